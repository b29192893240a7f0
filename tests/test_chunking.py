"""The chunk size changes the rows per call and nothing else."""

import warnings
from typing import NamedTuple

import pytest
import torch

from svdd.diffusion.chunking import Chunker
from svdd.samplers.svdd import SVDD
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


def test_running_out_of_memory_midway_loses_nothing():
    device = Device(capacity=10)

    def shrinking(rows, names):
        done = device(rows, names)
        device.capacity = 1
        return done

    chunker = Chunker()
    chunker.limit = 4
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


@pytest.mark.parametrize("chunk_size", [1, 4, 7])
def test_a_run_does_not_depend_on_the_size(chunk_size):
    value = bound(PosteriorMean(), Linear([1.0, -0.5]))
    expected = run(GaussianDiffusion(4), SVDD(3, alpha=0.3), value, prompts=["", "1", "2"])
    chunked = run(GaussianDiffusion(4, chunk_size=chunk_size), SVDD(3, alpha=0.3), value, prompts=["", "1", "2"])
    assert max(chunked.context.diffusion.denoised_rows) == chunk_size
    torch.testing.assert_close(chunked.x, expected.x, rtol=0, atol=1e-12)
    assert chunked.context.ledger.denoiser_rows == expected.context.ledger.denoiser_rows
