"""The commands on the pages: what needs only the embedded model runs, the rest is parsed; each picture has its own."""

import importlib.util
import re
import shlex
from itertools import takewhile
from pathlib import Path

import pytest

from svdd.__main__ import main
from svdd.commands import study
from svdd.commands.app.command import app_parser
from svdd.commands.benchmark import _with_class, benchmark_parser
from svdd.commands.compare import compare_parser
from svdd.commands.drawing import Drawing
from svdd.commands.parser import with_shipped_configs
from svdd.commands.report import report_parser
from svdd.commands.score import score_parser
from svdd.commands.test_reward import reward_parser
from tests.test_docs import DOCS, PAGES, ROOT, blocks, name_of, unpack

ALL = [*PAGES, ROOT / "README.md"]
TESTED_ELSEWHERE = {DOCS / "how_to" / "extending.md", DOCS / "how_to" / "reward_package.md"}  # in test_docs.py
# What is not here: models and rewards of the hub, servers, several machines, and files that only the reader has.
MISSING = re.compile(
    r"stabilityai/|stable-diffusion-|FLUX|Qwen|Aesthetic|PickScore|HPS|ImageReward|VQAScore|HTTPReward|ObjectCount|"
    r"UnifiedReward|RubricJudge|Similarity|http://|paper/|svdd_pm|several_nodes|prompts\.csv|prompts\.txt|--benchmark"
)
LONG = re.compile(r"^(study|app)\b|candidates|runs/study\b")  # other files test what takes long or needs their results
# What the pages name and do not define: a reader's own function, and what a command that is not run would write.
NAMED = {
    "my_file.py": "def ask(images, prompts):\n    return images.mean((1, 2, 3))\n",
    "runs/candidates/candidates.json": "{}",
}
SMALL = {
    "predict": "--data.limit 2 --model.images_per_prompt 1 --model.diffusion.num_inference_steps 2",
    "calibrate": "--data.limit 2 --model.images_per_prompt 2 --model.diffusion.num_inference_steps 2",
    "fit": "--data.num_rollouts 4 --data.batch_size 4 --trainer.max_steps 1 --model.diffusion.num_inference_steps 2",
}
PARSERS = {"app": app_parser, "report": report_parser, "compare": compare_parser}
CPU = "--trainer.accelerator cpu --trainer.devices 1"


def commands(page) -> list[list[str]]:
    """Returns the words after `svdd` of each command line in the page's bash blocks."""
    found = []
    for language, _, code in blocks(page):
        for line in code.replace("\\\n", " ").splitlines() if language == "bash" else ():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words = list(takewhile(lambda word: not re.fullmatch(r"[;&|<>()]+", word), lexer))
            if "svdd" in words:
                found.append(words[words.index("svdd") + 1 :])
    return found


def parse(words: list[str]) -> None:
    name, *rest = words
    if name in ("predict", "fit", "calibrate"):
        with pytest.raises(SystemExit, match=r"^0$"):
            main([*words, "--print_config"])
    elif name == "study":
        options, more = study._parse(rest)
        if Path(options.study).exists():  # the page's own, whose settings are checked
            with Drawing(options.study, more, options.output, options.devices) as drawing:
                assert drawing.study().cells
    elif name == "test-reward":
        reward_parser().parse_args(["--reward", *rest])
    elif name in PARSERS:
        PARSERS[name]().parse_args(rest)
    elif "--benchmark" in rest:
        benchmark_parser().parse_args(_with_class(rest))
    else:
        score_parser().parse_args(with_shipped_configs(rest))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in ALL if commands(page) and page not in TESTED_ELSEWHERE], ids=name_of)
def test_commands_run_or_are_parsed(page, workspace, capsys):
    unpack(DOCS / "how_to" / "extending.md", workspace)
    unpack(page, workspace)
    for name, text in NAMED.items():
        (workspace / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace / name).write_text(text)
    for words in commands(page):
        if MISSING.search(" ".join(words)) or LONG.search(" ".join(words)):
            parse(words)
            continue
        small = SMALL.get(words[0], "").split()
        if "svdd_mc" in " ".join(words) and "--ckpt_path" not in words:  # its value is for the model's own steps
            small = small[:-2]
        more = [*small, *CPU.split()] if small else []
        if ".help" in " ".join(words):
            with pytest.raises(SystemExit, match=r"^0$"):
                main(words)
        else:
            assert main([*words, *more]) == 0, (words, capsys.readouterr().err)


MAKES = re.compile(
    r"(?:^|`)(?:svdd [a-z]|```python$|make (?P<target>[\w-]+)|python -m (?P<module>[\w.]+))", re.MULTILINE
)
NEAR = 6  # lines


@pytest.mark.parametrize("page", [*ALL, *sorted((ROOT / "benchmarks").glob("*.md"))], ids=name_of)
def test_each_picture_stands_beside_the_command_that_makes_it(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for number, line in enumerate(lines):
        if picture := re.search(r"!\[.*\]\((.*images/.*)\)", line):
            found = MAKES.search("\n".join(lines[max(number - NEAR, 0) : number + NEAR]))
            assert found, f"{picture[1]}: no command within {NEAR} lines"
            assert found["target"] in (None, *targets), found[0]
            assert found["module"] is None or importlib.util.find_spec(found["module"]), found[0]


def test_every_picture_is_shown():
    text = "".join(page.read_text(encoding="utf-8") for page in ALL)
    assert [path.name for path in (DOCS / "images").iterdir() if f"images/{path.name})" not in text] == []
