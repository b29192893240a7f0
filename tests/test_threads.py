"""Rewards in threads beside the device, random numbers drawn ahead, and checks that wait for a device once."""

import os
import threading
import time
from concurrent.futures import CancelledError

import pytest
import torch
from torch import Tensor

from svdd import NotFinite, RewardError
from svdd.diffusion.chunking import Chunker
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards.base import CORES, Reward
from svdd.rewards.brightness import Brightness
from svdd.rewards.clip import CLIPScore
from svdd.rewards.function import FunctionReward
from svdd.rewards.jpeg import Compressibility, Incompressibility
from svdd.rewards.threshold import Threshold
from svdd.rewards.weighted_sum import WeightedSum
from svdd.rewards.win_rate import WinRate
from svdd.runs.rows import Prompt
from svdd.samplers.dps import DPS
from svdd.samplers.evolutionary_search import EvolutionarySearch
from svdd.samplers.noise_optimisation import NoiseOptimisation
from svdd.samplers.rollover_budget import RolloverBudget
from svdd.samplers.svdd import SVDD
from svdd.state import ledger as ledgers
from svdd.state.context import Context
from svdd.state.ledger import Ledger
from svdd.state.pool import Pool
from svdd.state.scoring import Scoring, score, score_all
from svdd.state.start import Start
from svdd.state.stream import Stream, draw_ahead
from svdd.values.posterior_mean import PosteriorMean

PROMPTS = ["red apple", "panda"]


class Recorded(Reward):
    """The mean of the red channel, and what its calls were given; meets a partner thread in `pair`."""

    threads, one_call = 4, True
    pair: threading.Barrier | None = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        if self.pair is not None:
            self.pair.wait(20)
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.get_num_threads()
        self.calls.append((len(images), modes, torch.tensor([0.1]).dtype, threading.current_thread().daemon))
        return images[:, 0].mean((1, 2)) + torch.tensor([len(prompt) for prompt in prompts])


def run(reward: Reward, threads: int, chunk_size: int | str, reproducible: bool, **options):
    reward.threads = threads
    diffusion = StableDiffusion("emoji", 2, 1.0, chunk_size=chunk_size, reproducible=reproducible)
    model = GuidedDiffusion(reward, diffusion, SVDD(3), **options)
    batch = [Prompt(k, text, None, k, {}) for k, text in enumerate(PROMPTS)]
    found = model.predict(batch)
    rows = [{**row, "ledger": row["ledger"]["reward_calls"]} for row in found.rows]
    return found.images, rows, found.traces


@pytest.mark.parametrize("reward", [Compressibility, lambda: WinRate(Compressibility()), Recorded])
def test_threads_change_nothing(reward):
    """Scores, selections, pictures and counts are those of calls in the run's own thread, in every mode."""
    held_out = {"eval_rewards": [Incompressibility(), Brightness()]}
    for chunk_size, reproducible in ((2, False), ("auto", True)):
        images, *rows = run(reward(), 0, chunk_size, reproducible, **held_out)
        also, *others = run(reward(), 3, chunk_size, reproducible, **held_out)
        assert torch.equal(images, also)
        assert rows == others


@torch.no_grad()
def test_a_chunk_is_scored_while_the_next_is_decoded():
    """The decoder's second chunk meets the reward's first call: neither can end without the other."""
    reward, diffusion = Recorded(), StableDiffusion("emoji", 2, 1.0, chunk_size=1)
    reward.pair = threading.Barrier(2)
    own, seen = diffusion.decode, []

    def decode(x0: Tensor) -> Tensor:
        seen.append(len(x0))
        if len(seen) == 2:
            reward.pair.wait(20)
            reward.pair = None
        return own(x0)

    state = Start(diffusion, PROMPTS, [0, 1])()
    scores = state.scores(reward, decode=decode)
    assert seen == [1, 1]
    torch.testing.assert_close(scores, state.images[:, 0].mean((1, 2)) + torch.tensor([9, 5]))


def test_rows_are_spread_and_calls_keep_their_promised_shapes():
    images, texts = torch.rand(8, 3, 4, 4), list("abcdefgh")

    def calls(chunker: Chunker, **attributes) -> list[int]:
        reward = Recorded()
        vars(reward).update(attributes)
        score(reward, chunker, 2, images, texts)
        return sorted(call[0] for call in reward.calls)

    assert calls(Chunker()) == [2] * 4
    assert calls(Chunker(), threads=1) == [8]  # a client with its own concurrency
    assert calls(Chunker(), one_call=False) == [8]
    assert calls(Chunker(reproducible=True), one_call=False) == [4, 4]  # rows of one image
    assert calls(Chunker(), groupwise=True) == [4, 4]
    for chunker, threads in ((Chunker(), torch.get_num_threads()), (Chunker(reproducible=True), 1)):
        reward = Recorded()
        with torch.inference_mode():
            score(reward, chunker, 2, images, texts)
        assert {call[1:] for call in reward.calls} == {((True, False, threads), torch.float32, True)}


