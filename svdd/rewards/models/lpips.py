"""LPIPS by torchmetrics, whose package holds its linear layers; the backbone is torchvision's."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from svdd import UserError, first_line
from svdd.assets.hub import fit_weights, read_weights

__all__ = ["DEFAULT", "read_lpips"]

DEFAULT = "alex"
_BACKBONES = {"alex": "alexnet", "vgg": "vgg16"}  # the name in torchmetrics and in torchvision


def read_lpips(pretrained: str, local_files_only: bool) -> nn.Module:
    """Returns the network, which takes two batches of images, [n, 3, h, w], and returns distances, [n, 1, 1, 1].

    Args:
        pretrained: `alex` or `vgg`, or a file with the weights of torchvision's AlexNet or VGG-16.
        local_files_only: Download nothing.

    Raises:
        UserError: If there are no such weights.
    """
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    state, source = _backbone(pretrained, local_files_only)
    features = {name.removeprefix("features."): each for name, each in state.items() if name.startswith("features.")}
    kind: Literal["alex", "vgg"] = "alex" if "10.weight" in features and "12.weight" not in features else "vgg"
    network = _NoTrainLpips(net=kind, pnet_rand=True)
    layers = {name: layer for part in network.net.children() for name, layer in part.named_children()}
    fit_weights(nn.ModuleDict(layers), features, source)  # layers keep torchvision's names
    return network


def _backbone(pretrained: str, local_files_only: bool) -> tuple[dict[str, Tensor], str]:
    """Returns the weights of the backbone and where they came from."""
    import torchvision

    file = Path(pretrained).expanduser()
    if pretrained not in _BACKBONES or file.is_file():
        if not file.is_file():
            known = ", ".join(_BACKBONES)
            raise UserError(
                f"pretrained={pretrained!r} is no file; expected {known}, or a file of torchvision's weights"
            )
        return read_weights(file), str(file)
    url = torchvision.models.get_model_weights(_BACKBONES[pretrained]).DEFAULT.url
    kept = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if kept.is_file():
        return read_weights(kept), str(kept)
    way_out = f"download {url} and give the file as pretrained, or put it into {kept.parent}"
    if local_files_only:
        raise UserError(f"pretrained={pretrained!r}: {kept.name} is not in the cache of torchvision; {way_out}")
    try:
        return torch.hub.load_state_dict_from_url(url, progress=False, check_hash=True, weights_only=True), url
    except Exception as error:  # of the network, the disk or the checksum
        problem = f"pretrained={pretrained!r} cannot be downloaded ({first_line(error)})"
        raise UserError(f"{problem}; {way_out}") from error
