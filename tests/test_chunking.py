"""The chunk size changes the rows per call and nothing else; in the reproducible mode, not even that."""

import threading
import warnings
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import Mock

import pytest
import torch

from svdd import UserError
from svdd.diffusion.chunking import Chunker, redrawn
from svdd.diffusion.row_limits import Call
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards.clip import CLIPScore
from svdd.rewards.jpeg import Compressibility
from svdd.runs.files import RunError
from svdd.runs.folder import RunFolder
from svdd.runs.rows import Prompt
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.smc import SMC
from svdd.samplers.svdd import SVDD
from svdd.samplers.unguided import Unguided
from svdd.state.ledger import Ledger
from svdd.values.latent_conv import LatentConvValue
from svdd.values.lookahead import Lookahead
from svdd.values.posterior_mean import PosteriorMean
from tests.analytic import GaussianDiffusion, Linear, bound, run


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


class Device:
    """Doubles rows; raises an out-of-memory error above `capacity` rows."""

    def __init__(self, capacity):
        self.capacity, self.tried = capacity, []

    def __call__(self, rows, names):
        assert len(rows) == len(names)
        self.tried.append(len(rows))
        if len(rows) > self.capacity:
            raise torch.OutOfMemoryError("out of memory")
        return Pair(2 * rows, torch.tensor([int(name) for name in names]))


ROWS, NAMES = torch.arange(20.0).view(10, 2), [str(k) for k in range(10)]


@pytest.mark.parametrize("size", [1, 2, 3, 9, 10, 11, "auto"])
def test_every_size_gives_the_same_rows_in_the_same_order(size):
    device = Device(capacity=10)
    left, right = result = Chunker(size).map(device, 10, ROWS, NAMES)
    assert isinstance(result, Pair)
    assert torch.equal(left, 2 * ROWS)
    assert right.tolist() == list(range(10))
    assert max(device.tried) == (10 if size == "auto" else min(size, 10))
    assert sum(device.tried) == 10


def test_a_plain_tensor_comes_back_as_one():
    assert torch.equal(Chunker(3).map(lambda rows: rows + 1, 10, ROWS), ROWS + 1)


@pytest.mark.filterwarnings("ignore:out of memory")  # pytest re-emits warnings that `match` does not cover
def test_auto_halves_on_out_of_memory_warns_and_keeps_the_size():
    chunker, device = Chunker(), Device(capacity=3)
    with pytest.warns(UserWarning, match="out of memory with 10 rows at once: chunk_size is now 5") as caught:
        result = chunker.map(device, 10, ROWS, NAMES)
    assert len(caught) == 2  # 10 to 5, 5 to 2
    assert device.tried == [10, 5, 2, 2, 2, 2, 2]
    assert torch.equal(result.left, 2 * ROWS)
    device.tried.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chunker.map(device, 10, ROWS, NAMES).right.tolist() == list(range(10))
    assert device.tried == [2] * 5


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
    MemoryError(),
    RuntimeError("std::bad_alloc"),
    RuntimeError("could not create a primitive"),
]


@pytest.mark.filterwarnings("ignore:out of memory")
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:20] or type(error).__name__)
def test_every_kind_of_out_of_memory_error_halves_the_rows_of_its_function_and_enters_no_work_twice(error):
    chunker, tried = Chunker(), []
    chunker.ledger = Ledger()

    def function(rows):
        tried.append(len(rows))
        chunker.ledger.gradient_rows += len(rows)
        with chunker.ledger.timed("decoder_seconds", rows.device):
            if len(rows) > 5:
                raise error
        return 2 * rows

    assert torch.equal(chunker.map(function, 10, ROWS, work=("network",)), 2 * ROWS)
    assert [tried, chunker.ledger.gradient_rows] == [[10, 5, 5], 10]
    assert torch.equal(chunker.map(lambda rows: tried.append(len(rows)) or rows, 10, ROWS, work=("reward",)), ROWS)
    assert tried[3:] == [10]  # another function has a limit of its own
    with pytest.raises(UserError, match="out of memory: a row does not fit in the network on cpu") as caught:
        chunker.map(Mock(side_effect=error), 10, ROWS, work=("network",))
    assert "\n" not in str(caught.value)


