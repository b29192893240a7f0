"""The pages in docs/: their code runs, their links resolve, and the rules they state hold."""

import ast
import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.metadata import entry_points
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
from PIL import Image

from svdd.__main__ import main
from svdd.commands.registry import KINDS, catalogue, import_all
from svdd.guided_diffusion import GuidedDiffusion
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.budget import count
from svdd.samplers.svdd import SVDD
from svdd.samplers.unguided import Unguided
from svdd.state.state import State
from svdd.values.posterior_mean import PosteriorMean

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))
SOURCES = sorted((ROOT / "svdd").glob("**/*.py"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"# ([\w./-]+\.\w+)\n")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str | None, str]]:
    """Returns (language, file name or None, code) of each fenced block."""
    found = []
    for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
        first_line = FILE_NAME.match(code)
        found.append((language, first_line[1] if first_line else None, code))
    return found


def unpack(page: Path, folder: Path) -> list[str]:
    """Writes the page's files to a folder and returns the module names among them."""
    modules = []
    for language, file_name, code in blocks(page):
        if file_name is not None and language in ("python", "toml", "yaml"):
            path = folder / file_name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(code, encoding="utf-8")
            if language == "python":
                modules.append(file_name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    return modules


@pytest.fixture
def examples(workspace):
    """The files of extending.md, in the working directory."""
    unpack(DOCS / "how_to" / "extending.md", workspace)
    return workspace


@pytest.fixture
def installed(examples):
    """The package of extending.md, with the metadata that pip would write from its pyproject.toml."""
    project = (examples / "pyproject.toml").read_text(encoding="utf-8")
    name, version = re.search(r'^name = "(.+)"', project, re.M), re.search(r'^version = "(.+)"', project, re.M)
    section = re.search(r'^\[project\.entry-points\."(.+)"\]\n(\w+) = "(.+)"', project, re.M)
    metadata = examples / f"{name[1].replace('-', '_')}-{version[1]}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name[1]}\nVersion: {version[1]}\n")
    (metadata / "entry_points.txt").write_text(f"[{section[1]}]\n{section[2]} = {section[3]}\n")
    assert [plugin.name for plugin in entry_points(group="svdd.plugins") if plugin.value == section[3]] == [section[2]]
    return examples


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_snippets_run(page, workspace):
    num_tests = 0
    for name in unpack(page, workspace):
        module = importlib.import_module(name)
        if name.startswith("test_"):
            for function in [value for key, value in vars(module).items() if key.startswith("test_")]:
                function()
                num_tests += 1
        else:
            assert module.__all__, name
    for language, file_name, code in blocks(page):
        if language == "python" and file_name is None:
            exec(compile(code, str(page), "exec"), {"__name__": "snippet"})
    assert num_tests or not any((file_name or "").startswith("test_") for _, file_name, _ in blocks(page))


def commands() -> list[list[str]]:
    text = "".join(code for language, _, code in blocks(DOCS / "how_to" / "extending.md") if language == "bash")
    return [shlex.split(line)[1:] for line in text.replace("\\\n", " ").splitlines() if line.startswith("svdd ")]


def output_of(words: list[str]) -> str:
    return words[words.index("--output") + 1] if "--output" in words else " ".join(words)


@pytest.mark.parametrize("words", commands(), ids=output_of)
def test_commands_of_extending_run(words, installed, sd15, read_rows, capsys):
    if words[0] == "test-reward":
        assert main(words) == 0, capsys.readouterr().out
        return
    if words[0] == "list":
        assert main(words) == 0
        assert "svdd_warmth" in next(line for line in capsys.readouterr().out.splitlines() if "Warmth" in line)
        return
    extra = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--model.diffusion.num_inference_steps", "3"]
    if "--model.diffusion" not in words:  # a small model in place of the embedded one
        extra += ["--model.diffusion.pretrained", sd15]
    if "--model.sampler" not in words:
        extra += ["--model.sampler.num_candidates", "3"]
    assert main([*words, *extra]) == 0, capsys.readouterr().err
    prompts = json.loads(words[words.index("--data.prompts") + 1])
    rows = read_rows(output_of(words))
    assert [row["prompt"] for row in rows] == prompts
    rewards = {
        "Redness": lambda pixels: pixels[..., 0] - (pixels[..., 1] + pixels[..., 2]) / 2,
        "Warmth": lambda pixels: pixels[..., 0] - pixels[..., 2],
    }
    weight = float(words[words.index("--model.reward.weight") + 1]) if "--model.reward.weight" in words else 1.0
    for row in rows:
        pixels = np.asarray(Image.open(Path(output_of(words)) / row["file"])) / 255
        for name in rewards.keys() & row["rewards"].keys():
            assert row["rewards"][name] == pytest.approx(weight * rewards[name](pixels).mean(), abs=0.01)
        assert row["ledger"]["denoiser_rows"] > 0
    assert len({json.dumps(row["rewards"]) for row in rows}) == len(rows)


