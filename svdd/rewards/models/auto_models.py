"""Models that transformers finds by their configuration, read strictly."""

from pathlib import Path
from typing import Any

import torch

from svdd import UserError
from svdd.assets.hub import LOAD_ERRORS, is_local

__all__ = ["read_auto", "read_model"]


def read_auto(auto: Any, pretrained: str, **options: Any) -> Any:
    """Returns what `auto.from_pretrained` makes of a folder or hub name; code that comes with it is never run.

    Args:
        auto: A class of transformers with `from_pretrained`.
        pretrained: A folder or a hub name.
        options: Passed on.

    Raises:
        UserError: If it cannot be loaded.
    """
    source = str(Path(pretrained).expanduser()) if is_local(pretrained) else pretrained
    if is_local(pretrained) and not (Path(source) / "config.json").is_file():
        raise UserError(
            f"pretrained={pretrained!r} has no config.json; expected a folder saved by save_pretrained or a hub name"
        )
    try:
        return auto.from_pretrained(source, trust_remote_code=False, **options)
    except LOAD_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"pretrained={pretrained!r} cannot be loaded: {reason}") from error


def read_model(auto: Any, pretrained: str, dtype: torch.dtype, **options: Any) -> Any:
    """Returns a model all of whose weights were in the files.

    Args:
        auto: One of the AutoModel classes, or a class of models.
        pretrained: A folder or a hub name.
        dtype: Of the weights.
        options: Passed on.

    Raises:
        UserError: If it cannot be loaded, is another kind of model, or weights are missing.
    """
    model, told = read_auto(auto, pretrained, dtype=dtype, output_loading_info=True, **options)
    if missing := sorted(told["missing_keys"]):
        raise UserError(
            f"pretrained={pretrained!r} lacks {len(missing)} weights of {type(model).__name__}, first {missing[0]}; "
            "expected a model trained for this"
        )
    return model
