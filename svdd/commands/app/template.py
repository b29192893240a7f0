"""What the owner of the page sets, a configuration, and what a visitor adds to it: together the settings of a run."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from svdd import UserError
from svdd.commands.app.controls import arguments, checked_number, controls_of, named_class, offered
from svdd.commands.app.rewards import Allowed, checked_reward, in_short, values_in
from svdd.commands.parser import with_shipped_configs
from svdd.commands.registry import catalogue, import_all
from svdd.commands.reward_sums import expand
from svdd.runs.prompts import PromptDataset
from svdd.runs.yaml_text import read_yaml

__all__ = ["Form", "Template", "Wanted"]

MAX_IMAGES = 16
_MAX_TEXT = 1_000  # characters of a prompt
_MAX_STEPS = 1_000
_MAX_BUDGET = 10**6
_SEEDS = 2**53  # that a page's script holds exactly
_PLAIN = re.compile(r"(?!null$)\w[\w ,./'()-]*", re.IGNORECASE)  # a text that a command line takes as it is
_DEFAULTS = {"sampler": "SVDD", "value": "PosteriorMean", "diffusion": "AutoDiffusion"}


class Form(NamedTuple):
    """What a visitor sends, not yet checked."""

    prompt: Any
    negative_prompt: Any
    reward: Any
    held_out: Any  # one reward a line
    sampler: Any
    sampler_arguments: Sequence[Any]  # one value for each control of the class
    value: Any
    value_arguments: Sequence[Any]
    guidance_scale: Any
    num_inference_steps: Any
    seed: Any
    images: Any
    budget: Any


class Wanted(NamedTuple):
    """The settings of a run, as in YAML, and the rewards in their short form."""

    model: dict[str, Any]
    prompt: str
    reward: str
    held_out: list[str]

    def yaml(self) -> str:
        """Returns a configuration of `svdd predict` that draws the same pictures."""
        settings = {"model": self.model, "data": {"prompts": [self.prompt]}}
        return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=100)

    def command(self, accelerator: str) -> str:
        """Returns a command line that draws the same pictures."""
        words = [["--output", "runs/app"], ["--data.prompts", json.dumps([self.prompt], ensure_ascii=False)]]
        words += [[f"--model.reward={self.reward}"], *([f"--model.eval_rewards+={each}"] for each in self.held_out)]
        for name, setting in self.model.items():
            if isinstance(setting, dict) and name != "reward":
                words += _options(f"--model.{name}", setting)
            elif name not in ("reward", "eval_rewards"):
                words.append([f"--model.{name}", str(setting)])
        words.append(["--trainer.accelerator", accelerator, "--trainer.devices", "1"])
        return " \\\n    ".join(["svdd predict", *map(shlex.join, words)])


class Template:
    """A configuration of `svdd predict`, of which a visitor may change what `Form` lists.

    Args:
        config: The configuration's file, or the name of one that ships with svdd.
        pretrained: Another model in place of the configuration's.
        reward: Another guide in place of the configuration's, in the short form.
        names: The rewards that visitors may name; by default all that are registered.

    Raises:
        UserError: If the configuration cannot be used here.
    """

    def __init__(
        self, config: str, pretrained: str | None = None, reward: str | None = None, names: Sequence[str] = ()
    ) -> None:
        import_all()
        (path,) = with_shipped_configs([f"--config={config}"])
        if not (file := Path(path.removeprefix("--config="))).is_file():
            raise UserError(f"--config {config}: no such file")
        given = read_yaml(file.read_text(encoding="utf-8-sig"))
        settings: dict[str, Any] = given if isinstance(given, dict) else {}
        model, trainer, data = (settings.get(name) or {} for name in ("model", "trainer", "data"))
        if not (isinstance(model, dict) and isinstance(trainer, dict) and isinstance(data, dict)):
            raise UserError(f"--config {config}: expected its parts as mappings, not as the names of other files")
        if str(trainer.get("precision") or "32-true") not in ("32", "32-true"):
            found = f"trainer.precision={trainer['precision']}"
            raise UserError(f"--config {config}: the page has no Trainer, got {found}; set model.diffusion.dtype")
        self.parts = {name: _part(model.get(name), default) for name, default in _DEFAULTS.items()}
        if pretrained is not None:
            self.parts["diffusion"]["init_args"]["pretrained"] = pretrained
        self.reward = reward or in_short(model.get("reward") or "Brightness")
        held_out = model.get("eval_rewards") or []
        held_out = held_out if isinstance(held_out, list) else [held_out]
        self.held_out = [in_short(each) for each in held_out]
        self.model = {name: model[name] for name in ("images_per_prompt", "budget", "seed") if model.get(name)}
        prompts = data.get("prompts")
        self.prompt = prompts[0] if isinstance(prompts, list) and [*map(type, prompts[:1])] == [str] else "red apple"
        registered = {kind: [entry.name for entry in catalogue() if entry.kind == kind] for kind in _KINDS}
        self.rewards = frozenset(names or registered["reward"])
        if unknown := self.rewards - {*registered["reward"]}:
            raise UserError(f"--rewards: unknown {', '.join(sorted(unknown))}; `svdd list reward` lists all")
        self.allowed: Allowed = frozenset(
            found for each in (model.get("reward"), *held_out) for found in values_in(each)
        ) | frozenset(values_in(expand(reward or "")))
        self.choices = {
            kind: [name for name in registered[kind] if offered(kind, name)] for kind in ("sampler", "value")
        }
        for kind, names_of_kind in self.choices.items():
            own, path = self.class_of(kind), str(self.parts[kind]["class_path"])
            if own not in registered[kind] or not (path == own or path.startswith("svdd.")):
                raise UserError(f"--config {config}: model.{kind} is {path}; the page takes registered classes only")
            names_of_kind += [own] if own not in names_of_kind else []

    def class_of(self, kind: str) -> str:
        """Returns the name of the configuration's class of this kind."""
        return str(self.parts[kind]["class_path"]).rpartition(".")[2]

    def given(self, kind: str, name: str) -> dict[str, Any]:
        """Returns what the configuration gives to a class."""
        return self.parts[kind]["init_args"] if name == self.class_of(kind) else {}

    def first(self) -> "Form":
        """Returns the form as the page shows it first."""
        diffusion, controls = self.parts["diffusion"]["init_args"], {}
        for kind in ("sampler", "value"):
            own, known = self.class_of(kind), self.given(kind, self.class_of(kind))
            controls[kind] = (own, [known.get(each.name, each.default) for each in controls_of(named_class(kind, own))])
        return Form(
            self.prompt,
            diffusion.get("negative_prompt") or "",
            self.reward,
            "\n".join(self.held_out),
            *controls["sampler"],
            *controls["value"],
            diffusion.get("guidance_scale"),
            diffusion.get("num_inference_steps", 50),
            self.model.get("seed", 0),
            min(self.model.get("images_per_prompt", 1), MAX_IMAGES),
            self.model.get("budget"),
        )

    def wanted(self, form: Form) -> Wanted:
        """Returns the settings of a run; UserError if something in the form is not allowed."""
        prompt = PromptDataset([_text("prompt", form.prompt)])[0].text
        reward = checked_reward(form.reward, self.rewards, self.allowed)
        lines = [line.strip() for line in _text("held-out rewards", form.held_out).splitlines() if line.strip()]
        held_out = [checked_reward(line, self.rewards, self.allowed) for line in lines]
        diffusion = dict(self.parts["diffusion"]["init_args"])
        steps = checked_number("num_inference_steps", form.num_inference_steps, 1, _MAX_STEPS, True)
        diffusion["num_inference_steps"] = steps
        if form.guidance_scale not in (None, ""):
            diffusion["guidance_scale"] = checked_number("guidance_scale", form.guidance_scale, 0, 100, False)
        if negative := _text("negative prompt", form.negative_prompt).strip():
            diffusion["negative_prompt"] = PromptDataset([negative])[0].text
        model: dict[str, Any] = {"reward": reward}
        model |= {"eval_rewards": held_out} if held_out else {}
        model["diffusion"] = {**self.parts["diffusion"], "init_args": diffusion}
        model["sampler"] = self._part("sampler", form.sampler, form.sampler_arguments)
        value = self._part("value", form.value, form.value_arguments)
        model |= {} if value == {"class_path": _DEFAULTS["value"], "init_args": {}} else {"value": value}
        model["images_per_prompt"] = checked_number("images", form.images, 1, MAX_IMAGES, True)
        if form.budget not in (None, "", 0):
            model["budget"] = checked_number("budget", form.budget, 1, _MAX_BUDGET, True)
            name = named_class("sampler", str(form.sampler)).__dict__.get("budget_argument")
            if isinstance(model["sampler"]["init_args"].get(name, 0), int):
                model["sampler"]["init_args"].pop(name, None)  # the budget chooses it
        model["seed"] = checked_number("seed", form.seed, 0, _SEEDS, True)
        model = {name: _without_empty(setting) for name, setting in model.items()}
        return Wanted(model, prompt, form.reward.strip(), lines)

    def _part(self, kind: str, name: Any, given: Sequence[Any]) -> dict[str, Any]:
        if name not in self.choices[kind]:
            raise UserError(f"unknown {kind} {str(name)[:40]!r}; known: {', '.join(self.choices[kind])}")
        read = arguments(named_class(kind, name), given, self.given(kind, name))
        return {"class_path": name, "init_args": read}


