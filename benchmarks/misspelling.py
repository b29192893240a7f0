"""A chain with known laws that writes the quoted word of a prompt, and misspells it."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from svdd.diffusion import Denoised, Diffusion
from svdd.rewards.models.wanted_text import quoted

__all__ = ["ALPHABET", "Misspelling"]

ALPHABET = " ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_WIDTH, _HEIGHT, _SIZE = 26, 48, 30  # of a place, and of the font, in pixels


class Misspelling(Diffusion):
    """Words of which each letter may be a wrong one; the denoiser is exact, and there are no weights.

    A latent has a number for each letter of the alphabet at each place: x_0 ~ N(mean, I), where the mean is `knowledge`
    for the right letter and 0 for the others. A place shows the letters blended by the softmax of 4 x_0.

    Args:
        num_inference_steps: T, the number of denoising steps.
        knowledge: Mean of the right letter's number, in standard deviations.
        length: Number of places; shorter words are padded with spaces.
        chunk_size: Rows at once, or `auto`.
    """

    glyphs: Tensor

    def __init__(
        self, num_inference_steps: int = 20, knowledge: float = 2.0, length: int = 8, chunk_size: int | str = "auto"
    ) -> None:
        super().__init__(num_inference_steps, chunk_size)
        self.knowledge, self.length = knowledge, length
        self.sigmas = [*torch.logspace(1, -2, num_inference_steps).tolist(), 0.0]  # sigma_i for i = 0 .. T
        self.latent_shape = (len(ALPHABET), 1, length)
        self.register_buffer("glyphs", torch.stack([_glyph(letter) for letter in ALPHABET]), persistent=False)

    def encode(self, prompts: Sequence[str], negative_prompts: Sequence[str | None]) -> Tensor:
        """Returns the mean of x_0 for each prompt, [p, letters, 1, places]."""
        words = ["".join(quoted(prompt)[:1]).upper().ljust(self.length)[: self.length] for prompt in prompts]
        right = torch.tensor([[ALPHABET.index(letter) for letter in word] for word in words])
        return self.knowledge * torch.eye(len(ALPHABET))[right].mT[:, :, None].to(self.anchor)

    def initial(self, noise: Tensor) -> Tensor:
        """Scales noise to the spread of x at i = 0."""
        return noise * self._variance(0) ** 0.5

    def denoise(self, x: Tensor, i: int, conditioning: Tensor, row: Tensor) -> Denoised:
        """Returns the exact posterior mean and the exact mean of the next x."""
        mean, now, after = conditioning[row], self._variance(i), self._variance(i + 1)
        return Denoised(x0=mean + (x - mean) / now, mean=mean + after / now * (x - mean))

    def std(self, i: int) -> float:
        """The exact standard deviation of x at i + 1, given x at i."""
        now, after = self._variance(i), self._variance(i + 1)
        return (after * (now - after) / now) ** 0.5

    def decode(self, x0: Tensor) -> Tensor:
        """Blends the letters of each place and puts the places side by side, dark on light."""
        ink = torch.einsum("nas,ahw->nhsw", (4 * x0[:, :, 0]).softmax(1), self.glyphs).flatten(2)
        return (0.95 - 0.85 * ink)[:, None].expand(-1, 3, -1, -1).float()

    def spelling(self, x0: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns the share of the word's letters that are the strongest at their place, [n]."""
        right = self.encode(prompts, [None] * len(prompts)).argmax(1)  # [n, 1, places]
        letters = right > 0
        return ((x0.argmax(1) == right) & letters).sum((1, 2)) / letters.sum((1, 2))

    def _variance(self, i: int) -> float:
        return 1 + self.sigmas[i] ** 2


def _glyph(letter: str) -> Tensor:
    """Returns a letter's ink, float [h, w] in [0, 1]."""
    picture = Image.new("L", (_WIDTH, _HEIGHT))
    place = (_WIDTH / 2, _HEIGHT / 2)
    ImageDraw.Draw(picture).text(place, letter, fill=255, font=ImageFont.load_default(_SIZE), anchor="mm")
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(_HEIGHT, _WIDTH) / 255
