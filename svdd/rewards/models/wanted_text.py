"""Text that a picture should show: found in a prompt, and aligned with what was read.

Source: the approximate match of a pattern in a text by dynamic programming, Sellers, The theory and computation of
evolutionary distances: pattern recognition, 1980.
"""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

__all__ = ["Alphabet", "distance", "quoted"]

# Double quotes of the usual languages; single ones count if there are no double ones, and apostrophes do not.
# ruff: noqa: RUF001
_DOUBLE = re.compile('"([^"]+)"|[“„‟]([^“”„]+)[”“]|«([^»]+)»|»([^«]+)«|「([^」]+)」|『([^』]+)』|＂([^＂]+)＂')
_SINGLE = re.compile(r"(?<!\w)'((?:[^']|(?<=\w)'(?=\w))+)'(?!\w)|[‘‚]((?:[^‘’]|(?<=\w)’(?=\w))+)[’‘](?!\w)|‹([^›]+)›")
_ALIKE = str.maketrans("’‘`´“”„–—−", "''''\"\"\"---")


def quoted(prompt: str) -> list[str]:
    """Returns the texts in quotation marks, straight or typographic, of a prompt.

    Examples:
        >>> quoted('a sign that says "OPEN" and a note “don’t knock”')
        ['OPEN', 'don’t knock']
        >>> quoted("the shop's sign 'it's open'")
        ["it's open"]
    """
    found = _DOUBLE.findall(prompt) or _SINGLE.findall(prompt)
    return [text.strip() for groups in found for text in ("".join(groups),) if text.strip()]


class Alphabet:
    """The characters of a recogniser, with one form for those that count as the same.

    Args:
        characters: The characters, by index; the first one is the blank.
        ignore_case: Whether upper and lower case are the same.
        ignore_spaces: Whether white space is left out.
    """

    def __init__(self, characters: Sequence[str], ignore_case: bool = True, ignore_spaces: bool = True) -> None:
        self.ignore_case, self.ignore_spaces = ignore_case, ignore_spaces
        self.indices: dict[str, list[int]] = {}
        for k, character in enumerate(characters[1:], 1):
            self.indices.setdefault(self.fold(character) or " ", []).append(k)

    def fold(self, text: str) -> str:
        """Returns a text with one form for characters that look alike: compatible ones, quotes and dashes."""
        text = unicodedata.normalize("NFKC", text.translate(_ALIKE)).translate(_ALIKE)
        text = text.casefold() if self.ignore_case else text
        return ("" if self.ignore_spaces else " ").join(text.split())

    def unknown(self, text: str) -> str:
        """Returns the characters of a folded text that the recogniser cannot read."""
        return "".join(sorted({character for character in text if character not in self.indices}))

    def match(self, text: str, probabilities: np.ndarray, soft: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Returns how well each wanted letter fits each letter that was read, and the cost of a letter too many.

        Args:
            text: A folded text of n known characters.
            probabilities: Of all characters at each of m places, float [m, characters].
            soft: Whether letters count by their probabilities; else 1 for the most probable one, and 0 for others.

        Returns:
            Shares, float32 [n, m], and costs, float32 [m], all in [0, 1].
        """
        best = probabilities.argmax(1)
        if self.ignore_spaces:
            kept = ~np.isin(best, self.indices.get(" ", []))
            probabilities, best = probabilities[kept], best[kept]
        shares, extra = {}, probabilities.max(1) if soft else np.ones(len(best))
        for character in set(text):
            same = self.indices[character]
            shares[character] = probabilities[:, same].sum(1) if soft else np.isin(best, same).astype(np.float32)
        return np.stack([shares[character] for character in text]), extra


def distance(match: np.ndarray, extra: np.ndarray, whole: bool = False) -> float:
    """Returns the least cost of turning a part of the reading into the wanted text.

    A wanted letter costs 1 if it is missing and 1 - match where it stands for a letter that was read; a letter within
    the part that belongs to no wanted one costs `extra`. With hard matches, 0 or 1, and extra = 1 this is the edit
    distance of Levenshtein.

    Args:
        match: Share of wanted letter i in the letter read at place j, float [wanted, read] in [0, 1].
        extra: Cost of each letter read if it is too many, float [read].
        whole: Align the whole reading, not the best part of it.
    """
    before = np.concatenate([[0.0], np.cumsum(extra)])  # cost of all letters up to a place
    row = before if whole else np.zeros_like(before)
    for shares in match:
        aligned = np.concatenate([[row[0] + 1], np.minimum(row[1:] + 1, row[:-1] + 1 - shares)])
        row = np.minimum.accumulate(aligned - before) + before  # letters too many after any place
    return float(row[-1] if whole else row.min())
