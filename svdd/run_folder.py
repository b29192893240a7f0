"""The folder that a run leaves: written so that a crash at any point loses nothing, and read back to continue it.

Every image is renamed into place before its row is appended to the process's own `results-00000.jsonl`. The main
process folds these shards into `results.jsonl`, sorted and without doubles, when a run begins and when it ends. A
row counts only if its line is whole and its image has the recorded SHA-256, so an interrupted fold is simply done
again.
"""

import errno
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

from svdd.run_config import HEADER, differences, dump_config, load_config, plain
from svdd.run_files import RunError, explained, lock, sync_folder, write_atomically

__all__ = ["RunFolder", "image_name"]

_OWN_FILE = re.compile(r"(config\.yaml|results(-\d+)?\.jsonl|summary\.json|trace\.jsonl)(\.tmp)?")
_OWN_IMAGE = re.compile(r"\d{6,}-\d{2,}\.png(\.tmp)?")
_SHARD = re.compile(r"results-\d+\.jsonl")

Key = tuple[int, int]


class _Place(NamedTuple):
    path: Path
    offset: int


class RunFolder:
    """The files of one run; the process of rank 0 calls `claim` and `merge`, every process may do the rest.

    Args:
        path: The folder; it need not exist.
        images_per_prompt: How many images make a prompt finished.
    """

    def __init__(self, path: str | Path, images_per_prompt: int = 1) -> None:
        self.path = Path(path)
        self.images_per_prompt = images_per_prompt
        self.results = self.path / "results.jsonl"
        self.summary = self.path / "summary.json"
        self._config = self.path / "config.yaml"
        self._images = self.path / "images"
        self._lock: int | None = None
        self._shard: int | None = None

    def claim(self, config: dict[str, Any], overwrite: bool = False) -> set[int]:
        """Locks the folder, repairs what a crash left, and returns the indices of the finished prompts.

        Args:
            config: The resolved configuration; it must equal that of an earlier run here, where it bears on images.
            overwrite: Remove the files of an earlier run first, and no others.

        Raises:
            RunError: If the folder is not a run folder, belongs to other settings, is in use, or cannot be written.
        """
        try:
            with explained(self.path):
                return self._claim(config, overwrite)
        except BaseException:
            self.close()
            raise

    def finished(self) -> set[int]:
        """Returns the indices of the prompts whose images are all whole; reads only, also while rank 0 repairs."""
        with explained(self.path):
            return self._finished(self._scan(check_images=True)[0])

    def rows(self, count: int = 1024) -> Iterator[list[dict[str, Any]]]:
        """Yields the rows of `results.jsonl` in lists of at most `count`."""
        if not self.results.exists():
            return
        with open(self.results, "rb") as file:
            while lines := [line for _, line in zip(range(count), file, strict=False)]:
                yield [json.loads(line) for line in lines]

    def open_shard(self, rank: int) -> None:
        """Opens the file to which the process of this rank appends its rows, and locks it."""
        path = self.path / f"results-{rank:05d}.jsonl"
        with explained(path):
            self._shard = lock(path, f"another process writes {path}", os.O_APPEND)
            sync_folder(self.path)

    def write(self, images: Iterable[tuple[dict[str, Any], bytes]]) -> None:
        """Puts a batch on disk: first each image, then, in one write, a row for each.

        Args:
            images: The row of each image, and its PNG file's bytes. The rows gain `file` and `sha256`.

        Raises:
            RunError: If the disk is full or cannot be written; earlier batches stay, and this one leaves no rows.
        """
        if self._shard is None:
            raise RuntimeError("write needs an open shard: call open_shard first")
        lines = []
        with explained(self.path):
            for row, png in images:
                name = image_name(row["prompt_index"], row["image_index"])
                write_atomically(self.path / name, png, durable=False)
                lines.append(_dump({**row, "file": name, "sha256": hashlib.sha256(png).hexdigest()}) + b"\n")
            sync_folder(self._images)
            data = b"".join(lines)
            if os.write(self._shard, data) != len(data):  # the torn line is dropped when the run continues
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._shard)

    def close_shard(self) -> None:
        """Closes this process's shard, if it is open."""
        if self._shard is not None:
            os.close(self._shard)
            self._shard = None

    def merge(self) -> tuple[int, int]:
        """Folds all shards into `results.jsonl` and returns the number of prompts and of images in it."""
        with explained(self.path):
            rows, _ = self._scan()
            self._fold(rows)
        return len({prompt_index for prompt_index, _ in rows}), len(rows)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes `summary.json`; what is not a finite number becomes null."""
        with explained(self.summary):
            write_atomically(self.summary, _dump(summary, indent=2) + b"\n")

    def remove_summary(self) -> None:
        """Removes the summary, which is about to be outdated."""
        with explained(self.summary):
            self.summary.unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the shard and gives up the lock."""
        self.close_shard()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _claim(self, config: dict[str, Any], overwrite: bool) -> set[int]:
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"the output must be a folder, got the file {self.path}; choose another --output")
        self.path.mkdir(parents=True, exist_ok=True)
        recorded = self._recorded_config()
        self._lock = lock(self.path / ".lock", f"{self.path} is in use by another run")
        for shard in self._shards():  # a process of a killed run may have outlived it
            os.close(lock(shard, f"a process of an earlier run still writes {shard}"))
        changed = differences(recorded, config) if recorded is not None else []
        if changed and self._has_rows() and not overwrite:
            raise RunError(
                f"{self.path} holds a run with other settings: {'; '.join(changed)}. "
                "Choose another --output, or remove the old run with --overwrite"
            )
        self._remove_own_files(everything=overwrite)
        if recorded is None or changed or overwrite:
            write_atomically(self._config, dump_config(config))
        self._images.mkdir(exist_ok=True)  # after the file that marks the folder as ours
        rows, lines = self._scan(check_images=True)
        finished = self._finished(rows)
        kept = {key: place for key, place in rows.items() if key[0] in finished}
        if self._shards() or lines > len(kept):
            self._fold(kept)
        return finished

    def _shards(self) -> list[Path]:
        return sorted(path for path in self.path.iterdir() if _SHARD.fullmatch(path.name))

    def _has_rows(self) -> bool:
        """Whether an earlier run got as far as an image; one that failed before binds nobody to its settings."""
        return any(path.stat().st_size for path in (self.results, *self._shards()) if path.exists())

    def _recorded_config(self) -> dict[str, Any] | None:
        """Returns the configuration of the run in the folder, None where there is no run, or refuses the folder."""
        foreign = f"{self.path} is not empty and is not a run folder; choose another --output"
        if not self._config.exists():
            if unknown := sorted({path.name for path in self.path.iterdir()} - {".lock", "config.yaml.tmp"}):
                raise RunError(f"{foreign} (it holds {', '.join(unknown[:3])}{', ...' if unknown[3:] else ''})")
            return None
        try:
            text = self._config.read_text(encoding="utf-8")
            if not text.startswith(HEADER):
                raise RunError(f"{foreign} (its config.yaml was not written by svdd)")
            return load_config(text)
        except UnicodeDecodeError as error:
            raise RunError(f"{foreign} (its config.yaml was not written by svdd)") from error

    def _remove_own_files(self, everything: bool) -> None:
        """Removes what a crash left half written, or everything but config.yaml, which marks the folder as ours."""
        for folder, own in ((self.path, _OWN_FILE), (self._images, _OWN_IMAGE)):
            for path in list(folder.iterdir()) if folder.is_dir() else ():
                if own.fullmatch(path.name) and (path.suffix == ".tmp" or (everything and path != self._config)):
                    path.unlink()

    def _scan(self, check_images: bool = False) -> tuple[dict[Key, _Place], int]:
        """Returns where the row of each image begins, and the number of lines read.

        Shards are read first: rows only ever move from them to results.jsonl, so that none is missed meanwhile.
        """
        rows: dict[Key, _Place] = {}
        lines = 0
        for path in (*self._shards(), self.results) if self.path.is_dir() else ():
            newer = set(rows) if path == self.results else set()
            with suppress(FileNotFoundError), open(path, "rb") as file:
                offset = 0
                for line in file:
                    row = _parse(line)
                    if row is not None and not (check_images and not self._is_whole(row)):
                        key = (row["prompt_index"], row["image_index"])
                        if key not in newer:
                            rows[key] = _Place(path, offset)
                    offset += len(line)
                    lines += 1
        return rows, lines

    def _is_whole(self, row: dict[str, Any]) -> bool:
        try:
            return hashlib.sha256((self.path / row["file"]).read_bytes()).hexdigest() == row["sha256"]
        except OSError:
            return False

    def _finished(self, rows: Iterable[Key]) -> set[int]:
        counts = Counter(prompt_index for prompt_index, image_index in rows if image_index < self.images_per_prompt)
        return {prompt_index for prompt_index, count in counts.items() if count == self.images_per_prompt}

    def _fold(self, rows: dict[Key, _Place]) -> None:
        """Replaces results.jsonl by the given rows in order, and then removes the shards."""
        temporary = self.results.with_suffix(".jsonl.tmp")
        with ExitStack() as stack, open(temporary, "wb") as output:
            sources = {path: stack.enter_context(open(path, "rb")) for path in {place.path for place in rows.values()}}
            for key in sorted(rows):
                source = sources[rows[key].path]
                source.seek(rows[key].offset)
                output.write(source.readline())
            output.flush()
            os.fsync(output.fileno())
        os.replace(temporary, self.results)
        sync_folder(self.path)
        for shard in self._shards():
            shard.unlink()


def image_name(prompt_index: int, image_index: int) -> str:
    """Returns an image's path in the run folder: `images/000012-00.png`."""
    return f"images/{prompt_index:06d}-{image_index:02d}.png"


def _parse(line: bytes) -> dict[str, Any] | None:
    """Returns the row in a whole line of ours, else None."""
    with suppress(ValueError, KeyError, TypeError):
        row = json.loads(line)
        named = row["file"] == image_name(row["prompt_index"], row["image_index"])
        if named and isinstance(row["sha256"], str) and line.endswith(b"\n"):
            return row
    return None


def _dump(value: Any, indent: int | None = None) -> bytes:
    """Encodes as strict JSON; a lone surrogate, which UTF-8 has not, becomes its JSON escape."""
    text = json.dumps(plain(value, finite=True), ensure_ascii=False, allow_nan=False, indent=indent)
    return text.encode("utf-8", "backslashreplace")
