"""`svdd report` and `svdd gallery`: runs as one HTML page, and the same page in the browser."""

import argparse
import os
import sys
import tempfile
import webbrowser
from pathlib import Path

from svdd import UserError, say
from svdd.commands.options import Options
from svdd.evaluation.comparison import distinct_names
from svdd.evaluation.pairing import counted
from svdd.evaluation.reports.data import read_run
from svdd.evaluation.reports.page import check_page, write_page
from svdd.runs.folder import RunFolder

__all__ = ["gallery", "gallery_parser", "report", "report_parser"]

_SUFFIXES = (".html", ".htm")


def report(words: list[str]) -> None:
    """Runs `svdd report` with the command line after its name.

    Raises:
        UserError: If a folder holds no image or a damaged row, or the page cannot be written.
    """
    parser = report_parser()
    _write(parser.parse_args(parser.spelled_out(words)))


def gallery(words: list[str]) -> None:
    """Runs `svdd gallery`: writes the report into the first run's folder, as gallery.html, and opens it.

    In a folder that cannot be written, it goes to a temporary one. Raises a UserError as `report` does.
    """
    parser = gallery_parser()
    options = parser.parse_args(parser.spelled_out(words))
    options.output = options.runs[0] / "gallery.html"
    if options.runs[0].is_dir() and not os.access(options.runs[0], os.W_OK):
        options.output = Path(tempfile.mkdtemp(prefix="svdd-gallery-"), "gallery.html")
    _write(options)
    display = sys.platform != "linux" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
    if not (display and webbrowser.open(Path(os.path.abspath(options.output)).as_uri())):
        say(f"no browser was found; open {os.path.abspath(options.output)} in one")


def report_parser() -> Options:
    """Returns the parser of `svdd report`."""
    parser = _parser("svdd report", "Runs as one HTML page that needs no server: pictures, rewards, traces, settings.")
    output = "HTML file (default: report.html)"
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help=output)
    return parser


def gallery_parser() -> Options:
    """Returns the parser of `svdd gallery`."""
    return _parser("svdd gallery", "Writes gallery.html, a report, into the first run's folder and opens it.")


def _parser(name: str, description: str) -> Options:
    parser = Options(name, description)
    runs = "run folders, also of unfinished runs, or the folder of a study for all its cells"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=runs)
    parser.add_argument("--baseline", type=Path, help="run with which the others are compared when the page opens")
    limit = "at most this many pictures of each run, the first of its prompts (default: 10000)"
    parser.add_argument("--limit", type=int, default=10_000, help=limit)
    embed = "true puts the full pictures into the page, to be sent on its own (default: false, which links to them)"
    parser.add_flag("--embed", embed)
    return parser


def _write(options: argparse.Namespace) -> None:
    output: Path = options.output
    if options.limit < 1:
        raise UserError(f"--limit must be >= 1, got {options.limit}")
    if output.suffix.lower() not in _SUFFIXES or os.path.isdir(output):
        raise UserError(f"--output must be a file whose name ends in .html, got {output}")
    runs_of_studies = [run for folder in options.runs for run in _cells(folder)]
    folders = [*([options.baseline] if options.baseline is not None else []), *runs_of_studies]
    places = {os.path.realpath(folder): folder for folder in reversed(folders)}  # one given twice is shown once
    distinct = [places[place] for place in dict.fromkeys(map(os.path.realpath, folders))]
    try:
        check_page(output)
        names = distinct_names(distinct)
        runs = [read_run(folder, name, options.limit) for folder, name in zip(distinct, names, strict=True)]
        written = write_page(runs, output, None if options.baseline is None else 0, options.embed)
    except OSError as error:
        where = error.filename or output
        raise UserError(f"cannot write {where}: {error.strerror or error}; choose another --output") from error
    for run in runs:
        if run.hidden:
            more = f"--limit {len(run.images) + run.hidden} shows all"
            say(f"svdd: warning: {counted(run.hidden, 'picture')} of {run.folder} left out; {more}", error=True)
    if written.faults:
        what = f"{counted(len(written.faults), 'picture')} cannot be read, the first one: {written.faults[0]}"
        say(f"svdd: warning: {what}", error=True)
    count = sum(len(run.images) for run in runs)
    beside = f", {counted(written.files, 'thumbnail')} in {output.stem}_files" if written.files else ""
    what = f"{counted(count, 'picture')} of {counted(len(runs), 'run')}"
    say(f"wrote {output}: {what}, {written.bytes / 2**20:.1f} MB{beside}")


def _cells(folder: Path) -> list[Path]:
    """Returns the drawn cells of a study's folder; of any other folder, that folder."""
    drawn = sorted(path for path in folder.glob("cells/*") if RunFolder(path).has_rows())
    return drawn or [folder]
