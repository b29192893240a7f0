"""Calls of a reward on the rows of a batch: on the device, or in threads beside it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from svdd.diffusion.arithmetic import float32_default
from svdd.diffusion.chunking import Chunker
from svdd.state.context import Scorer
from svdd.state.pool import Pool

__all__ = ["Scoring", "begin", "score", "score_all", "threads_of", "to_host"]


def score(reward: Scorer, chunker: Chunker, groups: int, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Returns the reward of each image, float32 [n]; a groupwise one sees each of so many equal groups in one call."""
    with begin(reward, chunker, groups, images, prompts) as result:
        return result()


def score_all(
    rewards: Mapping[str, Scorer], chunker: Chunker, images: Tensor, prompts: Sequence[str], groups: int, sets: int
) -> dict[str, Tensor]:
    """Returns the scores by each reward; those with threads work while the others do.

    The images are those of `groups` equal groups; a groupwise reward compares those of `sets` instead.
    """
    with ExitStack() as around:
        waiting = {}
        for name, reward in rewards.items():
            count = sets if getattr(reward, "groupwise", False) else groups
            waiting[name] = around.enter_context(begin(reward, chunker, count, images, prompts))
        scores = {name: waiting[name]() for name in sorted(rewards, key=lambda name: threads_of(rewards[name]) > 0)}
    return {name: scores[name] for name in rewards}


@contextmanager
def begin(
    reward: Scorer, chunker: Chunker, groups: int, images: Tensor, prompts: Sequence[str]
) -> Iterator[Callable[[], Tensor]]:
    """Hands images to the reward's threads, if it has any, and yields a function that returns what `score` does.

    Work that has not begun when the block is left is dropped.
    """
    whole = getattr(reward, "groupwise", False)
    groups = 1 if getattr(reward, "one_call", False) and not whole else groups
    map = partial(chunker.map, work=("reward", reward), whole=whole)
    if not threads_of(reward):
        yield lambda: map(reward.score, groups, images, prompts)
    elif getattr(chunker, "rehearses", False):  # each call is measured, and must have ended when it returns

        def call(images: Tensor, prompts: Sequence[str]) -> Tensor:
            with Scoring(reward, prompts) as scoring:
                scoring.add(images, torch.arange(len(images), device="cpu"))
                return scoring.result(images.device)

        yield lambda: map(call, groups, images, prompts)
    else:
        with Scoring(reward, prompts) as scoring:
            map(scoring.add, groups, images, torch.arange(len(images), device="cpu"))
            yield lambda: scoring.result(images.device)


def threads_of(reward: Scorer) -> int:
    """Returns in how many threads beside the device the reward may run; 0 if it runs on the device."""
    return 0 if getattr(reward, "differentiable", False) else getattr(reward, "threads", 0)


class Scoring:
    """Scores under way of the rows of a batch: `add` takes some images, and `result` waits for all scores.

    Leaving it as a context drops the work that has not begun. While the default type of new tensors, which is one for
    all threads, is another than float32, as a Trainer in half precision sets it, the reward is called by `result` only.

    Args:
        reward: A reward with `threads`.
        prompts: The prompt of each row.
    """

    def __init__(self, reward: Scorer, prompts: Sequence[str]) -> None:
        self._reward, self._prompts, self._threads = reward, prompts, threads_of(reward)
        self._split = getattr(reward, "one_call", False) and not getattr(reward, "groupwise", False)
        self._pool = Pool(self._threads)
        self._waiting: list[Callable[[], object]] = []
        self._calls: dict[int, tuple[list[int], Future[Tensor]]] = {}  # by row; a chunk that is tried again replaces

    def __enter__(self) -> "Scoring":
        """Enters the context."""
        return self

    def __exit__(self, *error: object) -> None:
        """Drops the work that has not begun."""
        self._pool.cancel()

    def add(self, images: Tensor, rows: Tensor) -> Tensor:
        """Begins to score the images, [k, 3, h, w], of these rows, int64 [k] on the CPU; returns the rows."""
        prepare = getattr(self._reward, "prepare", Tensor.detach)
        pictures, ready = to_host(prepare(images))
        numbers, parts = rows.tolist(), min(self._threads, len(rows)) if self._split else 1
        ends = [len(numbers) * (k + 1) // parts for k in range(parts)]
        for part in map(slice, [0, *ends[:-1]], ends):
            texts = [self._prompts[row] for row in numbers[part]]
            modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
            call = partial(_call, self._reward, pictures[part], texts, ready, modes)
            begin = partial(self._begin, numbers[part], call)
            if torch.get_default_dtype() == torch.float32:
                begin()
            else:
                self._pool.submit(lambda: None)  # starts a thread, with the present number of PyTorch's threads
                self._waiting.append(begin)
        return rows

    def _begin(self, rows: list[int], call: Callable[[], Tensor]) -> None:
        self._calls.update(dict.fromkeys(rows, (rows, self._pool.submit(call))))

    def result(self, device: torch.device) -> Tensor:
        """Returns the score of every row, float32 [n]; raises what the first failing call did."""
        with float32_default():
            for begin in self._waiting:
                begin()
            self._waiting.clear()
            self._pool.close()
            scores = torch.empty(len(self._prompts), device="cpu")
            ordered = (self._calls[row] for row in range(len(scores)))
            for rows, future in {id(call[1]): call for call in ordered}.values():
                scores[rows] = future.result()
        return scores.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> tuple[Tensor, Callable[[], object]]:
    """Begins to copy a tensor to the CPU; returns the copy, and a function that waits until it is there.

    A copy from a CUDA device goes to pinned memory, and nothing waits for it before that function is called.
    """
    if tensor.device.type != "cuda":
        return tensor.cpu(), lambda: None
    copy, event = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))
    return copy, event.synchronize


def _call(
    reward: Scorer, images: Tensor, prompts: list[str], ready: Callable[[], object], modes: tuple[bool, bool]
) -> Tensor:
    """Calls the reward in a thread, with the modes of the thread that began the scoring."""
    ready()
    with torch.inference_mode(modes[0]), torch.set_grad_enabled(modes[1]):
        return reward.score(images, prompts)
