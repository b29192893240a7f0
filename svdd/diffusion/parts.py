"""The modules of a pipeline and where they live: as this module's own, with a pipeline object, or offloaded."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from svdd import UserError
from svdd.assets.content import digest
from svdd.diffusion.arithmetic import order_weights
from svdd.diffusion.attention import attention_errors
from svdd.diffusion.family import Conditioning
from svdd.diffusion.offload import Offload, OffloadMode
from svdd.diffusion.pipelines import check_length, fingerprint
from svdd.diffusion.previews import PreviewFamily
from svdd.diffusion.twins import is_unet

__all__ = ["PipelineParts"]


class PipelineParts(PreviewFamily):
    """Holds the parts of `pipe`, under their names.

    Attributes:
        borrowed: Whether the pipeline is another's, which is neither moved nor changed. Its modules are no submodules.
        parity: Whether weights stay in the order in memory that the pipeline has.
        weights: Digest of all weights, before a LoRA was fused, as in `fingerprint`.
        weights_bfloat16: The same of the weights in bfloat16, from which that of `weights` cannot be computed.
    """

    borrowed = False
    parity = False
    attention_backend: str | None = None
    weights: str
    weights_bfloat16: str
    _offload: Offload | None = None
    _offloaded: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of latents."""
        return getattr(self, self.backbone).dtype if self.borrowed else super().dtype

    @property
    def device(self) -> torch.device:
        """The device of latents."""
        return self.pipe._execution_device if self.borrowed else super().device

    def take_parts(self, what: str, lora: bool) -> None:
        """Takes the network, the autoencoder, the text encoders and the tokenizers of the pipeline.

        Args:
            what: The beginning of an error's message.
            lora: Whether a LoRA will be fused into the modules.
        """
        found = {name: part for name, part in self.pipe.components.items() if part is not None}
        names = (self.backbone, "vae", *sorted(name for name in found if name.startswith("text_encoder")))
        self.parts: dict[str, Any] = {name: found[name] for name in names}
        if any(tensor.is_meta for part in self.parts.values() for tensor in part.parameters()):
            raise UserError(f"{what} is offloaded layer by layer; use enable_model_cpu_offload instead")
        self.weights = fingerprint(*self.parts.values())  # before fusing, whose rounding may vary
        self.weights_bfloat16 = fingerprint(*self.parts.values(), dtype=torch.bfloat16)
        self._unfused = {name: digest(part) for name, part in self.parts.items()} if lora else {}
        # Parameters keep requires_grad=True, as diffusers loads them: on the CPU, PyTorch picks other convolution
        # kernels for frozen weights, which are no faster, and autocast would convert them again in every call.
        for name, part in self.parts.items():
            if self.borrowed:
                self.__dict__[name] = part
            else:
                self.add_module(name, part.eval())
        self.tokenizers = {name: part for name, part in found.items() if name.startswith("tokenizer")}
        for name, tokenizer in self.tokenizers.items():
            config = getattr(found.get(name.replace("tokenizer", "text_encoder")), "config", None)
            check_length(f"{what}, its {name},", self.token_limit(tokenizer), config)

    def share_parts(self, other: "PipelineParts") -> None:
        """Takes the parts of another object that has loaded the same model, and is not used any more."""
        for name in ("pipe", "parts", "tokenizers", "weights", "weights_bfloat16", "_unfused"):
            setattr(self, name, getattr(other, name))
        for name, part in self.parts.items():
            self.add_module(name, part)
        self.anchor = other.anchor.clone()

    def save_memory(self, offload: OffloadMode, vae_slicing: bool, vae_tiling: bool) -> None:
        """Applies the settings of these names; UserError if the autoencoder has no such method."""
        for name, wanted in {"slicing": vae_slicing, "tiling": vae_tiling}.items():
            if not wanted:
                continue
            if not hasattr(self.vae, f"enable_{name}"):
                raise UserError(f"vae_{name}: a {type(self.vae).__name__} has no {name}; leave it out")
            getattr(self.vae, f"enable_{name}")()
        if offload != "none":
            encoders = tuple(name for name in self.parts if name.startswith("text_encoder"))
            self._offloaded = (*self.parts,) if offload == "model" else encoders
            modules = [self.parts[name] for name in self._offloaded]
            self._offload = Offload(modules, lambda: self.anchor.device)

    def upcast(self) -> None:
        """Returns parts that would overflow in half precision to float32, as the pipeline does; by default none."""

    def arrange(self) -> None:
        """Calls `upcast`, and orders the weights of a UNet and of the decoder for their precision and the device."""
        if self.borrowed:
            return
        self.upcast()
        if self.parity:
            return
        order_weights(self.vae, self.device, decodes=True)
        if is_unet(network := getattr(self, self.backbone)):
            order_weights(network, self.device, decodes=False)

    def halves(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, row: Tensor, guidance_scale: float
    ) -> tuple[Tensor, ...]:
        """Returns the outputs of the network; UserError if its attention backend cannot compute them."""
        with attention_errors(self.attention_backend, getattr(self, self.backbone), x):
            return super().halves(x, t, conditioning, row, guidance_scale)

    def release(self) -> None:
        """Frees the device of the part that is there under `offload`."""
        if self._offload is not None:
            self._offload.release()

    def fingerprints(self) -> dict[str, str]:
        """Returns digests of the scheduler, the tokenizers and each network, the last before a LoRA was fused."""
        self.release()
        borrowed = {name: digest(part) for name, part in self.parts.items()} if self.borrowed else {}
        scales = {"adapters": str(found)} if (found := self.adapters()) else {}
        return super().fingerprints() | borrowed | scales | self._unfused

    def adapters(self) -> dict[str, list[float]]:
        """Returns the LoRA layers' scales that are in effect but not fused, by the name of the adapter."""
        found: dict[str, set[float]] = {}
        for layer in (module for part in self.parts.values() for module in part.modules()):
            if hasattr(layer, "lora_A") and not layer.disable_adapters:
                for name in layer.active_adapters:
                    found.setdefault(name, set()).add(float(layer.scaling.get(name, 0.0)))
        return {name: sorted(scales) for name, scales in sorted(found.items())}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves and converts the model; parts under `offload` are only converted."""
        self.release()
        whole = self._modules
        self._modules = {name: part for name, part in whole.items() if name not in self._offloaded}
        try:
            super()._apply(fn, recurse)
        finally:
            self._modules = whole
        convert = self.conversion(lambda tensor: tensor.to(fn(tensor.new_empty(0)).dtype))
        for name in self._offloaded if recurse else ():
            self.parts[name]._apply(convert)
        self.arrange()
        return self
