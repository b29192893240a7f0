"""Models of transformers from a folder or the hub, with all of their weights."""

from typing import Any

import torch

from svdd import UserError
from svdd.assets.hub import loading, locate

__all__ = ["read_auto", "read_model"]


def read_auto(auto: Any, pretrained: str, **options: Any) -> Any:
    """Returns `auto.from_pretrained` of a folder or a hub name; code in it is never run.

    Args:
        auto: A class of transformers with `from_pretrained`.
        pretrained: A folder or a hub name.
        options: Passed on.

    Raises:
        UserError: If it cannot be loaded.
    """
    source = locate("pretrained", pretrained, "config.json", "a folder saved by save_pretrained or a hub name")
    with loading(f"pretrained={pretrained!r}"):
        return auto.from_pretrained(source, trust_remote_code=False, **options)


def read_model(auto: Any, pretrained: str, dtype: torch.dtype, **options: Any) -> Any:
    """Returns a model, after checking that the files hold all of its weights.

    Args:
        auto: An AutoModel class or a model class.
        pretrained: A folder or a hub name.
        dtype: The type of the weights.
        options: Passed on.

    Raises:
        UserError: If it cannot be loaded, is another kind of model, or weights are missing.
    """
    model, info = read_auto(auto, pretrained, dtype=dtype, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"pretrained={pretrained!r} lacks {len(missing)} weights of {type(model).__name__}, first {missing[0]}; "
            "expected a model trained for this task"
        )
    return model
