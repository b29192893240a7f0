"""Stable Diffusion 1.5 and 2.1 in small."""

from tests.tiny_models import save_tiny_pipeline as save

__all__ = ["save"]
