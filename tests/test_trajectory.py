"""`GuidedDiffusion.sample` in a notebook: functions as rewards, images per prompt, callbacks and trajectories."""

import io
import math
import sys
from dataclasses import fields
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from svdd import UserError
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards.brightness import Brightness
from svdd.rewards.clip import CLIPScore
from svdd.rewards.threshold import Threshold
from svdd.rewards.weighted_sum import WeightedSum
from svdd.rewards.z_scored import ZScored
from svdd.runs.rows import Prompt
from svdd.samplers.beam_search import BeamSearch
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.dps import DPS
from svdd.samplers.noise_optimisation import NoiseOptimisation
from svdd.samplers.refinement import Refinement
from svdd.samplers.rollover_budget import RolloverBudget
from svdd.samplers.smc import SMC
from svdd.samplers.svdd import SVDD
from svdd.samplers.twisted_smc import TwistedSMC
from svdd.samplers.unguided import Unguided
from svdd.samplers.zero_order_search import ZeroOrderSearch
from svdd.state.recorder import Recorder
from svdd.state.trajectory import Trajectory
from svdd.values.lookahead import Lookahead
from tests.analytic import GaussianDiffusion, Linear

STEPS = 6
SAMPLERS = {
    "unguided": Unguided(),
    "svdd": SVDD(3, choose_start=True),
    "svdd, two particles": SVDD(3, alpha=0.1, num_particles=2, guide_every=2),
    "beams": BeamSearch(2, 3),
    "best of 3": BestOfN(3),
    "smc": SMC(4, alpha=0.1, ess_threshold=1.0),
    "smc, all": SMC(4, alpha=0.1, ess_threshold=1.0, returns="all"),
    "twisted": TwistedSMC(3, alpha=0.5),
    "dps": DPS(0.1),
    "search": ZeroOrderSearch(3, 2),
    "refinement": Refinement(3, strength=0.5, sampler=SVDD(2)),
    "rollover": RolloverBudget(4, batch_size=2),
    "noise": NoiseOptimisation(3),
}