def test_the_evening_runs(workspace, sd15, capsys):
    page = DOCS / "how_to" / "reward_package.md"
    unpack(page, workspace)
    (workspace / "svdd").symlink_to(ROOT)
    small = ["--model.diffusion.pretrained", sd15, "--model.diffusion.num_inference_steps", "2"]
    small += ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    for line in "".join(code for language, _, code in blocks(page) if language == "bash").splitlines():
        if line.startswith("svdd "):
            words = shlex.split(line)[1:]
            assert main([*words, *(small if words[0] == "predict" else [])]) == 0, capsys.readouterr().err
        else:
            subprocess.run(line, shell=True, check=True)
    project = (workspace / "svdd-greenness" / "pyproject.toml").read_text()
    assert 'name = "svdd-greenness"' in project
    assert 'greenness = "svdd_greenness"' in project
    (test,) = [code for language, _, code in blocks(page) if language == "py"]
    sys.path.insert(0, "svdd-greenness")
    exec(compile(test, str(page), "exec"), namespace := {"__name__": "test"})
    namespace["test_it_keeps_to_what_svdd_expects"]()


def test_examples_work_on_a_stable_diffusion(examples, sd15):
    from my_rewards import Redness
    from my_samplers import SparseSVDD

    from svdd.diffusion.stable_diffusion import StableDiffusion

    prompts, diffusion = ["a car", "a house"], StableDiffusion(sd15, num_inference_steps=4)

    def draw(sampler) -> State:
        with torch.no_grad():
            return GuidedDiffusion(Redness(weight=3), diffusion, sampler).draw(prompts, [1, 2])

    plain, sparse = draw(SparseSVDD(1)), draw(SparseSVDD(4, interval=2))
    assert plain.images.shape == (2, 3, 64, 64)
    expected = 3 * (plain.images[:, 0] - (plain.images[:, 1] + plain.images[:, 2]) / 2).mean((1, 2))
    assert torch.allclose(plain.scores(Redness(weight=3)), expected, atol=1e-5)
    assert sparse.context.ledger.denoiser_rows == len(prompts) * (4 + 3)
    assert (sparse.scores(Redness()) > plain.scores(Redness())).all()


def test_the_example_of_a_pipelines_family_equals_the_pipeline(examples, tmp_path, monkeypatch):
    import svdd.diffusion
    from tests.tiny_families import FLOW, Family
    from tests.tiny_families.drawing import GUIDANCE, Reference, build, draw

    monkeypatch.setattr(svdd.diffusion, "AuraFlow", importlib.import_module("my_aura_flow").AuraFlow, raising=False)
    family = Family("AuraFlow", "AuraFlow", "aura_flow", FLOW, guidance=(3.5, 1.0))
    folder = family.save(tmp_path / "model")
    reference = Reference(family, folder)
    for step in FLOW:
        for guidance in GUIDANCE:
            expected = reference.draw(step, guidance, family.size, 3)
            assert np.array_equal(
                draw(build(family, folder, guidance, family.size, **step.ours), guidance, 3), expected
            )


def test_tempering_changes_only_samplers_with_a_temperature(examples):
    from my_diffusion import Tints
    from my_rewards import Redness
    from my_values import Tempered

    def draw(sampler, value) -> torch.Tensor:
        return GuidedDiffusion(Redness(), Tints(6), sampler, value).draw(["red", "wall"], [1, 2]).x

    assert torch.equal(draw(SVDD(4), Tempered()), draw(SVDD(4), PosteriorMean()))
    assert torch.equal(draw(SVDD(4, alpha=0.01), Tempered(power=0)), draw(SVDD(4, alpha=0.01), PosteriorMean()))
    assert not torch.equal(draw(SVDD(4, alpha=0.01), Tempered(power=8)), draw(SVDD(4, alpha=0.01), PosteriorMean()))


