"""The documentation site's own code; `make docs` builds the site."""

from inspect import isclass

from svdd.commands.registry import catalogue
from tools.site import reference, repository


def test_links_lead_to_pages_of_the_site():
    text = "[rewards.md](../reference/rewards.md), [a](paper.md#the-table), ![b](../images/study.png), [c](https://x.org)\n"
    text += "[d](../../benchmarks/study.md) [e](../../configs/studies/emoji.yaml) [f](../../examples/plugin)\n"
    text += "```python\nx = [a](b.md)\n```\n"
    assert repository.rewrite("docs/how_to/studies.md", text) == (
        "[Rewards](../reference/rewards.md), [a](paper.md#the-table), ![b](../images/study.png), [c](https://x.org)\n"
        "[d](../repository/benchmarks/study.md) [e](../reference/configs.md#studies-emoji) "
        "[f](../repository/examples/plugin/index.md)\n```python\nx = [a](b.md)\n```\n"
    )
    study = repository.rewrite("benchmarks/study.md", "[emoji](../configs/studies/emoji.yaml#x) [g](../docs/index.md)")
    assert study == "[emoji](../../reference/configs.md#x) [g](../../index.md)"


def test_linked_files_become_pages():
    pages = repository.pages(["examples/plugin", "docs/index.md"])
    assert pages["repository/examples/plugin/index.md"][0] == "examples/plugin"
    (source,) = [text for address, (_, text) in pages.items() if address.endswith("svdd_warmth/__init__.py.md")]
    assert "class Warmth" in source
    assert not any(address.startswith("index") for address in pages)


def test_every_class_of_the_registry_has_an_entry():
    pages = reference.pages()
    text = "".join(page for address, page in pages.items() if "classes" in address)
    for entry in catalogue():
        if entry.package == "svdd":
            assert any(line.startswith("::: ") and line.endswith(f".{entry.name}") for line in text.splitlines()), entry
    entries = {line[4:] for line in text.splitlines() if line.startswith("::: ")}
    elsewhere = {name for name, found in reference.public_names().items() if isclass(found)} - {*entries}
    assert elsewhere == {"svdd.StableDiffusion"}  # its entry is that of svdd.diffusion
    assert "usage: svdd predict" in pages["reference/commands.md"]
    assert "### quickstart { #quickstart }" in pages["reference/configs.md"]
