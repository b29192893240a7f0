"""Diversity of the pictures of each cell, as the run has measured it, or measured once and kept beside the study."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from svdd import UserError, say
from svdd.evaluation.evaluation import diversity_of
from svdd.evaluation.studies.measures import Drawn
from svdd.rewards.clip import CLIPScore
from svdd.runs.files import read_object, write_atomically
from svdd.runs.pictures import find_pictures

__all__ = ["measure_diversity"]


def measure_diversity(drawn: Sequence[Drawn], cache: Path) -> dict[str, dict[str, float | None]]:
    """Returns the entries of `Diversity` by the name of the cell; a cell without known features has none.

    Args:
        drawn: The cells.
        cache: A JSON file that keeps what was measured, by a checksum of the pictures.
    """
    known = read_object(cache)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found, kept, clips = {}, {}, dict[str, CLIPScore]()
    for each in drawn:
        name, features = each.cell.name, each.features
        if each.finished and each.diversity:
            found[name] = each.diversity
        elif len(each) and features is not None:
            key = hashlib.sha256(f"{features} {each.digest}".encode()).hexdigest()
            if not isinstance(known.get(key), dict):
                try:
                    if features not in clips:
                        clips[features] = CLIPScore(features).to(device)
                        clips[features].load()
                    known[key] = diversity_of(find_pictures(each.cell.folder), clips[features], device)
                except UserError as error:
                    say(f"svdd: warning: {name}: its diversity is not measured: {error}", error=True)
                    continue
            kept[key] = found[name] = known[key]
    if kept != read_object(cache):
        write_atomically(cache, json.dumps(kept, indent=1).encode())
    return found
