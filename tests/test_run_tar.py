"""Images in tar shards: readable by WebDataset, and repaired after damage."""

import hashlib
import io
import json
import tarfile

import pytest
from PIL import Image

from svdd import UserError
from svdd.runs import images as run_images
from svdd.runs.folder import RunFolder
from svdd.runs.images import RunImages, read_image
from svdd.runs.writer import RunWriter
from tests.memory import peak_bytes
from tests.test_writer import CONFIG, ROW, Tiny, full_disk, predict, read_rows


def run(folder, prompts=range(6), **kwargs):
    writer, module = RunWriter(folder, CONFIG, tar=True), Tiny(**kwargs)
    finished = writer.open()
    predict(writer, module, [p for p in prompts if p not in finished])
    return module.drawn


def names(folder):
    """Returns the members of all shards; fails on an incomplete shard."""
    found = {}
    for path in sorted(folder.glob("images/*")):
        with tarfile.open(path, "r:") as archive:
            found[path.name] = archive.getnames()
        assert path.read_bytes().endswith(bytes(1024))
        assert path.stat().st_size % 512 == 0
    return found


def check(folder):
    """Asserts that each image occurs once, matches its row and precedes it in the shard."""
    rows = read_rows(folder)
    assert [(row["prompt_index"], row["image_index"]) for row in rows] == [(p, k) for p in range(6) for k in range(2)]
    for row in rows:
        assert hashlib.sha256(read_image(folder, row["file"])).hexdigest() == row["sha256"]
        assert json.loads(read_image(folder, row["file"].replace(".png", ".json"))) == row
    members = sum(names(folder).values(), [])  # noqa: RUF017
    assert sorted(members) == sorted(
        f"{p:06d}-{k:02d}.{e}" for p in range(6) for k in range(2) for e in ("png", "json")
    )


