"""What the images of a run depend on beyond its settings: weights, files, the user's code, versions, rows at once."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from svdd.runs.files import OtherRun, RunError, os_errors_explained, read_object, write_atomically
from svdd.runs.json_lines import encode

__all__ = ["FINGERPRINTS", "compare", "compare_contents", "is_reproducible", "recorded_parts", "rows_at_once"]

FINGERPRINTS = "fingerprints.json"
_CONTENTS = "contents"  # of files that the prompts name
_ROWS_AT_ONCE = "rows_at_once"  # `Chunker.most`, with which the images are drawn


def compare(file: Path, found: Mapping[str, str], versions: Mapping[str, str]) -> list[str]:
    """Records digests and versions when a run begins; later returns the versions that have changed since.

    Raises:
        RunError: If a digest has changed.
    """
    with os_errors_explained(file):
        recorded = read_object(file)
        parts, known = recorded.get("parts"), recorded.get("versions")
        parts, known = (entry if isinstance(entry, dict) else {} for entry in (parts, known))
        changed = [name for name in parts if parts[name] != found.get(name, "")]
        changed += [f"{name} (new)" for name in found if parts and name not in parts]
        newer = [f"{name} {known[name]}, now {new}" for name, new in versions.items() if known.get(name, new) != new]
        if changed:
            began = "; ".join([f"other contents of {', '.join(changed)}", *newer])
            raise OtherRun(f"{file.parent} was begun with {began}: restore what was there to continue it")
        if not parts and found:
            _write(file, {**recorded, "parts": dict(found), "versions": dict(versions)})
    return newer


def compare_contents(file: Path, contents: Iterable[bytes]) -> None:
    """Records a digest of the files that prompts name; of prompts that are appended later, it covers those too.

    Args:
        file: The fingerprints of the run.
        contents: A digest for each prompt.

    Raises:
        RunError: If the files of the recorded prompts have changed.
    """
    with os_errors_explained(file):
        known, running, count = read_object(file).get(_CONTENTS), hashlib.sha256(), 0
        known = known if isinstance(known, dict) else {"prompts": 0}
        for count, content in enumerate(contents, 1):
            running.update(content)
            if count == known["prompts"] and running.hexdigest() != known.get("sha256"):
                what = "other contents of files that the prompts name"
                raise OtherRun(f"{file.parent} was begun with {what}: restore what was there to continue it")
        if count > known["prompts"]:
            _write(file, {**read_object(file), _CONTENTS: {"prompts": count, "sha256": running.hexdigest()}})


def is_reproducible(file: Path) -> bool:
    """Whether the images were drawn in the reproducible mode."""
    return bool(read_object(file).get(_ROWS_AT_ONCE))


def recorded_parts(file: Path) -> dict[str, str]:
    """Returns the recorded digests by the names of their parts; {} if they are unknown."""
    parts = read_object(file).get("parts")
    return {each: found for each, found in parts.items() if isinstance(found, str)} if isinstance(parts, dict) else {}


def rows_at_once(file: Path, most: int | None, drawn: bool, record: bool) -> int | None:
    """Returns `Chunker.most` for a run: if images are drawn, the smaller of the recorded one and this process's.

    With `record` it is recorded.

    Raises:
        RunError: If exactly one of the two is None, because one of the two runs is not in the reproducible mode.
    """
    recorded = read_object(file)
    known = recorded.get(_ROWS_AT_ONCE, most) if drawn else most
    if (known is None) != (most is None):
        modes = ("without", "with") if known is None else ("with", "without")
        what = f"{file.parent} holds images drawn {modes[0]} the reproducible mode, and this process would draw "
        raise RunError(f"{what}{modes[1]} it: continue on the same kind of device, or choose another --output")
    if most is not None and known is not None:
        most = min(most, int(known))
    if record and recorded.get(_ROWS_AT_ONCE, ...) != most:
        _write(file, {**recorded, _ROWS_AT_ONCE: most})
    return most


def _write(file: Path, content: Mapping[str, object]) -> None:
    write_atomically(file, encode(content, indent=2) + b"\n")
