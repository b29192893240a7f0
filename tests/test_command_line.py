"""What users type: help, short forms, lists, suggestions and completion."""

import inspect
import re
import shutil
import subprocess
import sys
from importlib import import_module

import pytest
import yaml

from svdd import UserError
from svdd.__main__ import _COMMANDS, main
from svdd.commands.benchmark import benchmark_parser
from svdd.commands.calibrate import CalibrateCLI
from svdd.commands.fit import FitCLI
from svdd.commands.predict import PredictCLI
from svdd.commands.registry import KINDS, catalogue
from svdd.commands.score import score_parser
from svdd.commands.settings.known import settings_of
from svdd.commands.settings.own import COMMANDS
from svdd.commands.settings.pages import help_page
from svdd.commands.settings.short_forms import spelled_out
from svdd.commands.settings.signatures import parameters
from svdd.commands.test_reward import reward_parser

CLASSES = {"predict": PredictCLI, "fit": FitCLI, "calibrate": CalibrateCLI}
PARSERS = {"score": score_parser, "score --benchmark": benchmark_parser, "test-reward": reward_parser}
PAGES = [name for name in COMMANDS if " " not in name]


def parser_of(command: str):
    """Returns the parser that reads the command line."""

    class Found(BaseException):
        pass

    class Stopped(CLASSES[command]):
        def parse_arguments(self, parser, args):
            raise Found(self._parser(self.command))

    with pytest.raises(Found) as found:
        Stopped([])
    return found.value.args[0]


def resolved(*words: str) -> dict:
    """Returns the settings of `svdd predict` as a run would record them."""

    class Stopped(PredictCLI):
        def before_instantiate_classes(self):
            raise InterruptedError

        def parse_arguments(self, parser, args):
            super().parse_arguments(parser, args)
            found.update(self.resolved())

    found: dict = {}
    with pytest.raises(InterruptedError):
        Stopped(spelled_out("predict", ["-p", "emoji", *words]))
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_knows_the_settings_of_the_parser(command):
    parser = parser_of(command) if command in CLASSES else PARSERS[command]()
    with pytest.raises(UserError) as lacking:
        parser.parse_args([])
    required, real = re.findall(r"--([\w.]+) is required", str(lacking.value)), {}
    for action in parser._actions:
        loads_a_section = type(action).__name__ == "_ActionConfigLoad"
        shown = action.option_strings and action.help != "==SUPPRESS==" and not action.dest.endswith("help")
        if shown and not loads_a_section:
            default = action.default if isinstance(action.default, str | int | float | bool | list) else None
            real[action.dest] = ... if action.dest in required else default
    known = {setting.name: setting.default for setting in settings_of(command)}
    real["print_config"] = known["print_config"] if "print_config" in real else "missing"
    assert known == real
    defaults = {name: parser.get_defaults()[f"model.{name}"]["class_path"] for name in COMMANDS[command].classes}
    assert {name: path.rpartition(".")[2] for name, path in defaults.items()} == {
        name: path.rpartition(".")[2] for name, path in COMMANDS[command].classes.items()
    }