def test_running_out_of_memory_midway_loses_nothing():
    device = Device(capacity=10)

    def shrinking(rows, names):
        done = device(rows, names)
        device.capacity = 1
        return done

    chunker = Chunker()
    chunker.limits.lower(Call(shrinking, (ROWS, NAMES), ()), 8)
    with pytest.warns(UserWarning, match="chunk_size is now"):
        result = chunker.map(shrinking, 10, ROWS, NAMES)
    assert torch.equal(result.left, 2 * ROWS)
    assert result.right.tolist() == list(range(10))


@pytest.mark.filterwarnings("ignore:out of memory")
@pytest.mark.parametrize(("size", "capacity"), [(4, 3), (1, 0), ("auto", 0)])
def test_out_of_memory_at_the_smallest_chunk_is_raised(size, capacity):
    with pytest.raises(torch.OutOfMemoryError):
        Chunker(size).map(Device(capacity), 10, ROWS, NAMES)


def test_other_errors_pass_through():
    def broken(rows):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        Chunker().map(broken, 10, ROWS)


@pytest.mark.parametrize("size", [0, -1, "all", "8"])
def test_an_invalid_size_is_refused(size):
    with pytest.raises(ValueError, match=f"chunk_size must be 'auto' or an integer >= 1, got {size!r}"):
        Chunker(size)


@pytest.mark.parametrize("reproducible", [1, "on", None])
def test_an_invalid_mode_is_refused(reproducible):
    with pytest.raises(ValueError, match=f"reproducible must be true, false or 'auto', got {reproducible!r}"):
        Chunker(reproducible=reproducible)


@pytest.mark.parametrize("chunk_size", [1, 4, 7])
def test_a_run_does_not_depend_on_the_size(chunk_size):
    value = bound(PosteriorMean(), Linear([1.0, -0.5]))
    expected = run(GaussianDiffusion(4), SVDD(3, alpha=0.3), value, prompts=["", "1", "2"])
    chunked = run(GaussianDiffusion(4, chunk_size=chunk_size), SVDD(3, alpha=0.3), value, prompts=["", "1", "2"])
    assert max(chunked.context.diffusion.denoised_rows) == chunk_size
    torch.testing.assert_close(chunked.x, expected.x, rtol=0, atol=1e-12)
    assert chunked.context.ledger.denoiser_rows == expected.context.ledger.denoiser_rows


# ---- the reproducible mode


