"""A state is evaluated once, separates groups, and draws each image's noise from its own generator."""

from dataclasses import FrozenInstanceError

import pytest
import torch

from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.rewards.jpeg import Compressibility
from svdd.samplers.svdd import SVDD
from svdd.state.start import Start
from svdd.state.state import State
from svdd.values.posterior_mean import PosteriorMean
from tests.analytic import GaussianDiffusion, Linear, bound, run


def index(*rows) -> torch.Tensor:
    return torch.tensor(rows)


@pytest.fixture
def diffusion():
    return GaussianDiffusion(3)


@pytest.fixture
def state(diffusion):
    """Two images of three particles."""
    return State.start(diffusion, ["a", "5"], [10, 11], 3)


# ---- lazy evaluation


def test_denoising_is_lazy(diffusion, state):
    assert diffusion.denoised_rows == []
    x0 = state.x0
    assert diffusion.denoised_rows == [6]
    assert state.x0 is x0
    assert state.prediction.x0 is x0
    state.propose(4)
    assert state.images.shape == (6, 3, 1, 2)
    assert diffusion.denoised_rows == [6]
    assert state.context.ledger.denoiser_rows == 6


def test_images_are_decoded_once_and_scores_use_them(state):
    ledger, reward = state.context.ledger, Linear([1.0, 2.0])
    images = state.images
    assert state.images is images
    scores = state.scores(reward)
    assert (ledger.decoded_images, ledger.reward_calls, ledger.denoiser_rows) == (6, 6, 6)
    torch.testing.assert_close(scores, (state.x0.flatten(1) @ reward.b).float())
    assert scores.dtype == torch.float32


def test_survivors_keep_their_cached_results(diffusion, state):
    x0, mean, images = state.x0, state.prediction.mean, state.images
    kept = state.select(index([2, 0], [1, 1]))
    flat = [2, 0, 4, 4]
    assert torch.equal(kept.x, state.x[flat])
    assert torch.equal(kept.x0, x0[flat])
    assert torch.equal(kept.prediction.mean, mean[flat])
    assert torch.equal(kept.images, images[flat])
    assert kept.row.tolist() == [0, 0, 1, 1]
    assert kept.prompts == ["a", "a", "5", "5"]
    assert kept.i == state.i
    assert diffusion.denoised_rows == [6]
    assert kept.context.ledger.decoded_images == 6
    kept.propose()
    assert diffusion.denoised_rows == [6]


def test_survivors_of_an_unevaluated_state_are_denoised_alone(diffusion, state):
    kept = state.select(index([2], [1]))
    assert diffusion.denoised_rows == []
    x0 = kept.x0
    assert diffusion.denoised_rows == [2]
    torch.testing.assert_close(x0, state.x0[[2, 4]])


def test_the_end_is_its_own_prediction_and_costs_nothing(diffusion, state):
    while not state.done:
        assert state.i < 3
        state = state.propose()
    spent = list(diffusion.denoised_rows)
    assert state.i == 3
    assert state.x0 is state.x
    assert torch.equal(state.images, diffusion.decode(state.x))
    assert state.std == 0.0
    assert diffusion.denoised_rows == spent == [6, 6, 6]
    with pytest.raises(ValueError, match="the chain has ended"):
        _ = state.prediction
    with pytest.raises(ValueError, match="the chain has ended"):
        state.propose()


def test_a_state_is_frozen_and_its_children_do_not_change_it(state):
    before = state.x.clone()
    state.propose(2).select(index([0, 1], [3, 4]))
    assert torch.equal(state.x, before)
    assert state.i == 0
    with pytest.raises(FrozenInstanceError):
        state.i = 1


# ---- children