@pytest.mark.parametrize(
    ("sampler", "rows", "decoded", "calls"),
    [
        (Unguided(), 5, 1, 0),
        (BestOfN(3), 3 * 5, 3, 3),
        (SVDD(4), 1 + 4 * 4, 4 * 5, 4 * 5),
        (SVDD(4, alpha=0.1, num_particles=2), 2 * (1 + 4 * 4), 2 * 4 * 5, 2 * 4 * 5),
    ],
    ids=["unguided", "best_of_n", "svdd", "svdd_beam"],
)
def test_costs_are_those_of_the_samplers_page(sampler, rows, decoded, calls, examples):
    from my_diffusion import Tints
    from my_rewards import Redness

    ledger = GuidedDiffusion(Redness(), Tints(5), sampler).draw(["red", "wall"], [1, 2]).context.ledger
    spent = (ledger.denoiser_rows, ledger.network_rows, ledger.decoded_images, ledger.reward_calls)
    assert spent == (2 * rows, 2 * rows, 2 * decoded, 2 * calls)
    assert rows == count(sampler, Tints(5), PosteriorMean()).denoiser_rows


def test_a_plugin_is_listed_with_its_source(installed):
    entry = next(entry for entry in catalogue() if entry.name == "Warmth")
    assert (entry.kind, entry.package) == ("reward", "svdd_warmth")
    assert entry.description == "Mean of red minus the mean of blue: images in warm light score high."


def test_a_broken_plugin_is_skipped_with_a_warning(installed):
    (installed / "svdd_warmth" / "__init__.py").write_text("raise RuntimeError('not today')")
    with pytest.warns(UserWarning, match="warmth.*svdd-warmth.*RuntimeError: not today"):
        names = [entry.name for entry in catalogue()]
    assert "SVDD" in names


