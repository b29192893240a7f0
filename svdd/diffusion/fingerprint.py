"""A short hash of a network's weights."""

import hashlib

import torch
from torch import nn

__all__ = ["fingerprint"]

_NUMBERS = 16  # of each parameter


def fingerprint(*modules: nn.Module) -> str:
    """Returns a hash of some numbers of every parameter; training changes all of them.

    The numbers are rounded to half precision, so a model's half-precision files have the same fingerprint.
    """
    found = hashlib.sha256()
    for module in modules:
        for name, parameter in module.named_parameters():
            flat = parameter.detach().flatten()
            few = flat[:: max(1, len(flat) // _NUMBERS)]
            found.update(name.encode() + few.to("cpu", torch.float16).numpy().tobytes())
    return found.hexdigest()[:12]
