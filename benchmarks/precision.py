"""Scores of every reward in every precision of the Trainer, and in every `dtype` of its network, against float32.

Writes benchmarks/precision.md. The rewards are those of `tests/tested_rewards.py`: their networks are small and random
unless the weights ship with svdd or inside a package. 16 fixed pictures are scored within a run of `GuidedDiffusion`.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torchmetrics.functional.regression import spearman_corrcoef

from svdd import first_line
from svdd.diffusion.auto import AutoDiffusion
from svdd.evaluation.rendering import render
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards import Brightness, CLIPScore, Reward
from svdd.rewards.pretrained import PretrainedReward
from svdd.runs.prediction import Prediction
from svdd.runs.prompts import Prompt, PromptDataModule
from svdd.samplers import Unguided
from tests.tested_rewards import TESTED, Case, images_of, serving

PRECISIONS = ["32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true"]
DTYPES = ["bfloat16", "float16"]
IMAGES = 16
CASES = {**TESTED, "CLIPScore, emoji": Case(lambda models: CLIPScore())}
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)

Scores = dict[str, Tensor | str]  # by the case; a text says why there are none


class Probed(GuidedDiffusion):
    """Scores the fixed pictures of each case where a run scores its own."""

    def __init__(self, rewards: dict[str, Reward]) -> None:
        super().__init__(Brightness(), AutoDiffusion("emoji", 2), Unguided())
        self.cases = torch.nn.ModuleList(rewards.values())
        self.names, self.found = list(rewards), {}

    def configure_model(self) -> None:
        """Loads the rewards of the cases as those of the run."""
        super().configure_model()
        for reward in self.cases:
            reward.load()

    def predict_step(self, batch: list[Prompt], batch_idx: int) -> Prediction:
        """Scores the cases and draws the batch."""
        self.found = {name: scores_of(name, reward) for name, reward in zip(self.names, self.cases, strict=True)}
        return super().predict_step(batch, batch_idx)


def scores_of(name: str, reward: Reward) -> Tensor | str:
    """Returns the scores of the fixed pictures of a case, or the error."""
    try:
        with torch.no_grad():
            return reward.score(*PICTURES[name])
    except Exception as error:  # any reward, on any device
        return first_line(error)


def in_trainer(precision: str, rewards: dict[str, Reward], folder: Path) -> Scores:
    """Returns the scores within a run; Lightning's own 16-mixed is bf16-mixed on a CPU."""
    options = {"plugins": MixedPrecision("16-mixed", "cpu")} if precision == "16-mixed" else {"precision": precision}
    model = Probed(rewards)
    trainer = L.Trainer(accelerator="cpu", devices=1, default_root_dir=folder, **options, **QUIET)
    trainer.predict(model, PromptDataModule(["red apple"]), return_predictions=False)
    return model.found


def cell(scores: Tensor | str, exact: Tensor) -> str:
    """Returns the largest relative difference and the rank correlation as text."""
    if isinstance(scores, str):
        return scores
    difference = ((scores - exact).abs() / exact.abs().clamp(min=1e-12)).where(scores != exact, 0.0).max()
    return f"{float(difference):.1g}, {float(spearman_corrcoef(scores, exact)):.4f}".replace("0, 1.0000", "0, 1")


@contextmanager
def folders() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main() -> None:
    """Prints and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="benchmarks/precision.md")
    output = Path(parser.parse_args().output)
    os.environ["no_proxy"] = "127.0.0.1,localhost"
    with folders() as folder, serving(lambda name: Path(tempfile.mkdtemp(prefix=name, dir=folder))) as models:
        made = {name: case.make(models) for name, case in CASES.items()}
        exact = {name: scores_of(name, reward) for name, reward in made.items()}
        found = {
            precision: in_trainer(precision, {name: case.make(models) for name, case in CASES.items()}, folder)
            for precision in PRECISIONS
        }
        networks = [
            name
            for name, reward in made.items()
            if any(isinstance(part, PretrainedReward) and [*part.parameters()] for part in reward.modules())
        ]
        halves = {
            dtype: {name: scores_of(name, CASES[name].make(models).to(getattr(torch, dtype))) for name in networks}
            for dtype in DTYPES
        }
    by_trainer = [[name, *(cell(found[each][name], exact[name]) for each in PRECISIONS)] for name in CASES]
    by_dtype = [[name, *(cell(halves[each][name], exact[name]) for each in DTYPES)] for name in networks]
    text = (
        "# Rewards in half precision\n\n"
        f"Largest relative difference of a score from that in float32, and Spearman's rank correlation, on {IMAGES}\n"
        f"pictures, CPU, torch {torch.__version__}. `python -m benchmarks.precision` writes this page. Networks are\n"
        "small random ones of the published architectures, but for those that ship with svdd or inside a package.\n\n"
        "## `--trainer.precision`\n\n"
        + render(["reward", *PRECISIONS], by_trainer, "md")
        + "\nOn a CPU, Lightning replaces `16-mixed` by `bf16-mixed`; here float16 autocast comes from its plugin.\n\n"
        "## `dtype` of a reward\n\n"
        "A sum's or a wrapper's row has all of its networks in that type. Scores near zero have large relative\n"
        "differences.\n\n" + render(["reward", *DTYPES], by_dtype, "md")
    )
    output.write_text(text, encoding="utf-8")
    print(text)


PICTURES = {name: images_of(case, IMAGES) for name, case in CASES.items()}

if __name__ == "__main__":
    main()
