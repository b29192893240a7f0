"""The over-optimisation check with strong and mild guidance, and a sum of two rewards.

Writes benchmarks/over_optimisation.md: `svdd predict` on the embedded model against an unguided baseline, with the
commands, the differences and the result of the check. The runs stay in runs/over-optimisation.
"""

import argparse
import contextlib
import io
import json
import shlex
from pathlib import Path

import torch

from svdd.__main__ import main as svdd

RUNS = Path("runs/over-optimisation")
PROMPTS = ["--data.prompts", "emoji", "--data.limit"]
QUICKSTART = ["predict", "--config", "configs/quickstart.yaml"]
JPEG = ["--model.reward", "Compressibility", "--model.eval_rewards+=CLIPScore"]
CHEAP = ["--model.value.decoder", "tiny", "--model.value.guidance_scale", "1.0"]
SUM = ["predict", "--config", "configs/weighted_sum.yaml"]


def draw(name: str, *words: str) -> tuple[str, dict, str]:
    """Returns the command of a run, its summary and its warning, if any."""
    command = [*words, "--output", str(RUNS / name)]
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = svdd([*command, "--overwrite", "true", "--trainer.accelerator", "cpu", "--trainer.devices", "1"])
    if code:
        raise SystemExit(errors.getvalue())
    said = [line for line in errors.getvalue().splitlines() if "over-optimisation:" in line]
    summary = json.loads((RUNS / name / "summary.json").read_text(encoding="utf-8"))
    return shlex.join(["svdd", *command]), summary, "\n".join(said)


def row(name: str, summary: dict, columns: list[str]) -> str:
    """Returns a table row: the differences to the baseline and the result of the check."""
    found = summary["baseline"]
    cells = []
    for column in columns:
        entry = found["rewards"].get(column)
        cells.append(
            "" if entry is None else f"{entry['difference']:+.3f} [{entry['ci95_low']:+.3f}, {entry['ci95_high']:+.3f}]"
        )
    return f"| {name} | {' | '.join(cells)} | {', '.join(found['over_optimised']) or 'silent'} |"


def main() -> None:
    """Samples, prints and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    few, base = [*PROMPTS, str(options.prompts)], ["--evaluation.baseline", str(RUNS / "plain")]
    unguided = ["--model.sampler", "Unguided"]
    many = str(options.candidates)
    commands = [draw("plain", *QUICKSTART, *few, *JPEG, *unguided)[0]]
    said, table = [], []
    for name, words in {
        f"Compressibility, M = {many}": [*JPEG, *CHEAP, "--model.sampler.num_candidates", many],
        "Compressibility, M = 2": [*JPEG, *CHEAP, "--model.sampler.num_candidates", "2"],
        "CLIPScore, M = 8": CHEAP,
    }.items():
        folder = name.replace(", M = ", "-").lower()
        command, summary, warning = draw(folder, *QUICKSTART, *few, *words, *base)
        commands.append(command)
        table.append(row(name, summary, ["Compressibility", "CLIPScore", "CLIPScore-judge"]))
        said += [warning] if warning else []
    both_plain = draw("sum-plain", *SUM, *unguided, "--model.images_per_prompt", "4")[0]
    four = ["--evaluation.baseline", str(RUNS / "sum-plain"), "--evaluation.unpaired", "true"]  # other seeds
    both, summary, _ = draw("sum", *SUM, *four)
    columns = ["WeightedSum", "Compressibility", "CLIPScore", "CLIPScore-judge"]
    lines = [
        "# Over-optimisation, and two rewards at once",
        "",
        f"The embedded model, {options.prompts} prompts x 1 image, T = 25, guidance scale 3, eta 1, SVDD, alpha 0, one "
        "thread; for speed the value takes the tiny decoder and no guidance. Differences to an unguided run of the "
        "same prompts and seeds, paired by prompt, with 95 % intervals (Student's t). Rewards other than the guide "
        "are held out; `CLIPScore-judge` is a second CLIP, trained separately. Made by "
        "`python -m benchmarks.over_optimisation`.",
        "",
        "| guide | Compressibility | CLIPScore | CLIPScore-judge | the check |",
        "|---|---:|---:|---:|---|",
        *table,
        "",
        "Output:",
        "",
        "```",
        *(said or ["(nothing)"]),
        "```",
        "",
        "```bash",
        *commands,
        "```",
        "",
        "## Two rewards at once",
        "",
        "`WeightedSum` of `ZScored` Compressibility and CLIPScore, M = 8, on the 8 prompts of "
        "configs/weighted_sum.yaml, against 4 unguided images of each. `CLIPScore-judge` was held out.",
        "",
        f"| guide | {' | '.join(columns)} | the check |",
        "|---|" + "---:|" * len(columns) + "---|",
        row("both", summary, columns),
        "",
        "```bash",
        both_plain,
        both,
        "```",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
