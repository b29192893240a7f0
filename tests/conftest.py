import gc
import importlib
import json
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests use no hub

import lightning.pytorch  # noqa: F401  (before gradio: typing's cache then keeps the order of Lightning's int | float)
import pytest
import torch

from tests.tiny_models import save_tiny_aesthetic_head, save_tiny_clip, save_tiny_open_clip, save_tiny_pipeline

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(min(2, os.cpu_count() or 1))


# Files that take longest, for their processes; several workers balance best if these come first.
LONGEST = ("test_cli", "faults", "test_families", "test_writer", "test_study", "test_paper", "test_evaluation_commands")
LONGEST += (
    "test_data",
    "test_notebook",
    "test_plugin",
    "test_wheel",
    "test_calibration",
    "test_scale",
    "test_precision",
    "test_fuzz",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONGEST))


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # what is imported by now need not be searched for garbage again


@pytest.fixture(scope="session")
def sd15(tmp_path_factory) -> str:
    """A folder in the layout of Stable Diffusion 1.5: PNDM scheduler, epsilon prediction, a safety checker on disk."""
    return save_tiny_pipeline(tmp_path_factory.mktemp("sd15"), "sd15")


@pytest.fixture(scope="session")
def sd21(tmp_path_factory) -> str:
    """A folder in the layout of Stable Diffusion 2.1: DDIM scheduler, v prediction, no safety checker."""
    return save_tiny_pipeline(tmp_path_factory.mktemp("sd21"), "sd21")


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> str:
    """A random CLIP of 32 px with tokenizer and image processor."""
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def tiny_open_clip(tmp_path_factory) -> str:
    """A random CLIP of open_clip, as `local-dir:FOLDER`."""
    return save_tiny_open_clip(tmp_path_factory.mktemp("open-clip"))


@pytest.fixture(scope="session")
def tiny_head(tmp_path_factory) -> str:
    """Random weights of an aesthetic head for the random CLIP."""
    return save_tiny_aesthetic_head(tmp_path_factory.mktemp("head"), 8)


@pytest.fixture
def prompts_file(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("red apple\nblue car on a white background\npanda\n")
    return path


@pytest.fixture
def read_rows():
    def read(folder) -> list[dict]:
        return [json.loads(line) for line in (Path(folder) / "results.jsonl").read_text().splitlines()]

    return read


@pytest.fixture
def one_thread():
    """The number of threads affects the last bit of a sum."""
    yield from threads(1)


@pytest.fixture
def two_threads():
    yield from threads(2)


def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def chromium():
    """A browser without a window, where Chromium and chromedriver are installed."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    binary, driver = next(filter(None, found), None), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip(f"{'Chromium' if binary is None else 'chromedriver'} is not installed")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1400,1000"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """An empty, importable working directory; its modules are unloaded afterwards."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # a copy: `main` adds to it
    monkeypatch.setattr(sys, "argv", ["svdd"])
    importlib.invalidate_caches()
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]
    gc.collect()  # a base class lists a subclass until it is collected
