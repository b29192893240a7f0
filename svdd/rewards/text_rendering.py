"""How much of a wanted text can be read in a picture.

Source: the normalised edit distance of text recognition (Zhang et al., ICDAR 2019 Robust Reading Challenge on Reading
Chinese Text on Signboard, arXiv 1912.09641), as a reward for image generation in Liu et al., Flow-GRPO, 2025,
arXiv 2505.05470.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from svdd import UserError
from svdd.assets.hub import find_file
from svdd.rewards.base import CORES, Reward
from svdd.rewards.columns import column
from svdd.rewards.models.onnx import PerProcess, digest_of_file, in_threads
from svdd.rewards.models.text_reader import TextReader, bundled_weights, enlarge
from svdd.rewards.models.wanted_text import Alphabet, distance, quoted

__all__ = ["TextRendering"]


class TextRendering(Reward):
    """Share of the wanted text that OCR reads in the picture, from 0 to 1 (needs `pip install 'svdd[ocr]'`).

    The wanted texts are those in quotation marks in the prompt. Each is compared with the part of the reading that it
    matches best; the score is 1 - (sum of edit distances) / (number of wanted letters). Other text costs nothing.

    Args:
        text: The wanted text or texts for all prompts, instead of quotations.
        text_column: Column of the prompt file with the wanted text, or a list of them, instead of quotations.
        soft: Count a letter by its probability, not as read or not: smoother, and better to guide by.
        whole: Compare all wanted texts, in their order, with all that is read: other text lowers the score.
        ignore_case: Whether upper and lower case are the same.
        ignore_spaces: Leave out spaces and line breaks; otherwise they count as letters.
        without_text: Score of a prompt that states no text; by default such a prompt is an error.
        side: Smaller pictures are enlarged before reading to the area of a square of so many pixels.
        detector: File of another text detector of PP-OCR in ONNX: a path, or owner/name/file on the hub.
        recognizer: File of another recogniser, for other scripts.

    Raises:
        ValueError: If both `text` and `text_column` are given, or `side` is below 32.
    """

    range, one_call, threads, from_files = (0.0, 1.0), True, CORES, ("weights",)

    def __init__(
        self,
        text: str | list[str] | None = None,
        text_column: str | None = None,
        soft: bool = False,
        whole: bool = False,
        ignore_case: bool = True,
        ignore_spaces: bool = True,
        without_text: float | None = None,
        side: int = 320,
        detector: str | None = None,
        recognizer: str | None = None,
    ) -> None:
        super().__init__()
        if text is not None and text_column is not None:
            raise ValueError("give text or text_column, not both")
        if side < 32:
            raise ValueError(f"side must be >= 32 pixels, got {side}")
        self.text, self.text_column, self.soft, self.whole = text, text_column, soft, whole
        self.ignore_case, self.ignore_spaces = ignore_case, ignore_spaces
        self.without_text, self.side = without_text, side
        self.detector, self.recognizer = detector, recognizer
        read = () if text_column is None else (text_column,)
        self.columns, self.optional_columns = (read, ()) if without_text is None else ((), read)
        self.reader: Any = None  # a PerProcess[TextReader], once the weights are found

    def load(self) -> None:
        """Reads the weights in this process."""
        if self.reader is None:
            own, found = (self.detector, self.recognizer), bundled_weights()
            files = [find_file(name) if name else file for name, file in zip(own, found, strict=True)]
            self.weights = {file.name: digest_of_file(file) for file in files}
            reader = PerProcess(TextReader, *files)
            self.alphabet = Alphabet(reader.get().characters, self.ignore_case, self.ignore_spaces)
            self.reader = reader  # the last, as another thread may have come to this method
        self.reader.get()

    def wanted(self, prompt: str) -> list[str]:
        """Returns the texts that a picture for this prompt should show; none if the prompt states none."""
        found = self.text if self.text_column is None else column(prompt, self.text_column)
        found = quoted(prompt) if self.text is None and self.text_column is None else found
        listed = found if isinstance(found, list | tuple) else ["" if found is None else found]
        return [str(text) for text in listed if str(text).strip()]

    def check_prompt(self, prompt: str) -> None:
        """Raises UserError if the prompt states no text, unless that has a score."""
        if self.without_text is None and not self.wanted(prompt):
            help = 'quote it ("..."), give text or text_column, or set without_text to a score'
            raise UserError(f"{self.name}: the prompt {str(prompt)!r} states no text to read; {help}")

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the share of the wanted text that can be read in each image, float32 [n]."""
        self.load()
        wanted = [self._known(prompt) for prompt in prompts]
        jobs = zip(enlarge(images, self.side), wanted, strict=True)
        scores = in_threads(lambda job: self._score(*job), jobs)
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _known(self, prompt: str) -> list[str]:
        """Returns the wanted texts in the recogniser's characters."""
        self.check_prompt(prompt)
        texts = [self.alphabet.fold(text) for text in self.wanted(prompt)]
        if unknown := self.alphabet.unknown("".join(texts)):
            warnings.warn(f"TextRendering leaves out {unknown!r}, which its recogniser cannot read", stacklevel=2)
            texts = [text.translate(dict.fromkeys(map(ord, unknown))) for text in texts]
        if self.without_text is None and not any(texts):
            raise UserError(f"{self.name}: of the text for {str(prompt)!r}, its recogniser can read no letter")
        return list(filter(None, texts))

    def _score(self, image: Tensor, texts: list[str]) -> float:
        if not texts:
            return self.without_text or 0.0
        probabilities = self.reader.get()(image)
        texts = ["".join(texts)] if self.whole else texts
        pairs = [self.alphabet.match(text, probabilities, self.soft) for text in texts]
        cost, letters = sum(distance(*pair, self.whole) for pair in pairs), len("".join(texts))
        return 1 - cost / (max(letters, len(pairs[0][1])) if self.whole else letters)
