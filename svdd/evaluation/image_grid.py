"""Images of one call as one picture, which a notebook displays."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from svdd import UserError, printable, require_at_least
from svdd.rewards.models.pixels import to_pil

__all__ = ["image_grid"]

_MARGIN, _LINE, _LEAST_TILE, _FONT = 6, 15, 128, 11  # pixels
_MOST_PIXELS = 2**27


def image_grid(images: Tensor, captions: Sequence[object] | None = None, columns: int = 8) -> Image.Image:
    """Returns images side by side, in rows; a notebook displays the result, and `.save("grid.png")` writes it.

    Args:
        images: Float in [0, 1] or uint8, [n, 3, h, w]; small ones are enlarged to 128 pixels.
        captions: A text or a number below each image, such as its score; lines are cut off at the width.
        columns: Images in a row at most.

    Raises:
        UserError: If the shape is another, the number of captions, or the picture would be too large.

    Example:
        >>> import torch
        >>> image_grid(torch.rand(3, 3, 64, 64), captions=torch.tensor([0.5, 0.25, 1])).size
        (408, 155)
    """
    require_at_least(1, columns=columns)
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise UserError(f"images must have the shape [n, 3, h, w] with n >= 1, got {list(images.shape)}")
    if captions is not None and len(captions) != len(images):
        raise UserError(f"captions must be one for each of the {len(images)} images, got {len(captions)}")
    texts = [_lines(caption) for caption in captions] if captions is not None else []
    zoom = -(-_LEAST_TILE // images.shape[3])
    height, width = images.shape[2] * zoom, images.shape[3] * zoom
    across = width + _MARGIN
    down = height + _MARGIN + _LINE * max(map(len, texts), default=0)
    columns = min(columns, len(images))
    size = across * columns + _MARGIN, down * -(-len(images) // columns) + _MARGIN
    if size[0] * size[1] > _MOST_PIXELS:
        raise UserError(f"the picture would have {size[0]} x {size[1]} pixels; show fewer images at once")
    canvas, font = Image.new("RGB", size, "white"), ImageFont.load_default(_FONT)
    pen = ImageDraw.Draw(canvas)
    for k, tile in enumerate(to_pil(images)):
        x, y = _MARGIN + k % columns * across, _MARGIN + k // columns * down
        canvas.paste(tile.resize((width, height), Image.Resampling.BICUBIC), (x, y))
        for line, text in enumerate(texts[k] if texts else []):
            while text and pen.textlength(text, font) > width:
                text = text[:-1]
            pen.text((x, y + height + 1 + line * _LINE), text, "black", font)
    return canvas


def _lines(caption: object) -> list[str]:
    """Returns the lines of a caption; a number has four digits."""
    if isinstance(caption, Tensor):
        caption = caption.item()
    return printable(f"{caption:.4g}" if isinstance(caption, float) else caption).splitlines()
