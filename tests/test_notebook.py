"""The notebooks in examples/ run, and what is committed was executed as it stands."""

import base64
import copy
import io

import nbformat
import pytest
import torch
from nbclient.exceptions import CellExecutionError
from PIL import Image

from svdd import GuidedDiffusion, UserError, image_grid
from svdd.samplers import SVDD
from tools.notebook import NOTEBOOKS, execute, source_digest

MAX_BYTES = 400_000


def kinds(notebook) -> list[list[tuple[str, list[str]]]]:
    """Returns the types of the outputs of each cell."""
    cells = [cell.get("outputs", []) for cell in notebook.cells]
    return [[(output.output_type, sorted(output.get("data", ()))) for output in outputs] for outputs in cells]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.name)
def path(request):
    return request.param


def test_there_is_a_notebook():
    assert [path.name for path in NOTEBOOKS] == ["quickstart.ipynb"]


def test_committed_outputs_are_those_of_the_committed_sources_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.executed_sources == source_digest(notebook), "run python -m tools.notebook"
    assert path.stat().st_size < MAX_BYTES
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.outputs and not cell.metadata for cell in code)
    pictures = [
        output.data["image/png"] for cell in code for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 5
    for picture in pictures:
        colours = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB").getcolors(2**20)
        assert len(colours) > 3  # not blank
    assert not any(line in nbformat.writes(notebook) for line in ("site-packages", "/home/", "/tmp/"))


@pytest.mark.slow
def test_it_runs_and_shows_what_is_committed(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    committed = copy.deepcopy(notebook)
    executed = execute(notebook, tmp_path)
    assert kinds(executed) == kinds(committed)
    assert source_digest(executed) == source_digest(committed)


def test_a_failing_cell_is_an_error(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(notebook, tmp_path)


def test_a_grid_holds_every_image_at_its_place():
    images = torch.linspace(0, 1, 5)[:, None, None, None].expand(5, 3, 16, 16)
    grid = image_grid(images, columns=3)
    across, down = grid.size
    assert (across, down) == (3 * 134 + 6, 2 * 134 + 6)
    for k in range(5):
        assert grid.getpixel((70 + k % 3 * 134, 70 + k // 3 * 134)) == (round(k * 255 / 4),) * 3
    assert grid.getpixel((across - 70, down - 70)) == (255, 255, 255)
    assert image_grid(torch.zeros(1, 3, 200, 300)).size == (312, 212)


def test_captions_stand_below_and_are_cut_off_at_the_width():
    images = torch.zeros(2, 3, 64, 64)
    bare, grid = image_grid(images), image_grid(images, ["a long caption " * 20 + "\nand \x1b[31m more", 0.123456])
    assert grid.size == (bare.width, bare.height + 30)
    below = grid.crop((0, 135, grid.width, grid.height)).convert("L")
    assert below.point(lambda value: 255 * (value < 128)).getbbox()[2] < grid.width
    left, between = below.crop((6, 0, 134, below.height)), below.crop((135, 0, 139, below.height))
    assert left.getextrema()[0] < 128
    assert between.getextrema() == (255, 255)


@pytest.mark.parametrize(
    ("images", "arguments", "message"),
    [
        (torch.zeros(3, 8, 8), {}, r"\[n, 3, h, w\] with n >= 1, got \[3, 8, 8\]"),
        (torch.zeros(0, 3, 8, 8), {}, r"n >= 1, got \[0, 3, 8, 8\]"),
        (torch.zeros(2, 3, 8, 8), {"captions": ["a"]}, "one for each of the 2 images, got 1"),
        (torch.zeros(1, 3, 8, 8).expand(9000, 3, 8, 8), {}, "show fewer images at once"),
    ],
    ids=["no batch", "empty", "captions", "many"],
)
def test_what_is_no_grid_is_refused(images, arguments, message):
    with pytest.raises(UserError, match=message):
        image_grid(images, **arguments)


def test_a_model_shows_itself_in_one_line():
    model = GuidedDiffusion(lambda images, prompts: images.mean((1, 2, 3)), sampler=SVDD(4, alpha=0.1))
    sampler = "SVDD(num_candidates=4, alpha=0.1)"
    assert repr(model) == f"GuidedDiffusion(lambda, StableDiffusion of 50 steps, {sampler}, PosteriorMean)"
    assert repr(SVDD(num_candidates=20)) == "SVDD()"
