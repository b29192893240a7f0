"""`svdd report` and `svdd gallery`: the data in the page, and the page in a real browser."""

import base64
import hashlib
import html.parser
import io
import json
import os
import re
import shutil
import stat
import sys
import webbrowser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from svdd.__main__ import main
from svdd.evaluation.baseline import paired
from svdd.evaluation.reports import page as page_module
from svdd.evaluation.reports.data import differences, read_run
from svdd.runs.config import read_config
from svdd.runs.folder import RunFolder
from svdd.runs.images import read_image
from svdd.runs.pictures import pixels_of

PROMPTS = [
    "owl </script><script>alert(\"1\")</script> & 'x'",
    "red \u05d0\u05d1\u202egpj.exe\u200f apple",
    "🦊 fox <b>",
]


class Page(html.parser.HTMLParser):
    """What a browser finds in a page: the JSON blocks by name, the other scripts and styles, and the policy."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.blocks, self.codes, self.policy, self._inside = path, {}, {"script": [], "style": []}, "", None
        self.feed(path.read_text(encoding="utf-8"))
        self.data = self.blocks.pop("data")
        self.details = [self.blocks[f"i{k}"] for k in range(len(self.blocks))]

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]
        if tag in self.codes:
            assert "src" not in given
            self._inside = given.get("id", tag)
        assert tag != "link"

    def handle_data(self, text):
        if self._inside in self.codes:
            self.codes[self._inside].append(text)
        elif self._inside:
            self.blocks[self._inside] = json.loads(text)

    def handle_endtag(self, tag):
        self._inside = None


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2]))).convert("RGB"))


def predict(sd15, output, *words):
    command = ["predict", "--model.diffusion.pretrained", sd15, "--model.diffusion.num_inference_steps", "4"]
    (prompts := output.with_name("prompts.txt")).write_text("\n".join(PROMPTS), encoding="utf-8")
    command += ["--data.prompts", str(prompts), "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    command += ["--model.reward", "Brightness", "--model.eval_rewards+=Compressibility"]
    assert main([*command, *words, "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def runs(sd15, tmp_path_factory):
    """Three runs of the same prompts and seeds: unguided, SVDD in tar shards, and all particles of SMC."""
    folder = tmp_path_factory.mktemp("runs of a # study")
    predict(sd15, folder / "plain", "--model.sampler", "Unguided", "--model.images_per_prompt", "2")
    svdd = ["--model.sampler.num_candidates", "3", "--tar", "true", "--model.images_per_prompt", "2"]
    predict(sd15, folder / "svdd", *svdd)
    smc = ["--model.sampler", "SMC", "--model.sampler.num_particles", "3", "--model.sampler.returns", "all"]
    predict(sd15, folder / "smc", *smc, "--model.images_per_prompt", "2", "--data.limit", "2")
    return folder


def as_killed(folder: Path, rows: int) -> None:
    """Makes of a finished run what is left if its process is killed after so many images."""
    for name in ("results", "trace"):
        if (path := folder / f"{name}.jsonl").exists():
            lines = path.read_bytes().splitlines(keepends=True)
            (folder / f"{name}-00000.jsonl").write_bytes(b"".join(lines[:rows]) + lines[-1][:20])
            path.unlink()
    (folder / "summary.json").unlink()


def test_the_page_holds_what_the_runs_hold(runs, tmp_path, capsys):
    output = tmp_path / "new" / "report.html"
    words = [str(runs / name) for name in ("plain", "svdd", "smc")]
    assert main(["report", *words, "--output", str(output), "--baseline", str(runs / "plain")]) == 0
    assert f"wrote {output}: 24 pictures of 3 runs" in capsys.readouterr().out
    page = Page(output)
    assert [run["name"] for run in page.data["runs"]] == ["plain", "svdd", "smc"]
    settings = {key: values for key, *values in page.data["settings"]["rows"]}
    assert settings["model.sampler"] == ["Unguided", "SVDD", "SMC"]
    assert settings["model.sampler.num_candidates"] == ["-", "3", "-"]
    assert not {key for key in settings if key.startswith(("trainer", "output", "tar"))}
    assert (page.data["baseline"], page.data["rewards"]) == (0, ["Brightness", "Compressibility"])
    rows = [(name, row) for name in ("plain", "svdd", "smc") for row in RunFolder(runs / name).rows()]
    columns = page.data["images"]
    assert {len(columns[name]) for name in columns if name != "scores"} == {len(rows)} == {len(page.details)}
    for k, ((name, row), detail) in enumerate(zip(rows, page.details, strict=True)):
        assert page.data["runs"][columns["run"][k]]["name"] == name
        assert page.data["prompts"][columns["prompt"][k]] == row["prompt"] in PROMPTS
        assert [scores[k] for scores in columns["scores"]] == list(row["rewards"].values())
        assert columns["seed"][k] == str(row["seed"])
        assert columns["number"][k] == row["image_index"] // (3 if name == "smc" else 1)
        assert columns["particle"][k] == row.get("particle")
        assert detail["ledger"] == row["ledger"]
        assert detail["file"] == row["file"]
        assert np.array_equal(pixels(detail["thumb"]), pixels_of(runs / name, row["file"]))  # small: without loss
        if name == "svdd":
            assert "full" not in detail
        else:
            assert (output.parent / unquote(detail["full"])).read_bytes() == read_image(runs / name, row["file"])
    weights = [columns["weight"][k] for k, (name, _) in enumerate(rows) if name == "smc"]
    assert np.allclose(np.reshape(weights, (4, 3)).sum(1), 1)


def test_the_page_holds_the_traces_of_the_runs(runs, tmp_path):
    assert main(["report", str(runs / "plain"), str(runs / "smc"), "--output", str(tmp_path / "r.html")]) == 0
    page, traces = Page(tmp_path / "r.html"), [*RunFolder(runs / "smc").traces()]
    assert ["trace" in detail for detail in page.details] == [False] * 6 + [True] * 12
    for k, detail in enumerate(page.details[6:]):
        shown, trace = detail["trace"], traces[k // 3]
        assert shown["step"] == trace["step"]
        assert shown["lineage"] == trace["lineage"]
        for name in ("ess", "alpha", "value_mean", "value_std", "value_max", "value_chosen", "ancestors"):
            column = shown.get(name)
            assert (column if isinstance(column, list) else [column] * len(trace["step"])) == trace[name], name


def test_only_the_pages_own_script_may_run(runs, tmp_path):
    """Prompts cannot end a block, and nothing comes from the network."""
    assert main(["report", str(runs / "plain"), "--output", str(tmp_path / "r.html")]) == 0
    page = Page(tmp_path / "r.html")
    ((script,), (style,)) = page.codes["script"], page.codes["style"]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    assert re.findall(r"(style|script)-src 'sha256-([^']+)'", page.policy) == [
        *zip(("style", "script"), digests, strict=True)
    ]
    assert page.policy.startswith("default-src 'none'; ")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 2 + len(page.details)
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}


def test_differences_and_means_are_those_of_the_other_commands(runs):
    plain, svdd = (read_run(runs / name, name, 100) for name in ("plain", "svdd"))
    summary = json.loads((runs / "svdd" / "summary.json").read_text())["rewards"]
    for name, entry in svdd.means().items():
        assert list(entry.values()) == pytest.approx([summary[name][key] for key in ("mean", "ci95_low", "ci95_high")])
    found = differences([plain, svdd])["1-0"]["Brightness"]
    pairs = zip(RunFolder(runs / "svdd").rows(), RunFolder(runs / "plain").rows(), strict=True)
    changes = [ours["rewards"]["Brightness"] - theirs["rewards"]["Brightness"] for ours, theirs in pairs]
    expected = paired([(changes[k] + changes[k + 1]) / 2 for k in (0, 2, 4)])
    assert list(found.values()) == pytest.approx([expected[key] for key in ("difference", "ci95_low", "ci95_high")])


def test_full_pictures_can_be_embedded(runs, tmp_path):
    assert main(["report", "--embed", str(runs / "svdd"), "--output", str(tmp_path / "r.html")]) == 0
    for detail, row in zip(Page(tmp_path / "r.html").details, RunFolder(runs / "svdd").rows(), strict=True):
        assert base64.b64decode(detail["full"].partition("base64,")[2]) == read_image(runs / "svdd", row["file"])


def test_thumbnails_beyond_the_limit_lie_beside_the_page(runs, tmp_path, monkeypatch):
    output, beside = tmp_path / "a b.html", tmp_path / "a b_files"
    small = sum(len(base64.b64decode(detail["thumb"].partition(",")[2])) for detail in report_of(runs, output)[:3])
    monkeypatch.setattr(page_module, "_EMBEDDED", small)
    details = report_of(runs, output)
    assert [detail["thumb"].startswith("data:") for detail in details] == [True] * 3 + [False] * 3
    for detail in details[3:]:
        shown = np.asarray(Image.open(tmp_path / unquote(detail["thumb"])).convert("RGB"))
        assert np.array_equal(shown, pixels_of(runs / "plain", detail["file"]))
    assert len(list(beside.iterdir())) == 3
    (beside / "mine.txt").write_text("mine")
    monkeypatch.undo()
    report_of(runs, output)
    assert [path.name for path in beside.iterdir()] == ["mine.txt"]


def report_of(runs, output):
    assert main(["report", str(runs / "plain"), "--output", str(output)]) == 0
    return Page(output).details


def test_large_pictures_become_small_ones(tmp_path):
    run = save_run(tmp_path / "run", size=(600, 300))
    assert main(["report", str(run), "--output", str(tmp_path / "r.html")]) == 0
    (detail,) = Page(tmp_path / "r.html").details
    assert (detail["width"], detail["height"]) == (600, 300)
    assert pixels(detail["thumb"]).shape == (160, 320, 3)
    assert np.abs(pixels(detail["thumb"]).astype(int) - [200, 30, 60]).max() <= 4


def save_run(folder, size=(16, 16), **columns):
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", size, (200, 30, 60)).save(folder / "images/000000-00.png")
    row = {"prompt_index": 0, "image_index": 0, "num_images": 1, "prompt": "x", "file": "images/000000-00.png"}
    (folder / "results.jsonl").write_text(json.dumps({**row, "rewards": {"r": 1.0}, **columns}) + "\n")
    return folder


def test_a_stopped_run_and_its_damaged_pictures_are_shown(runs, tmp_path, capsys):
    killed = shutil.copytree(runs / "plain", tmp_path / "killed")
    as_killed(killed, 4)
    (killed / "images" / "000001-00.png").write_bytes(b"torn")
    assert main(["report", str(killed), str(runs / "smc"), "--limit", "8", "--output", str(tmp_path / "r.html")]) == 0
    said = capsys.readouterr().err
    assert f"svdd: warning: 6 pictures of {runs / 'smc'} left out; --limit 12 shows all" in said
    assert "1 picture cannot be read, the first one: " in said
    page = Page(tmp_path / "r.html")
    assert [(run["unfinished"], run["pictures"], run["hidden"]) for run in page.data["runs"]] == [
        (True, 4, 0),
        (False, 6, 6),
    ]
    assert ["thumb" in detail for detail in page.details] == [True, True, False] + [True] * 7
    assert page.data["runs"][0]["means"]["Brightness"]["low"] is not None
    as_killed(tar := shutil.copytree(runs / "smc", tmp_path / "smc"), 6)
    assert main(["report", str(tar), "--output", str(tmp_path / "r.html")]) == 0
    page = Page(tmp_path / "r.html")
    traces = [detail["trace"]["lineage"] for detail in page.details]
    assert traces == [trace["lineage"] for trace in RunFolder(runs / "smc").traces() for _ in range(3)][:6]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs here")
def test_old_rows_and_damaged_files_beside_them_are_shown(tmp_path):
    """Rows have no seed and no ledger; the one prompt gives no interval, and a column may hold anything."""
    run = save_run(tmp_path / "run", tag={"a": [1, "</script>"]}, negative_prompt=3)
    damaged = '{"prompt_index": "x"}\n{}\n3\nno\n'
    bad = '{"prompt_index": 0, "image_index": 0, "step": [1, "</script>"], "ess": 3}\n'
    (run / "trace.jsonl").write_text(damaged + bad)
    (run / "fingerprints.json").write_text('{"parts": {"reward r": [3]}}')
    os.mkfifo(run / "config.yaml")
    assert main(["report", str(run), "--output", str(tmp_path / "r.html")]) == 0
    page = Page(tmp_path / "r.html")
    assert page.data["runs"][0]["means"] == {"r": {"mean": 1.0, "low": None, "high": None}}
    assert page.data["images"]["seed"] == [None]
    assert page.details[0]["columns"] == {"tag": '{"a": [1, "</script>"]}'}
    assert "trace" not in page.details[0]


def test_the_folder_of_a_study_stands_for_its_cells(tmp_path):
    for name in ("b", "a"):
        save_run(tmp_path / "study" / "cells" / name)
    (tmp_path / "study" / "cells" / "waiting").mkdir()
    assert main(["report", str(tmp_path / "study"), "--output", str(tmp_path / "r.html")]) == 0
    assert [run["name"] for run in Page(tmp_path / "r.html").data["runs"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "RUN is required: run folders, also of unfinished runs"),
        (["absent"], "absent holds no results.jsonl"),
        (["run", "--limit", "0"], "--limit must be >= 1, got 0"),
        (["run", "--embed=maybe"], "expected true or false, got 'maybe'"),
        (["run", "--output", "r.png"], "--output must be a file whose name ends in .html, got r.png"),
        (["run", "--output", "folder.html"], "--output must be a file whose name ends in .html"),
        (["run", "--output", "mine.html"], "mine.html exists and was not written by `svdd report`; choose another"),
        (["run", "--output", "taken.html"], "taken_files, for thumbnails, exists and is not part of a report"),
        (["run", "--output", "run/results.jsonl/x.html"], "cannot write run/results.jsonl"),
        (["empty"], "empty holds no image"),
    ],
)
def test_a_wrong_command_is_one_line_and_changes_nothing(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "run")
    save_run(tmp_path / "empty")
    (tmp_path / "empty" / "results.jsonl").write_text("")
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "taken_files").mkdir()
    for name in ("mine.html", "taken_files/a.txt"):
        (tmp_path / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("svdd: error: ")
    assert message in line
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "mine.html").read_text() == "mine"


@pytest.mark.skipif(sys.platform != "linux", reason="the browser is named by the variables of freedesktop.org")
def test_the_gallery_opens_in_the_browser_and_the_run_continues(runs, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(runs / "plain", tmp_path / "plain")
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > {opened}\n')
    browser.chmod(browser.stat().st_mode | stat.S_IXUSR)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    assert main(["gallery", str(run)]) == 0
    assert f"no browser was found; open {run / 'gallery.html'} in one" in capsys.readouterr().out
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    monkeypatch.setattr(webbrowser, "_tryorder", None)  # forgets the browsers that were found before
    monkeypatch.setattr(webbrowser, "_browsers", {})
    assert main(["gallery", str(run), str(runs / "svdd"), "--baseline", str(run)]) == 0
    assert opened.read_text() == (run / "gallery.html").as_uri()
    assert "no browser" not in capsys.readouterr().out
    assert len(Page(run / "gallery.html").details) == 12
    (folder := RunFolder(run)).claim(read_config(run).config)  # as the same `svdd predict` does
    folder.close()
    assert folder.finished() == {0, 1, 2}
    assert (run / "gallery.html").exists()


# ---- in a browser

_CONTRAST = """
const channel = (value) => (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
const ground = (element) => {
  for (; element; element = element.parentElement) {
    const found = numbers(getComputedStyle(element).backgroundColor);
    if (found.length < 4 || found[3] > 0) return found;
  }
  return [255, 255, 255];
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), low = [];
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest("svg, :disabled")) continue;
  const [a, b] = [light(numbers(getComputedStyle(element).color)), light(ground(element))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) low.push([element.tagName, element.className, walker.currentNode.data, ratio]);
}
return low;
"""


class Tab:
    """A page in the browser, as a user meets it: with clicks and keys."""

    def __init__(self, driver, path: Path):
        self.driver = driver
        driver.get("about:blank")
        driver.get(path.as_uri())

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector):
        return self.driver.find_element("css selector", selector)

    def run(self, script, *given):
        return self.driver.execute_script(script, *given)

    def choose(self, name, text):
        from selenium.webdriver.support.select import Select

        Select(self.one(f"#{name}")).select_by_visible_text(text)

    def press(self, *keys):
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def wait(self, condition):
        from selenium.webdriver.support.wait import WebDriverWait

        return WebDriverWait(self.driver, 20, poll_frequency=0.02).until(lambda _: condition())

    def media(self, scheme):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": features})

    def resize(self, width, height):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def images(self):
        return self.run("return [...document.querySelectorAll('.tile')].map((tile) => Number(tile.dataset.image))")


@pytest.fixture
def tab(chromium, runs, tmp_path):
    """The report on all three runs; at the end, the console holds no message."""
    words = [str(runs / name) for name in ("plain", "svdd", "smc")]
    assert main(["report", *words, "--output", str(tmp_path / "report.html")]) == 0
    chromium.get_log("browser")
    opened = Tab(chromium, tmp_path / "report.html")
    opened.page = Page(tmp_path / "report.html")
    opened.resize(1400, 1000)
    yield opened
    opened.media("")
    assert chromium.get_log("browser") == []


def test_images_are_sorted_filtered_and_paired(tab):
    columns = tab.page.data["images"]
    bright = columns["scores"][0]
    assert len(tab.images()) == 24
    assert len({columns["prompt"][image] for image in tab.images()[:10]}) == 1  # by prompt, over the runs
    for order, reverse in (("highest first", True), ("lowest first", False)):
        tab.choose("sort", "Brightness")
        tab.choose("order", order)
        assert [bright[image] for image in tab.images()] == sorted(bright, reverse=reverse)
    tab.choose("best", "first 1 by Brightness")
    assert sorted(bright[image] for image in tab.images()) == sorted(
        min(score for score, prompt in zip(bright, columns["prompt"], strict=True) if prompt == p) for p in range(3)
    )
    tab.choose("best", "all images")
    tab.one("#filter").send_keys("FOX")
    assert {columns["prompt"][image] for image in tab.images()} == {PROMPTS.index("🦊 fox <b>")}
    assert tab.one("#count").text == "4 of 24 images"
    tab.one("#filter").clear()
    tab.one("#filter").send_keys(" ", "\b")
    tab.choose("run", "svdd")
    tab.choose("baseline", "plain")
    tab.choose("sort", "Brightness, difference")
    tab.choose("order", "highest first")
    changes = [bright[image] - bright[image - 6] for image in tab.images()]
    assert changes == sorted(changes, reverse=True)
    assert len(changes) == 6
    assert "6 of them beside the image of plain with the same prompt, number and seed" in tab.one("#count").text
    first = tab.one(".tile")
    assert [len(tile.find_elements("css selector", "img")) for tile in tab.all(".tile")] == [2] * 6
    shown = re.search(r"Brightness\n[\d.]+ \((.+)\)", first.text)[1]
    assert float(shown.replace("\u2212", "-")) == pytest.approx(changes[0], rel=5e-3)
    assert tab.run("return [...document.images].every((image) => image.complete && image.naturalWidth === 64)")
    tab.one("#tab-rewards").click()
    assert "Differences are those to plain" in tab.one("#rewards").text
    assert len(tab.all("#rewards svg")) == 2
    tab.one("#tab-runs").click()
    assert "Unguided" in tab.one("#runs").text


def test_the_detail_view_works_with_the_keyboard(tab):
    columns = tab.page.data["images"]
    smc = [k for k, run in enumerate(columns["run"]) if run == 2]
    tab.choose("run", "smc")
    assert tab.images() == smc
    tab.run("arguments[0].focus()", tab.one(".tile"))
    tab.press("\ue007")  # Enter
    tab.wait(lambda: tab.run("return document.getElementById('detail').open"))
    for k in range(3):
        image, detail = smc[k], tab.page.details[smc[k]]
        assert (
            tab.one("#detail-prompt").get_property("textContent") == tab.page.data["prompts"][columns["prompt"][image]]
        )
        assert tab.one("#position").text == f"{k + 1} of 12"
        (picture,) = tab.all("#detail img")
        assert PROMPTS[columns["prompt"][image]] in picture.get_attribute("alt")
        assert "Brightness 0." in picture.get_attribute("alt")
        assert unquote(picture.get_attribute("src")).endswith("smc/" + detail["file"])
        tab.wait(lambda picture=picture: picture.get_property("complete"))
        assert picture.get_property("naturalWidth") == 64
        titles = [title.text for title in tab.all("#detail figure h3")]
        assert {"Values of the candidates", "Effective sample size", "Ancestry of the particles"} <= {*titles}
        assert all("Step" in chart.get_attribute("aria-label") for chart in tab.all("#detail svg")[:2])
        tab.press("\ue014")  # right
    tab.press("\ue012")  # left
    assert tab.one("#position").text == "3 of 12"
    assert tab.run("return location.hash") == f"#image-{smc[2]}"
    tab.press("\ue00c")  # Esc
    tab.wait(lambda: not tab.run("return document.getElementById('detail').open"))  # the browser closes it later
    tab.wait(lambda: tab.run("return document.activeElement.dataset.image") == str(smc[2]))
    tab.press("\ue014")
    assert tab.run("return Number(document.activeElement.dataset.image)") == smc[3]
    tab.all(".tile")[-1].click()
    tab.press("\ue014")  # there is no next one
    assert tab.one("#position").text == "12 of 12"
    assert not tab.one("#next").is_enabled()
    tab.one("#close").click()
    tab.run("document.getElementById('tab-images').focus()")
    tab.press("\ue014")
    assert tab.one("#rewards").is_displayed()


def test_a_phone_needs_no_sideways_scrolling_and_dark_text_stays_readable(tab):
    """Contrast is at least 4.5 (WCAG AA) in every view, in light and in dark."""
    grounds = set()
    for scheme in ("light", "dark"):
        tab.media(scheme)
        grounds.add(tab.run("return getComputedStyle(document.documentElement).backgroundColor"))
        for width in (390, 1400):
            tab.resize(width, 844)
            for view in ("images", "rewards", "runs", "detail"):
                if view == "detail":
                    tab.one("#tab-images").click()
                    tab.all(".tile")[-1].click()
                else:
                    tab.one(f"#tab-{view}").click()
                assert tab.run("return document.documentElement.scrollWidth") <= width, view
                assert tab.run("return document.getElementById('detail').scrollWidth") <= width, view
                assert tab.run(_CONTRAST) == [], (scheme, view)
            tab.one("#close").click()
    assert len(grounds) == 2
    tab.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not tab.one("#controls").is_displayed()
    assert all(tab.one(f"#{view}").is_displayed() for view in ("images", "rewards", "runs"))
    unnamed = "return [...document.querySelectorAll('input, select')].filter((one) => !one.labels.length).length"
    assert tab.run(unnamed) == 0
    assert tab.run("return [...document.images].every((image) => image.alt)")


def test_many_images_appear_while_one_scrolls(chromium, tmp_path):
    run = save_run(tmp_path / "run")
    row = json.loads((run / "results.jsonl").read_text())
    rows = ({**row, "prompt_index": k, "prompt": f"prompt {k}"} for k in range(300))
    (run / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert main(["report", str(run), "--output", str(tmp_path / "r.html")]) == 0
    tab = Tab(chromium, tmp_path / "r.html")
    tab.resize(1400, 900)
    before = len(tab.images())
    assert 0 < before < 300
    tab.run("window.scrollTo(0, document.body.scrollHeight)")
    tab.wait(lambda: len(tab.images()) > before)
    tab.run("arguments[0].focus()", tab.one(".tile"))
    tab.press("\ue010")  # End
    assert len(tab.images()) == 300
    assert tab.run("return document.activeElement.dataset.image") == "299"