def test_children_are_consecutive_and_come_from_the_kernel(state):
    children = state.propose(4)
    assert children.x.shape == (24, 1, 1, 2)
    assert children.i == 1
    assert children.row.tolist() == [0] * 12 + [1] * 12
    noise = (children.x - state.prediction.mean.repeat_interleave(4, 0)) / state.std
    for image, seed in enumerate([10, 11]):
        generator = torch.Generator().manual_seed(seed)
        torch.randn(3, 1, 1, 2, generator=generator, dtype=torch.float64)  # the start
        drawn = torch.randn(12, 1, 1, 2, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(noise[12 * image : 12 * image + 12], drawn)


def test_a_sampler_may_shift_the_mean(state):
    shifted = state.propose(2, mean=state.prediction.mean + 1)
    other = State.start(state.context.diffusion, ["a", "5"], [10, 11], 3).propose(2)
    torch.testing.assert_close(shifted.x, other.x + 1)


def test_a_deterministic_step_draws_no_noise():
    diffusion = GaussianDiffusion(3, eta=0.0)
    state = State.start(diffusion, ["a"], [1])
    before = state.context.generators[0].get_state()
    children = state.propose(2)
    assert torch.equal(children.x[0], children.x[1])
    assert torch.equal(children.x[0], state.prediction.mean[0])
    assert torch.equal(state.context.generators[0].get_state(), before)


def test_less_than_one_child_is_refused(state):
    with pytest.raises(ValueError, match="m must be >= 1, got 0"):
        state.propose(0)


# ---- selection


@pytest.mark.parametrize("bad", [[[3], [0]], [[0], [-1]], [[0, 1], [2, 6]]])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("method", [State.select, State.part])
def test_a_selection_cannot_leave_its_group(state, bad, late, method):
    """A device that computes asynchronously is not waited for, and the chain goes on until its images are read."""
    state.context.finiteness.late = late
    kept = method(state, torch.tensor(bad)).propose() if late else None
    with pytest.raises(ValueError, match=r"index must stay within its group of 3 rows, got -?\d \.\. \d"):
        _ = kept.images if late else method(state, torch.tensor(bad))


def test_groups_must_divide_the_rows(state):
    for shape in ([4, 1], [0, 1], [6]):
        with pytest.raises(ValueError, match=rf"groups that divide 6 rows evenly, got \{shape}"):
            state.select(torch.zeros(shape, dtype=torch.int64))


def test_groups_need_not_be_images(state):
    kept = state.select(index([0], [0], [0], [0], [0], [0]))  # one group per particle
    assert torch.equal(kept.x, state.x)
    pairs = state.propose(2).select(index(*[[1]] * 6))
    assert pairs.row.tolist() == [0, 0, 0, 1, 1, 1]


# ---- randomness


def test_the_start_comes_from_the_images_own_generator(diffusion):
    state = State.start(diffusion, ["a", "b"], [3, 2**64 - 1], 2)
    for k, seed in enumerate([3, 2**64 - 1]):
        generator = torch.Generator().manual_seed(seed)
        expected = torch.randn(2, 1, 1, 2, generator=generator, dtype=torch.float64)
        assert torch.equal(state.x[2 * k : 2 * k + 2], expected)
    assert state.i == 0
    assert not state.done
    assert state.num_images == 2


def test_noise_does_not_depend_on_the_other_images(diffusion):
    together = State.start(diffusion, ["a", "b", "c"], [4, 5, 6]).propose(2).propose()
    uniforms = together.uniforms(3)
    for k, (prompt, seed) in enumerate(zip("abc", [4, 5, 6], strict=True)):
        alone = State.start(diffusion, [prompt], [seed]).propose(2).propose()
        assert torch.equal(alone.x, together.x[2 * k : 2 * k + 2])
        assert torch.equal(alone.uniforms(3)[0], uniforms[k])


def test_uniform_numbers_lie_in_their_interval_and_do_not_shift_the_noise(diffusion):
    quiet = State.start(diffusion, ["a", "b"], [0, 1])
    asking = State.start(diffusion, ["a", "b"], [0, 1])
    first, second = asking.uniforms(500), asking.uniforms(500)
    assert torch.equal(quiet.propose(3).x, asking.propose(3).x)
    assert first.shape == (2, 500)
    assert first.dtype == torch.float64
    assert 0 <= first.min() <= first.max() < 1
    assert abs(float(torch.cat([first, second]).mean()) - 0.5) < 4 * (1 / 12 / 2000) ** 0.5
    assert len({float(column[0]) for column in (first[0], first[1], second[0], second[1])}) == 4


def test_images_of_equal_seed_and_prompt_are_equal(diffusion):
    value = bound(PosteriorMean(), Linear([1.0, 0.0]))
    x = run(diffusion, SVDD(3, alpha=0.5), value, prompts=["a", "a", "a"], seeds=[5, 6, 5]).x
    assert torch.equal(x[0], x[2])
    assert not torch.equal(x[0], x[1])


# ---- prompts


def test_distinct_prompts_are_encoded_once_and_looked_up_by_row(diffusion):
    state = State.start(diffusion, ["a", "7", "a", "7"], [0, 1, 2, 3], 2)
    assert diffusion.encoded == [[("a", None), ("7", None)]]
    assert state.row.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert state.prompts == ["a", "a", "7", "7", "a", "a", "7", "7"]
    alone = State.start(diffusion, ["7"], [1], 2)
    assert torch.equal(state.x0[2:4], alone.x0)  # the prompt shifts the prior, so a wrong prompt would fail


def test_a_prompt_with_two_negative_prompts_is_two_conditions(diffusion):
    state = State.start(diffusion, ["a", "a", "a"], [0, 1, 2], negative_prompts=["blurry", None, "blurry"])
    assert diffusion.encoded == [[("a", "blurry"), ("a", None)]]
    assert state.row.tolist() == [0, 1, 0]
    assert state.prompts == ["a", "a", "a"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "at least one image, got 0, 0 and 0"),
        ((["a", "b"], [1]), "one entry per image.*got 2, 1 and 2"),
        ((["a"], [1], 1, ["x", "y"]), "got 1, 1 and 2"),
        ((["a"], [1], 0), "a start needs at least 1 row per image, got 0"),
        ((["a", "b"], [1, -3]), r"a seed must lie in 0 \.\. 18446744073709551615, got -3"),
        ((["a"], [2**64]), "a seed must lie in .* got 18446744073709551616"),
    ],
)
def test_an_invalid_start_is_refused(diffusion, arguments, message):
    with pytest.raises(ValueError, match=message):
        State.start(diffusion, *arguments)


