"""The kernels that compute a network's attention, by the names that diffusers gives to them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from svdd import UserError, did_you_mean, first_line, is_out_of_memory
from svdd.assets.hub import quiet
from svdd.diffusion.twins import is_unet

__all__ = ["attention_errors", "check_backend", "runs_in_threads", "set_backend"]

_KERNELS = {  # of PyTorch
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_math": SDPBackend.MATH,
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
}
_FILES = ("attention_dispatch.py", "attention_processor.py", "attention.py", "flex_attention.py")


def check_backend(name: str | None) -> None:
    """Raises UserError if diffusers has no such backend, or if a package that it needs is not installed."""
    if name is None:
        return
    from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements

    known = [backend.value for backend in AttentionBackendName]
    if name not in known:
        raise UserError(
            f"attention_backend={name!r} is unknown; expected {', '.join(known)}{did_you_mean(name, known)}"
        )
    try:
        _check_attention_backend_requirements(AttentionBackendName(name))
    except RuntimeError as error:
        raise UserError(f"attention_backend={name!r}: {first_line(error)}") from None


def set_backend(network: Any, name: str) -> None:
    """Makes a network compute its attention with a backend of diffusers, and no other network of the process.

    Networks that ask diffusers' dispatcher have all backends. Others (UNets, SD 3, Sana, PixArt-Sigma) call PyTorch's
    function, whose kernel can be chosen; UNets can use xformers, too.

    Raises:
        UserError: If the network cannot use this backend, or its files cannot be loaded.
    """
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    check_backend(name)
    attentions = [module for module in network.modules() if getattr(module, "processor", None) is not None]
    if any(hasattr(module.processor, "_attention_backend") for module in attentions):
        active = (
            _AttentionBackendRegistry._active_backend
        )  # of all networks without their own, which diffusers sets too
        try:
            with quiet("diffusers"):
                network.set_attention_backend(name)
        except Exception as error:  # of the hub, of a package for kernels
            raise UserError(f"attention_backend={name!r}: {first_line(error)}") from error
        finally:
            _AttentionBackendRegistry.set_active_backend(active)
        return
    possible = ["native", *_KERNELS, *(["xformers"] if is_unet(network) else [])]
    if name not in possible:
        kind = type(network).__name__
        raise UserError(f"attention_backend={name!r} is impossible in a {kind}; expected {', '.join(possible)}")
    if name == "xformers":
        try:
            network.enable_xformers_memory_efficient_attention()
        except Exception as error:  # no CUDA, no kernel for this card
            raise UserError(f"attention_backend={name!r}: {first_line(error)}") from error
    for module in attentions if name in _KERNELS else ():
        module.processor = _with_kernel(type(module.processor), _KERNELS[name])(module.processor)


def runs_in_threads(name: str | None) -> bool:
    """Whether several threads may compute at once: the choice among PyTorch's kernels holds for the whole process."""
    return name in (None, "native")


@contextmanager
def attention_errors(name: str | None, network: nn.Module, x: torch.Tensor) -> Iterator[None]:
    """Turns errors of a backend within the block, where the network is evaluated on latents x, into a UserError."""
    if name is None:
        yield
        return
    kind = type(network).__name__
    if "sage" in name and x.requires_grad and torch.is_grad_enabled():
        raise UserError(f"attention_backend={name!r} has no gradient, which this sampler needs; choose another")
    try:
        yield
    except Exception as error:
        trace, files = error.__traceback__, set()
        while trace is not None:
            files.add(trace.tb_frame.f_code.co_filename.replace("\\", "/").rpartition("/")[2])
            trace = trace.tb_next
        if isinstance(error, UserError) or is_out_of_memory(error) or not files & {*_FILES}:
            raise
        where = f"of this {kind} on {x.device.type} in {str(x.dtype).removeprefix('torch.')}"
        raise UserError(
            f"attention_backend={name!r} cannot compute the attention {where}: {first_line(error)}"
        ) from error


def _with_kernel(kind: type, kernel: SDPBackend) -> Callable[[Any], Any]:
    """Returns a function that turns a processor of this class into one that computes with one kernel of PyTorch."""
    call: Any = kind.__call__

    @wraps(call)  # Attention reads the names of its parameters
    def within(self: Any, *args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(kernel):
            return call(self, *args, **kwargs)

    chosen: Any = type(kind.__name__, (kind,), {"__call__": within})

    def convert(processor: Any) -> Any:
        other = chosen.__new__(chosen)
        other.__dict__.update(vars(processor))
        return other

    return convert
