"""Executes the notebooks in examples/ in place: `python -m tools.notebook`.

The outputs and a digest of the sources are stored; a test fails if a source is edited without a new execution.
"""

import base64
import hashlib
import io
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

__all__ = ["NOTEBOOKS", "clean", "execute", "source_digest"]

NOTEBOOKS = sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb"))
_KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def source_digest(notebook: Any) -> str:
    """Returns a digest of the types and sources of all cells."""
    sources = "\0".join(f"{cell.cell_type}\0{cell.source}" for cell in notebook.cells)
    return hashlib.sha256(sources.encode()).hexdigest()[:16]


def execute(notebook: Any, folder: Path) -> Any:
    """Runs all cells in a fresh kernel with this working directory; raises CellExecutionError if one fails."""
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources)
    return clean(client.execute())


def clean(notebook: Any) -> Any:
    """Removes times, versions, identifiers and progress bars, makes pictures small, adds the digest of the sources."""
    notebook.metadata = nbformat.from_dict({**_KERNEL, "executed_sources": source_digest(notebook)})
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.from_dict({})
        if cell.cell_type == "code":  # progress bars are on stderr
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.get("outputs", []):
            if "image/png" in (data := output.get("data", {})):
                data.pop("image/jpeg", None)  # Pillow offers both
                data["image/png"] = _in_256_colours(data["image/png"])
    return notebook


def _in_256_colours(png: str) -> str:
    """Returns a PNG file in base64 with a palette, a third of the size."""
    picture, buffer = Image.open(io.BytesIO(base64.b64decode(png))), io.BytesIO()
    picture.convert("RGB").quantize(256).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    for path in NOTEBOOKS:
        nbformat.write(execute(nbformat.read(path, as_version=4), path.parent), path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
