"""Prints the lowest version of every library that pyproject.toml allows, as constraints for pip (`make oldest`)."""

import re
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # a dependency of hatchling

__all__ = ["constraints"]


def constraints(project: dict[str, Any]) -> list[str]:
    """Returns `name==version` for each dependency and extra of `[project]` that has a lower bound."""
    extras = project["optional-dependencies"].values()
    requirements = [*project["dependencies"], *(requirement for extra in extras for requirement in extra)]
    bounds = [re.match(r"([\w-]+)(?:\[.*?\])?>=([\w.]+)", requirement) for requirement in requirements]
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound]


if __name__ == "__main__":
    file = Path(__file__).parent.parent / "pyproject.toml"
    print("\n".join(constraints(tomllib.loads(file.read_text(encoding="utf-8"))["project"])))
