"""Devices, memory and the interrupt button."""

import torch


class InterruptProcessingException(Exception):
    pass


class _Button:
    pressed = False


on_device = []  # those of the last call of load_models_gpu: there is no memory for more


def interrupt_current_processing(value=True):
    _Button.pressed = value


def throw_exception_if_processing_interrupted():
    if _Button.pressed:
        _Button.pressed = False
        raise InterruptProcessingException()


def load_models_gpu(models, memory_required=0, force_patch_weights=False, minimum_memory_required=None, **kwargs):
    on_device[:] = models


def intermediate_device():
    return torch.device("cpu")