class WithLatents(Recorder):
    """Also keeps the latents of each particle."""

    def __init__(self, *args):
        super().__init__(*args)
        self.latents = []

    def add(self, state):
        self.latents += state.x.detach().clone()
        return super().add(state)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_particle_descends_from_its_parent_and_the_images_stay_the_same(name):
    """Steps have hardly any noise, so a particle lies where the flow takes its parent, far from that of others."""
    diffusion, prompts, seeds = GaussianDiffusion(STEPS, eta=0.003), ["0", "1", "0"], [4, 5, 6]
    model = GuidedDiffusion(Linear([1.0, -0.5]), diffusion, SAMPLERS[name])
    expected, recorder = model.draw(prompts, seeds), WithLatents(range(STEPS + 1))
    with torch.no_grad():
        final = model.draw(prompts, seeds, None, recorder)
    assert torch.equal(final.images, expected.images)
    counts = [each.name for each in fields(expected.context.ledger) if "seconds" not in each.name]
    for count in counts:
        assert getattr(final.context.ledger, count) == getattr(expected.context.ledger, count)
    found, x = Trajectory.of(recorder, final, seeds, final.scores(model.reward)), torch.stack(recorder.latents)
    step, image, parent, _ = found.particles
    shift = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    pairs = [k for k, above in enumerate(parent.tolist()) if above >= 0 and step[k] == step[above] + 1]
    assert len(pairs) >= STEPS * len(prompts)
    for k in pairs:
        above = x[parent[k], None]
        moved = diffusion.denoise(
            above, int(step[k]) - 1, shift[image[k], None], torch.zeros(1, dtype=torch.int64)
        ).mean
        error = (x[k] - moved[0]).abs().max()
        assert error < (0.1 if name in ("twisted", "dps") else 0.01)  # these shift the mean
        assert image[k] == image[parent[k]]
    starts = {k for k, above in enumerate(parent.tolist()) if above < 0}
    ends = found.ancestors[:, -1]
    assert torch.equal(x[ends], final.x)
    assert (found.ancestors >= 0).all()
    assert set(found.ancestors[:, 0].tolist()) <= starts
    if name != "refinement":
        assert torch.equal(parent[found.ancestors[:, 1:]], found.ancestors[:, :-1])
    assert torch.equal(step[found.ancestors], torch.arange(STEPS + 1).expand(len(ends), -1))
    assert torch.equal(image[ends], torch.arange(3).repeat_interleave(len(ends) // 3))


@pytest.mark.parametrize("name", ["svdd", "svdd, two particles", "beams", "smc", "rollover"])
def test_values_are_those_of_the_selections(name):
    model = GuidedDiffusion(Linear([1.0, -0.5]), GaussianDiffusion(STEPS), SAMPLERS[name])
    _, scores, found = model.sample(["0", "1"], trajectory=True)
    torch.testing.assert_close(found.values[:, -1], scores)
    for selection in found.selections:
        chosen = found.values[:, selection.i]
        kept = selection.values.gather(1, selection.kept)
        assert (chosen[:, None] == kept.float()).any(1).all()
    guided = {selection.i for selection in found.selections}
    assert found.values[:, sorted(set(range(STEPS)) - guided)].isnan().all()
    unguided = GuidedDiffusion(Linear([1.0, -0.5]), GaussianDiffusion(STEPS), Unguided())
    assert unguided.sample("0", trajectory=1)[2].values[0, :-1].isnan().all()


def test_frames_are_the_decoded_predictions_of_the_particles(sd15):
    model = GuidedDiffusion(Brightness(), StableDiffusion(sd15, 3, reproducible=True), SVDD(2), Lookahead(1))
    plain, _ = model.sample(["a", "b"], seed=7)
    seen = {}

    def look(i, state):
        seen[i] = state.images.clone()

    images, scores, found = model.sample(["a", "b"], seed=7, callback=look, trajectory=True)
    assert torch.equal(images, plain)
    assert (found.frames.shape, found.frames.dtype) == ((4, 2, 3, 64, 64), torch.uint8)
    assert found.steps == [0, 1, 2, 3]
    assert sorted(seen) == [1, 2, 3]
    for i, expected in seen.items():
        assert ((expected * 255).round() - found.frames[i].float()).abs().max() <= 1
    assert torch.equal(found.frames[-1], (images * 255).round().to(torch.uint8))
    assert (found.prompts, found.seeds) == (["a", "b"], [7, 8])
    assert torch.equal(found.scores, scores)
    assert len({frame.float().mean().item() for frame in found.frames[:, 0]}) == 4


def test_only_chosen_steps_are_kept_in_memory():
    model, recorder = GuidedDiffusion(Linear([1.0, 0.0]), GaussianDiffusion(STEPS), SMC(5, alpha=1.0)), Recorder([2, 6])
    model.draw(["0", "0"], [1, 2], None, recorder)
    assert len(recorder.x0) == 10
    assert set(recorder.particles.step[[*recorder.x0]].tolist()) == {2}


@pytest.mark.parametrize(
    ("wanted", "steps"), [(True, range(7)), (1, [6]), (3, [0, 3, 6]), (100, range(7)), ([4, 1, 4], [1, 4]), ([0], [0])]
)
def test_the_steps_of_the_frames(wanted, steps):
    model = GuidedDiffusion(Linear([1.0, 0.0]), GaussianDiffusion(STEPS), Unguided())
    *_, found = model.sample("0", trajectory=wanted)
    assert found.steps == list(steps)
    assert len(found.frames) == len(steps)


# ---- images per prompt, seeds, negative prompts


@pytest.fixture
def model(sd15):
    return GuidedDiffusion(Brightness(), StableDiffusion(sd15, 2), SVDD(2), images_per_prompt=2, seed=100)


def test_images_of_a_prompt_have_the_seeds_of_predict(model):
    rows = [Prompt(0, "a", "dull", None, {}), Prompt(1, "b", None, None, {})]
    expected = model.predict(rows)
    images, scores = model.sample(["a", "b"], seed=100, num_images=2, negative_prompts=["dull", None])
    assert torch.equal(images, expected.images)
    torch.testing.assert_close(scores, torch.tensor([row["rewards"]["Brightness"] for row in expected.rows]))
    own = model.sample(["a", "b"], seeds=[100, 102], num_images=2, negative_prompts=["dull", None])[0]
    each = model.sample(["a", "b"], seeds=[100, 101, 102, 103], num_images=2, negative_prompts=["dull", None])[0]
    assert torch.equal(own, images)
    assert torch.equal(each, images)
    same = model.sample(["a", "b"], seed=100, num_images=2, negative_prompts="dull")[0]
    assert torch.equal(same[:2], images[:2])
    assert not torch.equal(same[2:], images[2:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, r"prompts must be a text or a list of at least one, got \[\]"),
        ({"prompts": ["a", 3]}, "prompts must be a text or a list of at least one, got 3"),
        ({"num_images": 0}, "num_images must be >= 1, got 0"),
        ({"num_images": 2.0}, "num_images must be an integer"),
        ({"negative_prompts": ["x"]}, r"a list with a text or None for each \(2\), got \['x'\]"),
        ({"seeds": [1]}, r"seeds must be one integer per prompt \(2\), got \[1\]"),
        ({"seeds": [1, 2, 3], "num_images": 2}, r"per prompt \(2\) or per image \(4\), got \[1, 2, 3\]"),
        ({"seeds": [1, 2.5]}, "seeds must be one integer per prompt"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"trajectory": [0, 3]}, r"trajectory must be true, a number of frames, or steps from 0 to 2, got \[0, 3\]"),
        ({"trajectory": 0}, "trajectory must be true, a number of frames"),
        ({"trajectory": "all"}, "trajectory must be true, a number of frames"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
    model = GuidedDiffusion(Linear([1.0, 0.0]), GaussianDiffusion(2), Unguided())
    with pytest.raises(ValueError, match=message):
        model.sample(**{"prompts": ["a", "b"]} | options)


# ---- callbacks


def test_a_callback_sees_each_step_once_and_may_end_the_call():
    model, calls = GuidedDiffusion(Linear([1.0, 0.0]), GaussianDiffusion(STEPS), SMC(3, alpha=1.0)), []
    model.sample(["0", "0"], callback=lambda i, state: calls.append((i, state.i, len(state.x))))
    assert calls == [(i, i, 6) for i in range(1, STEPS)] + [(STEPS, STEPS, 2)]
    model.sampler = ZeroOrderSearch(2, 2)
    calls.clear()
    model.sample("0", callback=lambda i, state: calls.append(i))
    assert calls == [*range(1, STEPS)] * 3 + [STEPS]

    def stop(i, state):
        if i == 3:
            raise KeyboardInterrupt("seen enough")

    with pytest.raises(KeyboardInterrupt, match="seen enough"):
        model.sample("0", callback=stop)


# ---- plots and files


@pytest.fixture(scope="module")
def trajectory(sd15):
    model = GuidedDiffusion(CLIPScore(), StableDiffusion(sd15, 4), SMC(2, returns="all"))
    return model.sample("long " * 9, seed=2**63, trajectory=[0, 2, 4])[2]


@pytest.mark.parametrize("sampler", [BestOfN(2), ZeroOrderSearch(1, 1), Unguided()], ids=["best", "search", "none"])
def test_a_plot_shows_frames_and_values(sampler):
    model = GuidedDiffusion(Linear([1.0, 0.0]), GaussianDiffusion(12), sampler)
    found = model.sample(["0", "1"], trajectory=True)[2]
    figure = found.plot([1], num_frames=5)
    frames = [axes for axes in figure.axes if axes.images]
    assert [axes.get_xlabel() for axes in frames] == [f"step {i}" for i in (0, 3, 6, 9, 12)]
    assert np.array_equal(frames[-1].images[0].get_array(), found.frames[-1, 1].permute(1, 2, 0))
    assert len(figure.axes) == 5 + bool(found.selections)
    assert len(found.plot(num_frames=1).axes) == 2 * (1 + bool(found.selections))


def test_a_trajectory_is_saved_and_shown(trajectory, tmp_path, monkeypatch):
    assert repr(trajectory) == "Trajectory(2 images, 3 frames at steps 0 to 4 of 4, 10 particles)"
    assert Image.open(io.BytesIO(trajectory._repr_png_())).width > 500
    trajectory.save(tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().count("<image") == 6
    trajectory.save(str(tmp_path / "all.npz"))
    with np.load(tmp_path / "all.npz") as arrays:
        assert np.array_equal(arrays["frames"], trajectory.frames)
        assert arrays["seeds"].tolist() == [2**63] * 2
        assert np.array_equal(arrays["particle_parent"], trajectory.particles.parent)
        assert arrays["selection_0_values"].shape == (1, 2)
    with pytest.raises(UserError, match=r"saved as \.pdf, \.png, \.svg or \.npz, got 'x\.gif'"):
        trajectory.save(tmp_path / "x.gif")
    with pytest.raises(UserError, match=r"images must be some of 0 \.\. 1, got \[6\]"):
        trajectory.plot([6])
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"a plot needs matplotlib: pip install 'svdd\[plot\]'"):
        trajectory.plot()
    assert trajectory._repr_png_() is None


# ---- functions as rewards


def redness(images, prompts):
    return images[:, 0].mean((1, 2))


class Warmth:
    def __call__(self, images, prompts):
        return (images[:, 0] - images[:, 2]).mean((1, 2))


def test_a_function_is_a_reward(sd15):
    diffusion, scaled = StableDiffusion(sd15, 2), partial(lambda k, images, prompts: k * redness(images, prompts), 0.5)
    model = GuidedDiffusion(lambda images, prompts: -redness(images, prompts), diffusion, SVDD(3), None, [redness])
    assert list(model.rewards) == ["lambda", "redness"]
    with pytest.raises(UserError, match=r"distinct names, got lambda, lambda; .* give a function another name"):
        GuidedDiffusion(lambda images, prompts: 0, diffusion, eval_rewards=[scaled])
    images, scores = model.sample(["a", "b"], seed=1)
    assert torch.equal(scores, -redness(images, []))
    expected = GuidedDiffusion(WeightedSum([redness], [-1.0]), diffusion, SVDD(3)).sample(["a", "b"], seed=1)[0]
    assert torch.equal(images, expected)
    assert not torch.equal(images, GuidedDiffusion(redness, diffusion, SVDD(3)).sample(["a", "b"], seed=1)[0])
    assert GuidedDiffusion(Warmth(), diffusion).reward.name == "Warmth"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (CLIPScore, r"reward is the class CLIPScore; .*: call the class, CLIPScore\(\)"),
        ("CLIPScore", r"reward is 'CLIPScore' \(str\); expected a reward.*FunctionReward\(\"CLIPScore\"\)"),
        ([CLIPScore()], r"reward is \[.* \(list\); .*For several at once: WeightedSum"),
        (None, r"reward is None \(NoneType\); expected a reward, such as CLIPScore\(\), or a function"),
    ],
)
def test_what_is_no_reward_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        GuidedDiffusion(given, GaussianDiffusion(2))
    with pytest.raises(UserError, match=message.replace("reward is", r"eval_rewards\[1\] is", 1)):
        GuidedDiffusion(Brightness(), GaussianDiffusion(2), eval_rewards=[redness, given])


def test_rewards_take_functions_as_parts():
    images = torch.rand(3, 3, 4, 4)
    red = redness(images, [])
    found = WeightedSum([redness, Threshold(redness, at_most=0.1), ZScored(redness, 0.5, 2.0)], [1.0, 2.0, 4.0])
    expected = red - 2 * (red - 0.1).clamp(min=0) + 4 * (red - 0.5) / 2
    torch.testing.assert_close(found.score(images, [""] * 3), expected)
    assert not math.isfinite(found.range[0])
