"""Whether what an output folder records allows it to be continued."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdd.runs.config import CONFIG, HARMLESS, differences, is_older
from svdd.runs.files import OtherRun
from svdd.runs.recorded_prompts import PROMPTS, PromptChanges, compare_prompts

if TYPE_CHECKING:
    from svdd.runs.prompts import PromptDataset

__all__ = ["require_same"]

_OTHER_BATCHES = (
    ". Without the reproducible mode, other batches change the last bits of an image and can change which candidates "
    "are selected: keep these settings, or start a new run with --model.diffusion.reproducible true"
)


def require_same(
    folder: Path,
    recorded: Mapping[str, Any],
    config: Mapping[str, Any],
    prompts: "PromptDataset | None" = None,
    harmless: re.Pattern[str] = HARMLESS,
    may_grow: bool = True,
) -> PromptChanges | None:
    """Raises OtherRun if settings that matter, or prompts that both have, differ from the recorded ones.

    Args:
        folder: The output folder, which holds results.
        recorded: Its configuration; empty if the file is damaged.
        config: That of the command.
        prompts: Those of the command; without them, the settings say which ones are meant.
        harmless: Settings that may differ.
        may_grow: Whether the number of prompts may differ too.

    Returns:
        How the prompts have changed: in their number alone.
    """
    if is_older(recorded):
        raise OtherRun(f"{folder} was begun by an earlier version of svdd, which this one cannot continue")
    changes = None if prompts is None else compare_prompts(folder, prompts)
    changed = differences(recorded, config, harmless, prompts is not None)
    if changed and not recorded:
        raise OtherRun(f"{folder} holds a run with unknown settings, as its {CONFIG} is damaged")
    if prompts is not None and changes is None:
        raise OtherRun(f"{folder} holds a run with unknown prompts, as its {PROMPTS} is missing")
    found = [f"other settings: {'; '.join(changed)}"] if changed else []
    if changes is not None and (changes.differing or (not may_grow and changes.given != changes.recorded)):
        found.append(f"other prompts: {changes}{'; only new prompts at the end continue a run' if may_grow else ''}")
    if found:
        batches = any(line.startswith(("data.batch_size", "model.diffusion.chunk_size")) for line in changed)
        raise OtherRun(f"{folder} holds a run with {', and '.join(found)}{_OTHER_BATCHES if batches else ''}")
    return changes
