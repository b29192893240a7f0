"""Emoji images from three permissively licensed sets, rendered at the sizes used in scenes.

The sets are packages of the npm registry, downloaded by `npm` and rendered by resvg.
"""

import io
import json
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

from tools.embedded_model.vocabulary import OBJECTS

__all__ = ["SIZES", "load_sprites"]

ICON_SETS = ("@iconify-json/noto", "@iconify-json/fluent-emoji-flat", "@iconify-json/twemoji")
PACKAGES = (
    "@iconify-json/noto@1.2.9",
    "@iconify-json/fluent-emoji-flat@1.2.6",
    "@iconify-json/twemoji@1.2.5",
    "unicode-emoji-json@0.9.0",
)
SIZES = (50, 53, 56, 59)


def load_sprites(work: Path) -> dict[str, list[list[np.ndarray]]]:
    """Returns the drawings of each object: `sprites[name][drawing][size]`, uint8 [side, side, 4].

    The first call downloads and renders (about a minute); later calls read `work/sprites.npz`.

    Args:
        work: Folder for downloads and rendered files.

    Raises:
        ValueError: If an object of the vocabulary has no drawing in any set.
    """
    cache = work / "sprites.npz"
    if not cache.exists():
        work.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(cache, **_render_all(_fetch(work)))
    arrays = np.load(cache)
    sprites: dict[str, list[list[np.ndarray]]] = {name: [] for name in OBJECTS}
    for name in OBJECTS:
        for icon_set in range(len(ICON_SETS)):
            keys = [f"{name}/{icon_set}/{side}" for side in SIZES]
            if keys[0] in arrays:
                sprites[name].append([arrays[key] for key in keys])
        if not sprites[name]:
            raise ValueError(f"no drawing for {name!r}: its Unicode name {OBJECTS[name]!r} is in none of {ICON_SETS}")
    return sprites


def _fetch(work: Path) -> Path:
    modules = work / "node_modules"
    if not all((modules / package.rsplit("@", 1)[0]).exists() for package in PACKAGES):
        command = ["npm", "install", "--no-save", "--no-audit", "--no-fund", "--prefix", str(work), *PACKAGES]
        subprocess.run(command, check=True)
    return modules


def _render_all(modules: Path) -> dict[str, np.ndarray]:
    import resvg_py

    emoji = json.loads((modules / "unicode-emoji-json/data-by-emoji.json").read_text())
    codepoints = {
        entry["name"]: "-".join(f"{ord(c):x}" for c in char if c != "\ufe0f") for char, entry in emoji.items()
    }
    rendered = {}
    for set_index, icon_set in enumerate(ICON_SETS):
        icons = json.loads((modules / icon_set / "icons.json").read_text())
        names = json.loads((modules / icon_set / "chars.json").read_text())
        for name, unicode_name in OBJECTS.items():
            icon = icons["icons"].get(names.get(codepoints[unicode_name], ""))
            if icon is None:
                continue
            width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
            svg = (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
            )
            large = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=256, height=256))))
            large = _crop(large.convert("RGBA"))
            for side in SIZES:
                small = large.resize((side, side), Image.Resampling.LANCZOS)
                rendered[f"{name}/{set_index}/{side}"] = np.asarray(small)
    return rendered


def _crop(image: Image.Image) -> Image.Image:
    """Cuts to the drawn pixels and pads to a square, so that all drawings fill the frame equally."""
    box = image.getchannel("A").point(lambda a: 255 if a > 16 else 0).getbbox()
    left, top, right, bottom = box or (0, 0, *image.size)
    side = max(right - left, bottom - top)
    square = Image.new("RGBA", (side, side))
    square.paste(image.crop((left, top, right, bottom)), ((side - right + left) // 2, (side - bottom + top) // 2))
    return square
