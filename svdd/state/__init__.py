"""A batch of particles at one denoising step, and what all states of a batch share."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
