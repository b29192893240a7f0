"""Another class starts from its own defaults.

When a setting changes its class (`--model.sampler SMC` over a configuration that names SVDD), jsonargparse carries over
the arguments that both classes have, the defaults of the old one included: SMC would get SVDD's `num_particles: 1` and
guide nothing. No option turns this off, so the function that decides it is replaced.
"""

from typing import Any

import jsonargparse._typehints as typehints

__all__ = ["forget_arguments_on_class_change"]


def forget_arguments_on_class_change() -> None:
    """Makes jsonargparse drop all arguments of a class that another one replaces."""
    typehints.discard_init_args_on_class_path_change = _discard_all


def _discard_all(parser_or_action: Any, prev_val: Any, value: Any) -> None:
    if prev_val and "init_args" in prev_val and prev_val["class_path"] != value["class_path"]:
        for key in list(prev_val["init_args"].keys()):
            prev_val["init_args"].pop(key, None)
