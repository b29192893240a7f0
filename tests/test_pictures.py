"""Pictures of any kind mean what a viewer shows, wherever they are read."""

import json
import os
import zlib

import numpy as np
import PIL
import pytest
from PIL import Image, ImageCms

from svdd import UserError
from svdd.__main__ import main
from svdd.runs.files import write_atomically
from svdd.runs.folder import RunFolder
from svdd.runs.images import read_image
from svdd.runs.json_lines import ShardedFile
from svdd.runs.output import hold
from svdd.runs.pictures import find_pictures, pixels_of, read_pictures
from svdd.runs.prompts import PromptWarning

RAMP = np.tile(np.arange(0, 65535, 1040, dtype=np.uint16), (64, 1))  # 64 x 64, 0 .. 65520
GREY = (RAMP / 257).round().astype(np.uint8)
COLOUR = np.stack([GREY, GREY.T, 255 - GREY], -1)
READS_YCBCR_TIFF = pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow 12 calls them truncated")
ALPHA = np.dstack([COLOUR, GREY])
OVER_WHITE = COLOUR * (GREY[..., None] / 255) + 255 - GREY[..., None]


def lab():
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(Image.fromarray(COLOUR), *profiles, outputMode="LAB")


def palette_with_transparency():
    """Four colours, of which the last is transparent."""
    image = Image.fromarray((RAMP // 16384).astype(np.uint8), "L").convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    return image


def colours_of(numbers):
    return np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)], np.uint8)[numbers]


def animated(second):
    return {"save_all": True, "append_images": [Image.fromarray(second)]}


