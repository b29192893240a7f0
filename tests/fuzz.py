"""Wrong command lines and damaged folders: svdd must answer each with one line, not with a traceback or a hang.

    OMP_NUM_THREADS=1 python -m tests.fuzz --lines 4000 --damages 400

Each case is a forked child of one process that has imported everything, in a folder of its own that holds some files
of a user. A case fails if a traceback shows, if the exit code is none that svdd documents, if it takes more than 30
seconds or if it changes a file that is not svdd's. `tests/test_fuzz.py` runs a sample.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is imported

import argparse
import hashlib
import inspect
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

import torch

from svdd import printable
from svdd.__main__ import main as svdd
from svdd.commands.calibrate import CalibrateCLI
from svdd.commands.compare import compare  # noqa: F401  (imported before the forks)
from svdd.commands.fit import FitCLI
from svdd.commands.predict import PredictCLI
from svdd.commands.registry import KINDS, catalogue, import_all
from svdd.commands.score import score  # noqa: F401

LIMIT = 30  # seconds
CODES = {0, 2, 3, 130, 143}
COMMANDS = {"predict": PredictCLI, "fit": FitCLI, "calibrate": CalibrateCLI}

_BOMB = "[&a [x,x,x,x,x,x,x,x], " + ", ".join(
    f"&{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
) + "]"  # fmt: skip
_WORDS = """
    0 -1 1 2 0.5 nan inf -.inf 1e30 1e-320 -1e400 0x10 1_0 true null ~ { [ [[]] [null] *a -- - --help ${x} %s%n
    / . .. missing/file mine mine/thesis.txt mine/fifo mine/loop mine/pictures mine/run /dev/null owner/name ../x/y
    Nope os.system os.path builtins.dict torch.nn.Linear a.b x.y.z ..x __main__ svdd svdd.rewards.base.Reward
    svdd.samplers.svdd.SVDD SMC Compressibility LatentConvValue StableDiffusion RichProgressBar ModelCheckpoint
    ddp_spawn fsdp deepspeed 16-mixed 64-true cuda:99 mps
"""
_LINES = """
    [1, x]
    {a: 1}
    {1: 2}
    {? [a] : b}
    &a [*a]
    - x
    !!python/object/apply:os.system ['touch hacked']
    {class_path: SVDD, init_args: 3}
    {class_path: 3}
    {class_path: [SVDD]}
    {class_path: SVDD, init_args: {x: 1}}
    {class_path: torch.nn.Linear, init_args: {in_features: x}}
    {class_path: CLIPScore, init_args: {pretrained: 5}}
    {init_args: {}}
    [{class_path: CLIPScore}, CLIPScore]
""".strip().splitlines()
_STRINGS = [
    *("", " ", _BOMB, "1" + "0" * 30, "9" * 5000, "a" * 5000, "[" * 3000, "{a: " * 300 + "1" + "}" * 300, "- " * 400),
    *(
        "\x1b[2J\x1b]0;gotcha\x07",
        "\u202etxt.exe",
        "e\u0301\U0001f600",
        "\udcff",
        "a\x00b",
        "a\nb\r\x85c",
        "\x7f\x9b1m",
    ),
]
VALUES = [*_WORDS.split(), *map(str.strip, _LINES), *_STRINGS]

_MODEL = [
    "--model.reward",
    "Compressibility",
    "--model.diffusion.num_inference_steps",
    "2",
    "--trainer.accelerator",
    "cpu",
]
_PROMPTS = ["--data.prompts", '["apple", "blue car"]']
_FIT = ["--data.num_rollouts", "4", "--data.cache", "cache", "--trainer.max_epochs", "1"]
_FIT += ["--model.value", "LatentConvValue", "--model.value.channels", "8", "--model.value.num_blocks", "1"]
BASE = {
    "predict": ["predict", *_MODEL, "--model.sampler.num_candidates", "2", *_PROMPTS, "--output", "out"],
    "fit": ["fit", *_MODEL, *_PROMPTS, *_FIT, "--output", "out"],
    "calibrate": ["calibrate", *_MODEL, "--model.images_per_prompt", "8", *_PROMPTS, "--output", "out"],
    "score": ["score", "--reward", "Compressibility", "--images", "mine/pictures", "--device", "cpu"],
    "compare": ["compare", "mine/run"],
    "report": ["report", "mine/run"],
    "list": ["list"],
}


class Case(NamedTuple):
    """A command line, and what is done to the folder before it runs there."""

    name: str
    words: list[str]
    damage: Callable[[Path], None] | None = None


class Outcome(NamedTuple):
    """How a case ended; `faults` is empty if it ended as it should."""

    case: Case
    code: int
    text: str
    seconds: float
    faults: list[str]
    left: list[str]  # files that a refused command leaves behind


def options(command: str) -> list[tuple[str, str]]:
    """Returns all options of a command, as the parser knows them, each with the words that must stand before it."""
    if command in ("compare", "report", "list"):
        shared = ("output", "limit", "baseline")
        names = {"compare": (*shared, "format", "unpaired", "shared"), "report": (*shared, "embed")}.get(command, ())
        return [("", "")] * 3 + [(f"--{name}", "") for name in names]
    parser, found = _parser(command), []
    for action in parser._actions:
        if not action.option_strings or action.dest in ("help", "print_config") or ".help" in action.option_strings[-1]:
            continue
        option = action.option_strings[-1]
        found.append((option, ""))
        kind = option.rsplit(".", 1)[-1].lstrip("-")
        for entry in catalogue():
            if entry.kind == kind:
                cls = getattr(resolve_name(KINDS[kind][0]), entry.name)
                names = list(inspect.signature(cls).parameters)
                found += [(f"{option}.{name}", f"{option} {entry.name}") for name in names]
    return found


def _parser(command: str) -> Any:
    class Found(BaseException):
        pass

    if command == "score":
        from svdd.commands.score import score_parser

        return score_parser()

    class Stop(COMMANDS[command]):  # type: ignore[misc]
        def parse_arguments(self, parser: Any, args: Any) -> None:
            raise Found(self._parser(self.command))

    try:
        Stop([])
    except Found as found:
        return found.args[0]


def command_lines(count: int, seed: int) -> Iterator[Case]:
    """Yields command lines with one wrong value for one option, ten an option in turn, then with two of them."""
    chance = random.Random(seed)
    places = [(command, *option) for command in BASE for option in options(command)]
    chance.shuffle(places)
    for k in range(count):
        command, option, before = places[k % len(places)]
        words = [*BASE[command], *before.split()]
        chosen = [(option, chance.choice(VALUES))]
        if k >= 10 * len(places) or chance.random() < 0.05:
            others = [(name, earlier) for other, name, earlier in places if other == command]
            another, earlier = chance.choice(others)
            words += earlier.split()
            chosen.append((another, chance.choice(VALUES)))
        for name, value in chosen:
            words += [name, value] if name else [value]
        yield Case(f"{command} " + " ".join(f"{name} {value[:60]!r}" for name, value in chosen), words)


# --- damaged configurations and folders ---

_CONFIG_LINES = r"""
    5
    []
    a
    null
    # nothing
    trainer: 5
    model: 5
    model: {}
    data: []
    evaluation: x
    trainer: {devices: [}
    a: b: c
    <<: *x
    &a a: *a
    ? [a]
    1: 2
    on: yes
    output: "a\0b"
    output: [a]
    output: 5
    output: {a: b}
    overwrite: maybe
    config: wrong.yaml
    config: [wrong.yaml]
    predict: {model: {seed: 3}}
    model: {budget: 1.0e+30}
    model: {seed: 2001-01-01}
    model: {seed: 0o17}
    model: {sampler: 5}
    model: {sampler: {alpha: 1.0e-320}}
    model: {sampler: {class_path: SMC, init_args: {alpha: 1.0e-320}}}
    model: {sampler: {class_path: SMC, num_particles: 3}}
    model: {reward: [CLIPScore]}
    model: {eval_rewards: {a: b}}
    model: !!python/object:os.x {}
    model: !x y
    model: wrong.yaml
    data: {batch_size: 1.0e+30}
    data: {batch_size: 1000000000000000000000000000000}
    trainer: {limit_predict_batches: 0, limit_train_batches: 0, limit_test_batches: 0}
    trainer: {limit_predict_batches: 0.5}
    trainer: {limit_test_batches: 0.5}
    trainer: {strategy: ddp_spawn}
    trainer: {strategy: x}
    trainer: {callbacks: RichProgressBar}
    trainer: {callbacks: [{class_path: RichProgressBar}]}
    trainer: {logger: 7}
    trainer: {logger: {class_path: CSVLogger}}
    trainer: {plugins: [x]}
    trainer: {profiler: x}
    "\x1b[31m": 1
    model: {"\ud800": 1}
    x: "\ud800"
""".strip().splitlines()
_CONFIGS = [
    *(line.strip().encode() + b"\n" for line in _CONFIG_LINES),
    *(
        b"",
        b"\n",
        b"\x00",
        b"\xff\xfe\x00m",
        b"caf\xe9: 1\n",
        b"\tmodel: 1\n",
        b"model:\n\tx: 1\n",
        b"output: " + b"x" * 5000,
    ),
    *(b"[" * 3000, b"{a: " * 2000, b"- " * 3000, b"a: " + _BOMB.encode(), "model: {r\u202eeward: x}\n".encode()),
    *(b"%YAML 9.9\n---\na: 1\n", b"--- 1\n--- 2\n", b"# svdd predict: x\nmodel: 5\n", b"# svdd fit: x\ndata: []\n"),
]

_JSON = [
    b"[]",
    b"3",
    b"null",
    b'"x"',
    b"{}",
    b'{"a": [1]}',
    b"[" * 100000,
    b"NaN",
    b'{"prompt_index": "x"}',
    b"\xff\xfe",
]


def damaged_configs(count: int, seed: int) -> Iterator[Case]:
    """Yields damaged configurations, for each command that reads one."""
    for content in random.Random(seed).sample(_CONFIGS, min(count, len(_CONFIGS))):
        for command in ("predict", "fit", "calibrate", "score"):
            words = [command, *BASE[command][1:], "--config", "wrong.yaml"]
            if b"output" in content:
                words = [word for word in words if word not in ("--output", "out")]
            yield Case(f"{command} --config of {content[:60]!r}", words, _writer("wrong.yaml", content))


def _writer(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


USES = {  # a folder, and the commands that read it
    "run": [
        [*BASE["predict"][:-1], "theirs/run"],
        ["compare", "theirs/run", "mine/run", "--output", "out.png"],
        ["report", "theirs/run"],
        ["score", "--reward", "Compressibility", "--images", "theirs/run", "--device", "cpu"],
        [*BASE["predict"], "--evaluation.baseline", "theirs/run"],
    ],
    "tar": [
        [*BASE["predict"][:-1], "theirs/tar", "--tar", "true"],
        ["compare", "theirs/tar", "mine/run", "--output", "out.png"],
        ["report", "theirs/tar", "--embed"],
        ["score", "--reward", "Compressibility", "--images", "theirs/tar", "--device", "cpu"],
    ],
    "fit": [
        [*BASE["fit"][:-1], "theirs/fit", "--trainer.max_epochs", "2"],
        [*BASE["predict"], "--ckpt_path", "theirs/fit/value.safetensors"],
        [*BASE["predict"], "--ckpt_path", "theirs/fit/checkpoints/last.ckpt"],
    ],
    "cache": [[*BASE["fit"], "--data.cache", "theirs/cache"]],
    "calibration": [[*BASE["calibrate"][:-1], "theirs/calibration"]],
    "emoji-sd": [[*BASE["predict"], "--model.diffusion.pretrained", "theirs/emoji-sd"]],
    "emoji-clip": [[*BASE["predict"], "--model.reward", "CLIPScore", "--model.reward.pretrained", "theirs/emoji-clip"]],
    "prompts": [
        [*BASE["predict"], "--data.prompts", f"theirs/prompts/p.{kind}"]
        for kind in ("txt", "csv", "tsv", "json", "jsonl")
    ],
    "pictures": [["score", "--reward", "Compressibility", "--images", "theirs/pictures", "--device", "cpu"]],
}  # fmt: skip


def folders_to_damage(seed: int) -> list[str]:
    """Returns the kinds of folders in the order in which they are damaged."""
    return random.Random(seed).sample(list(USES), len(USES))


def damaged_folders(template: Path, count: int, seed: int) -> Iterator[Case]:
    """Yields cases in which one file of a folder is damaged before each command that reads it."""
    chance, folders = random.Random(seed), folders_to_damage(seed)
    for k in range(count):
        folder = folders[k % len(folders)]
        uses = USES[folder]
        files = sorted(path for path in (template / "theirs" / folder).rglob("*") if path.is_file())
        path = chance.choice(files).relative_to(template)
        if folder == "prompts":
            uses = [use for use in uses if use[-1].endswith(path.suffix)]
        kind, state = chance.choice(list(_DAMAGES)), chance.getrandbits(32)
        for words in uses:
            yield Case(f"{path} {kind}: {words[0]} ... {' '.join(words[-2:])}", words, _damage(path, kind, state))


def _damage(path: Path, kind: str, state: int) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        content = (folder / path).read_bytes()
        (folder / path).unlink()  # the file of the template stays as it is
        _DAMAGES[kind](folder / path, content, random.Random(state))

    return run


def _flip(path: Path, content: bytes, chance: random.Random) -> None:
    changed = bytearray(content)
    for _ in range(chance.choice([1, 10])):
        if changed:
            changed[chance.randrange(min(len(changed), 2000))] ^= 1 << chance.randrange(8)
    path.write_bytes(changed)


def _rename_a_key(path: Path, content: bytes, chance: random.Random) -> None:
    words = content.split(b'"')
    if len(words) > 2:
        words[2 * chance.randrange(len(words) // 2) + 1] = chance.choice([b"x", b"", b"\x1b[2J", b"prompt_index"])
    path.write_bytes(b'"'.join(words))


def _other_value(path: Path, content: bytes, chance: random.Random) -> None:
    """Replaces one value of a JSON file, or of a line of one, by a value of another type."""
    lines = content.split(b"\n") if path.suffix == ".jsonl" else [content]
    k = chance.randrange(len(lines))
    try:
        tree = json.loads(lines[k])
    except ValueError:
        return _flip(path, content, chance)
    node, key = None, None
    while isinstance(tree if node is None else node[key], dict) and (tree if node is None else node[key]):
        node = tree if node is None else node[key]
        key = chance.choice(list(node))
        if chance.random() < 0.3:
            break
    other = chance.choice(
        [None, "x", -1, 10**30, [], {}, [[1]], 0.5, True, "\x00", "../../mine/thesis.txt", "1" * 5000]
    )
    if node is None:
        tree = other
    elif chance.random() < 0.3:
        del node[key]
    else:
        node[key] = other
    lines[k] = json.dumps(tree).encode()
    path.write_bytes(b"\n".join(lines))
    return None


_DAMAGES: dict[str, Callable[[Path, bytes, random.Random], Any]] = {
    "flipped": _flip,
    "truncated": lambda path, content, chance: path.write_bytes(content[: chance.randrange(len(content) + 1)]),
    "emptied": lambda path, content, chance: path.write_bytes(b""),
    "removed": lambda path, content, chance: None,
    "doubled": lambda path, content, chance: path.write_bytes(content * 2),
    "a folder": lambda path, content, chance: path.mkdir(),
    "a FIFO": lambda path, content, chance: os.mkfifo(path),
    "a loop": lambda path, content, chance: path.symlink_to(path.name),
    "other JSON": lambda path, content, chance: path.write_bytes(chance.choice(_JSON)),
    "another value": _other_value,
    "a value of another type": _other_value,
    "another key": _rename_a_key,
    "zeros": lambda path, content, chance: path.write_bytes(bytes(len(content))),
}


# --- running ---


def make_template(folder: Path, kinds: list[str]) -> None:
    """Makes the files of a user, and a healthy folder of each kind for `damaged_folders`."""
    from PIL import Image

    mine, theirs = folder / "mine", folder / "theirs"
    for name in ("mine/pictures", "theirs/prompts", "theirs/pictures"):
        (folder / name).mkdir(parents=True)
    (mine / "thesis.txt").write_text("years of work\n")
    for name, colour in (("a", "red"), ("b", "blue")):
        for place in (mine, theirs):
            Image.new("RGB", (16, 16), colour).save(place / "pictures" / f"{name}.png")
    texts = {"txt": "apple\ncar\n", "csv": "prompt,seed\napple,1\ncar,2\n", "tsv": "prompt\tseed\napple\t1\n"}
    texts |= {"json": '["apple", {"prompt": "car", "seed": 2}]', "jsonl": '"apple"\n{"prompt": "car", "seed": 3}\n'}
    for suffix, text in texts.items():
        (theirs / "prompts" / f"p.{suffix}").write_text(text)
    assets = Path(resolve_name("svdd").__file__).parent / "assets"
    for name in ("emoji-sd", "emoji-clip"):
        shutil.copytree(assets / name, theirs / name)
    for output, words in (
        ("mine/run", BASE["predict"][:-1]),
        ("theirs/run", BASE["predict"][:-1]),
        ("theirs/tar", [*BASE["predict"][:-2], "--tar", "true", "--output"]),
        ("theirs/fit", [*BASE["fit"][:-2], "--data.cache", "theirs/cache", "--output"]),
        ("theirs/calibration", BASE["calibrate"][:-1]),
    ):
        made_for = {"theirs/fit": {"fit", "cache"}}.get(output, {output.split("/")[1]})
        if output != "mine/run" and not made_for & {*kinds}:
            continue
        code, text, _ = _in_child([*words, output], folder)
        assert code == 0, text


def run(case: Case, template: Path) -> Outcome:
    """Runs a case in a copy of the template whose large files are links."""
    with tempfile.TemporaryDirectory(prefix="svdd-fuzz-") as place:
        folder = Path(place)
        if case.damage is None or case.words[-1] == "wrong.yaml":
            shutil.copytree(template / "mine", folder / "mine")
        else:
            shutil.copytree(template, folder, dirs_exist_ok=True, copy_function=_copy)
        os.mkfifo(folder / "mine" / "fifo")
        (folder / "mine" / "loop").symlink_to("loop")
        if case.damage is not None:
            case.damage(folder)
        before, names = _snapshot(folder / "mine"), {*folder.iterdir()}
        code, text, seconds = _in_child(case.words, folder)
        faults = ["hang"] if code == 256 else [] if code in CODES else [f"exit code {code}"]
        if "Traceback" in text or 'File "' in text:
            faults.append("traceback")
        lines = [line for line in text.splitlines() if line]
        if code == 2 and not (lines and any(line.startswith("svdd: ") for line in lines)):
            faults.append("no message")
        if printable(text.replace("\r", "")) != text.replace("\r", ""):
            faults.append("control characters")
        after = _snapshot(folder / "mine")
        if case.words[-2:-1] == ["--data.cache"]:  # a cache may be added to any folder
            after = {path: after.get(path) for path in before}
        if after != before or (folder / "hacked").exists():
            faults.append("a user's file changed")
        left = [] if code != 2 else [path.name for path in folder.iterdir() if path not in names]
        return Outcome(case, code, text, seconds, faults, left)


def _copy(source: str, target: str) -> None:
    if os.path.getsize(source) > 100_000:
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def _snapshot(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        found[str(path)] = (status.st_mode, content, status.st_mtime_ns if path.is_file() else None)
    return found


def _in_child(words: list[str], folder: Path) -> tuple[int, str, float]:
    """Runs `svdd` in a forked process; returns its exit code, 256 if it was ended for its time, and what it printed."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            _run_and_exit(words, folder, said.fileno())
        code = None
        while code is None:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() - start > LIMIT:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                code = 256
            else:
                time.sleep(0.005)
        said.seek(0)
        return code, said.read().decode(errors="surrogateescape"), time.monotonic() - start


def _run_and_exit(words: list[str], folder: Path, said: int) -> None:
    code: Any = 1
    try:
        os.setsid()
        os.chdir(folder)
        for stream in (1, 2):
            os.dup2(said, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        limit = 12 * 2**30  # bytes of address space
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        sys.argv = ["svdd", *words]
        code = svdd()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def fuzz(lines: int, damages: int, configs: int, seed: int, only: str = "") -> list[Outcome]:
    """Runs all cases one after the other, and prints those that fail and a line of totals."""
    torch.set_num_threads(1)
    import_all()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="svdd-fuzz-template-") as place:
        template = Path(place)
        make_template(template, folders_to_damage(seed)[:damages])
        cases = [*command_lines(lines, seed), *damaged_configs(configs, seed)]
        cases += damaged_folders(template, damages, seed)
        for case in cases:
            if only not in case.name:
                continue
            if len(outcomes) % 100 == 99:
                print(f"{len(outcomes) + 1} cases", flush=True)
            outcome = run(case, template)
            outcomes.append(outcome)
            if outcome.faults:
                text = outcome.text if len(outcome.text) < 3000 else f"{outcome.text[:1000]} ... {outcome.text[-2000:]}"
                print(printable(f"{', '.join(outcome.faults)}: {case.name}\n{text}\n---"), flush=True)
    kinds = Counter(fault for outcome in outcomes for fault in outcome.faults)
    codes = Counter(outcome.code for outcome in outcomes)
    print(f"{len(outcomes)} cases, exit codes {dict(codes)}, faults: {dict(kinds) or 'none'}")
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lines", type=int, default=4000, help="command lines")
    parser.add_argument(
        "--damages", type=int, default=400, help="damaged folders; each meets every command that reads it"
    )
    parser.add_argument("--configs", type=int, default=1000, help="damaged configurations; each meets every command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only cases whose name holds this text")
    chosen = parser.parse_args()
    found = fuzz(chosen.lines, chosen.damages, chosen.configs, chosen.seed, chosen.only)
    left = [outcome for outcome in found if outcome.left and outcome.case.damage is None]
    for outcome in left:
        print(printable(f"left {', '.join(outcome.left)}: {outcome.case.name}: {outcome.text[-200:]!r}"))
    print(f"{len(left)} refused command lines left something behind")
    sys.exit(any(outcome.faults for outcome in found))
