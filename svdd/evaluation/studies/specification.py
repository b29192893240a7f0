"""What a study is: a file that describes a grid of runs, each an ordinary run folder."""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml

from svdd import UserError, did_you_mean, is_integer
from svdd.evaluation.studies.names import as_text, folder_name, labels, reward_pairs, shortened
from svdd.runs.files import regular_only
from svdd.runs.yaml_text import read_yaml

__all__ = ["STATISTICS", "Cell", "Specification", "Study", "words_of"]

STATISTICS = ("mean", "median", "top10", "top20")
_KEYS = ("base", "settings", "guides", "variants", "budgets", "baseline", "statistics", "fronts")
_OWN = {"output": "svdd study --output", "overwrite": "remove the run's folder instead", "model.budget": "budgets"}
_MOST_BYTES, _MOST_CELLS = 2**20, 10_000


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Args:
        name: A unique name that is valid as that of a folder.
        guide: The group that the run is compared within: the name of its guide.
        variant: The name of its variant, which is the same for all budgets and guides.
        budget: The denoiser rows per image that were asked for; None for a variant that takes no budget.
        settings: Its settings by dotted keys, on top of the base configuration.
        folder: Its run folder.
        base: The configurations that the settings are added to, later ones winning.
    """

    name: str
    guide: str
    variant: str
    budget: int | None
    settings: dict[str, Any]
    folder: Path
    base: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """The command line of `svdd predict`, after the command's name, that makes this run."""
        return [*words_of(self.base, self.settings), "--output", str(self.folder)]


@dataclass(frozen=True)
class Study:
    """The runs of a study, and how they are compared.

    Args:
        cells: The runs, in the order of the file.
        baseline: The variant with which the others are compared; None if there is none.
        statistics: The columns of the table: any of mean, median, top10 and top20.
        folder: The folder of the study, which holds its tables and plots.
        fronts: Pairs of rewards whose trade-off is shown.
    """

    cells: list[Cell]
    baseline: str | None
    statistics: list[str]
    folder: Path
    fronts: tuple[tuple[str, str], ...] = ()


class _Variant(NamedTuple):
    """An entry of `guides` or `variants` without lists: its label, its settings, and its own budgets."""

    label: str
    settings: dict[str, Any]
    budgets: list[int | None] | None  # None: those of the study


class _Guide(NamedTuple):
    """An entry of `guides` without lists: its label, its settings, and the variants with what it adds to them."""

    label: str
    settings: dict[str, Any]
    variants: list[_Variant]


