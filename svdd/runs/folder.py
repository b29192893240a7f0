"""The folder that a run leaves: written so that a crash at any point loses nothing, and read back to continue it.

Every image is renamed into place, then its trace and then its row are appended to the process's own
`trace-00000.jsonl` and `results-00000.jsonl`. The main process folds these shards into `trace.jsonl` and
`results.jsonl`, sorted and without doubles, when a run begins and when it ends. A row counts only if its line is whole
and its image has the recorded SHA-256; a trace counts only where its row does. Prompts that failed stand in
`failed.jsonl` until the run continues, which tries them again.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from svdd.runs.config import HEADER, differences, dump_config, load_config
from svdd.runs.files import RunError, explained, lock, sync_folder, write_atomically
from svdd.runs.index import OWN_FOLDER, WholeImages
from svdd.runs.json_lines import Places, ShardedFile, encode
from svdd.runs.tar import OWN_SHARD, TarWriter, is_in_shard, member_of, repair

__all__ = ["RunFolder", "image_name"]

_OWN_FILE = re.compile(r"(config\.yaml|(results|trace|failed)(-\d+)?\.jsonl|summary\.json)(\.tmp)?")
_OWN_IMAGE = re.compile(rf"(\d{{6,}}-\d{{2,}}\.png|{OWN_SHARD.pattern})(\.tmp)?")
_IMAGES_PER_FOLDER = 10_000  # beyond which folders become slow to list and to back up


class RunFolder:
    """The files of one run; the process of rank 0 calls `claim` and `merge`, every process may do the rest.

    Args:
        path: The folder; it need not exist.
        num_prompts: Prompts of the whole run; where they make more images than a folder should hold, the images go to
            subfolders, in the same way however often the run is interrupted.
        tar: Write the images into tar shards instead of a file each.
    """

    def __init__(self, path: str | Path, num_prompts: int | None = None, tar: bool = False) -> None:
        self.path = Path(path)
        self.num_prompts = num_prompts or 0
        self.results = self.path / "results.jsonl"
        self.summary = self.path / "summary.json"
        self._rows = ShardedFile(self.results, _is_row)
        self._traces = ShardedFile(self.path / "trace.jsonl")
        self._failures = ShardedFile(self.path / "failed.jsonl")
        self._config = self.path / "config.yaml"
        self._images = self.path / "images"
        self._lock: int | None = None
        self._tar = tar
        self._archive: TarWriter | None = None  # None where images are files of their own, or nothing is written
        self._rank: int | None = None  # None while the shards are closed

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
            return self._scan_rows()[0].finished()

    def rows(self, count: int = 1024) -> Iterator[list[dict[str, Any]]]:
        """Yields the rows of `results.jsonl` in lists of at most `count`."""
        if not self.results.exists():
            return
        with open(self.results, "rb") as file:
            while lines := [line for _, line in zip(range(count), file, strict=False)]:
                yield [json.loads(line) for line in lines]

    def open_shard(self, rank: int) -> None:
        """Opens the file to which the process of this rank appends its rows, and locks it.

        That of the traces is opened with the first one.
        """
        with explained(self.path):
            self._rows.open(rank)
            if self._tar and self._archive is None:
                self._archive = TarWriter(self._images, rank)
        self._rank = rank

    def write(
        self,
        images: Iterable[tuple[dict[str, Any], bytes]],
        traces: Sequence[dict[str, Any]] = (),
        failures: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Puts a batch on disk: first each image, then, in one write each, the traces and a row for each image.

        Args:
            images: The row of each image, and its PNG file's bytes. The rows gain `file` and `sha256`.
            traces: What was known at each choice, with `prompt_index` and `image_index`.
            failures: The prompts that could not be drawn, with `prompt_index` and `image_index`.

        Raises:
            ValueError: If a row or a trace could not be read back, as a row without `num_images`.
            RunError: If the disk is full or cannot be written; earlier batches stay, and this one leaves no rows.
        """
        if self._rank is None:
            raise RuntimeError("write needs an open shard: call open_shard first")
        with explained(self.path):
            rows = self._write_files(images) if self._archive is None else self._write_tar(self._archive, images)
            if traces:
                self._traces.open(self._rank)
                self._traces.append(traces)
            if failures:
                self._failures.open(self._rank)
                self._failures.append(failures)
            self._rows.append(rows)

    def close_shard(self) -> None:
        """Closes this process's shards, if they are open."""
        if self._archive is not None:
            self._archive.close()
            self._archive = None
        self._rows.close()
        self._traces.close()
        self._failures.close()
        self._rank = None

    def merge(self) -> tuple[int, int]:
        """Folds all shards and returns the number of prompts and of images in `results.jsonl`."""
        with explained(self.path):
            rows, _ = self._rows.scan(lambda key, row: True)
            self._rows.fold(rows)
            self._fold_traces(rows)
        return rows.num_prompts, len(rows)

    def merge_failures(self) -> int:
        """Folds the shards of the prompts that failed in this run, and returns how many there are."""
        with explained(self.path):
            failures, _ = self._failures.scan(lambda key, failure: True)
            if failures:
                self._failures.fold(failures)
        return len(failures)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes `summary.json`; what is not a finite number becomes null."""
        with explained(self.summary):
            write_atomically(self.summary, encode(summary, indent=2) + b"\n")

    def amend_summary(self, found: dict[str, Any]) -> None:
        """Adds entries to `summary.json`."""
        with explained(self.summary):
            summary = json.loads(self.summary.read_text(encoding="utf-8"))
        self.write_summary(summary | found)

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

    def _write_files(self, images: Iterable[tuple[dict[str, Any], bytes]]) -> list[dict[str, Any]]:
        """Writes each image to a file of its own and returns the completed rows."""
        rows, folders = [], {self._images}
        for row, png in images:
            name = image_name(row["prompt_index"], row["image_index"], row["num_images"] or 1, self.num_prompts)
            path = self.path / name
            if path.parent not in folders:
                path.parent.mkdir(exist_ok=True)
                folders.add(path.parent)
            write_atomically(path, png, durable=False)
            rows.append({**row, "file": name, "sha256": hashlib.sha256(png).hexdigest()})
        for folder in folders:
            sync_folder(folder)
        return rows

    def _write_tar(self, archive: TarWriter, images: Iterable[tuple[dict[str, Any], bytes]]) -> list[dict[str, Any]]:
        """Writes the images into the shard at work, each followed by its row, and returns the completed rows."""
        rows, members = [], []
        for row, png in images:
            name = Path(image_name(row["prompt_index"], row["image_index"])).name
            file = f"images/{archive.shard()}/{name}"
            rows.append({**row, "file": file, "sha256": hashlib.sha256(png).hexdigest()})
            members += [(name, png), (f"{name.partition('.')[0]}.json", encode(rows[-1]))]
        if rows:
            archive.append(members, len(rows))
        return rows

    def _repair_tar(self) -> None:
        """Drops what is torn or has no row from the shards; after the rows are folded."""
        wanted: dict[str, set[str]] = {}
        for row in (row for part in self.rows() for row in part):
            if (inside := member_of(row["file"])) is not None:
                wanted.setdefault(Path(inside[0]).name, set()).add(inside[1].partition(".")[0])
        repair(self._images, wanted)

    def _claim(self, config: dict[str, Any], overwrite: bool) -> set[int]:
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"the output must be a folder, got the file {self.path}; choose another --output")
        self.path.mkdir(parents=True, exist_ok=True)
        recorded = self._recorded_config()
        self._lock = lock(self.path / ".lock", f"{self.path} is in use by another run")
        for shard in (
            *self._rows.shards(),
            *self._traces.shards(),
            *self._failures.shards(),
        ):  # a process of a killed run may have outlived it
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
        self._failures.remove()  # they are tried again
        self._images.mkdir(exist_ok=True)  # after the file that marks the folder as ours
        rows, lines = self._scan_rows()
        finished = rows.finished()
        kept = rows.only(finished)
        if self._rows.shards() or lines > len(kept):
            self._rows.fold(kept)
        self._fold_traces(kept)
        self._repair_tar()
        return finished

    def _has_rows(self) -> bool:
        """Whether an earlier run got as far as an image; one that failed before binds nobody to its settings."""
        return any(path.stat().st_size for path in (self.results, *self._rows.shards()) if path.exists())

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
        inside = self._images.iterdir() if self._images.is_dir() else ()
        folders = sorted(path for path in inside if OWN_FOLDER.fullmatch(path.name) and path.is_dir())
        for folder, own in ((self.path, _OWN_FILE), *((images, _OWN_IMAGE) for images in (self._images, *folders))):
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():  # rows before their traces
                if own.fullmatch(path.name) and (path.suffix == ".tmp" or (everything and path != self._config)):
                    path.unlink()
        for folder in folders if everything else ():
            with suppress(OSError):  # it holds something else
                folder.rmdir()

    def _fold_traces(self, rows: Places) -> None:
        """Folds the traces of the given rows and drops all others; without any, no file is left."""
        traces, lines = self._traces.scan(lambda key, trace: key in rows)
        if not traces:
            self._traces.remove()
        elif self._traces.shards() or lines > len(traces):
            self._traces.fold(traces)

    def _scan_rows(self) -> tuple[Places, int]:
        """Returns the rows whose images are whole, and the number of lines read."""
        images = WholeImages(self.path)
        return self._rows.scan(lambda key, row: images.has(row["file"], row["sha256"]))


def image_name(prompt_index: int, image_index: int, num_images: int = 1, num_prompts: int = 0) -> str:
    """Returns an image's path in the run folder.

    `images/000012-00.png`; in a run of more than 10,000 images `images/0001/010234-00.png`, with at most 10,000 images
    to a subfolder.

    Args:
        prompt_index: The prompt's place in the source.
        image_index: Which of the prompt's images.
        num_images: Images of each prompt.
        num_prompts: Prompts of the whole run; 0 where nobody knows, for one folder.
    """
    name = f"{prompt_index:06d}-{image_index:02d}.png"
    if num_prompts * num_images <= _IMAGES_PER_FOLDER:
        return f"images/{name}"
    return f"images/{prompt_index // max(1, _IMAGES_PER_FOLDER // num_images):04d}/{name}"


def _is_row(row: dict[str, Any]) -> bool:
    """Whether this is a row of ours; a prompt has the images 0 to num_images - 1."""
    place = row["prompt_index"], row["image_index"], row["num_images"]
    numbered = type(row["num_images"]) is int and 0 <= row["image_index"] < row["num_images"]
    named = numbered and row["file"] in (image_name(*place), image_name(*place, num_prompts=_IMAGES_PER_FOLDER + 1))
    named = named or (numbered and is_in_shard(row["file"], Path(image_name(*place[:2])).name))
    return named and isinstance(row["sha256"], str)
