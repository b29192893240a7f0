"""Pictures as a viewer shows them: decoded with the same checks wherever svdd reads one."""

import io
import os
import stat
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from svdd import UserError, first_line

__all__ = ["decode", "read_content"]

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # other formats of Pillow run programs
_MOST_BYTES, _MOST_PIXELS = 2**30, 178_956_970  # Pillow refuses more pixels
_KEY_SCALES = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}  # a PNG's transparent colour is not read as 8 bits
_PHOTOMETRIC = 262  # a TIFF tag; 0 means that white is zero


def read_content(path: Path) -> bytes:
    """Returns the bytes of a picture's file; raises UserError if it is no regular file, too large or unreadable."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            known = os.fstat(file.fileno())
            if not stat.S_ISREG(known.st_mode) or known.st_size > _MOST_BYTES:
                raise UserError(f"{path} is no regular file of at most {_MOST_BYTES} bytes; expected a picture")
            return file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def decode(content: bytes, name: str) -> np.ndarray:
    """Returns the pixels of a picture's file, uint8 [h, w, 3], as a viewer shows them.

    This is the first frame in sRGB, turned as its EXIF data say, with numbers of other types scaled to 8 bits, and
    transparency over white.

    Args:
        content: The bytes of the file.
        name: Of the file, for messages.

    Raises:
        UserError: If it is no picture, damaged or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes below the limit, and metadata
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                if image.width * image.height > _MOST_PIXELS:
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
        raise UserError(f"{name} has more than {_MOST_PIXELS} pixels; {advice}") from error
    except UnidentifiedImageError as error:
        reason = "it is none of PNG, JPEG, WebP, BMP, GIF and TIFF, damaged, or its pixels are of an unusual type"
        raise UserError(f"{name} cannot be read as a picture: {reason}") from error
    except MemoryError:
        raise
    except Exception as error:  # damaged files make Pillow raise errors of any kind
        raise UserError(f"{name} cannot be read as a picture: {first_line(error)}") from error


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
