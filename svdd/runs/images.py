"""Where the images of a run lie: in files of their own or in tar shards."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, cast

from svdd.runs.files import sync_folder, write_atomically
from svdd.runs.json_lines import encode
from svdd.runs.rows import ResultRow
from svdd.runs.tar import SHARD_NAME, TarWriter, read_image, repair

__all__ = ["RunImages", "image_name", "is_named_by"]

_SUBFOLDER = re.compile(r"\d{4,}")
_OWN_FILE = re.compile(rf"(\d{{6,}}-\d{{2,}}\.png|{SHARD_NAME.pattern})(\.tmp)?")
_FILE = re.compile(rf"images/(?:(?:{_SUBFOLDER.pattern}|{SHARD_NAME.pattern})/)?([^/]+)")
_IMAGES_PER_FOLDER = 10_000  # larger folders are slow to list and to back up


class RunImages:
    """The images of one run; see `RunFolder` for the arguments."""

    def __init__(self, run: Path, num_prompts: int, tar: bool) -> None:
        self.run, self.folder, self.num_prompts, self.tar = run, run / "images", num_prompts, tar
        self._archive: TarWriter | None = None

    def open(self, rank: int) -> None:
        """Prepares to write as the process of this rank."""
        if self.tar and self._archive is None:
            self._archive = TarWriter(self.folder, rank)

    def close(self) -> None:
        """Ends the open tar shard, if there is one."""
        if self._archive is not None:
            self._archive.close()
            self._archive = None

    def write(self, images: Iterable[tuple[ResultRow, bytes]]) -> list[ResultRow]:
        """Puts PNG files on disk and returns their rows with `file` and `sha256`."""
        rows: list[ResultRow] = []
        members: list[tuple[str, bytes]] = []
        folders: set[Path] = set()
        for row, png in images:
            file = image_name(row["prompt_index"], row["image_index"], row["num_images"] or 1, self.num_prompts)
            path = self.run / file
            if self._archive is not None:
                file = f"images/{self._archive.shard()}/{path.name}"
            rows.append(cast(ResultRow, {**row, "file": file, "sha256": hashlib.sha256(png).hexdigest()}))
            if self._archive is not None:
                members += [(path.name, png), (f"{path.stem}.json", encode(rows[-1]))]
                continue
            path.parent.mkdir(exist_ok=True)
            folders |= {self.folder, path.parent}
            write_atomically(path, png, durable=False)
        if self._archive is not None and members:
            self._archive.append(members, len(rows))
        for folder in folders:
            sync_folder(folder)
        return rows

    def is_whole(self, row: Mapping[str, Any]) -> bool:
        """Whether the image of a row is there with the recorded checksum."""
        with suppress(OSError):
            return hashlib.sha256(read_image(self.run, row["file"])).hexdigest() == row["sha256"]
        return False

    def remove(self, everything: bool) -> None:
        """Removes files that a crash left half written, or all images; keeps all files of other origin."""
        inside = sorted(self.folder.glob("*"))
        subfolders = [path for path in inside if _SUBFOLDER.fullmatch(path.name) and path.is_dir()]
        for path in (*inside, *(path for folder in subfolders for path in sorted(folder.iterdir()))):
            if _OWN_FILE.fullmatch(path.name) and (everything or path.suffix == ".tmp"):
                path.unlink()
        for folder in subfolders if everything else ():
            with suppress(OSError):  # it holds something else
                folder.rmdir()

    def keep_only(self, rows: Iterable[ResultRow]) -> None:
        """Repairs the tar shards and removes images without a row from them."""
        wanted: dict[str, set[str]] = {}
        for row in rows:
            path = PurePosixPath(row["file"])
            if path.parent.suffix == ".tar":
                wanted.setdefault(path.parent.name, set()).add(path.stem)
        repair(self.folder, wanted)


def is_named_by(row: Mapping[str, Any]) -> bool:
    """Whether a row is complete and names its image as svdd does; a prompt has the images 0 to num_images - 1."""
    if type(row["num_images"]) is not int or not 0 <= row["image_index"] < row["num_images"]:
        return False
    named = _FILE.fullmatch(row["file"])
    right = named is not None and f"images/{named[1]}" == image_name(row["prompt_index"], row["image_index"])
    return right and isinstance(row["sha256"], str)


def image_name(prompt_index: int, image_index: int, num_images: int = 1, num_prompts: int = 0) -> str:
    """Returns an image's path in the run folder, `images/000012-00.png`.

    In a run of more than 10,000 images it is `images/0001/010234-00.png`, with at most 10,000 images in a subfolder.

    Args:
        prompt_index: Position of the prompt in its source.
        image_index: Position of the image among those of its prompt.
        num_images: Images of each prompt.
        num_prompts: Prompts of the whole run; 0 if unknown.
    """
    name = f"{prompt_index:06d}-{image_index:02d}.png"
    if num_prompts * num_images <= _IMAGES_PER_FOLDER:
        return f"images/{name}"
    return f"images/{prompt_index // max(1, _IMAGES_PER_FOLDER // num_images):04d}/{name}"
