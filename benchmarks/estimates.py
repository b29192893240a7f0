"""What `svdd predict --dry_run` predicts, and what the run then takes, on one thread of a CPU.

Writes benchmarks/estimates.md.

Each estimate is followed at once by its run: both in wall time, and both in CPU time, which other programs on the
machine disturb less. A run is what the command does once the model is loaded: the Trainer, drawing, scoring, and
writing into a folder.
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch

from benchmarks.paired import PROMPTS
from svdd.commands.estimate import Estimate, estimate
from svdd.diffusion.auto import AutoDiffusion
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards.clip import CLIPScore
from svdd.runs.prompts import PromptDataModule
from svdd.runs.writer import RunWriter
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.smc import SMC
from svdd.samplers.svdd import SVDD
from svdd.samplers.twisted_smc import TwistedSMC

Case = tuple[Callable[[], GuidedDiffusion], int, int]  # the module, prompts and prompts of a batch


def module(sampler: object, **options: object) -> GuidedDiffusion:
    """Returns the module of the configuration `quickstart` with another sampler."""
    rewards = {"reward": CLIPScore("emoji"), "eval_rewards": [CLIPScore("emoji-judge")]}
    return GuidedDiffusion(
        diffusion=AutoDiffusion("emoji", 25, guidance_scale=3.0), sampler=sampler, **rewards, **options
    )


CASES: dict[str, Case] = {
    "quickstart: SVDD, M = 8": (lambda: module(SVDD(8)), 8, 8),
    "SMC, budget 200": (lambda: module(SMC(), budget=200), 6, 3),
    "TwistedSMC, N = 4": (lambda: module(TwistedSMC(4)), 6, 2),
    "BestOfN, N = 8": (lambda: module(BestOfN(8)), 8, 4),
}


def seconds(model: GuidedDiffusion, prompts: list[str], batch_size: int) -> tuple[float, float]:
    """Returns the wall time and the CPU time of a whole run."""
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            callbacks=[RunWriter(Path(folder) / "run")],
            inference_mode=not model.sampler.needs_gradient,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.predict(model, PromptDataModule(prompts, batch_size), return_predictions=False)
        return time.perf_counter() - wall, time.process_time() - cpu


def measure(case: Case) -> tuple[dict[str, tuple[float, float, float]], Estimate]:
    """Returns, by the kind of time, what was predicted, what it took, and what the estimate itself took."""
    build, count, batch_size = case
    prompts, found, took = list(PROMPTS[:count]), [], []
    for clock in (time.perf_counter, time.process_time):
        model, begin = build(), clock()
        found.append(estimate(model, PromptDataModule(prompts).dataset, batch_size, clock=clock))
        took.append(clock() - begin)
    real = seconds(build(), prompts, batch_size)
    times = zip((each.seconds for each in found), real, took, strict=True)
    return dict(zip(("wall", "CPU"), times, strict=True)), found[0]


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*(many workers|Total length).*")
    lines: list[str] = []
    largest = dict.fromkeys(("wall", "CPU"), 0.0)
    for _ in range(arguments.repeats):
        for name, case in CASES.items():
            times, found = measure(case)
            cells = [f"{name}, {case[1]} prompts", f"{found.denoiser_rows:,.0f}"]
            for kind, (predicted, took, own) in times.items():
                cells += [f"{predicted:.1f}", f"{took:.1f}", f"{predicted / took - 1:+.0%}", f"{own:.1f}"]
                largest[kind] = max(largest[kind], abs(predicted / took - 1))
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
            write(arguments.output, sorted(lines), largest, arguments.repeats)


def write(output: Path, lines: list[str], largest: dict[str, float], repeats: int) -> None:
    """Writes the page with what is measured so far."""
    kinds = ["predicted", "took", "error", "estimate itself"]
    head = ["run", "denoiser rows", *(f"{kind}: {word}" for kind in largest for word in kinds)]
    text = [
        "# Estimates",
        "",
        *(__doc__ or "").replace("Writes benchmarks/estimates.md.\n\n", "").strip().splitlines(),
        "",
        "Times are in seconds. In each line the estimates come first, by wall time and by CPU time, then the run.",
        "",
        f"| {' | '.join(head)} |",
        f"|---|{'---:|' * (len(head) - 1)}",
        *lines,
        "",
        f"Largest error: {largest['wall']:.0%} in wall time, {largest['CPU']:.0%} in CPU time.",
        "",
        f"`python -m benchmarks.estimates --repeats {repeats}`, torch {torch.__version__}, float32, one thread.",
    ]
    output.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
