"""Pictures read from a run folder or any other folder, with their prompts where these are known."""

import io
import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from svdd import UserError, first_line
from svdd.runs.bounds import MAX_PIXELS, MAX_PIXELS_AT_ONCE
from svdd.runs.folder import RunFolder
from svdd.runs.images import read_image

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Picture", "find_pictures", "pixels_of", "read_pictures"]

_SUFFIXES = {".apng", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # other formats of Pillow run programs
_HIDDEN = re.compile(r"\.|(__MACOSX|@eaDir)$")  # how the names of files and folders begin that no viewer shows
_KEY_SCALES = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}  # a PNG's transparent colour is not read as 8 bits
_PHOTOMETRIC = 262  # a TIFF tag; 0 means that white is zero


@dataclass(frozen=True)
class Picture:
    """A picture on disk."""

    folder: Path
    file: str  # path in the folder; a member of a tar shard is `images/00000-000000.tar/000012-00.png`
    prompt_index: int  # without prompts, its own position
    prompt: str = ""  # empty if it is unknown
    image: int = 0  # equal for all particles of an image
    weight: float = 1.0  # of the particle among those of its image
    extra: Mapping[str, Any] = field(default_factory=dict)  # other columns of the prompt's source that were asked for


def find_pictures(folder: Path, columns: Collection[str] = ()) -> list[Picture]:
    """Returns the pictures of a run in the order of its rows, or those of any folder and its subfolders by name.

    Those of a run have these columns of its prompts. Numbers in names count as numbers: 2.png comes before 10.png.
    Hidden files and folders are left out.

    Raises:
        UserError: If there are none, or a picture's name is that of a FIFO, a device or a broken link.
    """
    run = RunFolder(folder)
    if run.has_rows():
        found = [
            Picture(
                folder,
                row["file"],
                row["prompt_index"],
                row["prompt"],
                row["image_index"] - row.get("particle", 0),
                row.get("particle_weight", 1.0),
                {name: cast(Any, row)[name] for name in columns if name in row},
            )
            for row in run.rows(checked=True)
        ]
    elif os.path.isdir(folder):
        files = sorted((str(path.relative_to(folder)) for path in _files(folder)), key=_natural)
        found = [Picture(folder, file, k, image=k) for k, file in enumerate(files)]
    else:
        raise UserError(f"{folder} is no folder; expected a run folder or a folder of pictures")
    if not found:
        raise UserError(f"{folder} holds no pictures ({', '.join(sorted(_SUFFIXES))})")
    return found


def _files(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error

    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not _HIDDEN.match(name)]
        for path in (Path(place, name) for name in names if not _HIDDEN.match(name)):
            if path.suffix.lower() in _SUFFIXES:
                if not path.is_file():
                    raise UserError(f"{path} is no regular file but a FIFO, a device or a broken link; remove it")
                yield path


def _natural(name: str) -> tuple[list[str | int], str]:
    """Returns the alternating texts and numbers of a name, text first; then the name, for equal ones."""
    return [int(part) if k % 2 else part for k, part in enumerate(re.split(r"(\d+)", name))], name


