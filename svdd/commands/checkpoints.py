"""Checkpoints of `svdd fit`, looked at before anything is built: what is no checkpoint is refused in one line."""

import hashlib
import io
from pathlib import Path

import torch

from svdd import UserError

__all__ = ["checkpoint_digest"]


def checkpoint_digest(path: str) -> str:
    """Returns the SHA-256 of a checkpoint, which belongs to the settings of a run; nothing in it is executed.

    Args:
        path: A file on this machine. No address: Lightning would unpickle what it downloads.

    Raises:
        UserError: If the file cannot be read, or was not written by `svdd fit`.
    """
    expected = "expected the best.ckpt or last.ckpt that `svdd fit` wrote"
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"ckpt_path={path!r} cannot be read: {reason}; {expected}") from error
    try:
        checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # garbage fails in every way there is
        raise UserError(f"ckpt_path={path!r} is not a checkpoint, or a torn one; {expected}") from error
    if not isinstance(checkpoint, dict) or not {"svdd_value", "state_dict"} <= checkpoint.keys():
        raise UserError(f"ckpt_path={path!r} holds no value of svdd; {expected}")
    return hashlib.sha256(data).hexdigest()