_KINDS = ("sampler", "value", "reward")


def _part(setting: Any, default: str) -> dict[str, Any]:
    """Returns class_path and init_args of a setting in any of the forms that YAML allows."""
    setting = {"class_path": setting} if isinstance(setting, str) else dict(setting or {})
    if "class_path" not in setting:
        setting = {"class_path": default, "init_args": setting.get("init_args", setting)}
    return {"class_path": setting["class_path"], "init_args": dict(setting.get("init_args") or {})}


def _text(name: str, text: Any) -> str:
    if not isinstance(text, str | None) or len(text or "") > _MAX_TEXT:
        raise UserError(f"{name}: expected a text of at most {_MAX_TEXT} characters")
    if re.search("[\0\ud800-\udfff]", text or ""):
        raise UserError(f"{name}: holds a character that cannot be stored as UTF-8; remove it")
    return text or ""


def _without_empty(setting: Any) -> Any:
    if isinstance(setting, dict) and not setting.get("init_args", True):
        return {"class_path": setting["class_path"]}
    return setting


def _options(option: str, setting: dict[str, Any]) -> list[list[str]]:
    """Returns the options of a class with its arguments; nested ones, and texts that YAML reads otherwise, as JSON."""
    given = setting.get("init_args") or {}
    plain = {name: value for name, value in given.items() if value is not None}
    if not all(_PLAIN.fullmatch(value) for value in plain.values() if isinstance(value, str)):
        return [[option, json.dumps(setting, ensure_ascii=False)]]
    return [
        [option, setting["class_path"]],
        *(
            [f"{option}.{name}", value if isinstance(value, str) else json.dumps(value)]
            for name, value in plain.items()
        ),
    ]
