"""How T2I-CompBench scores what was found in a picture: pure functions of texts, boxes and depths.

Source: Huang et al., T2I-CompBench++, 2025, arXiv 2307.06350; the rules follow the authors' code (MIT), the files
`2D_spatial_eval.py`, `3D_spatial_eval.py`, `numeracy_eval.py` and `3_in_1.py`.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from svdd.evaluation.benchmarks.sentences import Sentence
from svdd.rewards.models.detectors import Detection

__all__ = ["Layout", "counted", "depth_order", "numeracy", "objects_around", "pair", "placed", "spatial", "wanted"]

_RELATIONS = ("on side of", "next to", "near", "on the left of", "on the right of", "on the bottom of", "on the top of")
_DEPTHS = ("in front of", "behind", "hidden by")
_PREPOSITIONS = {"on top of", "on bottom of", "on the left", "on the right", "next to", "on side of", "near"}
_AXES = {"on the right of": (0, -1), "on the left of": (0, 1), "on the bottom of": (1, -1), "on the top of": (1, 1)}
_OVERLAP, _DEPTH_OVERLAP, _SAME = 0.1, 0.5, 0.9
_PERSON = {"girl", "boy", "man", "woman"}
_NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
_OBJECTS = frozenset(
    """
    airplane apple backpack bag balloon banana bear bee bicycle bird boat book bottle bowl boy bread butterfly
    cake camel camera candle car cat chair chicken clock computer couch cow cup deer desk dog drum duck egg fish
    flag frog giraffe girl goldfish guitar hamburger helicopter helmet horse key kite knife lamp lemon man
    microphone microwave mouse paddle painting peach pear pen person phone pig pillow plate printer rabbit
    refrigerator sheep ship shrimp sink sofa stool strawberry suitcase swan table television tent tomato toy train
    truck turtle vase woman
    """.split()  # noqa: SIM905
)
_PLURALS = {"knives": "knife", "men": "man", "women": "woman", "mice": "mouse", "people": "person"}
_DETECTED = {"ship": "boat", "television": "tv", "goldfish": "fish", "painting": "picture"}

Box = Sequence[float]


class Layout(NamedTuple):
    """Two objects of a prompt and the relation of the first to the second; empty names if there are none."""

    first: str
    second: str
    relation: str


def pair(text: str, depth: bool = False) -> Layout | None:
    """Returns the objects and the relation of a prompt such as `a cat on the left of a dog`; None for another."""
    names = "|".join(_DEPTHS if depth else _RELATIONS)
    found = re.fullmatch(rf"an? ([\w ]+?) ({names}) an? ([\w ]+?)\.?", text.strip().lower())
    return Layout(_person(found[1]), _person(found[3]), found[2]) if found else None


def objects_around(sentence: Sentence) -> Layout:
    """Returns the nouns next to the preposition of a sentence; no names if there is not exactly one pair.

    The relation is the first of the benchmark's in the sentence. `on top of` is none of them, as in the authors' code,
    so that its place never scores.
    """
    words, tags, nouns = sentence.words, sentence.tags, []
    for k in range(len(words)):
        length = next((n for n in (3, 2, 1) if " ".join(words[k : k + n]) in _PREPOSITIONS), 0)
        if length:
            before = [word for word, tag in zip(words[:k], tags[:k], strict=True) if tag in ("NOUN", "PROPN")]
            after = [*zip(words, tags, strict=True)][k + length :]
            common = [word for word, tag in after if tag == "NOUN"]
            proper = [one for (one, tag), (_, then) in pairwise(after) if tag == "PROPN" and then != "PROPN"]
            nouns += [*before[-1:], *(common or proper)[:1]]
    text = " ".join(words)
    relation = next((name for name in _RELATIONS if name in text), "")
    first, second = map(_person, nouns) if len(nouns) == 2 else ("", "")
    return Layout(first, second, relation)


def placed(relation: str, a: Box, b: Box, near: float) -> float:
    """Returns how well box a lies in a relation to box b, in [0, 1]; `near` is a distance in pixels."""
    offset = [(b[k] + b[k + 2] - a[k] - a[k + 2]) / 2 for k in (0, 1)]
    if relation in ("next to", "on side of", "near"):
        return 1.0 if min(map(abs, offset)) < near else near / max(map(abs, offset))
    if relation not in _AXES:
        return 0.0
    axis, sign = _AXES[relation]
    if offset[axis] * sign <= 0 or abs(offset[axis]) <= abs(offset[1 - axis]):
        return 0.0
    shared = _overlap(a, b)
    return 1.0 if shared < _OVERLAP else _OVERLAP / shared


def depth_order(relation: str, a: Box, b: Box, nearness: Tensor) -> float:
    """Returns how well box a lies in front of box b or behind it, in [0, 1].

    Nearness, float [h, w], is high for what is near.
    """
    shared = _overlap(a, b)
    difference = _mean(nearness, a) - _mean(nearness, b)
    right = difference > 0 if relation == "in front of" else difference < 0
    return min(shared / _DEPTH_OVERLAP, 1.0) if right else 0.0


def spatial(found: Sequence[Detection], layout: Layout, place: float, least: float) -> float:
    """Returns half of the objects' mean confidence plus half of the score of their place; 0 if that is below `least`.

    If one object is missing, the place does not count, and neither does the missing one's confidence.
    """
    best = [next((one.score for one in found if one.label == name), 0.0) for name in (layout.first, layout.second)]
    score = sum(best) / 4 + (place / 2 if all(best) else 0.0)
    return score if score >= least else 0.0


def wanted(text: str) -> list[tuple[str, int]]:
    """Returns the objects of a prompt with their numbers: `two dogs and a cat` has two dogs and one cat."""
    words = re.findall(r"\w+", text.lower())
    found = [(_singular(name), _NUMBERS[word]) for word, name in pairwise(words) if word in _NUMBERS]
    return [(_person(_DETECTED.get(name, name)), count) for name, count in found if name in _OBJECTS]


def counted(found: Sequence[Detection]) -> Mapping[str, int]:
    """Returns the number of objects by name; of two that mostly cover each other the better counts."""
    kept: list[Detection] = []
    for one in sorted(found, key=lambda one: -one.score):
        if not any(one.label == other.label and _covers(one.box, other.box) for other in kept):
            kept.append(one)
    return {name: sum(one.label == name for one in kept) for name in {one.label for one in kept}}


def numeracy(objects: Sequence[tuple[str, int]], counts: Mapping[str, int]) -> float:
    """Returns the mean over the wanted objects of half a point for being there and half for the right number."""
    points = [(counts.get(name, 0) > 0) * 0.5 + (counts.get(name, 0) == number) * 0.5 for name, number in objects]
    return sum(points) / len(points)


def _singular(word: str) -> str:
    if word in _OBJECTS:
        return word
    endings = (("ies", "y"), ("es", ""), ("s", ""))
    stems = [word.removesuffix(end) + new for end, new in endings if word.endswith(end)]
    return _PLURALS.get(word) or next((stem for stem in stems if stem in _OBJECTS), word)


def _person(name: str) -> str:
    return "person" if name in _PERSON else name


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def _shared(a: Box, b: Box) -> float:
    return _area([*map(max, a[:2], b[:2]), *map(min, a[2:], b[2:])])


def _overlap(a: Box, b: Box) -> float:
    shared = _shared(a, b)
    return shared / (_area(a) + _area(b) - shared) if shared else 0.0


def _covers(a: Box, b: Box) -> bool:
    """Whether most of one box lies in the other."""
    return _shared(a, b) > _SAME * min(_area(a), _area(b))


def _mean(values: Tensor, box: Box) -> float:
    height, width = values.shape
    left, top = (min(max(int(edge), 0), most - 1) for edge, most in ((box[0], width), (box[1], height)))
    return float(values[top : max(int(box[3]), top + 1), left : max(int(box[2]), left + 1)].mean())
