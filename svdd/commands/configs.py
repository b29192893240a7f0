"""The configurations and studies that ship with svdd, by name."""

import re
from pathlib import Path

from svdd import UserError, did_you_mean

__all__ = ["find_config", "shipped"]

_WHEEL, _SOURCE_TREE = Path(__file__).parents[1] / "assets" / "configs", Path(__file__).parents[2] / "configs"


def shipped(study: bool = False) -> dict[str, str]:
    """Returns the paths of the configurations, or studies, that ship with svdd, by their names, as in `paper/smc`."""
    root = _root()
    paths = [path for path in sorted(root.glob("**/*.yaml")) if ("\nvariants:" in path.read_text("utf-8")) == study]
    return {path.relative_to(root).with_suffix("").as_posix().removeprefix("studies/"): str(path) for path in paths}


def find_config(name: str, study: bool = False) -> str:
    """Returns the path of a shipped configuration or study, or the name itself if it is a path; else a UserError."""
    if not re.fullmatch(r"[\w-]+(/[\w-]+)*(\.yaml)?", name) or Path(name).is_file():
        return name
    stem, known = name.removesuffix(".yaml"), shipped(study)
    if Path(f"{stem}.yaml").is_file():
        return f"{stem}.yaml"
    if stem in known:
        return known[stem]
    if not (_root() / name).parent.is_dir():
        return name  # a path of the user's
    what, kind = (name, "study") if study else (f"--config {name}", "configuration")
    raise UserError(f"{what}: no such file or shipped {kind}; known: {', '.join(known)}{did_you_mean(name, known)}")


def _root() -> Path:
    return _WHEEL if _WHEEL.is_dir() else _SOURCE_TREE