def test_a_second_start_draws_other_rows_and_encodes_nothing(diffusion):
    start = Start(diffusion, ["a", "7"], [3, 4])
    first, second = start(2), start(3)
    assert diffusion.encoded == [[("a", None), ("7", None)]]
    assert first.origin.tolist() == [0, 1] * 2
    assert second.origin.tolist() == [2, 3, 4] * 2
    together = State.start(diffusion, ["a", "7"], [3, 4], 5)  # continues the image's stream
    assert torch.equal(first.join(second).x, together.x)
    assert torch.equal(first.join(second).origin, together.origin)


# ---- divergence


def test_selections_and_shifts_add_to_the_divergence(state):
    trace = state.context.trace
    assert trace.path_kl == 0.0
    state = state.propose().select(index([0, 1], [1, 2]), kl=torch.tensor([1.0, 2.0]))
    state = state.propose(mean=state.prediction.mean + 1, kl=torch.tensor([0.5, 0.25]))
    assert trace.path_kl.tolist() == [1.5, 2.25]
    state.select(index([0], [1]))
    assert trace.path_kl is None
    state.propose(mean=state.prediction.mean, kl=torch.zeros(2))
    assert trace.path_kl is None


def test_other_starts_and_shifts_without_a_divergence_leave_it_unknown(diffusion):
    for leave in (lambda s: s.replay(s.x + 1), lambda s: s.propose(mean=s.prediction.mean)):
        state = State.start(diffusion, ["a"], [0])
        state.replay(state.x)
        assert state.context.trace.path_kl == 0.0
        leave(state)
        assert state.context.trace.path_kl is None


# ---- with a network


@pytest.mark.parametrize("alpha", [0.0, 0.05])
def test_rows_are_independent(sd15, alpha):
    diffusion = StableDiffusion(sd15, 3, guidance_scale=4.0, chunk_size=1)
    value = bound(PosteriorMean(), Compressibility())
    prompts, seeds = ["a red apple", "blue car", "a red apple", ""], [3, 2, 1, 0]
    with torch.no_grad():
        together = run(diffusion, SVDD(3, alpha), value, prompts=prompts, seeds=seeds)
        alone = [
            run(diffusion, SVDD(3, alpha), value, prompts=[p], seeds=[s]) for p, s in zip(prompts, seeds, strict=True)
        ]
    assert torch.equal(together.x, torch.cat([state.x for state in alone]))
    assert torch.equal(together.images, torch.cat([state.images for state in alone]))
    assert together.context.ledger.denoiser_rows == 4 * (1 + 3 * 2)
