"""T2I-CompBench: attributes, places, numbers and actions of several objects, each by a tool of its own.

Sources: Huang et al., T2I-CompBench: A Comprehensive Benchmark for Open-world Compositional Text-to-image Generation,
2023, arXiv 2307.06350, and T2I-CompBench++ under the same number, whose authors use BLIP, UniDet, DPT and CLIP.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from svdd import UserError
from svdd.evaluation.benchmarks.base import Benchmark, Entry, Judgement
from svdd.evaluation.benchmarks.compbench_rules import (
    Layout,
    counted,
    depth_order,
    numeracy,
    objects_around,
    pair,
    placed,
    spatial,
    wanted,
)
from svdd.evaluation.benchmarks.sentences import parse
from svdd.rewards.clip import CLIPScore
from svdd.rewards.models.depth import DepthModel
from svdd.rewards.models.detectors import Detection, read_detector
from svdd.rewards.vlm_judge import VLMJudge

__all__ = ["T2ICompBench"]

_ATTRIBUTES = ("color", "shape", "texture")
_PHRASES = 8  # noun phrases of a prompt that are asked about
_NEAR = 150 / 479  # of the picture's shorter side, to which the authors scale pictures
_LEAST = 0.5  # below which the score of a place is 0


class T2ICompBench(Benchmark):
    """T2I-CompBench: eight categories of 300 prompts, each with a score of its own, in [0, 1] but for CLIP's cosine.

    Args:
        vqa: The model that is asked about attributes. Default: BLIP, as the authors use it.
        question: What it is asked; `{phrase}` stands for a noun phrase.
        detector: A zero-shot detector of transformers: a folder or a hub name.
        depth: A depth model of transformers: a folder or a hub name.
        clip: A CLIP of transformers: a folder or a hub name.
        threshold: Objects of a lower score are dropped.
        local_files_only: Use local files and the hub's cache only.
    """

    metric = "score"
    size = 2400
    known = (*_ATTRIBUTES, "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
    overall = False

    def __init__(
        self,
        vqa: VLMJudge | None = None,
        question: str = "{phrase}?",
        detector: str = "IDEA-Research/grounding-dino-base",
        depth: str = "Intel/dpt-hybrid-midas",
        clip: str = "openai/clip-vit-base-patch32",
        threshold: float = 0.3,
        local_files_only: bool = False,
    ) -> None:
        super().__init__()
        if "{phrase}" not in question:
            raise UserError(f"question must contain {{phrase}}, got {question!r}")
        if not 0 <= threshold <= 1:
            raise UserError(f"threshold must be in [0, 1], got {threshold}")
        self.question, self.threshold = question, threshold
        self.vqa = vqa or VLMJudge("Salesforce/blip-vqa-capfilt-large", local_files_only=local_files_only)
        self.clip = CLIPScore(clip, local_files_only=local_files_only)
        options = {"revision": None, "local_files_only": local_files_only}
        self.readers: dict[str, Callable[[], nn.Module]] = {
            "detector": lambda: read_detector(detector, options),
            "depth": lambda: DepthModel(depth, options),
        }
        self.networks = nn.ModuleDict()

    def load(self) -> None:
        """Loads nothing: each category's models are loaded with its first picture."""

    def read(self, source: str) -> list[Entry]:
        """Returns the prompts of a public file such as `color_val.txt`, or of all in a folder, with its category.

        Raises:
            UserError: If there is no such file, or a prompt is not of its category's form.
        """
        path = Path(source).expanduser()
        files = [path / f"{name}_val.txt" for name in self.known] if path.is_dir() else [path]
        if not (files := [file for file in files if file.is_file()]):
            raise UserError(f"{source} holds none of T2I-CompBench's prompt files, such as color_val.txt")
        return [entry for file in files for entry in self._read_file(file)]

    def _read_file(self, file: Path) -> list[Entry]:
        category = file.stem.removesuffix("_val").removesuffix("_train")
        if category not in self.known:
            if file.suffix == ".jsonl":  # of a run: with a column for the category, or it is unknown
                try:
                    return super().read(str(file))
                except UserError as error:
                    raise UserError(f"{error}: give it with --benchmark_prompts, color_val.txt or its folder") from None
            known = ", ".join(f"{name}_val.txt" for name in self.known)
            raise UserError(f"{file} is none of T2I-CompBench's prompt files: {known}, which name the category")
        texts = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        kinds = {kind: _texts(file, kind) for kind in ("spatial", "action")} if category == "complex" else {}
        entries = []
        for text in texts:
            kind = next((kind for kind, members in kinds.items() if _start(text) in members), "")
            entries.append(Entry(text, category, {"kind": kind} if kinds else {}))
            if problem := self.fault(entries[-1]):
                raise UserError(f"{file}: the prompt {text!r} {problem}")
        return entries

    def fault(self, entry: Entry) -> str:
        """Returns what is wrong with a prompt; empty if nothing is."""
        if entry.category not in self.known:
            return f"has the category {entry.category!r}, which is none of {', '.join(self.known)}"
        if entry.category in ("spatial", "3d_spatial") and pair(entry.text, entry.category == "3d_spatial") is None:
            return "does not name two objects and a relation of T2I-CompBench between them"
        if entry.category == "numeracy" and not wanted(entry.text):
            return "names no object of T2I-CompBench with a number"
        if entry.category in (*_ATTRIBUTES, "complex"):
            parse(entry.text)  # a missing parser shows before pictures are read
        return ""

    @torch.no_grad()
    def judge(self, images: Tensor, entries: Sequence[Entry]) -> list[Judgement]:
        """Returns the score of each image in its category, and what it is made of."""
        found: list[dict[str, float]] = []
        for image, entry in zip(images, entries, strict=True):
            scores = {name: getattr(self, f"_{name}")(image[None], entry) for name in _parts(entry)}
            found.append({"score": sum(scores.values()) / len(scores), **(scores if len(scores) > 1 else {})})
        return [
            Judgement({entry.category: parts.pop("score")}, {"parts": parts} if parts else {})
            for entry, parts in zip(entries, found, strict=True)
        ]

    def _attributes(self, image: Tensor, entry: Entry) -> float:
        """Returns the product over noun phrases of p(yes) / (p(yes) + p(no)); 1 without a noun phrase."""
        phrases = parse(entry.text).phrases[:_PHRASES]
        questions = [self.question.replace("{phrase}", phrase) for phrase in phrases]
        if not questions:
            return 1.0
        return float(self.vqa.log_odds(image.expand(len(questions), -1, -1, -1), questions).sigmoid().prod())

    def _place(self, image: Tensor, entry: Entry) -> float:
        """Returns the score of two objects and the relation between them in the picture's plane."""
        layout = pair(entry.text) if entry.category == "spatial" else objects_around(parse(entry.text))
        assert layout is not None  # see `fault`
        near = _NEAR * min(image.shape[-2:])
        return self._layout(image, layout, lambda a, b: placed(layout.relation, a, b, near), _LEAST)

    def _depth(self, image: Tensor, entry: Entry) -> float:
        """Returns the score of two objects and which of them is in front."""
        layout = pair(entry.text, depth=True)
        assert layout is not None  # see `fault`

        def order(a: Any, b: Any) -> float:
            return depth_order(layout.relation, a, b, self._network("depth", image)(image)[0])

        return self._layout(image, layout, order, 0.0)

    def _layout(self, image: Tensor, layout: Layout, rule: Callable[[Any, Any], float], least: float) -> float:
        names = [name for name in (layout.first, layout.second) if name]
        found = self._detect(image, names)
        boxes = [next((one.box for one in found if one.label == name), None) for name in names]
        together = len(boxes) == 2 and None not in boxes
        return spatial(found, layout, rule(*boxes) if together else 0.0, least)

    def _numbers(self, image: Tensor, entry: Entry) -> float:
        """Returns the score of the numbers of objects."""
        objects = wanted(entry.text)
        return numeracy(objects, counted(self._detect(image, [name for name, _ in objects])))

    def _alignment(self, image: Tensor, entry: Entry) -> float:
        """Returns CLIP's cosine of picture and prompt; of a complex prompt without its adjectives."""
        text = entry.text
        if entry.category == "complex":
            sentence = parse(text)
            text = " ".join(word for word, tag in zip(sentence.words, sentence.tags, strict=True) if tag != "ADJ")
        return float(self.clip.score(image, [text]))

    def _detect(self, image: Tensor, names: Sequence[str]) -> list[Detection]:
        detector = cast(Any, self._network("detector", image))
        return detector.detect(image, [names], self.threshold)[0] if names else []

    def _network(self, name: str, image: Tensor) -> nn.Module:
        if name not in self.networks:
            self.networks[name] = self.readers[name]().eval().requires_grad_(False)
        return self.networks[name].to(image.device)


def _parts(entry: Entry) -> tuple[str, ...]:
    """Returns the names of the scores whose mean is that of the prompt."""
    if entry.category == "complex":
        kind = entry.extra.get("kind")
        return ("attributes", *(("place",) if kind != "action" else ()), *(("alignment",) if kind != "spatial" else ()))
    rules = {"spatial": "place", "3d_spatial": "depth", "numeracy": "numbers", "non_spatial": "alignment"}
    return (rules.get(entry.category, "attributes"),)


def _texts(file: Path, kind: str) -> set[str]:
    """Returns the prompts of the list beside `complex_val.txt` that names those with one kind of relation."""
    beside = file.with_name(f"{file.stem}_{kind}.txt")
    if not beside.is_file():
        raise UserError(f"{file} needs {beside.name} beside it, which says how its prompts are scored")
    return {_start(line) for line in beside.read_text(encoding="utf-8-sig").splitlines()}


def _start(text: str) -> str:
    """Returns a prompt up to its full stop in lower case, by which the authors compare prompts."""
    return text.strip().split(".")[0].lower()
