"""What a model is, by its small files: the index of a folder or hub name, and the configurations of its parts."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from svdd import UserError
from svdd.assets.hub import ASSETS, fetch, find_file, is_local, locate
from svdd.diffusion.single_file import architecture, is_single_file

__all__ = [
    "EMBEDDED",
    "INDEX",
    "LEFT_OUT",
    "Configs",
    "ModelIndex",
    "Source",
    "examine",
    "name_of",
    "read_index",
    "read_json",
]

Configs = dict[str, dict[str, Any]]  # config.json by the name of the part
EMBEDDED = {
    "emoji": "emoji-sd",
    "emoji-flow": "emoji-flow",
}  # the pipelines that ship with svdd: folders of assets by name
INDEX = "model_index.json"
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")  # pictures drawn from prompts alone need none


class Source(NamedTuple):
    """Where a model comes from; arguments of `LatentDiffusion` of the same names."""

    pretrained: str
    config: str | None = None
    revision: str | None = None
    variant: str | None = None
    local_files_only: bool = False

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "Source":
        """Returns what the arguments of a class name, of which some may be missing."""
        given = {name: arguments[name] for name in cls._fields if arguments.get(name) is not None}
        return cls(**{"pretrained": "emoji"} | given)

    @property
    def what(self) -> str:
        """The beginning of an error's message."""
        return f"pretrained={self.pretrained!r}"


class ModelIndex(NamedTuple):
    """A pipeline's model_index.json, and where it lies."""

    source: str  # a folder or a hub name
    entries: dict[str, Any]
    options: dict[str, Any]  # to read more of a hub name
    file: Path | None = None  # the single file whose configuration this is

    @property
    def pipeline(self) -> str | None:
        """Name of the pipeline's class in diffusers."""
        return found if isinstance(found := self.entries.get("_class_name"), str) else None

    def parts(self) -> Iterator[tuple[str, tuple[str, str]]]:
        """Yields the name of each part that is loaded, with its library and class."""
        for name, entry in self.entries.items():
            if isinstance(entry, list) and len(entry) == 2 and name not in LEFT_OUT and None not in entry:
                yield name, (str(entry[0]), str(entry[1]))


def read_index(source: Source, saved: str = "a pipeline's save_pretrained") -> ModelIndex:
    """Returns the index of a model; of a single file, that of its configuration.

    Args:
        source: The model.
        saved: What saves such a folder, for messages.

    Raises:
        UserError: If there is no such model, or a file is of another kind.
    """
    what, pretrained = source.what, source.pretrained
    if pretrained in EMBEDDED:
        pretrained = str(ASSETS / EMBEDDED[pretrained])
    elif is_single_file(pretrained):
        return _index_of_file(source, saved)
    elif source.config is not None:
        raise UserError(f"{what} is no single file, so it has its own configuration; leave out config")
    expected = f"`emoji`, `emoji-flow`, a folder saved by {saved}, a .safetensors file, or a hub name such as "
    expected += "stable-diffusion-v1-5/stable-diffusion-v1-5"
    if is_local(pretrained):
        folder = Path(pretrained).expanduser()
        if folder.exists() and not (file := folder / INDEX).is_file():
            raise UserError(f"{what} {_describe(folder)}; expected {expected}")
        found, options = locate(what, pretrained, INDEX, expected)
        return ModelIndex(found, read_json(what, file), options)
    file, options = fetch(what, pretrained, INDEX, source.revision, source.local_files_only)
    return ModelIndex(pretrained, read_json(what, file), options)


def _index_of_file(source: Source, saved: str) -> ModelIndex:
    file = find_file(source.pretrained, source.revision, source.local_files_only)
    held = architecture(source.what, file)
    if source.config is None and held.repository is None:
        needs = "give `config`, a folder or hub name of its pipeline, if that is a model of this kind"
        raise UserError(f"{source.what} is a single file, of {held.name}, whose configuration is not known; {needs}")
    config = source.config or str(held.repository)
    try:
        index = read_index(Source(config, local_files_only=source.local_files_only), saved)
    except UserError as error:
        needs = (
            f"{source.what} is a single file, of {held.name}, and needs the configuration of its pipeline (`config`)"
        )
        raise UserError(f"{needs}: {error}") from error
    if held.pipeline is not None and index.pipeline != held.pipeline:
        raise UserError(
            f"{source.what} is a single file, of {held.name}, but config={config!r} is that of a {index.pipeline}"
        )
    return index._replace(file=file)