def test_the_arguments_of_classes_are_those_of_their_constructors():
    of_some_families = {"max_sequence_length", "true_cfg_scale", "cfg_normalization", "cfg_truncation"}
    for entry in catalogue():
        found = {each.name for each in parameters(f"{KINDS[entry.kind][0]}.{entry.name}")}
        real = inspect.signature(getattr(import_module(KINDS[entry.kind][0]), entry.name)).parameters.values()
        named = {each.name for each in real if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
        passes_on = {each.kind for each in real} >= {inspect.Parameter.VAR_KEYWORD} and entry.kind == "diffusion"
        assert found >= named - of_some_families, entry
        assert passes_on or found <= named, entry


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", PAGES)
def test_the_help_is_whole_and_begins_with_what_most_runs_set(command, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    page = help_page(command)
    lines = page.splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) < 290
    for setting in settings_of(command):
        assert f"--{setting.name} " in page or f"--{setting.name}\n" in page
    text = " ".join(page.split())
    assert command not in CLASSES or "restart after one of several has died. [default: 0]" in text
    assert command != "fit" or re.search(r"--trainer.max_epochs INT [^\[]*\[default: 20\]", text)
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings[0] == "used most:"
    if command in CLASSES:
        assert headings[-1] == "options of Lightning's Trainer:"
        assert page.index("--trainer.accelerator") > page.index("--overwrite")
        assert page.index("--model.reward") < page.index("--data.prompts") < page.index("--output")
        first = next(each.help for each in parameters(COMMANDS[command].parts["model"]) if each.name == "reward")
        assert first in " ".join(page.split())
    if command == "predict":
        for entry in catalogue():
            assert entry.name in page
        assert "--model.sampler.help NAME" in page


def test_help_and_lists_import_no_torch():
    code = "import sys; from svdd.__main__ import main\n"
    code += "pages = [[name, '--help'] for name in sys.argv[1:]]\n"
    code += "for words in (*pages, ['list', 'samplers'], ['completion', 'bash']):\n"
    code += "    try: assert main(words) == 0\n    except SystemExit as error: assert error.code == 0\n"
    code += "assert not {'torch', 'lightning', 'diffusers', 'transformers', 'torchmetrics'} & {*sys.modules}"
    names = [*PAGES, "study", "compare", "report", "gallery", "app", "list", "completion"]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_short_forms_are_the_whole_names():
    words = ["-r", "CLIPScore", "-p=a.txt", "-s", "SMC", "--sampler.alpha=1", "-m", "emoji", "-o", "x", "-c=quickstart"]
    assert spelled_out("predict", words) == [
        *("--model.reward", "CLIPScore", "--data.prompts=a.txt", "--model.sampler", "SMC", "--model.sampler.alpha=1"),
        *("--model.diffusion.pretrained", "emoji", "--output", "x", "--config=quickstart"),
    ]
    assert spelled_out("predict", ["-output", "--reward.help", "--rewards", "-1"]) == [
        *("-output", "--model.reward.help", "--rewards", "-1")
    ]
    assert spelled_out("fit", ["-s", "SMC", "-r", "X"]) == ["-s", "SMC", "--model.reward", "X"]
    assert spelled_out("score", ["-r", "X", "--images", "-m"]) == ["--reward", "X", "--images", "-m"]
    long = ["--model.reward", "CLIPScore", "--model.sampler", "SMC", "--model.sampler.alpha", "1", "--output", "x"]
    assert resolved("-r", "CLIPScore", "-s=SMC", "--sampler.alpha=1", "-o", "x") == resolved(*long)


def test_one_name_is_appended_to_a_list_and_a_list_replaces_it(tmp_path):
    (tmp_path / "lists.yaml").write_text(
        yaml.safe_dump({"model": {"eval_rewards": ["Sharpness"]}, "trainer": {"callbacks": "TQDMProgressBar"}})
    )

    def names(*words: str, key: str = "eval_rewards", section: str = "model") -> list[str]:
        found = resolved("-r", "Compressibility", *words)[section][key]
        return [each if isinstance(each, str) else each["class_path"].rpartition(".")[2] for each in found]

    config, option = ["--config", str(tmp_path / "lists.yaml")], "--model.eval_rewards"
    assert names(option, "CLIPScore") == ["CLIPScore"]
    assert names(option, "CLIPScore", f"{option}=Brightness") == ["CLIPScore", "Brightness"]
    assert names(*config, option, "CLIPScore") == ["Sharpness", "CLIPScore"]
    assert names(*config, f"{option}+=CLIPScore") == ["Sharpness", "CLIPScore"]
    assert names(*config, option, "Brightness - 0.5 * Sharpness") == ["Sharpness", "WeightedSum"]
    assert names(*config, option, "[CLIPScore]") == ["CLIPScore"]
    callbacks = names(*config, "--trainer.callbacks", "ModelSummary", key="callbacks", section="trainer")
    assert callbacks == ["TQDMProgressBar", "ModelSummary"]
    measured = ["--evaluation.distances", "cmmd", "--evaluation.distances=kid"]
    assert names(*measured, key="distances", section="evaluation") == ["cmmd", "kid"]
    found = resolved("-r", "Brightness", *config, option, "CLIPScore", f"{option}.pretrained", "emoji-judge")
    assert found["model"]["eval_rewards"][1]["init_args"]["pretrained"] == "emoji-judge"


RUN = ["predict", "-r", "Compressibility", "-p", "emoji"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["predict"], "error: --model.reward is required: for example -r Compressibility; --data.prompts is required:"),
        (["predict", "-r", "HTTPReward", "-p", "emoji"], "error: --model.reward.url is required"),
        (["predict", "-r"], "error: --model.reward needs a value"),
        (["score"], "--reward is required: for example -r Compressibility; --images is required: Folder of pictures"),
        (["score", "--benchmark", "geneval"], "error: RUN is required"),
        (["test-reward"], "error: --reward is required"),
        (["study"], "error: STUDY is required: a YAML file"),
        (["completion"], "error: SHELL is required: bash, zsh, tcsh"),
        ([*RUN, "--confg", "quickstart"], "unrecognized arguments: --confg quickstart; did you mean --config?"),
        ([*RUN, "--num_candidate", "3"], "did you mean --model.sampler.num_candidates?"),
        ([*RUN, "num_candidate", "3"], "did you mean --model.sampler.num_candidates?"),
        ([*RUN, "--steps", "3"], "did you mean --model.diffusion.num_inference_steps?"),
        ([*RUN, "--guidance", "3"], "did you mean --model.diffusion.guidance_scale?"),
        ([*RUN, "--dry-run"], "did you mean --dry_run?"),
        ([*RUN, "--model.images-per-prompt", "2"], "did you mean --model.images_per_prompt?"),
        ([*RUN, "--model.smapler.alpha", "2"], "did you mean --model.sampler.alpha?"),
        ([*RUN, "--trainer.device", "2"], "did you mean --trainer.devices?"),
        ([*RUN, "--zzzz"], "unrecognized arguments: --zzzz; `svdd predict --help` lists all settings"),
        ([*RUN, "--model.sampler.num_candidate", "3"], "did you mean 'num_candidates'?"),
        ([*RUN, "--model.diffusion.steps", "3"], "did you mean 'num_inference_steps'?"),
        ([*RUN, "-s", "SMC", "--model.sampler.num_beam", "3"], "did you mean 'num_beams' of BeamSearch?"),
        (
            [*RUN, "--config", "wrong.yaml"],
            "has no setting 'model.smapler'; did you mean 'model.sampler'?",
        ),
        (["score", "--reward", "Brightness", "--images", "x", "--batchsize", "2"], "did you mean --batch_size?"),
        (["score", "--config", "wrong.yaml"], "`svdd score` has no setting 'model"),
        (["calibrate", *RUN[1:], "--candidats", "8"], "did you mean --model.candidates?"),
        (["compare", "a", "--basline", "b"], "did you mean --baseline?"),
        (["report", "a", "--embeded"], "did you mean --embed?"),
        (["study", "emoji", "--device", "2"], "did you mean --devices?"),
        (["study", "emoji", "--steps", "2"], "did you mean --model.diffusion.num_inference_steps?"),
        (["list", "rewrads"], "did you mean 'reward'?"),
        (["completion", "fisch"], "argument SHELL: invalid choice: 'fisch'"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_a_mistake_gets_one_line_that_says_what_to_write(words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.yaml").write_text("model: {smapler: SVDD}\n")
    assert main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected in line


def test_list_takes_plurals_and_has_help(capsys):
    assert main(["list", "samplers", "Values"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("sampler:\n  BeamSearch ")
    assert "value:\n" in text
    assert "reward:" not in text
    with pytest.raises(SystemExit) as exit_:
        main(["list", "--help"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("usage: svdd list")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_classes_and_files(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    (tmp_path / "svdd.sh").write_text(capsys.readouterr().out)
    (tmp_path / "my_prompts.txt").write_text("apple")
    lines = {
        "svdd ": sorted(_COMMANDS),
        "svdd pred": ["predict"],
        "svdd predict --model.bud": ["--model.budget"],
        "svdd predict -r Compress": ["Compressibility"],
        "svdd predict --model.sampler Un": ["Unguided"],
        "svdd predict --sampler Un": ["Unguided"],
        "svdd predict -s SVDD --model.sampler.num_c": ["--model.sampler.num_candidates"],
        "svdd predict -c qui": ["quickstart"],
        "svdd predict -p my_": ["my_prompts.txt"],
        "svdd predict --model.on_error ": ["raise", "skip"],
        "svdd score --benchmark gen": ["geneval"],
        "svdd test-reward Compress": ["Compressibility"],
        "svdd compare my_": ["my_prompts.txt"],
        "svdd study trade": ["trade_off"],
        "svdd study x --model.bud": ["--model.budget"],
        "svdd list sam": ["samplers"],
        "svdd completion z": ["zsh"],
    }
    script = "source ./svdd.sh\n"
    for line in lines:
        words = " ".join(f"'{word}'" for word in line.split(" "))
        script += f"COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))\n"
        script += '_shtab_svdd; echo "${COMPREPLY[@]}"\n'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    found = [sorted(line.split()) for line in done.stdout.splitlines()]
    assert dict(zip(lines, found, strict=True)) == lines
