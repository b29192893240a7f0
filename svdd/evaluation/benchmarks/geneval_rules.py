"""When a picture is correct under GenEval: pure functions of what a detector has found.

Source: Ghosh et al., GenEval, 2023, arXiv 2310.11513; the rules follow `evaluation/evaluate_images.py` of the authors'
code (MIT), which differs from the paper in details: only the most confident objects of a class are judged.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from svdd.rewards.models.detectors import Detection

__all__ = ["COLOURS", "evaluate", "kept", "overlap", "relations"]

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_HALF = 0.5  # of the direction from one object to the other, which makes a relation

Objects = Mapping[str, Sequence[Detection]]


def kept(found: Sequence[Detection], threshold: float, most: int = 16, max_overlap: float = 1.0) -> Objects:
    """Returns the objects of each class, the most confident first.

    Args:
        found: All objects of a picture.
        threshold: Objects of this score or less are dropped.
        most: Objects of a class that are looked at.
        max_overlap: Of two whose boxes overlap this much or more the better is kept; 1 keeps all.
    """
    objects: dict[str, list[Detection]] = {}
    for name in dict.fromkeys(one.label for one in found):
        best = sorted((one for one in found if one.label == name and one.score > threshold), key=lambda one: -one.score)
        chosen: list[Detection] = []
        for one in best[:most]:
            if max_overlap == 1 or all(overlap(other.box, one.box) < max_overlap for other in chosen):
                chosen.append(one)
        if chosen:
            objects[name] = chosen
    return objects


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Returns the intersection over union of two boxes whose last pixel belongs to them, as the authors compute it."""

    def area(box: Sequence[float]) -> float:
        return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)

    shared = area([*map(max, a[:2], b[:2]), *map(min, a[2:], b[2:])])
    union = area(a) + area(b) - shared
    return shared / union if union else 0.0


def relations(a: Sequence[float], b: Sequence[float], threshold: float = 0.1) -> set[str]:
    """Returns where box a lies relative to box b: `left of`, `right of`, `above`, `below`, none or two of them.

    The offset of the centres is shortened, in each direction, by this share of the sum of both extents. A direction
    counts if what remains is more than half of the whole offset's length.
    """
    offset = [(a[k] + a[k + 2] - b[k] - b[k + 2]) / 2 for k in (0, 1)]
    extents = [abs(a[k + 2] - a[k]) + abs(b[k + 2] - b[k]) for k in (0, 1)]
    rest = [math.copysign(max(abs(o) - threshold * e, 0), o) for o, e in zip(offset, extents, strict=True)]
    if all(abs(each) < 1e-3 for each in rest):
        return set()
    dx, dy = (each / math.hypot(*offset) for each in rest)
    holds = {"left of": dx < -_HALF, "right of": dx > _HALF, "above": dy < -_HALF, "below": dy > _HALF}
    return {name for name, true in holds.items() if true}


def evaluate(
    objects: Objects,
    include: Sequence[Mapping[str, Any]],
    exclude: Sequence[Mapping[str, Any]],
    colours_of: Callable[[str, Sequence[Detection]], Sequence[str]],
    position_threshold: float = 0.1,
) -> list[str]:
    """Returns why a picture is not correct; nothing if it is.

    Args:
        objects: Those of each class, the most confident first.
        include: What must be there: `class` and `count`, perhaps a `color`, perhaps a `position`: a relation, and the
            index of the earlier requirement that it refers to. All must hold.
        exclude: What must not be there: a `class` as often as `count` or more.
        colours_of: Returns the colour of each object of a class.
        position_threshold: As in `relations`.
    """
    reasons: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for wanted in include:
        name, count = wanted["class"], wanted["count"]
        found = objects.get(name, [])[:count]
        problem = ""
        if len(found) < count:
            problem = f"expected {count} or more of {name}, found {len(found)}"
        elif "color" in wanted and (colours := [*colours_of(name, found)]).count(wanted["color"]) < count:
            problem = f"expected {count} or more of {wanted['color']} {name}, found {', '.join(colours)}"
        elif "position" in wanted:
            problem = _misplaced(name, found, wanted["position"], matched, position_threshold)
        reasons += [problem] if problem else []
        matched.append(None if problem else found)
    for unwanted in exclude:
        if (number := len(objects.get(unwanted["class"], []))) >= unwanted["count"]:
            reasons.append(f"expected fewer than {unwanted['count']} of {unwanted['class']}, found {number}")
    return reasons


def _misplaced(
    name: str,
    found: Sequence[Detection],
    position: Sequence[Any],
    matched: Sequence[Sequence[Detection] | None],
    threshold: float,
) -> str:
    """Returns what is wrong with the place of the objects relative to those of an earlier requirement."""
    relation, index = position
    targets = matched[index]
    if targets is None:
        return f"nothing that {name} could be {relation}"
    for one in found:
        for target in targets:
            if relation not in (true := relations(one.box, target.box, threshold)):
                return (
                    f"expected {name} {relation} {target.label}, found {' and '.join(sorted(true)) or 'no direction'}"
                )
    return ""