def read_pictures(pictures: Sequence[Picture], count: int) -> "Iterator[tuple[list[Picture], Tensor]]":
    """Yields pictures of equal size, at most `count` at once: float32 [n, 3, h, w] in [0, 1]; see `pixels_of`."""
    import torch  # here, because commands that only show pictures need none of it

    read = ((picture, pixels_of(picture.folder, picture.file)) for picture in pictures)
    for (height, width, _), same in groupby(read, lambda pair: pair[1].shape):
        most = max(1, min(count, MAX_PIXELS_AT_ONCE // (height * width)))
        while batch := list(islice(same, most)):
            pixels = torch.from_numpy(np.stack([array for _, array in batch]))
            yield [picture for picture, _ in batch], pixels.permute(0, 3, 1, 2).contiguous().float() / 255


def pixels_of(folder: Path, file: str) -> np.ndarray:
    """Returns the pixels of a file as in `Picture`, uint8 [h, w, 3], as a viewer shows them.

    This is the first frame in sRGB, turned as its EXIF data say, with numbers of other types scaled to 8 bits, and
    transparency over white.

    Raises:
        UserError: If it is no picture, damaged or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes below the limit, and metadata
            with Image.open(io.BytesIO(read_image(folder, file)), formats=_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                raw_mode = image.tile[0].args if image.format == "PNG" and image.tile else None
                image.load()
                if raw_mode in _KEY_SCALES and (colour := image.info.get("transparency")) is not None:
                    scaled = (np.array(colour) * _KEY_SCALES[raw_mode]).astype(int).tolist()
                    image.info["transparency"] = tuple(scaled) if isinstance(scaled, list) else scaled
                negative = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
                return np.array(_rgb(_in_srgb(_upright(image)), image.format == "PNG", negative))
    except Image.DecompressionBombError as error:
        advice = "make it smaller, or cut a contact sheet into its pictures"
        raise UserError(f"{folder / file} has more than {MAX_PIXELS} pixels; {advice}") from error
    except UnidentifiedImageError as error:
        reason = "it is none of PNG, JPEG, WebP, BMP, GIF and TIFF, damaged, or its pixels are of an unusual type"
        raise UserError(f"{folder / file} cannot be read as a picture: {reason}") from error
    except MemoryError:
        raise
    except Exception as error:  # damaged files make Pillow raise errors of any kind
        raise UserError(f"{folder / file} cannot be read as a picture: {first_line(error)}") from error


def _upright(image: Image.Image) -> Image.Image:
    """Turns a picture as its EXIF data say; damaged data say nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # as above
        return image


def _in_srgb(image: Image.Image) -> Image.Image:
    """Converts colours with another profile than sRGB; a damaged profile says nothing."""
    if image.mode in ("RGB", "RGBA", "CMYK") and (data := image.info.get("icc_profile")):
        with suppress(ImageCms.PyCMSError, OSError, ValueError):
            profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
            if "srgb" not in ImageCms.getProfileDescription(profile).lower():
                mode = "RGBA" if image.mode == "RGBA" else "RGB"
                srgb = ImageCms.createProfile("sRGB")
                return ImageCms.profileToProfile(image, profile, srgb, outputMode=mode) or image
    return image


def _rgb(image: Image.Image, png: bool, negative: bool) -> Image.Image:
    """Returns an 8-bit RGB picture; with `negative`, white is zero, which Pillow sees to for 8 bits at most."""
    if image.mode == "F" or image.mode.startswith("I"):
        numbers = np.asarray(image)
        grey = _to_8_bits(numbers, png)
        if negative:
            grey = 255 - grey
        if png and (transparent := image.info.get("transparency")) is not None:
            grey[numbers == transparent] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.applyTransform(image, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))
        assert converted is not None  # None if changed in place
        return converted
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray, deep: bool) -> np.ndarray:
    """Scales grey values to 0 .. 255: of 16 bits if `deep`, else of the first range that holds them.

    The ranges are 0 .. 1 for floating-point numbers, which may exceed it a little, 0 .. 255, 0 .. 65535 and, for
    integers, 0 .. 2**32 - 1.
    """
    whole, numbers = values.dtype.kind in "iu", values.astype(np.float64)
    low, high = numbers.min(), numbers.max()
    scales = (65535,) if deep or values.dtype.itemsize == 2 else (255, 65535, 2**32 - 1) if whole else (1, 255, 65535)
    scale = next((scale for scale in scales if high <= (2 if scale == 1 else scale)), None)
    if scale is None or not low >= -scale / 2:
        raise ValueError(f"its values lie in {low:.4g} .. {high:.4g}, expected 0 .. 1, 0 .. 255 or 0 .. 65535")
    return (numbers.clip(0, scale) * (255 / scale)).round().astype(np.uint8)
