"""Previews of a pipeline: what its network records at a parent, and how its candidates reuse it."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from svdd import UserError
from svdd.diffusion.family import Conditioning, ModelFamily
from svdd.diffusion.features import check, recording, reusing, share
from svdd.diffusion.kernels.base import Kernel
from svdd.diffusion.preview import Preview

__all__ = ["PreviewFamily"]

_HALVES = ("conditional", "unconditional")


class PreviewFamily(ModelFamily):
    """Computes previews with a changed, a reused or no guidance, and with reused features."""

    kernel: Kernel
    guidance_scale: float

    def check_preview(self, preview: Preview) -> None:
        """Raises UserError if the model cannot compute previews of this kind, or if they would save nothing."""
        own, scale, name = self.guidance_scale, preview.guidance_scale, type(self).__name__
        guided = self.network_rows(own)
        if scale is not None and self.network_rows(scale) > guided:
            raise UserError(f"a preview at guidance_scale={scale} needs a model with guidance; its own scale is {own}")
        if preview.reuse_guidance and guided == 1:
            raise UserError(
                f"reuse_guidance: {name} at guidance_scale={own} computes no unconditional half, and there is nothing "
                "to save; leave it out"
            )
        if preview.feature_depth is not None:
            check(self._network, preview.feature_depth)

    def has_preview(self, preview: Preview, i: int) -> bool:
        """Whether a preview at step i differs from the model's own prediction."""
        if preview.feature_depth is not None:
            return True
        guided, scale, least = self.network_rows(self.guidance_scale, i) > 1, preview.guidance_scale, self.guides_above
        if preview.reuse_guidance or scale is None:
            return preview.reuse_guidance and guided
        return (guided or self.distilled) and max(scale, least) != max(self.guidance_scale, least)

    def preview_rows(self, preview: Preview, i: int) -> float:
        """Returns the network-row equivalents of one preview at step i; a part of the network counts by its FLOPs."""
        part = 1 if preview.feature_depth is None else share(self, preview.feature_depth)
        return part * self._num_halves(preview, i)

    def record(self, x: Tensor, i: int, conditioning: Conditioning, row: Tensor, preview: Preview) -> dict[str, Tensor]:
        """Evaluates as `denoise` and returns `x0`, `mean` and what previews of the children reuse, one row in each."""
        t, scale, depth = self.kernel.timestep_on(x.device, i), self.guidance_scale, preview.feature_depth
        network, store = (self._network, []) if depth is None else recording(self._network, depth)
        outputs = self._with_network(network).halves(self.kernel.scale_input(x, i), t, conditioning, row, scale)
        output, found = self.guide(outputs, scale, t), {}
        if preview.reuse_guidance and len(outputs) > 1:
            found["guidance"] = output - outputs[0]
        halves = _HALVES[: self._num_halves(preview, i)]
        for half, parts in zip(halves, self._split(store, len(outputs)), strict=False):
            found |= {f"{half} {k}": part for k, part in enumerate(parts)}
        return self.kernel.predict(x, output, i)._asdict() | found

    def preview(
        self,
        x: Tensor,
        i: int,
        conditioning: Conditioning,
        row: Tensor,
        preview: Preview,
        recorded: Mapping[str, Tensor],
    ) -> Tensor:
        """Returns a cheaper prediction of x0, [n, *latent_shape]; see `Diffusion.preview`."""
        t, scale = self.kernel.timestep_on(x.device, i), self.guidance_scale
        scale = scale if preview.guidance_scale is None else preview.guidance_scale
        scaled, outputs = self.kernel.scale_input(x, i), []
        for half, inputs in zip(_HALVES[: self._num_halves(preview, i)], conditioning, strict=False):
            network = self._network
            if preview.feature_depth is not None:
                parts = [part for name, part in recorded.items() if name.startswith(f"{half} ")]
                network = reusing(network, preview.feature_depth, parts)
            texts = {name: part[row] for name, part in (inputs or {}).items()}
            outputs.append(self._with_network(network).network(scaled, t, texts, scale))
        output = self.guide(tuple(outputs), scale, t)
        if preview.reuse_guidance and self.network_rows(self.guidance_scale, i) > 1:
            output = output + recorded["guidance"]
        return self.kernel.predict(x, output, i).x0

    def _num_halves(self, preview: Preview, i: int) -> int:
        scale = self.guidance_scale if preview.guidance_scale is None else preview.guidance_scale
        return 1 if preview.reuse_guidance else self.network_rows(scale, i)

    def _split(self, store: list[Tensor], halves: int) -> list[list[Tensor]]:
        """Splits what was recorded by the halves of guidance, in the order of `halves`."""
        if halves == 1:
            return [store]
        if self.two_calls:
            return [store[: len(store) // 2], store[len(store) // 2 :]]
        order = 1 if self.conditional_first else -1
        return [list(parts) for parts in zip(*(tensor.chunk(2)[::order] for tensor in store), strict=True)]

    @property
    def _network(self) -> nn.Module:
        return getattr(self, self.backbone)

    def _with_network(self, network: nn.Module) -> "PreviewFamily":
        """Returns this model with another network in the place of its own, and all else shared."""
        if network is self._network:
            return self
        other: Any = copy.copy(self)
        if self.backbone in self._modules:
            other.__dict__["_modules"] = {**self._modules, self.backbone: network}
        else:  # of a borrowed pipeline
            other.__dict__[self.backbone] = network
        return other