def examine(source: Source, class_name: str, check: Callable[[Configs], str]) -> ModelIndex:
    """Checks what a model is: a hub name by its model_index.json alone.

    Args:
        source: The model.
        class_name: The class of pipelines that it must be of.
        check: Returns what is wrong with the configurations of the parts, or an empty string.

    Raises:
        UserError: If there is no such model, or it is not what is expected.
    """
    saved, what = f"{class_name}.save_pretrained", source.what
    index = read_index(source, saved)
    if index.pipeline != class_name:
        kind = f"names no class of pipelines in {INDEX}" if index.pipeline is None else f"is a {index.pipeline}"
        hint = f"this class takes a {class_name}, and AutoDiffusion any model: expected a folder saved by {saved}"
        raise UserError(f"{what} {kind}; {hint}")
    if lacking := sorted(_lacking(index.entries)):
        raise UserError(f"{what} is incomplete: {INDEX} names no {', '.join(lacking)}; expected the whole model")
    configs, folder = {}, Path(index.source).expanduser()
    for name, (library, kind) in index.parts():
        if library not in ("diffusers", "transformers"):
            problem = f"takes its {name} from {library}.{kind}, and code in a model is never run"
            raise UserError(f"{what} {problem}; expected classes of diffusers and transformers")
        if kind.startswith("EDM"):  # as Playground v2.5
            problem = f"was trained for the noise levels of EDM ({kind}), of which there is no kernel"
            raise UserError(f"{what} {problem}; expected a scheduler with betas, or of flow matching")
        if is_local(index.source):
            if not (folder / name).is_dir():
                problem = f"is incomplete: it has no folder {name}, which {INDEX} names"
                raise UserError(f"{what} {problem}; copy or download the whole model")
            if (file := folder / name / "config.json").is_file():
                configs[name] = read_json(what, file)
    if configs and (problem := check(configs)):
        raise UserError(f"{what} {problem}")
    return index


def _lacking(entries: Mapping[str, Any]) -> Iterator[str]:
    """Yields the parts that pictures need and an index lacks or states as null; a third text encoder may be absent."""
    there = {name for name, entry in entries.items() if isinstance(entry, list) and None not in entry}
    yield from {"vae", "scheduler"} - there
    if not there & {"unet", "transformer"}:
        yield "unet or transformer"
    for name in entries.keys() - there:
        if re.fullmatch(r"(text_encoder|tokenizer)(_2)?", name):
            yield name


def name_of(pipe: Any) -> str:
    """Returns from where a pipeline object was loaded, or the name of its class."""
    name = str(getattr(pipe, "name_or_path", None) or type(pipe).__name__)
    return next((known for known, folder in EMBEDDED.items() if name == str(ASSETS / folder)), name)


def read_json(what: str, file: Path) -> dict[str, Any]:
    """Returns a JSON object in a file; UserError if it holds none."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{what} cannot be loaded: {file} is damaged ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{what} cannot be loaded: {file} is damaged; expected a JSON object")
    return found


def _describe(path: Path) -> str:
    """Returns what is in a folder that is none of a pipeline."""
    for name in ("config.json", "modular_model_index.json"):
        if (path / name).is_file():
            found = read_json(f"pretrained={str(path)!r}", path / name)
            kind = found.get("_class_name") or found.get("model_type") or "model of unknown class"
            return f"is a {kind} alone and has no {INDEX}"
    if files := sorted(file.name for file in path.iterdir() if file.suffix in (".safetensors", ".ckpt")):
        return f"has no {INDEX}, but single files such as {files[0]}, which can be given themselves"
    return f"has no {INDEX}"
