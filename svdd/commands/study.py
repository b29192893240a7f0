"""`svdd study`: a grid of runs from one file, drawn in one or several processes, and their tables and plots."""

import argparse
import re
from typing import Any

from svdd import Incomplete, UserError, say
from svdd.commands.options import Options

__all__ = ["study", "study_parser"]

_PURPOSE = """\
Draws the runs of a study and writes its tables and plots.

STUDY.yaml names a configuration of `svdd predict`, and what changes from run to run:

  base: quickstart                    # a shipped configuration or a file, or a list of them
  settings:                           # of all runs, as on the command line of `svdd predict`
    data.prompts: emoji
    data.limit: 24
  guides:                             # optional: the study is made once for each
    JPEG: {model.reward: Compressibility}
    CLIP: {model.reward: CLIPScore}
  variants:                           # a list expands to several variants
    unguided: {model.sampler: Unguided}
    SVDD: {model.sampler: SVDD, model.sampler.alpha: [0.0, auto]}
  budgets: [100, 200]                 # denoiser rows per image, for samplers with a count
  baseline: unguided                  # with which the others are compared
  statistics: [mean]                  # or median, top10, top20
  fronts: [[Compressibility, CLIPScore]]  # pairs of rewards, one on each axis of a plot

Each run is that of `svdd predict` in FOLDER/cells/NAME, bit for bit. The same command continues: finished runs are
kept, and failed ones are tried again. Settings of `svdd predict` on the command line hold for all runs:

  svdd study emoji --data.limit 2 --output runs/try
"""


def study(words: list[str]) -> None:
    """Runs `svdd study` with the command line after its name.

    Raises:
        UserError: If the study's file, or the settings of one of its runs, cannot be used.
        Incomplete: If runs have failed, or would fail in a dry run.
        Stopped: After a signal.
    """
    options, more = _parse(words)
    from svdd.commands.drawing import Drawing  # which imports all classes
    from svdd.evaluation.studies.outputs import write_outputs

    with Drawing(options.study, more, options.output, options.devices) as drawing:
        if options.dry_run:
            found, failed = drawing.show()
        else:
            if options.tables_only and not (drawing.folder / "cells").is_dir():
                raise UserError(f"{drawing.folder} holds no run of a study; leave out --tables_only, or check --output")
            found, failed = (drawing.study(), {}) if options.tables_only else drawing.draw()
            for written in write_outputs(found):
                say(f"wrote {written}")
    for name, message in failed.items():
        say(f"svdd: {name} {'cannot be drawn' if options.dry_run else 'failed'}: {message}", error=True)
    if failed:
        what = "cannot be drawn" if options.dry_run else "failed; the same command tries them again"
        say(f"svdd: {len(failed)} of {len(found.cells)} runs {what}", error=True)
        raise Incomplete(3)


def study_parser() -> Options:
    """Returns the parser of the own options of `svdd study`."""
    usage, form = "svdd study STUDY [options] [--SETTING VALUE ...]", argparse.RawDescriptionHelpFormatter
    parser = Options("svdd study", _PURPOSE, usage=usage, formatter_class=form)
    parser.add_argument("study", metavar="STUDY", help="a YAML file, or the name of a study that ships with svdd")
    parser.add_argument("-o", "--output", help="folder of the study (default: runs/ and the file's name)")
    help = "processes that draw at once: on GPUs one each, on the CPU with an equal share of its cores (default: 1)"
    parser.add_argument("--devices", type=int, default=1, metavar="N", help=help)
    for name, purpose in {
        "dry_run": "list the runs with what they cost, and write nothing",
        "tables_only": "write tables and plots of what is drawn, and draw nothing",
    }.items():
        parser.add_flag(f"--{name}", purpose)
    return parser


def _parse(words: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Returns the command's own options, and the settings of `svdd predict` by dotted keys."""
    parser = study_parser()
    options, rest = parser.parse_known_args(parser.spelled_out(words))
    if options.devices < 1:
        raise UserError(f"--devices must be >= 1, got {options.devices}")
    more: dict[str, Any] = {}
    while rest:
        option = re.fullmatch(r"--([a-z]\w*(?:\.\w+)+\+?|config)(?:=(.*))?", word := rest.pop(0), re.DOTALL)
        if option is None:
            from svdd.commands.settings.nearest import setting_names

            parser.others = [name for name in setting_names("predict") if "." in name]
            parser.error(f"unrecognized arguments: {word}")
        if option[1].rstrip("+") == "model.budget":
            parser.error(f"{word.partition('=')[0]} is set by the study: use budgets in its file")
        if option[2] is None and not rest:
            parser.error(f"argument {word}: expected a value")
        more[option[1]] = rest.pop(0) if option[2] is None else option[2]
    return options, more
