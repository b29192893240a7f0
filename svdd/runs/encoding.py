"""Images as PNG files with what is known about them."""

import io
import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from svdd import __version__
from svdd.runs.json_lines import encode
from svdd.runs.prediction import Prediction
from svdd.runs.rows import ResultRow

__all__ = ["VERSIONS", "encoded", "pixels_of"]

VERSIONS = {"svdd": __version__, "torch": version("torch"), "diffusers": version("diffusers")}
_THREADS = 8  # at most; Pillow compresses without the interpreter's lock


def pixels_of(prediction: Prediction) -> np.ndarray:
    """Returns the images as uint8 [n, h, w, 3], rounded as diffusers' `numpy_to_pil` does, where they are computed.

    Raises:
        ValueError: If they are no images in [0, 1], or not one for each row.
    """
    images = prediction.images
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images must be float [n, 3, h, w], got {images.dtype} {list(images.shape)}")
    if len(images) != len(prediction.rows):
        raise ValueError(f"a Prediction needs one row per image, got {len(prediction.rows)} for {len(images)} images")
    values = images.detach().float()
    low, high = torch.stack(torch.aminmax(values)).tolist() if values.numel() else (0, 1)
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(f"images must lie in [0, 1], got values from {low:.4g} to {high:.4g}: rescale or clamp them")
    rounded = values.clamp(0, 1).mul_(255).round_().to(torch.uint8)
    return rounded.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def encoded(pixels: np.ndarray, rows: Sequence[ResultRow]) -> Generator[tuple[ResultRow, bytes], None, None]:
    """Yields the row of each image and its PNG file, in order, while several threads encode the next ones."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ThreadPoolExecutor(min(_THREADS, cores), "svdd-png")
    try:
        yield from zip(rows, pool.map(_encode_png, pixels, rows), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_png(pixels: np.ndarray, row: ResultRow) -> bytes:
    """Encodes uint8 [h, w, 3] with the prompt, the seed, the rewards and the versions as text chunks."""
    info = PngInfo()
    rewards = encode(row["rewards"]).decode()
    for key, text in {"prompt": row["prompt"], "seed": str(row["seed"]), "rewards": rewards, **VERSIONS}.items():
        info.add_text(key, text.encode("utf-8", "backslashreplace").decode())
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()
