"""GenEval: whether named objects are there, in the right number, colour and place, by an object detector.

Source: Ghosh et al., GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment, 2023, arXiv
2310.11513, whose authors use Mask2Former of mmdet and CLIP ViT-L/14 of open_clip.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from svdd import UserError, is_integer
from svdd.evaluation.benchmarks.base import Benchmark, Entry, Judgement
from svdd.evaluation.benchmarks.geneval_rules import COLOURS, evaluate, kept
from svdd.rewards.clip import CLIPScore
from svdd.rewards.models.detectors import Detection, Detector, read_detector

__all__ = ["GenEval"]

_GREY = 0x99 / 255  # what replaces all but the object before its colour is judged
_TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
_RELATIONS = ("left of", "right of", "above", "below")
_COUNTING = "counting"


class GenEval(Benchmark):
    """GenEval: object, two objects, number, colour, position and colour attribution, 553 prompts.

    The overall score is the mean of the six tasks' shares of correct pictures.

    Args:
        detector: An instance segmenter or a detector of transformers: a folder or a hub name.
        clip: A CLIP of transformers, which names colours: a folder or a hub name.
        threshold: Objects of this score or less are dropped.
        counting_threshold: The same for the task `counting`.
        max_objects: Objects of a class that are looked at.
        max_overlap: Of two objects of a class whose boxes overlap this much or more the better is kept; 1 keeps all.
        position_threshold: Share of the objects' extents by which their distance is shortened.
        local_files_only: Use local files and the hub's cache only.
    """

    metric = "accuracy"
    proportion = True
    size = 553
    known = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    category_column = "tag"

    def __init__(
        self,
        detector: str = "facebook/mask2former-swin-small-coco-instance",
        clip: str = "openai/clip-vit-large-patch14",
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        max_objects: int = 16,
        max_overlap: float = 1.0,
        position_threshold: float = 0.1,
        local_files_only: bool = False,
    ) -> None:
        super().__init__()
        shares = {"threshold": threshold, "counting_threshold": counting_threshold, "max_overlap": max_overlap}
        for name, share in {**shares, "position_threshold": position_threshold}.items():
            if not 0 <= share <= 1:
                raise UserError(f"{name} must be in [0, 1], got {share}")
        if max_objects < 1:
            raise UserError(f"max_objects must be >= 1, got {max_objects}")
        self.threshold, self.counting_threshold, self.max_overlap = threshold, counting_threshold, max_overlap
        self.max_objects, self.position_threshold = max_objects, position_threshold
        self.options, self.source = {"revision": None, "local_files_only": local_files_only}, detector
        self.detector: Detector | None = None
        self.clip = CLIPScore(clip, local_files_only=local_files_only)

    def fault(self, entry: Entry) -> str:
        """Returns what is wrong with a prompt's requirements; empty if nothing is."""
        include, exclude = _clauses(entry, "include"), _clauses(entry, "exclude")
        if not include:
            return "has no include"
        for k, clause in enumerate([*include, *exclude]):
            if not isinstance(clause, Mapping) or not isinstance(clause.get("class"), str):
                return "requires something without a class"
            if not is_integer(clause.get("count")) or clause["count"] < 1:
                return f"requires {clause['class']} without a count >= 1"
            if clause.get("color", "red") not in COLOURS:
                return f"requires the color {clause['color']!r}, which is none of {', '.join(COLOURS)}"
            if "position" in clause:
                relation, index = (
                    [*clause["position"], None, None][:2] if isinstance(clause["position"], list) else (0, 0)
                )
                if relation not in _RELATIONS or not is_integer(index) or not 0 <= index < k:
                    return f"requires the position {clause['position']!r}; expected a relation and an earlier index"
        return ""

    def load(self) -> None:
        """Loads the detector and CLIP now."""
        super().load()
        if self.detector is None:
            self.detector = read_detector(self.source, self.options).eval().requires_grad_(False)
        self.detector.to(self.clip.anchor.device)

    def judge(self, images: Tensor, entries: Sequence[Entry]) -> list[Judgement]:
        """Returns whether each image is correct, 1 or 0, in its task, and why it is not."""
        self.load()
        assert self.detector is not None
        names = [[c["class"] for kind in ("include", "exclude") for c in _clauses(entry, kind)] for entry in entries]
        if not self.detector.reads_names:  # it finds all of its classes at once
            names = [sorted({name for each in names for name in each})] * len(entries)
        counts = [entry.category == _COUNTING for entry in entries]
        found = self.detector.detect(images, names, min(self.threshold, self.counting_threshold))
        return [self._judge(*each) for each in zip(images, found, entries, counts, strict=True)]

    def _judge(self, image: Tensor, found: Sequence[Detection], entry: Entry, counts: bool) -> Judgement:
        threshold = self.counting_threshold if counts else self.threshold
        objects = kept(found, threshold, self.max_objects, self.max_overlap)
        clauses = (_clauses(entry, "include"), _clauses(entry, "exclude"))
        reasons = evaluate(objects, *clauses, partial(self.colours_of, image), self.position_threshold)
        details = {"correct": not reasons, "reason": "; ".join(reasons)}
        details["objects"] = {name: [_rounded(one) for one in group] for name, group in objects.items()}
        return Judgement({entry.category: float(not reasons)}, details)

    @torch.no_grad()
    def colours_of(self, image: Tensor, name: str, objects: Sequence[Detection]) -> list[str]:
        """Returns each object's colour, that of CLIP's highest cosine, in an image, float32 [3, h, w]."""
        clip = self.clip.network
        features = torch.cat([clip.image_features(crop(image, one)[None]) for one in objects])
        texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in _TEMPLATES]
        means = clip.text_features(texts).unflatten(0, (len(COLOURS), len(_TEMPLATES))).mean(1)
        return [COLOURS[k] for k in (features @ F.normalize(means, dim=-1).T).argmax(1)]


def crop(image: Tensor, one: Detection) -> Tensor:
    """Returns the object's box out of an image, float32 [3, h, w], with all that is not in its mask in grey."""
    if one.mask is not None:
        image = torch.where(one.mask.to(image.device), image, image.new_tensor(_GREY))
    height, width = image.shape[1:]
    left, top = (min(max(round(edge), 0), most - 1) for edge, most in zip(one.box[:2], (width, height), strict=True))
    right, bottom = max(round(one.box[2]), left + 1), max(round(one.box[3]), top + 1)
    return image[:, top:bottom, left:right]


def _clauses(entry: Entry, kind: str) -> Sequence[Mapping[str, Any]]:
    found = entry.extra.get(kind) or []
    return found if isinstance(found, list) else [found]


def _rounded(one: Detection) -> dict[str, Any]:
    return {"score": round(one.score, 4), "box": [round(edge, 1) for edge in one.box]}