def test_every_builtin_is_listed_with_a_description():
    import_all()
    listed = {(entry.kind, entry.name): entry for entry in catalogue() if entry.package == "svdd"}
    for kind, (package, base) in KINDS.items():
        waiting = [getattr(importlib.import_module(f"{package}.base"), base)]
        while waiting:
            found = waiting.pop()
            waiting += found.__subclasses__()
            public = not found.__name__.startswith("_") and not inspect.isabstract(found)
            if public and found.__module__.startswith("svdd."):
                assert (kind, found.__name__) in listed, f"{found.__module__} is not read by svdd.commands.registry"
    assert {kind for kind, _ in listed} == set(KINDS)
    for entry in listed.values():
        assert entry.description.endswith("."), entry
        assert 10 <= len(entry.description) <= 120, entry


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_modules_define_all(path):
    body = tree_of(path).body
    defined = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Assign | ast.AnnAssign)]
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    names = {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    assert "__all__" in names or not defined


def test_every_builtin_is_exported_by_its_folder():
    for entry in catalogue():
        if entry.package == "svdd":
            folder = importlib.import_module(KINDS[entry.kind][0])
            assert entry.name in folder.__all__, f"{folder.__name__}/__init__.pyi lacks {entry.name}"
            assert not inspect.isabstract(getattr(folder, entry.name)), entry.name
    for name in (*LAZY, "svdd"):
        folder = importlib.import_module(name)
        assert all(hasattr(folder, export) for export in dir(folder)), name


def test_folders_import_nothing_heavy():
    code = f"import sys, svdd, {', '.join(LAZY)}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {"torch", "numpy", "PIL", *FOREIGN}


def imports(node: ast.AST) -> set[str]:
    """Returns the names of imported modules, those inside functions too, but not those under TYPE_CHECKING."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        return {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        return set()
    return {name for child in ast.iter_child_nodes(node) for name in imports(child)}


def module_of(path: Path) -> str:
    return name_of(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")


NOUNS = {"diffusion", "state", "rewards", "values", "samplers"}
LAZY = sorted(f"svdd.{noun}" for noun in NOUNS)  # folders that re-export their classes to users
MAY_IMPORT = {  # a folder or module of svdd: the others that it may import, also inside functions
    "assets": set(),
    "evaluation.metrics": set(),
    "runs": {"assets"},
    "diffusion": {"assets"},
    "rewards": {"assets"},
    "state": {"diffusion"},
    "values": {"diffusion", "state", "rewards"},
    "samplers": {"diffusion", "state", "values"},
    "guided_diffusion": {*NOUNS, "assets", "runs", "evaluation.metrics"},
    "values.training": {*NOUNS, "assets", "runs", "guided_diffusion"},
    "evaluation": {*NOUNS, "runs", "guided_diffusion", "evaluation.metrics"},
    "commands": {*NOUNS, "assets", "runs", "guided_diffusion", "evaluation.metrics", "values.training", "evaluation"},
    "__main__": {"commands", "runs"},
}
FOREIGN = {  # a library: the only folders that may import it
    "diffusers": {"diffusion"},
    "transformers": {"diffusion", "rewards", "commands"},
    "lightning": {"guided_diffusion", "values.training", "evaluation", "runs", "commands"},
    "PIL": {"assets", "rewards", "runs", "evaluation", "commands"},
}


def room_of(module: str) -> str:
    """Returns the key of MAY_IMPORT that a module belongs to; empty for the root package, which all may import."""
    inside = module.removeprefix("svdd").removeprefix(".")
    return max((room for room in MAY_IMPORT if f"{inside}.".startswith(f"{room}.")), key=len, default="")


def test_imports_point_one_way():
    graph = {module_of(path): imports(tree_of(path)) for path in SOURCES}
    inside = {name: {target for target in targets if target in graph} - {name} for name, targets in graph.items()}
    TopologicalSorter(inside).prepare()  # raises CycleError
    for name, targets in graph.items():
        room = room_of(name)
        outside = {room_of(target) for target in targets if target in graph} - {room, ""}
        assert room or not outside, f"the root package imports {outside}"
        assert not outside - MAY_IMPORT.get(room, set()), f"{name} imports {outside}"
        assert not targets & set(LAZY), f"{name} imports from a folder; expected the module that defines the name"
        for library, rooms in FOREIGN.items():
            if library in {target.split(".")[0] for target in targets}:
                assert room in rooms, f"{name} imports {library}"


def test_the_package_has_few_entries_and_short_files():
    entries = [path.name for path in (ROOT / "svdd").iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 13, entries
    assert {path: lines for path in SOURCES if (lines := path.read_text("utf-8").count("\n")) > 300} == {}


def test_the_tree_in_architecture_is_that_of_the_code():
    tree = next(code for language, _, code in blocks(DOCS / "explanation" / "architecture.md") if language == "text")
    drawn, folder = {}, ""
    for indent, name, text in re.findall(r"^( +)(\S+) *(.*)$", tree, re.M):
        path = name if len(indent) == 2 else folder + name
        folder = path if len(indent) == 2 else folder
        drawn[path] = text
    packages = {f"{path.parent.relative_to(ROOT / 'svdd')}/": path for path in SOURCES if path.name == "__init__.py"}
    del packages["./"]
    files = {path.name for path in (ROOT / "svdd").iterdir() if path.is_file()}
    assert drawn.keys() == packages.keys() | files
    assert {path: text for path, text in drawn.items() if path in packages} == {
        path: ast.get_docstring(tree_of(package)) for path, package in packages.items()
    }


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives to a page's headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("*.md"))], ids=name_of)
def test_links_resolve(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)", text):
        if re.match(r"\w+:", link):  # external links are not checked
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_helpers_read_pages_as_written(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        dedent("""\
        # A `Title`, twice
        ```python
        # lib/one.py
        x = 1
        ```
        ```bash
        # not a heading
        ls
        ```
        ```python
        y = 2
        ```
        """)
    )
    assert [(language, name) for language, name, _ in blocks(page)] == [
        ("python", "lib/one.py"),
        ("bash", None),
        ("python", None),
    ]
    assert unpack(page, tmp_path) == ["lib.one"]
    assert anchors(page) == {"a-title-twice"}