def test_shards_as_webdataset_reads_them(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    assert run(tmp_path / "run") == list(range(6))
    check(tmp_path / "run")
    assert list(names(tmp_path / "run")) == ["00000-000000.tar"]
    reader = webdataset.WebDataset(str(tmp_path / "run/images/00000-000000.tar"), shardshuffle=False)
    samples = list(reader.decode("pil"))
    assert [sample["__key__"] for sample in samples] == [f"{p:06d}-{k:02d}" for p in range(6) for k in range(2)]
    for sample, row in zip(samples, read_rows(tmp_path / "run"), strict=True):
        assert sample["json"] == row
        with Image.open(io.BytesIO(read_image(tmp_path / "run", row["file"]))) as picture:
            assert sample["png"].tobytes() == picture.convert("RGB").tobytes()


def cut_the_end(path):
    path.write_bytes(path.read_bytes()[:-1024])
    return set()


def cut_a_member(path):
    path.write_bytes(path.read_bytes()[:-1600])
    return {5}


def garble_an_image(path):
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    return {0}


def garble_a_header(path):
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        at = archive.getmember("000004-00.png").offset
    content[at + 150] ^= 1  # the checksum
    path.write_bytes(content)
    return {4, 5}


def lose_the_shard(path):
    path.unlink()
    return set(range(6))


def add_noise(path):
    with open(path, "ab") as file:
        file.write(b"noise")
    return set()


@pytest.mark.parametrize(
    "damage", [cut_the_end, cut_a_member, garble_an_image, garble_a_header, lose_the_shard, add_noise]
)
def test_a_damaged_shard_is_repaired(tmp_path, damage):
    run(tmp_path)
    missing = damage(tmp_path / "images/00000-000000.tar")
    assert set(run(tmp_path)) == missing
    check(tmp_path)
    assert run(tmp_path) == []


def test_an_interrupted_run_continues_in_a_new_shard(tmp_path):
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path, stop_at=4)
    rows = (tmp_path / "results-00000.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "results-00000.jsonl").write_bytes(b"".join(rows[:-1]))  # as if killed before the last row
    assert run(tmp_path) == [3, 4, 5]
    check(tmp_path)
    found = names(tmp_path)
    assert list(found) == ["00000-000000.tar", "00000-000001.tar"]
    assert {name[:6] for name in found["00000-000000.tar"]} == {"000000", "000001", "000002"}


def test_a_full_disk_loses_nothing(tmp_path):
    run(tmp_path, prompts=[0, 1])
    with full_disk(8_000), pytest.raises(UserError, match="what is finished is kept"):
        run(tmp_path, size=64)
    assert run(tmp_path) == [2, 3, 4, 5]
    check(tmp_path)


def image(prompt_index, content=b"x"):
    return {**ROW, "prompt_index": prompt_index}, content


def writer(folder, rank, **kwargs):
    (folder / "images").mkdir(exist_ok=True)
    images = RunImages(folder, tar=True, **kwargs)
    images.rank = rank
    return images


def test_a_full_shard_is_closed(tmp_path):
    images = writer(tmp_path, 3, images_per_shard=2)
    for k in range(5):
        assert images.write([image(k)])[0]["file"] == f"images/00003-{k // 2:06d}.tar/{k:06d}-00.png"
    images.close()
    assert list(names(tmp_path)) == [f"00003-{k:06d}.tar" for k in range(3)]
    assert writer(tmp_path, 3).write([image(5)])[0]["file"] == "images/00003-000003.tar/000005-00.png"
    assert writer(tmp_path, 4).write([image(6)])[0]["file"] == "images/00004-000000.tar/000006-00.png"


def large_shard(folder):
    """A shard of 20 images of a megabyte without the end-of-archive blocks."""
    images = writer(folder, 0)
    for k in range(20):
        row = images.write([image(k, bytes([k]) * 1_000_000)])[0]
    return (folder / row["file"]).parent


def keep_only(path, prompts):
    rows = [{"file": f"images/{path.name}/{k:06d}-00.png"} for k in prompts]
    RunImages(path.parents[1]).keep_only(rows)


def test_a_missing_end_is_appended_without_copying(tmp_path):
    path = large_shard(tmp_path)
    before, inode = path.read_bytes(), path.stat().st_ino
    keep_only(path, range(20))
    assert path.read_bytes() == before + bytes(1024)
    assert path.stat().st_ino == inode


def test_a_shard_is_copied_image_by_image(tmp_path):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    shards = [large_shard(folder) for folder in folders]
    waiting = iter(shards)
    assert peak_bytes(lambda: keep_only(next(waiting), range(1, 20))) < 6_000_000
    for folder, path in zip(folders, shards, strict=True):
        assert names(folder) == {path.name: [f"{k:06d}-00.{e}" for k in range(1, 20) for e in ("png", "json")]}
        for k in range(1, 20):
            assert read_image(folder, f"images/{path.name}/{k:06d}-00.png") == bytes([k]) * 1_000_000
    assert not list(tmp_path.rglob("*.tmp"))


def test_many_shards_are_read_one_after_the_other(tmp_path, monkeypatch):
    """Rows are sorted by prompt, so neighbouring rows are in shards of different processes."""
    folders = [RunFolder(tmp_path, tar=True) for _ in range(70)]
    folders[0].claim({})
    for rank, folder in enumerate(folders):
        folder.open_shard(rank)
        for p in (rank, rank + 70):
            folder.write([({**ROW, "prompt_index": p}, b"png")])
        folder.close_shard()
    folders[0].merge()
    folders[0].close()
    opened, open_tar = [], tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *args, **kwargs: opened.append(args) or open_tar(*args, **kwargs))
    run_images._scan.cache_clear()
    assert RunFolder(tmp_path, tar=True).claim({}) == set(range(140))
    assert 70 <= len(opened) <= 2 * 70


def test_overwrite_removes_shards(tmp_path):
    run(tmp_path)
    (tmp_path / "images/mine.tar").write_text("mine")
    writer = RunWriter(tmp_path, CONFIG, overwrite=True)
    assert writer.open() == set()
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["mine.tar"]
    writer.folder.close()


def test_a_run_may_switch_between_files_and_shards(tmp_path):
    run(tmp_path, prompts=range(3))
    writer, module = RunWriter(tmp_path, {**CONFIG, "tar": False}), Tiny()
    assert writer.open() == {0, 1, 2}
    predict(writer, module, [3, 4, 5])
    assert RunWriter(tmp_path, CONFIG).folder.finished() == set(range(6))