@pytest.mark.parametrize(
    ("rows", "parts"), [(1, [1, 1]), (20, [20, 20]), (21, [10, 11] * 2), (24, [12] * 4), (45, [15] * 6)]
)
def test_a_call_holds_equal_parts_of_one_image(rows, parts):
    chunker, tried = Chunker(7, reproducible=True), []
    result = chunker.map(lambda x: tried.append(x.tolist()) or 2 * x, 2, torch.arange(2 * rows))
    assert [len(part) for part in tried] == parts
    assert torch.equal(result, 2 * torch.arange(2 * rows))
    assert all(part[0] // rows == part[-1] // rows for part in tried)


def test_the_rows_of_a_part_stay_together_in_inner_calls():
    chunker, tried = Chunker(reproducible=True), []

    def outer(x):
        return chunker.map(lambda y: tried.append(len(y)) or y, 5, x)

    assert torch.equal(chunker.map(outer, 2, ROWS), ROWS)
    assert tried == [5, 5]


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_threads_compute_the_parts_as_the_caller_would(context):
    """With one thread for each operation, the caller's gradient mode, and the caller's errors."""
    chunker, before = Chunker(reproducible=True), torch.get_num_threads()
    chunker.concurrent, seen, weight = True, [], torch.ones(2, requires_grad=True)

    def function(x):
        seen.append((threading.get_ident(), torch.get_num_threads()))
        if x[0, 0] > 1000:
            raise RuntimeError("shapes do not match")
        return weight * x

    torch.set_num_threads(2)
    try:
        with context():
            result = chunker.map(function, 5, ROWS, parallel=True)
            assert result.requires_grad == (context is torch.enable_grad)
            assert result.is_inference() == (context is torch.inference_mode)
            with pytest.raises(RuntimeError, match="shapes do not match"):
                chunker.map(function, 5, ROWS + 1000, parallel=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.equal(result, ROWS)
    assert threading.get_ident() not in {thread for thread, _ in seen}
    assert {threads for _, threads in seen} == {1}


@pytest.mark.filterwarnings("ignore:out of memory")
def test_out_of_memory_halves_the_parts_and_redraws_the_whole_batch():
    class Model:
        diffusion = SimpleNamespace(chunker=Chunker(reproducible=True))

        @redrawn
        def draw(self):
            return self.diffusion.chunker.map(device, 1, ROWS, NAMES)

    device = Device(capacity=3)
    what = "out of memory with 10 rows of an image at once in the function: now 5"
    with pytest.warns(UserWarning, match=what) as caught:
        assert torch.equal(Model().draw().left, 2 * ROWS)
    assert [len(caught), Model.diffusion.chunker.most, device.tried] == [2, 2, [10, 5, *[2] * 5]]
    device.capacity = 0
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="now 1"):
        Model().draw()


@pytest.mark.parametrize(
    ("sampler", "value", "together"),
    [
        (SVDD(8), None, True),
        (SMC(8), Lookahead(1), True),
        (SVDD(4), None, False),
        (BestOfN(8), None, False),
        (BestOfN(16), None, True),
        (Unguided(), None, False),
        (SVDD(20), LatentConvValue(), False),  # one row an image through the network
    ],
)
def test_the_mode_is_on_where_it_costs_nothing(sampler, value, together):
    diffusion = GaussianDiffusion(4)
    model = GuidedDiffusion(Compressibility(), diffusion, sampler, value)
    model.on_predict_start()
    assert (diffusion.chunker.most is not None) == together


def test_an_image_is_the_same_to_the_bit_in_every_batch_chunk_order_and_number_of_threads():
    texts = ("apple", "blue car", "panda", "rocket")
    prompts = [Prompt(index, text, None, None, {}) for index, text in enumerate(texts)]
    found, before = [], torch.get_num_threads()
    try:
        for chunk_size, threads, batches in (("auto", 1, ([0, 1, 2, 3],)), (7, 2, ([3, 1, 0], [2])), (5, 1, ([2],))):
            torch.set_num_threads(threads)
            diffusion = StableDiffusion("emoji", 3, guidance_scale=4.0, chunk_size=chunk_size)
            model = GuidedDiffusion(CLIPScore(), diffusion, SVDD(8), eval_rewards=[Compressibility()])
            for batch in batches:
                with torch.no_grad():
                    drawn = model.predict_step([prompts[k] for k in batch], 0)
                for image, row, trace in zip(drawn.images, drawn.rows, drawn.traces, strict=True):
                    row = {**row, "ledger": {k: n for k, n in row["ledger"].items() if not k.endswith("seconds")}}
                    found.append((row["prompt_index"], image, row, trace))
    finally:
        torch.set_num_threads(before)
    for index, image, row, trace in found[4:]:
        _, expected, *rest = found[index]
        assert torch.equal(image, expected)
        assert [row, trace] == rest


@pytest.mark.parametrize(("recorded", "own"), [(16, 16), (8, 16), (None, None)])
def test_a_run_folder_records_the_rows_at_once(tmp_path, recorded, own):
    folder = RunFolder(tmp_path)
    folder.claim({"data": {"batch_size": 2}})
    assert folder.record_rows_at_once(recorded, rank=0) == recorded
    assert folder.record_rows_at_once(own, rank=1) == own  # nothing is drawn yet
    folder.results.write_text("{}\n")
    assert folder.record_rows_at_once(own, rank=0) == recorded
    with pytest.raises(RunError, match="the reproducible mode"):
        folder.record_rows_at_once(None if recorded else 16, rank=1)
    folder.close()
    folder.results.write_text("{}\n")
    if recorded:
        folder.claim({"data": {"batch_size": 3}})
        folder.close()
    else:
        with pytest.raises(RunError, match=r"batch_size was 2, now 3.*reproducible true"):
            folder.claim({"data": {"batch_size": 3}})
