"""Random captioned scenes: one object, sometimes recoloured, on a background that some captions name."""

from pathlib import Path

import numpy as np

from tools.embedded_model.sprites import load_sprites
from tools.embedded_model.vocabulary import COLORS

__all__ = ["Scenes"]

SIDE = 64
NAMES = tuple(COLORS)


class Scenes:
    """Draws scenes from a numpy generator.

    Args:
        work: Folder of the rendered sprites.
    """

    def __init__(self, work: Path) -> None:
        self.sprites = load_sprites(work)
        self.objects = tuple(self.sprites)

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        """Returns one scene, uint8 [64, 64, 3], and its caption."""
        name = self.objects[rng.integers(len(self.objects))]
        drawings = self.sprites[name]
        sizes = drawings[rng.integers(len(drawings))]
        sprite = sizes[rng.integers(len(sizes))]
        words = name
        if rng.random() < 0.12:
            color = NAMES[rng.integers(len(NAMES))]
            sprite = _tint(sprite, COLORS[color])
            words = f"{color} {name}"
        if rng.random() < 0.3:
            words = f"{_article(words)} {words}"
        image, background, named = _background(rng)
        room = SIDE - sprite.shape[0]
        top, left = (int(np.clip(room / 2 + rng.normal(0, 1.0), 0, room)) for _ in range(2))
        window = image[top : top + sprite.shape[0], left : left + sprite.shape[1]]
        alpha = sprite[..., 3:].astype(np.float32) / 255
        window += alpha * (sprite[..., :3].astype(np.float32) - window)
        if rng.random() < named:
            words = f"{words} on {background}"
        return image.round().astype(np.uint8), words

    def batch(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
        """Returns `count` scenes, uint8 [count, 64, 64, 3], and their captions."""
        images, captions = zip(*(self.draw(rng) for _ in range(count)), strict=True)
        return np.stack(images), list(captions)


def _tint(sprite: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Recolours a drawing, keeping its shading."""
    luminance = sprite[..., :3].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    solid = sprite[..., 3] > 128
    mean = luminance[solid].mean() if solid.any() else 0.5
    shade = np.clip(1 + 1.1 * (luminance - mean), 0.3, 1.6)[..., None]
    base = np.array(color, np.float32)
    bright = 255 - (255 - base) * np.clip(2 - shade, 0.2, 1)  # above the mean: towards white
    colored = np.where(shade > 1, bright, base * shade)
    return np.concatenate([np.clip(colored, 0, 255).astype(np.uint8), sprite[..., 3:]], axis=-1)


def _background(rng: np.random.Generator) -> tuple[np.ndarray, str, float]:
    """Returns a background [64, 64, 3] in 0 .. 255, its description, and the probability that a caption names it."""
    kind = rng.random()
    if kind < 0.38:
        return np.full((SIDE, SIDE, 3), 255, np.float32), "a white background", 0.25
    first, second = rng.choice(len(NAMES), 2, replace=False)
    a, b = (np.array(COLORS[NAMES[k]], np.float32) for k in (first, second))
    if kind < 0.80:
        return np.tile(a, (SIDE, SIDE, 1)), f"{_article(NAMES[first])} {NAMES[first]} background", 0.65
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    pair = f"{NAMES[first]} and {NAMES[second]}"
    if kind < 0.88:
        mix, words = (y / (SIDE - 1)), f"{_article(pair)} {pair} gradient"
    elif kind < 0.94:
        mix, words = ((x // 8) % 2), f"{pair} stripes"
    else:
        mix, words = ((x // 8 + y // 8) % 2), f"{_article(pair)} {pair} checkerboard"
    return a + mix[..., None] * (b - a), words, 0.65


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" and not word.startswith("unicorn") else "a"
