"""Time and memory of `svdd compare` on generated run folders, from a thousand to a hundred thousand images a run.

Writes benchmarks/comparing.md. Each command runs in a process of its own with one thread.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COUNTS = (1_000, 10_000, 100_000)
IMAGES_PER_PROMPT = 4
CASES = {  # number of runs, words, whether the last run has its prompts in another order
    "2 runs": (2, [], False),
    "3 runs": (3, [], False),
    "3 runs, the last one in another order": (3, [], True),
    "3 runs, --unpaired": (3, ["--unpaired"], False),
}


def write_run(folder: Path, count: int, number: int, shuffled: bool) -> None:
    """Writes the files of a finished run of `count` images, but for its pictures."""
    folder.mkdir(parents=True)
    chance = random.Random(number)
    prompts = list(range(count // IMAGES_PER_PROMPT))
    if shuffled:
        chance.shuffle(prompts)
    with open(folder / "results.jsonl", "w", encoding="utf-8") as file:
        for index, prompt in enumerate(prompts):
            for k in range(IMAGES_PER_PROMPT):
                ledger = {"denoiser_rows": 193, "network_rows": 386, "gradient_rows": 0, "decoded_images": 200}
                ledger |= {"reward_calls": 200, "denoiser_seconds": 1.716369, "decoder_seconds": 1.729512}
                row = {
                    "prompt_index": index,
                    "image_index": k,
                    "num_images": IMAGES_PER_PROMPT,
                    "prompt": f"a picture of the number {prompt} in oil on canvas, seen from above",
                    "seed": prompt * IMAGES_PER_PROMPT + k,
                    "rewards": {name: chance.gauss(number, 1) for name in ("CLIPScore", "CLIPScore-judge")},
                    "path_kl_sample": 24.817766,
                    "selection": {"choices": 24, "resamplings": 23, "spread": 0.002537199},
                    "ledger": ledger | {"reward_seconds": 0.178742, "total_seconds": 3.627839},
                    "file": f"images/{index:06d}-{k:02d}.png",
                    "sha256": f"{chance.getrandbits(256):064x}",
                }
                file.write(json.dumps(row) + "\n")
    (folder / "summary.json").write_text(json.dumps({"prompts": len(prompts)}))


def measure(words: list[str]) -> tuple[float, float]:
    """Returns the wall time in seconds and the peak of resident memory in MB of a command."""
    code = "import resource, sys, svdd.__main__ as main; assert main.main(sys.argv[1:]) == 0;"
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, file=sys.stderr)"
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - start, float(done.stderr.split()[-1])


def main() -> None:
    """Generates, measures, prints and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    table = []
    for name, (runs, words, shuffled) in CASES.items():
        cells = []
        for count in COUNTS:
            with tempfile.TemporaryDirectory() as place:
                folders = [Path(place, str(k)) for k in range(runs)]
                for k, folder in enumerate(folders):
                    write_run(folder, count, k, shuffled and k == runs - 1)
                seconds, memory = measure(["compare", *map(str, folders), *words])
                cells.append(f"{seconds:.1f} s, {memory:.0f} MB")
        table.append(f"| {name} | {' | '.join(cells)} |")
        print(table[-1], flush=True)
    lines = [
        "# Time and memory of comparisons",
        "",
        f"`svdd compare` on generated runs with {IMAGES_PER_PROMPT} images per prompt and two rewards: wall time of "
        "the command, start included, and peak of resident memory, one thread. "
        "Made by `python -m benchmarks.comparing`.",
        "",
        f"| images a run | {' | '.join(f'{count:,}' for count in COUNTS)} |",
        "|---|" + "---:|" * len(COUNTS),
        *table,
    ]
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
