"""DPG-Bench: the share of questions about a long prompt that a vision-language model answers with yes.

Source: Hu et al., ELLA: Equip Diffusion Models with LLM for Enhanced Semantic Alignment, 2024, arXiv 2403.05135, whose
authors ask mPLUG-large; the questions depend on each other as in Cho et al., Davidsonian Scene Graph, 2023, arXiv
2310.18235.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svdd import UserError
from svdd.evaluation.benchmarks.base import Benchmark, Entry, Judgement
from svdd.rewards.vlm_judge import VLMJudge
from svdd.runs.bounds import MAX_LINE
from svdd.runs.prompts import PromptDataset

__all__ = ["DPGBench", "Question", "judged"]

_WHOLE = "DPG-Bench"
_COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")


class Question(NamedTuple):
    """A question about a prompt.

    Attributes:
        text: The question.
        category: What it is about: `entity - whole`, whose first part is the broad category.
        parents: Numbers of the questions without whose yes it makes no sense.
    """

    text: str
    category: str
    parents: tuple[int, ...]


class DPGBench(Benchmark):
    """DPG-Bench: 1065 long prompts, each with questions about it.

    Args:
        vqa: The model that answers. Default: Qwen2.5-VL 7B of transformers in bfloat16.
        question: What the model is asked; `{question}` stands for the benchmark's question.
    """

    metric = "score"
    size = 1065
    whole = _WHOLE
    known = (_WHOLE, "global", "entity", "attribute", "relation", "other")
    category_column = "question_natural_language"

    def __init__(self, vqa: VLMJudge | None = None, question: str = "{question} Answer yes or no.") -> None:
        super().__init__()
        if "{question}" not in question:
            raise UserError(f"question must contain {{question}}, got {question!r}")
        self.vqa = vqa or VLMJudge("Qwen/Qwen2.5-VL-7B-Instruct", dtype="bfloat16")
        self.question = question

    def read(self, source: str) -> list[Entry]:
        """Returns the prompts of `dpg_bench.csv`, each with its questions; raises UserError for another file."""
        questions: dict[str, dict[int, Question]] = defaultdict(dict)
        texts: dict[str, str] = {}
        with closing(PromptDataset(source, max_prompt_length=MAX_LINE)) as dataset:
            for prompt in (dataset[k] for k in range(len(dataset))):
                if lacking := [name for name in _COLUMNS if name not in prompt.extra]:
                    expected = "expected dpg_bench.csv of DPG-Bench, a line per question: --benchmark_prompts FILE"
                    raise UserError(f"{source}: the prompt {prompt.text!r} has no {lacking[0]}; {expected}")
                item = str(prompt.extra["item_id"])
                if texts.setdefault(item, prompt.text) != prompt.text:
                    raise UserError(f"{source}: item {item} has two prompts, {texts[item]!r} and {prompt.text!r}")
                number, question = _question(prompt.extra, f"{source}, item {item}")
                questions[item][number] = question
        for item, asked in questions.items():
            if unknown := {parent for one in asked.values() for parent in one.parents} - asked.keys():
                raise UserError(f"{source}: item {item} depends on question {min(unknown)}, which is not there")
        return [Entry(texts[item], _WHOLE, {"item_id": item, "questions": asked}) for item, asked in questions.items()]

    @torch.no_grad()
    def judge(self, images: Tensor, entries: Sequence[Entry]) -> list[Judgement]:
        """Returns the share of questions that are answered with yes, overall and by category."""
        found = []
        for image, entry in zip(images, entries, strict=True):
            questions = entry.extra["questions"]
            texts = [self.question.replace("{question}", question.text) for question in questions.values()]
            odds = self.vqa.log_odds(image.expand(len(texts), -1, -1, -1), texts)
            found.append(judged(questions, dict(zip(questions, (odds > 0).tolist(), strict=True))))
        return found


def judged(questions: Mapping[int, Question], answers: Mapping[int, bool]) -> Judgement:
    """Returns the scores of a picture.

    A question whose parent is answered with no, itself or for its own parent earlier in the list, counts as no in the
    overall score. In the categories each question counts by its own answer, as in the authors' code.
    """
    valid = dict(answers)
    for number, question in questions.items():
        valid[number] = valid[number] and all(valid[parent] for parent in question.parents)
    groups: dict[str, list[bool]] = defaultdict(list)
    for number, question in questions.items():
        broad = question.category.split("-")[0].strip()
        for category in dict.fromkeys((broad, question.category)):
            groups[category].append(answers[number])
    scores = {_WHOLE: sum(valid.values()) / len(valid)}
    scores |= {category: sum(found) / len(found) for category, found in groups.items()}
    weights = {category: float(len(found)) for category, found in groups.items()}
    details = {"answers": {str(number): bool(answer) for number, answer in answers.items()}}
    return Judgement(scores, details, weights)


def _question(columns: Mapping[str, Any], place: str) -> tuple[int, Question]:
    """Returns the number and the question of a line."""
    try:
        number = int(columns["proposition_id"])
        parents = tuple(int(part) for part in str(columns["dependency"]).split(","))
    except ValueError:
        found = f"proposition_id {columns['proposition_id']!r} and dependency {columns['dependency']!r}"
        raise UserError(f"{place}: {found} must be integers; expected dpg_bench.csv of DPG-Bench") from None
    category = str(columns["tuple"]).split("(")[0].strip()
    text = str(columns["question_natural_language"]).strip()
    return number, Question(text, category, tuple(parent for parent in parents if parent))
