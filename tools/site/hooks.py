"""Hooks of mkdocs: adds generated pages, turns links into those of the site, checks that every name is documented."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocstrings import Inventory

from tools.site import reference, repository

__all__ = ["on_files", "on_page_content", "on_page_markdown", "on_post_build"]

_ALWAYS = ("benchmarks", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "svdd/assets/LICENSES.md")
_log = get_plugin_logger(__name__)
_ASSETS = Path(__file__).parent / "assets"
_origins: dict[str, str] = {}  # path in the repository of each page from outside docs/, by the page's address


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the reference, the files of the repository that pages link to, and the style sheet."""
    linked = list(_ALWAYS)
    for file in files.documentation_pages():
        linked += repository.targets(f"docs/{file.src_uri}", file.content_string)
    for address, (path, text) in repository.pages(linked).items():
        _origins[address] = path
        files.append(File.generated(config, address, content=text))
    for address, text in reference.pages().items():
        files.append(File.generated(config, address, content=text))
    for path in _ASSETS.iterdir():
        files.append(File.generated(config, f"assets/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to files of the repository into links to their pages; in a search, these pages come last."""
    address = page.file.src_uri
    if address in _origins:
        page.meta.setdefault("search", {}).setdefault("boost", 0.5)
    return repository.rewrite(_origins.get(address, f"docs/{address}"), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links pages that comments and docstrings mention, and shows a bar in a table's code as GitHub does."""

    def link(mention: re.Match[str]) -> str:
        if file := files.get_file_from_path(mention[1]):
            return f'<a href="{file.url_relative_to(page.file)}">{mention[0]}</a>'
        _log.warning("%s mentions %s, which does not exist", page.file.src_uri, mention[0])
        return mention[0]

    html = re.sub(r"<td.*?</td>", lambda cell: cell[0].replace("\\|", "|"), html, flags=re.DOTALL)
    return re.sub(r"(?<![\w/\"])docs/((?:\w+/)*\w+\.md)(?!\w)", link, html)


def on_post_build(config: MkDocsConfig) -> None:
    """Raises PluginError if a public name has no entry."""
    with (Path(config.site_dir) / "objects.inv").open("rb") as file:
        documented = Inventory.parse_sphinx(file)
    if missing := sorted(reference.public_names().keys() - documented.keys()):
        raise PluginError(f"not documented under reference/classes: {', '.join(missing)}")
