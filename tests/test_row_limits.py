"""Rows at once by memory: chosen from a measured row and what is free, per function, within limits of the system."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from svdd.diffusion import memory, row_limits
from svdd.diffusion.chunking import Chunker, redrawn
from svdd.diffusion.memory import free_memory
from svdd.diffusion.row_limits import OutOfMemory
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards.jpeg import Compressibility
from svdd.samplers.svdd import SVDD
from svdd.state.ledger import Ledger

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a row is measured on Linux only")
ROW = 20_000_000  # bytes that a row takes while it is computed
LATENTS = torch.arange(40.0).view(40, 1, 1, 1).expand(-1, 4, 8, 4)  # 0.5 kB a row, for which the bound is 26 MB


class Hungry:
    """A function whose rows take memory; remembers how many it computed at once, and the most at the same time."""

    def __init__(self, seconds=0.0):
        self.calls, self.most, self._now, self._lock, self._seconds = [], 0, 0, threading.Lock(), seconds

    def __call__(self, rows):
        with self._lock:
            self.calls.append(len(rows))
            self._now += 1
            self.most = max(self.most, self._now)
        held = torch.ones(len(rows), ROW // 4)
        time.sleep(self._seconds)
        del held
        with self._lock:
            self._now -= 1
        return rows + 1


@pytest.fixture
def free(monkeypatch):
    """Sets the number of free bytes."""
    left = [0]
    monkeypatch.setattr(row_limits, "free_memory", lambda device: left[0])
    return lambda number: left.__setitem__(0, number)


def test_a_row_is_measured_and_as_many_fit_as_there_is_memory_for(free, capsys):
    chunker, network, decoder = Chunker(), Hungry(), Hungry()
    free(10 * ROW)
    assert torch.equal(chunker.map(network, 4, LATENTS, work=("network",)), LATENTS + 1)
    assert network.calls[0] == 1
    assert sum(network.calls) == 41  # the measured row is computed again
    assert 3 <= max(network.calls) <= 8  # of 0.8 x 10, less what else the process takes
    said = capsys.readouterr().err
    assert f"svdd: the network computes {chunker.limits.rows(*known(network))} of 40 rows at once (" in said
    free(200 * ROW)
    chunker.map(decoder, 4, LATENTS, work=("decoder",))
    assert decoder.calls == [40]  # a limit of its own; the bound says that half of the memory suffices
    for _ in range(12):  # there is room now, which it sees at the eighth call
        chunker.map(network, 4, LATENTS, work=("network",))
    assert network.calls[-1] == 40
    assert not capsys.readouterr().err


def known(network):
    return row_limits.Call(network, (LATENTS,), ("network",)), 40, lambda: None


@pytest.mark.filterwarnings("ignore:out of memory")
def test_without_a_measure_memory_errors_halve_and_the_function_grows_again(free):
    chunker, calls, room = Chunker(), [], 10

    def function(rows):
        calls.append(len(rows))
        if len(rows) > room:
            raise MemoryError
        return rows

    free(10**12)
    chunker.map(function, 4, LATENTS, work=("network",))
    assert calls == [40, 20, 10, 10, 10, 10]
    calls.clear()
    room = 40
    free(10**13)
    for _ in range(30):
        chunker.map(function, 4, LATENTS, work=("network",))
    assert calls[-1] == 40


@pytest.mark.usefixtures("two_threads")
def test_memory_decides_the_threads_of_the_reproducible_mode_but_not_the_parts(free):
    results = []
    for rows_free in (1000, 20):  # 10 rows of an image and thread
        chunker, function = Chunker(reproducible=True), Hungry(0.02)
        chunker.concurrent = True
        free(rows_free * ROW)
        results.append(chunker.map(function, 4, LATENTS, parallel=True, work=("network",)))
        parts = function.calls if rows_free == 1000 else function.calls[1:]  # after the measured row
        assert parts == [10] * 4
        assert function.most == (2 if rows_free == 1000 else 1)
        assert chunker.most == 20
    assert torch.equal(*results)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("fails", ["measured", "raised"])
def test_a_part_that_does_not_fit_lowers_the_rows_and_the_batch_is_drawn_again(free, fails):
    function, drawn = Hungry(), []

    class Model:
        diffusion = type("Diffusion", (), {"chunker": Chunker(reproducible=True)})

        @redrawn
        def draw(self):
            drawn.append(1)
            chunker = self.diffusion.chunker
            chunker.concurrent, chunker.ledger = True, Ledger()
            result = chunker.map(compute, 4, LATENTS, parallel=True, work=("network",))
            return result, chunker.ledger.gradient_rows

    def compute(rows):
        if fails == "raised" and len(rows) > 5:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        Model.diffusion.chunker.ledger.gradient_rows += len(rows)
        return function(rows)

    free(8 * ROW if fails == "measured" else 10**12)
    with pytest.warns(UserWarning, match="10 rows of an image at once") as caught:
        result, entered = Model().draw()
    assert torch.equal(result, LATENTS + 1)
    assert [len(drawn), entered] == [2, 40]  # the measured row is entered nowhere
    assert Model.diffusion.chunker.most in ((4, 5, 6) if fails == "measured" else (5,))
    assert sum("may change last bits" in str(each.message) for each in caught) == 1


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("short", [3, 1000])
def test_a_start_with_few_rows_decides_nothing_for_larger_parts(free, short):
    chunker, function = Chunker(reproducible=True), Hungry()
    chunker.concurrent = True
    for rows, left in ((8, short), (40, 1000), (40, 1)):  # 1 row of each of 8 images, then 10 of each of 4
        free(left * ROW)
        chunker.map(function, 8 if rows == 8 else 4, LATENTS[:rows], parallel=True, work=("network",))
    assert [chunker.most, function.calls[-4:]] == [20, [10] * 4]  # parts that were computed stay, whatever is left
    few = Chunker(reproducible=True)
    free(short * ROW)
    few.map(Hungry(), 8, LATENTS[:8], work=("network",))
    free(8 * ROW)
    with pytest.raises(torch.OutOfMemoryError, match="draw the batch again"), pytest.warns(UserWarning, match="fit"):
        few.map(Hungry(), 4, LATENTS, work=("network",))


@pytest.mark.parametrize("mode", [True, False])
def test_a_measured_row_that_does_not_fit_is_such_an_error(free, mode):
    def function(rows):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    free(ROW)
    with pytest.raises(OutOfMemory, match="a row does not fit in the decoder on cpu"):
        Chunker(reproducible=mode).map(function, 4, LATENTS, work=("decoder",))


def test_parts_of_large_rows_are_smaller_whatever_is_free(free):
    free(10**14)
    for side, name, part in ((8, "decoder", 20), (64, "network", 20), (64, "decoder", 2), (128, "network", 5)):
        calls, rows = [], torch.zeros(1, 4, side, side).expand(20, 4, side, side)
        Chunker(reproducible=True).map(lambda x, calls=calls: calls.append(len(x)) or x, 1, rows, work=(name,))
        assert calls == [part] * (20 // part)


@pytest.mark.parametrize("mode", [True, False])
def test_rewards_in_threads_never_see_the_measured_row(free, mode):
    seen, counts, images = [], [], []

    class Counted(Compressibility):
        def forward(self, images, prompts):
            seen.append(len(images))
            return super().forward(images, prompts)

    for number in (10**12, 2 * 10**8):
        seen.clear()
        free(number)
        model = GuidedDiffusion(Counted(), StableDiffusion("emoji", 2, reproducible=mode), SVDD(4))
        decode, decoded = model.diffusion.decode, []
        model.diffusion.decode = lambda x0, decode=decode, decoded=decoded: decoded.append(len(x0)) or decode(x0)
        images.append(model.sample(["apple"], seed=1))
        counts.append((sum(seen), sum(decoded)))
    assert counts[0][0] == counts[1][0]
    assert counts[0][1] < counts[1][1]  # a row was measured
    torch.testing.assert_close(*images, atol=1e-4, rtol=0)


LIMITED = """
import resource, sys, torch
from svdd.diffusion.chunking import Chunker
from tests.test_row_limits import Hungry, LATENTS
torch.set_num_threads(1)
torch.randn(8, 8) @ torch.randn(8, 8)
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 200_000_000,) * 2)
function = Hungry()
assert torch.equal(Chunker().map(function, 4, LATENTS, work=("network",)), LATENTS + 1)
assert function.calls[0] == 1 and 4 <= max(function.calls) <= 9, function.calls
try:
    Chunker(40).map(function, 4, LATENTS, work=("network",))
