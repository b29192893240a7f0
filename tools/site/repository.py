"""Files outside docs/ as pages of the site, and links that work in the repository as well as on the site."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["ROOT", "address", "pages", "rewrite"]

ROOT = Path(__file__).parents[2]
# A fenced block, or the target of a link, after the text of the link if that is the name of a page.
_LINK = re.compile(
    r"^ *(`{3,}|~{3,}).*?^ *\1 *$|(\[(?P<name>[\w/.-]+\.md)\]\(|(?<=\]\())(?!\w+:|#)(?P<link>[^)\s]+)",
    re.MULTILINE | re.DOTALL,
)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".cff": "yaml"}
_PREFIX = "repository/"  # of these pages on the site


def address(path: str) -> str:
    """Returns the page of a file or folder of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("configs"):
        anchor = path.removeprefix("configs").strip("/").removesuffix(".yaml").replace("/", "-")
        return f"reference/configs.md#{anchor}".rstrip("#")
    if path == "README.md":
        return "index.md"
    if (ROOT / path).is_dir():
        return f"{_PREFIX}{path}/index.md"
    return _PREFIX + path if path.endswith(".md") else f"{_PREFIX}{path}.md"


def pages(paths: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Returns the page of each file and folder, and of those that it links to: {address: (path, text)}."""
    made: dict[str, tuple[str, str]] = {}
    waiting = list(paths)
    for path in waiting:  # the list grows by the links of each
        place = address(path)
        if place.startswith(_PREFIX) and place not in made and (ROOT / path).exists():
            made[place] = path, _text(ROOT / path)
            waiting += targets(path, made[place][1])
    return made


def targets(path: str, text: str) -> Iterator[str]:
    """Yields the paths in the repository that the text of a file, or of a folder's page, links to."""
    for match in _LINK.finditer(text):
        if match["link"]:
            yield _resolve(path, match["link"].partition("#")[0])


def rewrite(path: str, text: str) -> str:
    """Returns the text with links to files of the repository turned into links to their pages, named by their titles.

    A link to nothing becomes a link to no page, which mkdocs reports.
    """

    def replace(match: re.Match[str]) -> str:
        if not match["link"]:
            return match[0]
        target, _, anchor = match["link"].partition("#")
        file = _resolve(path, target)
        place, _, section = address(file).partition("#")
        link = os.path.relpath(place, os.path.dirname(address(path))) + f"#{anchor or section}".rstrip("#")
        named = match["name"] and (ROOT / file).is_file()
        return f"[{_title(ROOT / file)}]({link}" if named else match[0].removesuffix(match["link"]) + link

    return _LINK.sub(replace, text)


def _resolve(path: str, link: str) -> str:
    folder = path if (ROOT / path).is_dir() else os.path.dirname(path)
    return os.path.normpath(os.path.join(folder, link)) if link else path


def _text(path: Path) -> str:
    if path.is_dir():
        return _index(path)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    fence = "`" * 6
    head = f"---\nsearch:\n  exclude: true\n---\n# {path.relative_to(ROOT)}\n"
    return f"{head}\n{fence}{_LANGUAGES.get(path.suffix, 'text')}\n{text}\n{fence}\n"


def _title(page: Path) -> str:
    return page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def _index(folder: Path) -> str:
    """Returns the page of a folder: its pages with their titles, then its other texts by name."""
    files = sorted(path for path in folder.glob("**/*") if path.suffix in {".md", *_LANGUAGES})
    title = folder.relative_to(ROOT).as_posix().capitalize()
    lines = [f"# {title}", ""]
    for path in sorted(files, key=lambda path: (path.suffix != ".md", path)):
        name = path.relative_to(folder).as_posix()
        lines.append(f"- [{_title(path) if path.suffix == '.md' else name}]({name})")
    return "\n".join([*lines, ""])