def test_a_trainer_in_half_precision_keeps_its_default_type():
    """The default type of new tensors is one for all threads."""
    reward, before = Recorded(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with Scoring(reward, ["a", "b"]) as scoring:
            scoring.add(torch.rand(2, 3, 4, 4), torch.arange(2))
            assert torch.tensor([0.1]).dtype == torch.bfloat16
            assert not reward.calls
            assert scoring.result(torch.device("cpu")).dtype == torch.float32
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(before)
    assert {call[2] for call in reward.calls} == {torch.float32}


def test_a_chunk_that_is_tried_again_replaces_its_scores():
    images, reward = torch.rand(4, 3, 4, 4), Recorded()
    with Scoring(reward, ["a"] * 4) as scoring:
        scoring.add(images[:1] * 0, torch.arange(1))
        scoring.add(images[:2], torch.arange(2))
        scoring.add(images[2:], torch.arange(2, 4))
        found = scoring.result(torch.device("cpu"))
    assert torch.equal(found, images[:, 0].mean((1, 2)) + 1)


def test_the_first_error_in_the_order_of_rows_is_raised_and_the_rest_is_dropped():
    called = []

    def fail(image, prompt):
        called.append(prompt)
        if prompt in "bc":
            raise KeyError(prompt)
        return float("nan") if prompt == "d" else 1.0

    images = torch.rand(40, 3, 4, 4)
    reward = FunctionReward(fail, one_by_one=True, threads=2)
    for texts, message in (("abcd", "failed with KeyError: 'b'"), ("ad", "NaN or infinity for 1 of 1 images.*'d'")):
        with pytest.raises(RewardError, match=message) as caught:
            score(reward, Chunker(), 1, images[: len(texts)], list(texts))
    assert caught.value.__cause__ is None
    called.clear()
    reward.threads = 1
    with pytest.raises(RewardError, match="'b'"):
        score_all({"fail": FunctionReward(fail, one_by_one=True, threads=2)}, Chunker(), images[:1], ["b"], 1, 1)


def test_threads_end_and_drop_their_work():
    held, pool = threading.Event(), Pool(2)
    running = pool.submit(held.wait)
    also = pool.submit(held.wait)
    waiting = pool.submit(lambda: 1)
    pool.cancel()
    with pytest.raises(CancelledError):
        waiting.result()
    held.set()
    assert running.result()
    assert also.result()
    names = {thread.name for thread in threading.enumerate() if thread.name == "svdd pool"}
    deadline = time.monotonic() + 20
    while names and time.monotonic() < deadline:
        names = {thread.name for thread in threading.enumerate() if thread.name == "svdd pool"}
    assert not names


def test_who_runs_in_threads():
    jpeg, clip = Compressibility(), Brightness()
    assert (jpeg.threads, clip.threads, WeightedSum([jpeg, clip]).threads) == (CORES, 0, 0)
    both = WeightedSum([jpeg, Threshold(Incompressibility(), at_most=2)])
    assert (both.threads, both.takes_bytes, both.one_call) == (CORES, True, True)
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(both.score(both.prepare(images), ["a"] * 3), both.score(images, ["a"] * 3))
    with pytest.raises(ValueError, match=r"is differentiable.*: leave out threads"):
        FunctionReward(lambda images: images.mean((1, 2, 3)), differentiable=True, threads=2)
    assert 1 <= CORES <= max(32, os.cpu_count() or 1)


# ---- random numbers


@pytest.mark.parametrize(
    "sampler",
    [SVDD(3), SVDD({0.5: 3, 1.0: 2}), RolloverBudget(3, 2), EvolutionarySearch(2, 2, 2), NoiseOptimisation(2)],
    ids=lambda sampler: type(sampler).__name__,
)
def test_numbers_drawn_ahead_are_the_same(sampler, monkeypatch):
    """Also where counts change, searches return to the stream, and images share or leave a batch."""
    own = Context.encode

    def run(ahead: bool) -> Tensor:
        def encode(*args, **options):
            context = own(*args, **options)
            context.ahead = ahead
            return context

        monkeypatch.setattr(Context, "encode", encode)
        model = GuidedDiffusion(CLIPScore(), StableDiffusion("emoji", 3, 1.0), sampler)
        return model.sample(PROMPTS, seed=3)[0]

    assert torch.equal(run(True), run(False))


def test_a_stream_returns_to_where_it_was():
    shapes = [(2, 3), (2, 3), (5,), (2, 3)]
    expected = Stream.seeded(7)
    found, other = Stream.seeded(7), Stream.seeded(8)
    for shape in shapes:
        assert torch.equal(found.normals(shape, torch.float32), expected.normals(shape, torch.float32))
        draw_ahead([found, other], (2, 3), torch.float32)
        draw_ahead([found, found], (2, 3), torch.float32)  # of one stream twice: nothing
        assert torch.equal(found.clone().normals((4,), torch.float64), expected.clone().normals((4,), torch.float64))
        draw_ahead([found], (2, 3), torch.float32)
    assert torch.equal(found.get_state(), expected.get_state())
    assert torch.equal(found.uniforms(3), expected.uniforms(3))


# ---- a device that computes asynchronously


@pytest.mark.parametrize(
    ("part", "message"),
    [("unet", "the denoiser returned .* 2 of 2 rows at step 0 of 2, .*'red apple'"), ("vae.decoder", "the decoder")],
)
@pytest.mark.parametrize("reward", [Brightness(), Compressibility()])
@pytest.mark.parametrize("sampler", [SVDD(2), DPS()])
def test_a_late_check_names_the_first_fault(part, message, reward, sampler, monkeypatch):
    """As on a CPU, where each evaluation is checked at once, and not the reward that got NaN."""
    if isinstance(sampler, DPS) and not reward.differentiable:
        pytest.skip("has no gradient")
    monkeypatch.setattr("svdd.rewards.base._is_asynchronous", lambda device: True)
    model = GuidedDiffusion(reward, StableDiffusion("emoji", 2, 1.0), sampler)
    next(reversed([*model.diffusion.get_submodule(part).parameters()])).data[0] = torch.nan
    own, settled = Context.encode, []

    def encode(*args, **options):
        context = own(*args, **options)
        context.finiteness.late = True
        settled.append(context.finiteness)
        return context

    monkeypatch.setattr(Context, "encode", encode)
    with pytest.raises(NotFinite, match=message):
        model.sample(PROMPTS)
    with pytest.raises(RewardError, match=r"received NaN or infinity in 1 of 2 images.*'panda'"):
        reward.score(torch.stack([torch.zeros(3, 8, 8), torch.full((3, 8, 8), torch.inf)]), PROMPTS)


class Event:
    """A clock in the order of a device's work."""

    now = 0.0

    def __init__(self) -> None:
        self.at, self.done = Event.now, False

    def synchronize(self) -> None:
        self.done = True

    def elapsed_time(self, end: "Event") -> float:
        assert end.done
        return 1000 * (end.at - self.at)


def test_events_are_read_when_the_ledger_is(monkeypatch):
    monkeypatch.setattr(ledgers, "_mark", lambda device: Event())
    ledger, device = Ledger(), torch.device("cpu")
    for field, seconds in (("denoiser_seconds", 2.0), ("decoder_seconds", 1.0), ("denoiser_seconds", 0.5)):
        with ledger.timed(field, device):
            Event.now += seconds
        Event.now += 10
    assert ledger.denoiser_seconds == 0
    found = ledger.per_image(2)
    assert (found["denoiser_seconds"], found["decoder_seconds"]) == (1.25, 0.5)
    with ledger.timed("total_seconds", device):
        pass
    assert ledger.per_image(1)["denoiser_seconds"] == 2.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("chunk_size", ["auto", 2])
@torch.no_grad()
def test_an_evaluation_waits_for_nothing(chunk_size):
    """The network, the decoder and the random numbers of a step; only the scores are waited for."""
    diffusion = StableDiffusion("emoji", 4, 2.0, chunk_size=chunk_size).to("cuda")
    value = PosteriorMean()
    value.bind(Compressibility(), diffusion)
    state = Start(diffusion, PROMPTS, [0, 1])()
    for _ in range(2):  # once to warm up
        state = state.propose(3)
        _ = state.prediction
    torch.cuda.set_sync_debug_mode("error")
    try:
        children = state.propose(2)
        pictures = diffusion.chunker.map(diffusion.decode, 2, children.x0, parallel=True, work=("decoder",))
        children.require_finite("decoder", children.x0, pictures)
        kept = children.select(torch.zeros(2, 1, dtype=torch.int64, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ledger = kept.context.ledger
    with ledger.timed("total_seconds", diffusion.device):
        _ = kept.scores(value.reward)
    assert 0 < ledger.reward_seconds <= ledger.total_seconds
    assert ledger.denoiser_seconds > 0
    kept.context.finiteness.settle()