@pytest.mark.parametrize(
    ("name", "image", "options", "expected", "error"),
    [
        ("grey.png", GREY, {}, GREY, 0),
        ("bits.png", Image.fromarray(GREY > 99), {}, (GREY > 99) * np.uint8(255), 0),
        ("16.png", RAMP, {}, GREY, 0),
        ("16.TIFF", RAMP, {}, GREY, 0),
        ("16_big_endian.tif", RAMP.astype(">u2"), {}, GREY, 0),
        ("32_of_16.tif", RAMP.astype(np.int32), {}, GREY, 0),
        ("32_of_8.tif", GREY.astype(np.int32), {}, GREY, 0),
        ("32.tif", RAMP.astype(np.int32) * 32000, {}, RAMP * (32000 / (2**32 - 1) * 255), 0.5),
        ("unit.tif", (RAMP / 65535).astype(np.float32), {}, GREY, 0),
        ("overshoot.tif", (RAMP / 65535 * 1.02 - 0.01).astype(np.float32), {}, GREY, 3),
        ("float_of_8.tif", GREY.astype(np.float32), {}, GREY, 0),
        ("rgb.PNG", COLOUR, {}, COLOUR, 0),
        ("rgb.bmp", COLOUR, {}, COLOUR, 0),
        ("cmyk.tif", Image.fromarray(COLOUR).convert("CMYK"), {}, COLOUR, 0),
        ("cmyk.jpg", Image.fromarray(COLOUR).convert("CMYK"), {"quality": 100, "subsampling": 0}, COLOUR, 4),
        pytest.param("ycbcr.tif", Image.fromarray(COLOUR).convert("YCbCr"), {}, COLOUR, 10, marks=READS_YCBCR_TIFF),
        ("lab.tif", lab(), {}, COLOUR, 40),
        ("alpha.png", ALPHA, {}, OVER_WHITE, 1),
        ("alpha.webp", ALPHA, {"lossless": True}, OVER_WHITE, 1),
        ("grey_alpha.png", Image.fromarray(ALPHA).convert("LA"), {}, None, 0),
        ("palette.png", palette_with_transparency(), {"transparency": 3}, colours_of(RAMP // 16384), 0),
        ("palette.gif", palette_with_transparency(), {"transparency": 3}, colours_of(RAMP // 16384), 0),
        ("key.png", COLOUR, {"transparency": tuple(map(int, COLOUR[0, 0]))}, None, 0),
        ("key_16.png", RAMP, {"transparency": int(RAMP[0, 3])}, np.where(RAMP[0, 3] == RAMP, 255, GREY), 0),
        ("animated.webp", COLOUR, {"lossless": True, **animated(GREY)}, COLOUR, 0),
        ("animated.png", COLOUR, animated(255 - COLOUR), COLOUR, 0),
        ("animated.gif", GREY, animated(255 - GREY), GREY, 0),
    ],
)  # fmt: skip
def test_a_picture_means_what_a_viewer_shows(tmp_path, name, image, options, expected, error):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(tmp_path / name, **options)
    (picture,) = find_pictures(tmp_path)
    pixels = pixels_of(tmp_path, picture.file)
    if expected is None:
        shown = image.convert("RGBA") if name != "key.png" else Image.open(tmp_path / name).convert("RGBA")
        expected = np.array(Image.alpha_composite(Image.new("RGBA", image.size, "white"), shown).convert("RGB"))
    expected = expected if expected.ndim == 3 else np.stack([expected] * 3, -1)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels - expected.astype(float)).max() <= error


def test_white_is_zero_in_a_tiff_that_says_so_also_if_it_is_turned(tmp_path):
    tags = {262: 0, 274: 3}  # photometric interpretation and orientation
    Image.fromarray(RAMP).save(tmp_path / "a.tif", tiffinfo=tags)
    with Image.open(tmp_path / "a.tif") as image:
        assert image.tag_v2[262] == 0
    assert (pixels_of(tmp_path, "a.tif")[..., 0] == 255 - GREY[::-1, ::-1]).all()


@pytest.mark.parametrize(
    ("depth", "kind", "colour", "row"),  # the row holds that colour and a grey
    [
        (2, 0, [0, 1], [0b01_10_0000]),
        (4, 0, [0, 3], [0x39]),
        (16, 2, [200, 1, 100, 2, 50, 3], [200, 1, 100, 2, 50, 3, *[153] * 6]),
    ],
)
def test_a_transparent_colour_of_a_png_of_another_depth_is_white(tmp_path, depth, kind, colour, row):
    def chunk(name, data):
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    parts = [
        (b"IHDR", bytes([0, 0, 0, 2, 0, 0, 0, 1, depth, kind, 0, 0, 0])),
        (b"tRNS", bytes(colour)),
        (b"IDAT", zlib.compress(bytes([0, *row]))),
    ]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in (*parts, (b"IEND", b""))))
    assert pixels_of(tmp_path, "a.png").tolist() == [[[255] * 3, [170 if depth == 2 else 153] * 3]]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_stands_upright(tmp_path, suffix, orientation):
    turns = [None, *(Image.Transpose[name] for name in ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM"))]
    turns += [Image.Transpose[name] for name in ("TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270")]
    image, turn = Image.fromarray(COLOUR[:32]), turns[orientation - 1]
    exif = Image.Exif()
    exif[0x112] = orientation
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    (image if turn is None else image.transpose(turn)).save(tmp_path / f"a.{suffix}", exif=exif, **options)
    pixels = pixels_of(tmp_path, f"a.{suffix}").astype(int)
    assert pixels.shape == (32, 64, 3)
    assert np.abs(pixels - COLOUR[:32]).max() <= (8 if suffix == "jpg" else 0)


def test_colours_of_another_profile_are_converted_to_srgb(tmp_path):
    """A profile with red and blue exchanged; one that is sRGB or damaged changes nothing."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    other = srgb.replace(b"rXYZ", b"----").replace(b"bXYZ", b"rXYZ").replace(b"----", b"bXYZ")
    other = other.replace("sRGB".encode("utf-16-be"), "RBG.".encode("utf-16-be"))
    image = Image.fromarray(ALPHA)
    for profile, expected in ((other, COLOUR[..., ::-1]), (srgb, COLOUR), (b"damaged", COLOUR)):
        for mode in ("RGB", "RGBA"):
            image.convert(mode).save(tmp_path / "a.png", icc_profile=profile)
            pixels = pixels_of(tmp_path, "a.png")
            over_white = OVER_WHITE if expected is COLOUR else OVER_WHITE[..., ::-1]
            difference = np.abs(pixels - (expected if mode == "RGB" else over_white).astype(float))
            assert difference.max() <= (3 if profile is other else 1 if mode == "RGBA" else 0)


def test_a_contact_sheet_above_the_limit_is_one_line(tmp_path, capsys):
    Image.new("1", (14000, 14000)).save(tmp_path / "sheet.png")
    assert main(["score", "--reward", "Brightness", "--images", str(tmp_path), "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{tmp_path}/sheet.png has more than 178956970 pixels; make it smaller" in line


def bad_png(*chunks):
    made = (
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big") for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


HEADER = (b"IHDR", b"\0\0\0\x08\0\0\0\x08\x08\x02\0\0\0")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "none of PNG, JPEG, WebP, BMP, GIF and TIFF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of PNG"),  # Pillow would run Ghostscript
        (bad_png(HEADER, (b"IDAT", zlib.compress(os.urandom(200))[:90])), "cannot be read as a picture"),
        (bad_png(HEADER, (b"zTXt", b"k\0\0" + zlib.compress(bytes(2**27))), (b"IDAT", b"")), "cannot be read as a"),
        (bad_png((b"IHDR", b"\xff\xff\xff\xff" * 2 + HEADER[1][8:])), "cannot be read as a picture"),
    ],
)
def test_a_damaged_picture_is_named(tmp_path, content, said):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        pixels_of(tmp_path, "a.png")
    assert str(tmp_path / "a.png") in str(caught.value)


def test_floating_point_values_of_no_usual_range_are_refused(tmp_path):
    for values in ([-1, 1], [0, 1e6], [0, np.nan]):
        Image.fromarray(np.array([values], np.float32)).save(tmp_path / "a.tif")
        with pytest.raises(UserError, match=r"expected 0 \.\. 1, 0 \.\. 255 or 0 \.\. 65535"):
            pixels_of(tmp_path, "a.tif")


def test_hidden_files_and_folders_are_no_pictures(tmp_path):
    names = ["b/2.JPG", "b/10.jpeg", "a.Tif", "..png", "._a.png", ".git/a.png", "__MACOSX/a.png", "@eaDir/a.png"]
    names += [".ipynb_checkpoints/a-checkpoint.png", "notes.txt", "png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    assert [picture.file for picture in find_pictures(tmp_path)] == ["a.Tif", "b/2.JPG", "b/10.jpeg"]


@pytest.mark.parametrize("kind", ["fifo", "link", "device"])
def test_a_name_of_a_picture_that_is_none_is_refused_before_any_is_read(tmp_path, kind):
    path = tmp_path / "a.png"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    with pytest.raises(UserError, match=r"a\.png is no regular file but a FIFO, a device or a broken link"):
        find_pictures(tmp_path)
    with pytest.raises(OSError, match=r"regular file|No such file"):
        read_image(tmp_path, "a.png")
    tar = tmp_path / "00000-000000.tar"
    path.rename(tar)
    with pytest.raises(OSError, match=r"regular file|No such file"):
        read_image(tmp_path, "00000-000000.tar/000000-00.png")


def test_a_fifo_named_like_a_result_file_is_refused_at_once(tmp_path):
    for name in ("results.jsonl", "results-00000.jsonl", "summary.json", "summary.json.tmp", "config.yaml"):
        os.mkfifo(tmp_path / name)
    run, rows = RunFolder(tmp_path), ShardedFile(tmp_path / "results.jsonl")
    for read in (rows.scan, lambda: rows.open(0), lambda: write_atomically(run.summary, b"")):
        with pytest.raises(OSError, match=r"regular file|No such device"):
            read()
    assert not run.has_summary()
    for read in (run.read_summary, lambda: list(run.rows()), lambda: hold(tmp_path, "predict")):
        with pytest.raises(UserError):
            read()


def test_large_pictures_are_read_in_smaller_batches(tmp_path, monkeypatch):
    for k in range(5):
        Image.fromarray(np.full((4, 4, 3), k, np.uint8)).save(tmp_path / f"{k}.png")
    monkeypatch.setattr("svdd.runs.pictures.MAX_PIXELS_AT_ONCE", 2 * 4 * 4)
    batches = list(read_pictures(find_pictures(tmp_path), 64))
    assert [len(part) for part, _ in batches] == [2, 2, 1]
    assert [round(image[0, 0, 0].item() * 255) for _, images in batches for image in images] == list(range(5))


# svdd score


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A command that scores one picture, in its folder."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("pictures")
    Image.new("RGB", (8, 8), "red").save("pictures/a.png")
    return ["score", "--reward", "Brightness", "--images", "pictures", "--device", "cpu"]


def test_score_finds_the_prompts_in_any_column(words, tmp_path):
    (tmp_path / "p.csv").write_text("title;Prompt\nx;" + "red " * 900 + "apple\n")
    for column, text in (("title", "x"), ("prompt", "red " * 900 + "apple")):
        assert main([*words, "--prompts", "p.csv", "--prompt_column", column, "--output", column]) == 0
        (row,) = map(json.loads, (tmp_path / column / "scores.jsonl").read_text().splitlines())
        assert row["prompt"] == text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch_size", "0"], "batch_size must be >= 1, got 0"),
        (["--prompts", "p.csv"], "no column 'prompt' among the columns 'title'; say with prompt_column which one"),
        (["--output", "pictures"], "pictures is not empty and is not a run folder"),
        (["--output", "p.csv"], "the output must be a folder, got the file p.csv"),
        (["--images", "absent"], "absent is no folder"),
        (["--prompts", "red"], 'write a single prompt as a list: ["a red apple"]'),
        (["--prompts", '["red", "blue"]'], "--prompts has 2 prompts for 1 pictures in pictures"),
    ],
)
def test_score_checks_its_options_before_it_loads_a_model(words, tmp_path, monkeypatch, capsys, arguments, said):
    (tmp_path / "p.csv").write_text("title\na\n")
    monkeypatch.setattr("svdd.rewards.base.Reward.load", lambda reward: pytest.fail("a model was loaded"))
    monkeypatch.setattr("svdd.evaluation.evaluation.Evaluation.check", lambda self: pytest.fail("a model was loaded"))
    before = sorted(os.listdir())
    assert main([*words, *arguments]) == 2
    assert said in capsys.readouterr().err
    assert sorted(os.listdir()) == before


def test_a_run_warns_once_and_score_leaves_its_files_alone(words, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("red apple\n\n")
    run = ["predict", "--config", "quickstart", "--data.prompts", "p.txt", "--model.diffusion.num_inference_steps", "2"]
    run += ["--model.sampler", "Unguided", "--trainer.accelerator", "cpu", "--output", "run"]
    with pytest.warns(PromptWarning, match="^p.txt: skipped a blank prompt, the first at line 2$") as caught:
        assert main(run) == 0
    assert sum(each.category is PromptWarning for each in caught) == 1  # although the prompts are read twice
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for output, code in (("run", 2), ("run/images", 2), ("run/../run", 2), ("run/scores", 0)):
        assert (
            main(["score", "--reward", "Brightness", "--images", "run", "--device", "cpu", "--output", output]) == code
        )
    assert {path: path.read_bytes() for path in files} == files
