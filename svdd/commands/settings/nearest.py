"""What to write in place of a mistyped or a missing setting."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from svdd import did_you_mean
from svdd.commands.settings.known import class_settings, section_of, settings_of
from svdd.commands.settings.own import COMMANDS
from svdd.commands.settings.short_forms import SHORT_FORMS

__all__ = ["hint", "hint_in_class", "missing", "nearest", "setting_names"]

_CUTOFF, _LAST = 0.75, 0.6  # how similar a name must be, and how similar its last part
_WORD_OF = 0.8  # how similar `guidance` is to `guidance_scale`
_LEAST = 4  # letters of such a word
_MOST_OWNERS = 4
_ALIASES = {  # words of other tools
    "model.diffusion.num_inference_steps": "steps num_steps inference_steps ddim_steps sampling_steps",
    "model.diffusion.guidance_scale": "guidance cfg cfg_scale",
    "model.diffusion.pretrained": "model_id model_path pretrained_model checkpoint",
    "model.diffusion.height": "size resolution",
    "model.sampler.num_candidates": "candidates num_samples",
    "model.sampler.num_particles": "particles",
    "model.sampler.alpha": "temperature",
    "model.images_per_prompt": "num_images images num_images_per_prompt",
    "model.eval_rewards": "eval eval_reward held_out",
    "data.prompts": "prompt prompt_file",
    "data.batch_size": "batch bs",
    "trainer.devices": "gpu gpus device num_devices",
    "trainer.precision": "half fp16 bf16 dtype",
    "trainer.max_epochs": "epochs",
    "output": "out outdir out_dir output_dir folder dir save_dir",
}
_EXAMPLES = {"model.reward": "-r Compressibility", "data.prompts": "-p prompts.txt", "reward": "-r Compressibility"}


def setting_names(command: str) -> list[str]:
    """Returns the names of all settings of a command, with those of built-in classes, the likeliest first."""
    commands = [each for each in COMMANDS if each.partition(" ")[0] == command]
    own = [setting.name for each in commands for setting in settings_of(each)]
    trainer = [name for name in own if section_of(name) == "trainer"]
    classes = [name for each in commands for name in class_settings(each)]
    return list(dict.fromkeys([*(name for name in own if name not in trainer), *classes, *trainer]))


def nearest(word: str, names: Sequence[str]) -> str:
    """Returns the name that a word on a command line most likely means; empty if none is similar."""
    plain = re.sub("[=+].*", "", word.lstrip("-"), flags=re.DOTALL).replace("-", "_").lower()
    if not plain:
        return ""
    alias = next((name for name, words in _ALIASES.items() if plain.rpartition(".")[2] in words.split()), "")
    exact = [name for name in names if f".{name}".lower().endswith(f".{plain}")]
    if (whole := plain if plain in exact else alias) in names:
        return whole
    if exact:
        return min(exact, key=lambda name: name.count("."))
    scores = {name: _similarity(plain, name.lower()) for name in names}
    best = max(names, key=lambda name: scores[name], default="")
    return best if best and scores[best] >= _CUTOFF else ""


def hint(word: str, command: str) -> str:
    """Returns the end of a message about an unknown word: the option that it most likely means, or where all are."""
    found = nearest(word, setting_names(command))
    return f"; did you mean --{found}?" if found else f"; `svdd {command} --help` lists all settings"


def hint_in_class(argument: str, setting: str, command: str) -> str:
    """Returns the end of a message about an argument that the class of a setting does not have."""
    known = {name: owners for name, owners in class_settings(command).items() if name.startswith(f"{setting}.")}
    found = nearest(f"{setting}.{argument}", [*known])
    if not found:
        return did_you_mean(argument, [name.rpartition(".")[2] for name in known])
    owners = f" of {', '.join(known[found])}" if len(known[found]) <= _MOST_OWNERS else ""
    return f"; did you mean {found.rpartition('.')[2]!r}{owners}?"


def missing(names: Sequence[str], command: str) -> str:
    """Returns a message about settings without a value, each as its option is written."""
    commands = [each for each in COMMANDS if each.partition(" ")[0] == command]
    helps = {setting.name: setting.help for each in reversed(commands) for setting in settings_of(each)}
    short = {name for _, name in SHORT_FORMS.get(command, {}).values()}
    lines = []
    for name in names:
        about = helps.get(name, "").rstrip(".")
        about = f"for example {_EXAMPLES[name]}" if name in _EXAMPLES and name in short else about
        option = f"--{name}" if "." in name or name in helps else name.upper()  # a positional argument
        lines.append(f"{option} is required{f': {about}' if about else ''}")
    return f"{'; '.join(lines)}; `svdd {command} --help` lists all settings"


def _similarity(plain: str, name: str) -> float:
    last = name.rpartition(".")[2]
    if "." not in plain and len(plain) >= _LEAST and plain in last.split("_"):
        return _WORD_OF
    similar = SequenceMatcher(None, plain.rpartition(".")[2], last).ratio()
    whole = SequenceMatcher(None, plain, name).ratio()
    if "." in plain:
        return whole if similar >= _LAST else 0.0
    return max(similar, whole)