except torch.OutOfMemoryError as error:
    print(error)
"""


def test_the_limit_of_the_address_space_is_heeded():
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "40 rows at once do not fit in the network on cpu" in done.stdout
    assert "lower model.diffusion.chunk_size, or set it to auto" in done.stdout


def test_control_groups_of_both_versions_limit_the_memory(tmp_path):
    def group(folder, limit, used, cached, names, key):
        folder.mkdir(parents=True, exist_ok=True)
        for name, number in zip(names, (limit, used), strict=True):
            (folder / name).write_text(f"{number}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{key} {cached}\n")

    two, one = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
    groups = tmp_path / "groups"
    groups.write_text("0::/outer/inner\n")
    group(tmp_path / "v2/outer", 1000, 700, 100, two, "inactive_file")
    group(tmp_path / "v2/outer/inner", "max", 300, 50, two, "inactive_file")
    assert min(memory._rooms(groups, tmp_path / "v2")) == 400
    groups.write_text("4:cpu,cpuacct:/x\n3:memory:/job\n")
    group(tmp_path / "v1/memory/job", 500, 450, 10, one, "total_inactive_file")
    group(tmp_path / "v1/memory", 2**63 - 4096, 450, 10, one, "total_inactive_file")
    assert min(memory._rooms(groups, tmp_path / "v1")) == 60
    assert min(memory._rooms(tmp_path / "none", tmp_path)) > 2**59


def test_processes_of_a_machine_share_what_is_free(monkeypatch):
    alone = free_memory(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(torch.device("cpu")) == pytest.approx(alone / 4, rel=0.2)
    assert alone < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_row_that_does_not_fit_is_an_error_in_one_line():
    def function(rows):
        raise RuntimeError("std::bad_alloc\nwhere")

    with pytest.raises(
        OutOfMemory, match=r"a row does not fit in the decoder on cpu, .* are free .*vae_slicing"
    ) as found:
        Chunker().map(function, 1, LATENTS[:1], work=("decoder",))
    assert "\n" not in str(found.value)
