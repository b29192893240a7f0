"""What the images of a run depend on beyond its settings: weights, files, the user's code, versions of libraries."""

from collections.abc import Mapping
from pathlib import Path

from svdd.runs.files import RunError, os_errors_explained, read_object, write_atomically
from svdd.runs.json_lines import encode

__all__ = ["compare"]


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
            raise RunError(
                f"{file.parent} was begun with {began}: restore what was there, choose another --output, or remove "
                "the old run with --overwrite true"
            )
        if not parts and found:
            write_atomically(file, encode({"parts": dict(found), "versions": dict(versions)}, indent=2) + b"\n")
    return newer