@dataclass(frozen=True)
class Specification:
    """The content of a study's file, checked, its lists expanded."""

    base: tuple[str, ...]
    settings: dict[str, Any]
    guides: list[_Guide]
    budgets: list[int | None]
    baseline: str | None
    statistics: list[str]
    fronts: tuple[tuple[str, str], ...]
    more: dict[str, Any]  # of the command line, for all cells
    content: dict[str, Any]  # as in the file

    @classmethod
    def read(cls, path: Path, more: Mapping[str, Any] | None = None) -> "Specification":
        """Reads a YAML file; `more` are settings that override those of all cells.

        Raises:
            UserError: If the file cannot be read, or an entry is unknown or has the wrong form.
        """
        try:
            with open(path, encoding="utf-8-sig", opener=regular_only) as file:
                text = file.read(_MOST_BYTES + 1)
            if len(text) > _MOST_BYTES:
                raise UserError(f"has more than {_MOST_BYTES} bytes; give prompts in a file of their own")
            return cls._of(read_yaml(text), path.parent, dict(more or {}))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from error
        except yaml.YAMLError as error:
            raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @classmethod
    def _of(cls, tree: Any, folder: Path, more: dict[str, Any]) -> "Specification":
        content = _mapping("a study", tree, _KEYS)
        try:
            json.dumps(content, default=_refuse)
        except TypeError as error:
            raise UserError(f"a key is no text ({error}); put it in quotes") from error
        if unknown := [key for key in content if key not in _KEYS]:
            raise UserError(f"unknown key {unknown[0]!r}; known: {', '.join(_KEYS)}{did_you_mean(unknown[0], _KEYS)}")
        base = content.get("base", [])
        base = [base] if isinstance(base, str) else base
        if not isinstance(base, list) or not all(isinstance(name, str) for name in base):
            raise UserError(f"base must be the name of a configuration, or a list of them, got {shortened(base)}")
        settings = _flat("settings", content.get("settings") or {})
        variants = _mapping("variants", content.get("variants"))
        guides = list(_guides(content["guides"], variants)) if content.get("guides") else []
        guides = guides or [_Guide("", {}, list(_expand("variants", variants)))]
        baseline, statistics = content.get("baseline"), content.get("statistics") or ["mean"]
        labels = list(dict.fromkeys(variant.label for guide in guides for variant in guide.variants))
        if baseline is not None and baseline not in labels:
            known = f"known: {', '.join(labels)}{did_you_mean(str(baseline), labels)}"
            raise UserError(f"baseline {shortened(baseline)} is no variant; {known}")
        if (
            not isinstance(statistics, list)
            or not statistics
            or (wrong := [s for s in statistics if s not in STATISTICS])
        ):
            got = shortened(statistics if not isinstance(statistics, list) or not statistics else wrong[0])
            raise UserError(f"statistics must be a list of {', '.join(STATISTICS)}, got {got}")
        budgets = _budgets("budgets", content.get("budgets")) or [None]
        base = tuple(name if Path(name).is_file() else _beside(folder, name) for name in base)
        fronts = reward_pairs(content.get("fronts"))
        return cls(base, settings, guides, budgets, baseline, statistics, fronts, more, content)

    def _pairs(self) -> Iterator[tuple[_Guide, _Variant]]:
        for guide in self.guides:
            yield from ((guide, variant) for variant in guide.variants)

    def study(
        self, folder: Path, guide_of: Callable[[list[str]], str], takes_budget: Callable[[list[str]], bool]
    ) -> Study:
        """Returns the cells of the study.

        Args:
            folder: Of the study.
            guide_of: Returns the name of the guide reward that a command line of `svdd predict` chooses.
            takes_budget: Returns whether a budget can set the count of the sampler that it chooses.
        """
        cells: list[Cell] = []
        for guide, variant in self._pairs():
            settings = _joined(self.settings, guide.settings, variant.settings, self.more)
            words = words_of(self.base, settings)
            asked = self.budgets if variant.budgets is None else variant.budgets
            budgets = asked if asked == [None] or takes_budget(words) else [None]
            for budget in budgets:
                as_configured = budget is None and variant.budgets is None and budgets == asked
                own = {} if as_configured else {"model.budget": budget}
                label = "-".join(part for part in (guide.label, variant.label, str(budget or "")) if part)
                name = folder_name(label, {cell.name.lower() for cell in cells})
                place = folder / "cells" / name
                group = guide.label or guide_of(words)
                cells.append(Cell(name, group, variant.label, budget, {**settings, **own}, place, self.base))
            if len(cells) > _MOST_CELLS:
                raise UserError(f"the study has more than {_MOST_CELLS} runs; split it")
        return Study(cells, self.baseline, self.statistics, folder, self.fronts)


def _beside(folder: Path, name: str) -> str:
    """Returns the path of a configuration beside the study's file, or the name if there is none."""
    files = (folder / name, folder / f"{name}.yaml")
    return next((str(file) for file in files if file.is_file()), name)


