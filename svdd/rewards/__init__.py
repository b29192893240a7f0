"""Scores of finished images, to guide by or to measure: one file per reward."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
