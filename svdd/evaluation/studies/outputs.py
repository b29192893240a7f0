"""What a study leaves beside its runs: its rows, its tables and its plots, all made from the run folders alone."""

from pathlib import Path

from svdd import say
from svdd.evaluation.studies.diversity import measure_diversity
from svdd.evaluation.studies.fronts import check_names, plot_fronts
from svdd.evaluation.studies.measures import read_cells
from svdd.evaluation.studies.plots import plot
from svdd.evaluation.studies.results import groups_of
from svdd.evaluation.studies.specification import Study
from svdd.evaluation.studies.tables import write_csv, write_markdown, write_tex
from svdd.runs.files import os_errors_explained, write_atomically

__all__ = ["write_outputs"]


def write_outputs(study: Study) -> list[Path]:
    """Writes `study.csv`, `table.md`, `table.tex`, `table.csv` and `pareto.png`, `.pdf` and `.svg`; returns the files.

    With `fronts` there are `fronts.png`, `.pdf` and `.svg` too.

    Unfinished cells count with what they have drawn. Run folders are only read; `diversity.json` in the study's folder
    keeps what takes long. Without matplotlib the plots are missing.

    Raises:
        UserError: If the study's folder cannot be written.
    """
    folder = study.folder
    with os_errors_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / "study.csv"]
        drawn = read_cells(study.cells, written[0])
        groups = groups_of(study, drawn, measure_diversity(drawn, folder / "diversity.json"))
        for name, write in (("table.csv", write_csv), ("table.md", write_markdown), ("table.tex", write_tex)):
            write_atomically(folder / name, write(study, groups).encode())
            written.append(folder / name)
        check_names(study, groups)
        pictures = {"pareto": plot(study, groups), "fronts": plot_fronts(study, groups)}
        for name, forms in pictures.items():
            for form, content in forms.items():
                write_atomically(folder / f"{name}.{form}", content)
                written.append(folder / f"{name}.{form}")
    if not pictures["pareto"]:
        say("no plots: they need matplotlib (pip install 'svdd[plot]')")
    return written