def _joined(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all settings in the order in which a command line gives them: what is set again moves to the end.

    Configurations do not replace each other; `config` becomes their list.
    """
    found: dict[str, Any] = {}
    for part in parts:
        if "config" in part:
            part = {**part, "config": found.get("config", []) + _list(part["config"])}
        for key in sorted(part, key=lambda key: key.count(".")):  # a class before its arguments
            found.pop(key, None)
            found[key] = part[key]
    return found


def words_of(base: tuple[str, ...], settings: Mapping[str, Any]) -> list[str]:
    """Returns configurations and settings as options of `svdd predict`; configurations come first."""
    configs = [*base, *_list(settings.get("config", []))]
    options = [f"--{key}={as_text(value)}" for key, value in settings.items() if key != "config"]
    return [word for config in configs for word in ("--config", config)] + options


def _list(value: Any) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]


def _mapping(what: str, tree: Any, known: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree or not all(isinstance(key, str) for key in tree):
        expected = f"a mapping with {', '.join(known)}" if known else "a mapping with text as keys"
        raise UserError(f"{what}: expected {expected}, got {shortened(tree)}")
    return tree


def _flat(what: str, tree: Any) -> dict[str, Any]:
    """Returns settings by dotted keys; nested mappings without `class_path` are joined to such keys."""
    found: dict[str, Any] = {}
    for key, value in _mapping(what, tree).items() if tree else ():
        if key in _OWN:
            raise UserError(f"{what}.{key} is set by the study: use {_OWN[key]}")
        if not re.fullmatch(r"[A-Za-z]\w*(\.\w+)*\+?", key):
            raise UserError(f"{what}: {key!r} is no setting, expected a dotted key such as model.sampler.alpha")
        if isinstance(value, dict) and "class_path" not in value and key in ("model", "data", "trainer", "evaluation"):
            found |= _flat(what, {f"{key}.{name}": inner for name, inner in value.items()})
        else:
            found[key] = value
    return found


def _guides(tree: Any, variants: Mapping[str, Any]) -> Iterator[_Guide]:
    """Yields the guides, each with the variants, to which its own `variants` may add settings."""
    for name, entry in _mapping("guides", tree).items():
        own, what = dict(entry) if isinstance(entry, dict) else entry, f"guides.{name}.variants"
        added = _mapping(what, own.pop("variants")) if isinstance(own, dict) and own.get("variants") else {}
        if unknown := [each for each in added if each not in variants]:
            known = f"known: {', '.join(variants)}{did_you_mean(unknown[0], variants)}"
            raise UserError(f"{what}: {unknown[0]!r} is no variant; {known}")
        both = {
            each: {**_flat(f"variants.{each}", variants[each]), **_flat(f"{what}.{each}", added[each])}
            for each in added
        }
        found = list(_expand("variants", {**variants, **both}))
        for guide in _expand("guides", {name: own}):
            if guide.budgets is not None:
                raise UserError(f"guides.{name}.budgets: a guide has no budgets; set them for the study or a variant")
            yield _Guide(guide.label, guide.settings, found)


def _expand(what: str, tree: Any) -> Iterator[_Variant]:
    """Yields the entries of a mapping, one for each combination of the values in their lists."""
    for name, entry in _mapping(what, tree).items():
        given = {} if entry in (None, {}) else dict(_mapping(f"{what}.{name}", entry))
        budgets = _budgets(f"{what}.{name}.budgets", given.pop("budgets")) if "budgets" in given else None
        settings = _flat(f"{what}.{name}", given)
        if empty := [key for key, value in settings.items() if value == []]:
            raise UserError(
                f"{what}.{name}.{empty[0]}: the list is empty; give a value, or [[]] for a list without any"
            )
        lists = {key: value for key, value in settings.items() if isinstance(value, list)}
        if math.prod(map(len, lists.values())) > _MOST_CELLS:
            raise UserError(f"{what}.{name}: its lists make more than {_MOST_CELLS} runs; split the study")
        for values in itertools.product(*lists.values()):
            chosen = dict(zip(lists, values, strict=True))
            several = {key: value for key, value in chosen.items() if len(lists[key]) > 1}
            yield _Variant(" ".join([name, *labels(several)]), {**settings, **chosen}, budgets)


def _refuse(value: Any) -> NoReturn:
    raise UserError(f"{shortened(value)} is no text and no number; put it in quotes")


def _budgets(what: str, tree: Any) -> list[int | None] | None:
    """Returns a list of budgets, [None] for null inside a list; None if there are none."""
    if tree is None:
        return [None] if "." in what else None  # a variant that takes none
    given = tree if isinstance(tree, list) else [tree]
    if not given or any(each is not None and (not is_integer(each) or each < 1) for each in given):
        raise UserError(f"{what} must be a list of integers >= 1, denoiser rows per image, got {shortened(tree)}")
    if len(set(given)) < len(given):
        raise UserError(f"{what} has the same budget twice: {shortened(tree)}")
    return given
