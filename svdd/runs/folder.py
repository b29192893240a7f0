"""The folder of a run: written so that a crash at any point loses nothing, and read back.

Each image is renamed into place; then its trace and then its row are appended to the shards of this process. Rank 0
merges the shards when a run begins and when it ends. A row counts only if its line is complete and its image has the
recorded SHA-256; a trace counts only with its row. Failed prompts are listed until the
run continues, which tries them again.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from svdd import SUMMARY_FILE, say
from svdd.runs.changes import require_same
from svdd.runs.config import CONFIG, HARMLESS, HARMLESS_IF_REPRODUCIBLE, Recorded, plain, read_config, write_config
from svdd.runs.files import OtherRun, lock, os_errors_explained, read_object, sync_folder, write_atomically
from svdd.runs.fingerprints import FINGERPRINTS, compare, compare_contents, is_reproducible, rows_at_once
from svdd.runs.images import RunImages, is_complete
from svdd.runs.json_lines import RowIndex, ShardedFile, encode
from svdd.runs.output import check, hold
from svdd.runs.peaks import Peaks
from svdd.runs.reading import has_rows, read_rows, read_sampler, read_summary
from svdd.runs.recorded_prompts import PROMPTS, PromptChanges, write_prompts
from svdd.runs.rows import ResultRow

if TYPE_CHECKING:
    from svdd.runs.prompts import PromptDataset

__all__ = ["Entries", "RunFolder"]

_KIND = "predict"  # the command whose folder this is

Entries = Sequence[Mapping[str, Any]]


class RunFolder:
    """The files of one run. The process of rank 0 calls `claim` and `merge`; every process may call the rest.

    Args:
        path: The folder; it need not exist.
        tar: Write the images into tar shards instead of a file each.
    """

    def __init__(self, path: str | Path, tar: bool = False) -> None:
        self.path = Path(path)
        self.results, self.failures = self.path / "results.jsonl", self.path / "failed.jsonl"
        self.summary = self.path / SUMMARY_FILE
        self.images = RunImages(self.path, tar)
        self._fingerprints = self.path / FINGERPRINTS
        self.peaks = Peaks(self._fingerprints)
        self._condemned = self.path / ".overwriting"  # exists while an earlier run is removed
        self._rows = ShardedFile(self.results, is_complete)
        self._traces = ShardedFile(self.path / "trace.jsonl")
        self._failures = ShardedFile(self.failures)
        self._lock: FileLock | None = None
        self._shard_lock: FileLock | None = None
        self._rank: int | None = None  # None while the shards are closed

    @property
    def held(self) -> bool:
        """Whether this process has claimed the folder."""
        return self._lock is not None

    def has_rows(self) -> bool:
        """Whether there is a file of result rows."""
        return has_rows(self._rows)

    def rows(self, checked: bool = False) -> Iterator[ResultRow]:
        """Yields the rows of a run, also of one that is still being drawn or was killed: see `read_rows`."""
        return read_rows(self.path, self._rows, self.images, checked)

    def traces(self) -> Iterator[dict[str, Any]]:
        """Yields the traces of a run in the same order, also of one that is still being drawn or was killed."""
        return (entry for _, entry in self._traces.entries() if isinstance(entry, dict))

    def read_summary(self) -> dict[str, Any]:
        """Returns the summary of a finished run; raises a UserError if there is none."""
        return read_summary(self.path)

    def sampler(self) -> str:
        """Returns the name of the run's sampler; a UserError if neither configuration nor summary states it."""
        return read_sampler(self.path)

    def failed(self) -> set[str]:
        """Returns the prompts that could not be drawn."""
        return {str(entry.get("prompt")) for _, entry in self._failures.entries() if isinstance(entry, dict)}

    def finished(self) -> set[int]:
        """Returns the indices of the prompts whose images are all whole; only reads."""
        with os_errors_explained(self.path):
            return _finished(self._rows.scan(self.images.is_whole)[0])

    def claim(
        self, config: dict[str, Any], overwrite: bool = False, prompts: "PromptDataset | None" = None
    ) -> set[int]:
        """Locks the folder, repairs what a crash left, and returns the indices of the finished prompts.

        Args:
            config: The resolved configuration; settings that affect images must equal those of an earlier run here.
            overwrite: First remove the files of an earlier run, and no others.
            prompts: Those of the run. The recorded ones must be their beginning, or they the beginning of the recorded
                ones, if no image of the others is drawn. Without them, their settings must equal the recorded ones.

        Raises:
            RunError: If the folder is no run folder, holds another run, is in use, or cannot be written.
        """
        try:
            with os_errors_explained(self.path):
                self._lock_and_clear(config, overwrite, prompts)
                rows, lines = self._rows.scan(self.images.is_whole)
                finished = _finished(rows)
                kept = {key: place for key, place in rows.items() if key[0] in finished}
                if self._rows.shards() or lines > len(kept):
                    self._rows.merge(kept)
                self._merge_traces(kept)
                self.images.keep_only(self.rows() if self.results.exists() else ())
                return finished
        except BaseException:
            self.close()
            raise

    def peek(self, config: dict[str, Any], overwrite: bool = False, prompts: "PromptDataset | None" = None) -> set[int]:
        """Returns or raises what `claim` would, and changes nothing."""
        with os_errors_explained(self.path):
            check(self.path, _KIND)
            anew, _ = self._compare(read_config(self.path), config, overwrite, prompts)
            return set() if anew else self.finished()

    def record_rows_at_once(self, most: int | None, rank: int) -> int | None:
        """Records how many rows of an image are computed together, and returns how many to take: see `rows_at_once`."""
        with os_errors_explained(self.path):
            return rows_at_once(self._fingerprints, most, self._drawn(), record=rank == 0)

    def open_shard(self, rank: int) -> None:
        """Locks and opens the files to which the process of this rank appends; raises a RunError if it cannot."""
        with os_errors_explained(self.path):
            if self._shard_lock is None:
                held = f"another process writes as rank {rank} to {self.path}"
                self._shard_lock = lock(self.path / f".lock-{rank:05d}", held)
            self._rows.open(rank)
            if rank == 0:
                self.summary.unlink(missing_ok=True)  # it becomes outdated
        self._rank = self.images.rank = rank

    def write(
        self,
        images: Iterable[tuple[ResultRow, bytes]],
        traces: Entries = (),
        failures: Entries = (),
        peak: int | None = None,
    ) -> None:
        """Puts a batch on disk: first each image, then, in one write each, the traces and a row for each image.

        `images` holds the row and the PNG file's bytes of each image, and `peak` is this process's peak memory in
        bytes; the rest is as in `Prediction`. After an error, earlier batches stay, and this one leaves no rows.

        Raises:
            ValueError: If a row or a trace could not be read back, for example a row without `num_images`.
            RunError: If the disk is full or cannot be written.
        """
        assert self._rank is not None, "call open_shard first"
        with os_errors_explained(self.path):
            if peak is not None:
                self.peaks.record(self._rank, peak)
            rows = self.images.write(images)
            for file, entries in ((self._traces, traces), (self._failures, failures), (self._rows, rows)):
                if entries:
                    file.append(self._rank, entries)

    def close_shard(self) -> None:
        """Closes and unlocks this process's shards, if they are open."""
        for file in (self.images, self._rows, self._traces, self._failures):
            file.close()
        self._rank = None
        if self._shard_lock is not None:
            with suppress(OSError):  # Windows removes no locked file, and leaves it to `claim`
                Path(self._shard_lock.lock_file).unlink()
            self._shard_lock.release()
            self._shard_lock = None

    def merge(self) -> tuple[int, int, int]:
        """Merges all shards and returns the number of prompts with images, of images, and of failed prompts."""
        with os_errors_explained(self.path):
            self.peaks.fold()
            rows, _ = self._rows.scan()
            self._rows.merge(rows)
            self._merge_traces(rows)
            if failures := self._failures.scan()[0]:
                self._failures.merge(failures)
        return len({prompt for prompt, _ in rows}), len(rows), len(failures)

    def fingerprint(self, found: Mapping[str, str], versions: Mapping[str, str]) -> list[str]:
        """Records or compares what the images depend on beyond the settings: see `compare`."""
        return compare(self._fingerprints, found, versions)

    def compare_contents(self, contents: Iterable[bytes]) -> None:
        """Records or compares the files that the prompts name: see `compare_contents` in `svdd.runs.fingerprints`."""
        compare_contents(self._fingerprints, contents)

    def has_summary(self) -> bool:
        """Whether there is a whole summary."""
        return bool(read_object(self.summary))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes the summary; numbers that are not finite become null."""
        with os_errors_explained(self.summary):
            write_atomically(self.summary, encode(summary, indent=2) + b"\n")

    def amend_summary(self, found: Mapping[str, Any]) -> None:
        """Adds entries to the summary."""
        self.write_summary(self.read_summary() | dict(found))

    def close(self) -> None:
        """Closes the shards and releases the folder."""
        self.close_shard()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _drawn(self) -> bool:
        """Whether rows of an earlier run are on disk."""
        return any(path.stat().st_size for path in (self.results, *self._rows.shards()) if path.exists())

    def _lock_and_clear(self, config: dict[str, Any], overwrite: bool, prompts: "PromptDataset | None") -> None:
        """Locks the folder, checks and records configuration and prompts, and removes what must not stay."""
        if self._lock is None:
            self._lock = hold(self.path, _KIND)
        recorded = read_config(self.path)
        for path in sorted(self.path.glob(".lock-*")):  # a process of a killed run may have outlived it
            lock(path, f"a process of an earlier run still writes to {self.path}").release()
            path.unlink(missing_ok=True)
        anew, changes = self._compare(recorded, config, overwrite, prompts)
        if anew and recorded is not None:  # a crash from here on leaves nothing that a later run continues
            write_atomically(self._condemned, b"")
        files = (self._rows, self._traces, self._failures)  # rows before their traces
        others = (self.summary, self.path / CONFIG, self.path / PROMPTS, self._fingerprints, self._condemned)
        for path in (*(file.path for file in files), *others):
            path.with_name(f"{path.name}.tmp").unlink(missing_ok=True)
        for file in files if anew else (self._failures,):  # failed prompts are tried again
            file.remove()
        for path in (self.summary, self._fingerprints, *self.peaks.files()) if anew else ():
            path.unlink(missing_ok=True)
        self.images.remove(everything=anew)
        if anew or recorded is None or recorded.config.get("data") != plain(config).get("data"):  # of more prompts
            write_config(self.path, _KIND, config)
        if prompts is not None and (changes is None or changes.given != changes.recorded):
            write_prompts(self.path, prompts)
        elif anew:
            (self.path / PROMPTS).unlink(missing_ok=True)
        self.images.folder.mkdir(exist_ok=True)  # after the file that marks the folder as ours
        if anew:
            sync_folder(self.path)  # the removals are on disk before the mark goes
            self._condemned.unlink(missing_ok=True)

    def _compare(
        self, recorded: Recorded | None, config: dict[str, Any], overwrite: bool, prompts: "PromptDataset | None"
    ) -> tuple[bool, PromptChanges | None]:
        """Returns whether the run begins anew, and else how the prompts have changed; OtherRun if it can do neither."""
        if recorded is None or overwrite or not self._drawn() or self._condemned.exists():
            return True, None
        harmless = HARMLESS_IF_REPRODUCIBLE if is_reproducible(self._fingerprints) else HARMLESS
        changes = require_same(self.path, recorded.config, config, prompts, harmless)
        self._check_number(changes)
        return False, changes

    def _check_number(self, changes: PromptChanges | None) -> None:
        """Says how many prompts were appended; raises OtherRun if images of prompts are drawn that are missing now."""
        if changes is None or changes.given == changes.recorded:
            return
        more = changes.given - changes.recorded
        if more > 0:
            appended = f"{more} prompts were" if more > 1 else "a prompt was"
            say(f"svdd: {appended} appended to the {changes.recorded} of {self.path}", error=True)
        elif drawn := {prompt for prompt, _ in self._rows.scan()[0] if prompt >= changes.given}:
            what = f"{self.path} holds images of {len(drawn)} prompts beyond the {changes.given} given"
            raise OtherRun(f"{what}: to continue it, give at least its first {max(drawn) + 1} prompts")

    def _merge_traces(self, rows: RowIndex) -> None:
        """Merges the traces of the given rows and drops all others; without any, no file is left."""
        found, lines = self._traces.scan()
        traces = {key: place for key, place in found.items() if key in rows}
        if not traces:
            self._traces.remove()
        elif self._traces.shards() or lines > len(traces):
            self._traces.merge(traces)


def _finished(rows: RowIndex) -> set[int]:
    """Returns the prompts that have as many images as their rows say."""
    expected: defaultdict[int, list[int]] = defaultdict(list)
    for (prompt, _), place in rows.items():
        expected[prompt].append(place.num_images)
    return {prompt for prompt, counts in expected.items() if len(counts) == max(counts)}
