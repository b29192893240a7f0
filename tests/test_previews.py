"""Cheaper previews and lookaheads: exact costs, and exact agreement with the computations they replace."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, EulerDiscreteScheduler

from svdd import UserError
from svdd.diffusion.auto import AutoDiffusion, from_pipeline
from svdd.diffusion.kernels import DIFFUSION_KERNELS
from svdd.diffusion.preview import Preview
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards.clip import CLIPScore
from svdd.rewards.jpeg import Compressibility
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.budget import count
from svdd.samplers.dps import DPS
from svdd.samplers.svdd import SVDD
from svdd.samplers.unguided import Unguided
from svdd.state.start import Start
from svdd.state.state import State
from svdd.values.lookahead import Lookahead
from svdd.values.posterior_mean import PosteriorMean
from tests.analytic import GaussianDiffusion, Linear, bound, run

B = [0.6, -0.8]
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@pytest.fixture(scope="module")
def tiny_decoder(tmp_path_factory) -> str:
    """A random AutoencoderTiny for four latent channels."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    AutoencoderTiny(
        encoder_block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ).save_pretrained(folder)
    return str(folder)


# ---- steps without noise


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_the_flow_is_the_deterministic_ddim_step(steps):
    kernel, scheduler = (
        DIFFUSION_KERNELS["ddim"]({**NOISE, "clip_sample": False}, steps),
        DDIMScheduler(**NOISE, clip_sample=False),
    )
    scheduler.set_timesteps(steps)
    x, output = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).chunk(2, 0)
    for i, t in enumerate(scheduler.timesteps):
        expected = scheduler.step(output, t, x, eta=0.0).prev_sample
        torch.testing.assert_close(kernel.flow(x, kernel.predict(x, output, i).x0, i), expected, rtol=1e-4, atol=1e-5)
    assert steps == 1 or kernel.std(0) > 0  # the chain has noise, which the flow omits


def test_the_flow_of_ancestral_steps_is_an_euler_step():
    kernel, scheduler = DIFFUSION_KERNELS["euler_ancestral"](NOISE, 6), EulerDiscreteScheduler(**NOISE)
    scheduler.set_timesteps(6)
    generator = torch.Generator().manual_seed(0)
    output, x = torch.randn(1, 3, 4, 4, generator=generator), 10 * torch.randn(1, 3, 4, 4, generator=generator)
    for i, t in enumerate(scheduler.timesteps):
        expected = scheduler.step(output, t, x).prev_sample
        torch.testing.assert_close(kernel.flow(x, kernel.predict(x, output, i).x0, i), expected, rtol=1e-4, atol=1e-4)


def test_the_flow_to_the_end_is_the_chain_without_noise():
    diffusion = GaussianDiffusion(5, eta=0.0)
    state, end = State.start(diffusion, [""] * 3, range(3)), run(diffusion, Unguided(), None, 3)
    while not state.done:
        state = state.flow()
    torch.testing.assert_close(state.x, end.x)
    assert state.prompts == end.prompts


# ---- lookahead


def test_lookahead_of_no_step_is_the_posterior_mean_bit_for_bit():
    diffusion = GaussianDiffusion(5)
    first, second = (run(diffusion, SVDD(4, 0.3), bound(v, Linear(B)), 4) for v in (PosteriorMean(), Lookahead(0)))
    assert torch.equal(first.x, second.x)
    assert first.context.ledger.denoiser_rows == second.context.ledger.denoiser_rows


@pytest.mark.parametrize("steps", [5, 6, 100])
def test_lookahead_to_the_end_predicts_a_chain_without_noise(steps):
    diffusion = GaussianDiffusion(6, eta=0.0)
    state, value = State.start(diffusion, [""] * 4, range(4)), bound(Lookahead(steps), Linear(B))
    end = run(diffusion, Unguided(), value, 4).scores(Linear(B))
    while not state.done:
        if state.i > 0 or steps > 5:
            torch.testing.assert_close(value(state), end)
        state = state.propose()
    torch.testing.assert_close(value(state), end)


@pytest.mark.parametrize("k", [0, 1, 3, 50])
@pytest.mark.parametrize("candidates", [1, 4])
def test_the_rows_of_lookahead(k, candidates):
    steps, diffusion = 6, GaussianDiffusion(6)
    final = run(diffusion, SVDD(candidates), bound(Lookahead(k), Linear(B)), 3)
    ahead = sum(1 + min(k, steps - 1 - i) for i in range(1, steps))
    expected = steps if candidates == 1 else 1 + candidates * ahead
    assert final.context.ledger.denoiser_rows == sum(diffusion.denoised_rows) == 3 * expected
    assert final.context.ledger.denoiser_rows <= 3 * (1 + candidates * (steps - 1)) * Lookahead(k).most_rows


def test_lookahead_does_not_change_the_noise_or_the_state():
    diffusion = GaussianDiffusion(5)
    state = State.start(diffusion, [""] * 2, range(2)).propose()
    before = [generator.get_state() for generator in state.context.generators]
    bound(Lookahead(3), Linear(B))(state)
    assert all(torch.equal(a.get_state(), b) for a, b in zip(state.context.generators, before, strict=True))
    rows = len(diffusion.denoised_rows)
    state.propose()
    assert len(diffusion.denoised_rows) == rows  # its own prediction was kept


def test_a_gradient_flows_through_lookahead():
    diffusion, value = GaussianDiffusion(6), bound(Lookahead(2), Linear(B))
    state = State.start(diffusion, [""], [0]).propose()
    _, slope = state.gradient(value)
    ahead = state.flow().flow()
    shifted = type(state)(state.x + 1e-3 * slope, state.i, state.row, state.origin, state.context)
    rise = float(Linear(B)(shifted.flow().flow().images, []) - Linear(B)(ahead.images, []))
    assert rise == pytest.approx(1e-3 * float(slope.square().sum()), rel=1e-3)
    assert float(run(diffusion, DPS(1.0), value, 50).scores(Linear(B)).mean()) > float(
        run(diffusion, Unguided(), value, 50).scores(Linear(B)).mean()
    )


def test_a_budget_counts_the_longest_lookahead():
    model = GuidedDiffusion(Linear(B), GaussianDiffusion(8), SVDD(), Lookahead(2), budget=100)
    spent = model.draw([""] * 2, [0, 1]).context.ledger.denoiser_rows / 2
    assert spent <= 100
    assert model.sampler.num_candidates == (100 // 3 - 1) // 7


def test_impossible_lookahead_is_refused():
    with pytest.raises(ValueError, match="steps must be >= 0, got -1"):
        Lookahead(-1)

    class Odd(GaussianDiffusion):
        flow = GaussianDiffusion.__mro__[2].flow

    with pytest.raises(UserError, match="Odd has no deterministic step, which Lookahead needs"):
        run(Odd(3), SVDD(2), bound(Lookahead(1), Linear(B)), 1)


# ---- previews without guidance


@pytest.mark.parametrize("candidates", [1, 4])
def test_a_preview_without_guidance_is_cheaper_and_only_kept_rows_cost_full_guidance(sd15, candidates):
    steps, m = 4, candidates
    model = GuidedDiffusion(Compressibility(), StableDiffusion(sd15, steps), SVDD(m), PosteriorMean(guidance_scale=1.0))
    ledger = model.draw(["panda", "car"], [0, 1]).context.ledger
    if m == 1:
        assert (ledger.denoiser_rows, ledger.network_rows) == (2 * steps, 4 * steps)
    else:
        assert ledger.denoiser_rows == 2 * (1 + (m + 1) * (steps - 1))
        assert ledger.network_rows == 2 * (2 + (m + 2) * (steps - 1))


def test_a_preview_is_the_x0_of_a_model_with_that_scale(sd15):
    own, other = StableDiffusion(sd15, 4, guidance_scale=7.5), StableDiffusion(sd15, 4, guidance_scale=1.0)
    with torch.no_grad():
        states = [State.start(diffusion, ["panda"], [0]) for diffusion in (own, other)]
        torch.testing.assert_close(states[0].preview(Preview(1.0)), states[1].x0)
        assert not torch.allclose(states[0].preview(Preview(1.0)), states[0].x0)
        torch.testing.assert_close(states[0].preview(Preview(7.5)), states[0].x0)
    with pytest.raises(UserError, match=r"needs a model with guidance; its own scale is 1.0"):
        PosteriorMean(guidance_scale=3.0).bind(Compressibility(), other)
    with pytest.raises(UserError, match="GaussianDiffusion computes no cheaper previews; leave out"):
        run(GaussianDiffusion(3), SVDD(2), bound(PosteriorMean(guidance_scale=1.0), Linear(B)), 1)


def test_the_last_selection_uses_the_reward_for_any_preview(sd15, tiny_decoder):
    model = GuidedDiffusion(
        Compressibility(), StableDiffusion(sd15, 3), SVDD(4), PosteriorMean(tiny_decoder, guidance_scale=1.0)
    )
    final = model.draw(["panda"], [0])
    trace = final.context.trace.per_image()[0]
    assert trace["value_chosen"][-1] == trace["value_max"][-1]
    assert trace["value_chosen"][-1] == pytest.approx(float(Compressibility().score(final.images, [""])), rel=1e-6)


# ---- the smaller decoder


def test_the_smaller_decoder_is_the_pipeline_s_own(sd15, tiny_decoder):
    diffusion = StableDiffusion(sd15, 2)
    latents = torch.randn(2, *diffusion.latent_shape, generator=torch.Generator().manual_seed(0))
    decoder = diffusion.load_decoder(tiny_decoder)
    with torch.no_grad():
        expected = AutoencoderTiny.from_pretrained(tiny_decoder).decode(latents).sample * 0.5 + 0.5
        torch.testing.assert_close(decoder(latents), expected.clamp(0, 1))


@torch.no_grad()
def test_weights_are_ordered_for_the_precision_unless_parity_is_asked_for(sd15, tiny_decoder):
    """Two models that share nothing keep their own order, whatever moves or converts them."""

    def order(model: StableDiffusion, decoder: torch.nn.Module) -> list[bool]:
        layers = (model.unet.conv_in, model.vae.decoder.conv_in, decoder.decoder.layers[0])
        return [not layer.weight.is_contiguous() for layer in layers]

    pairs = [(model := StableDiffusion(sd15, 2, parity=parity), model.load_decoder(tiny_decoder)) for parity in (0, 1)]
    for dtype, expected in (
        (torch.float32, [True] * 3),
        (torch.bfloat16, [False, True, True]),
        (torch.float64, [True] * 3),
    ):
        for part in (part for pair in pairs for part in pair):
            part.to(dtype)
        assert [order(*pair) for pair in pairs] == [expected, [False] * 3]
    (fast, decoder), (exact, plain) = pairs
    assert fast.fingerprints() == exact.fingerprints()
    assert fast.identity == exact.identity
    x0 = torch.randn(2, *fast.latent_shape, dtype=torch.float64)
    assert torch.allclose(fast.decode(x0), exact.decode(x0), atol=1e-6)
    assert torch.allclose(decoder(x0), plain(x0), atol=1e-6)
    borrowed = from_pipeline(StableDiffusion(sd15, 2, parity=True).pipe, num_inference_steps=2)
    assert order(borrowed.to(torch.float32), borrowed.load_decoder(tiny_decoder)) == [False, False, True]


def test_only_previews_use_the_smaller_decoder(sd15, tiny_decoder):
    class Seen(Compressibility):
        def forward(self, images, prompts):
            self.images = [*getattr(self, "images", []), images]
            return super().forward(images, prompts)

    reward = Seen()
    model = GuidedDiffusion(reward, StableDiffusion(sd15, 3), SVDD(2), PosteriorMean(tiny_decoder))
    final = model.draw(["panda"], [0])
    plain = GuidedDiffusion(Compressibility(), StableDiffusion(sd15, 3), SVDD(2)).diffusion
    with torch.no_grad():
        torch.testing.assert_close(final.images, plain.decode(final.x))
    assert final.context.ledger.decoded_images == 3 * 2
    assert final.context.ledger.denoiser_rows == 1 + 2 * 2
    assert any(name.startswith("value.preview_decoder.") for name, _ in model.named_parameters())


def test_a_gradient_flows_through_the_smaller_decoder(sd15, tiny_clip, tiny_decoder):
    model = GuidedDiffusion(CLIPScore(tiny_clip), StableDiffusion(sd15, 3), DPS(50.0), Lookahead(1, tiny_decoder))
    images, _ = model.sample(["panda"])
    plain, _ = GuidedDiffusion(CLIPScore(tiny_clip), StableDiffusion(sd15, 3), Unguided()).sample(["panda"])
    assert images.isfinite().all()
    assert not torch.equal(images, plain)


def test_a_decoder_that_does_not_fit_is_refused(sd15, tiny_decoder, tmp_path):
    diffusion = StableDiffusion(sd15, 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no config.json; expected `tiny`, a folder written by"):
        diffusion.load_decoder(str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"decoder=.* cannot be loaded"):
        diffusion.load_decoder("nobody/has-this")
    with pytest.raises(UserError, match="is for latents of 4 channels; this model has 16"):
        StableDiffusion("emoji", 2).load_decoder(tiny_decoder)
    with pytest.raises(UserError, match="GaussianDiffusion has no other decoder than its own, got decoder='tiny'"):
        GuidedDiffusion(Linear(B), GaussianDiffusion(2), value=PosteriorMean("tiny"))


@pytest.mark.skipif(not Path("svdd/assets/emoji-tiny").is_dir(), reason="not shipped yet")
def test_the_embedded_model_has_a_small_decoder_that_draws_the_same():
    diffusion = StableDiffusion("emoji", 6, guidance_scale=3.0)
    with torch.no_grad():
        end = run(diffusion, Unguided(), None, prompts=["apple", "penguin on a blue background", "rocket"])
        big, small = diffusion.decode(end.x), diffusion.load_decoder("tiny")(end.x)
    assert -10 * math.log10(float((big - small).square().mean())) > 22


# ---- previews that reuse the parent's evaluation


PREVIEWS = {
    "guidance": Preview(reuse_guidance=True),
    "features": Preview(feature_depth=1),
    "both": Preview(reuse_guidance=True, feature_depth=2),
    "unguided features": Preview(1.0, feature_depth=1),
}


@pytest.fixture(scope="module")
def emoji() -> dict[str, AutoDiffusion]:
    """A UNet whose halves are one batch, and a transformer."""
    return {name: AutoDiffusion(name, 4, guidance_scale=3.0, reproducible=True) for name in ("emoji", "emoji-flow")}


@pytest.mark.parametrize("kind", PREVIEWS)
@pytest.mark.parametrize("model", ["emoji", "emoji-flow"])
@torch.no_grad()
def test_a_preview_that_reuses_all_of_its_parent_is_exact_where_nothing_changed(emoji, model, kind):
    diffusion, preview, i = emoji[model], PREVIEWS[kind], 2
    start = Start(diffusion, ["apple", "blue car"], [0, 1])
    x, row = start(3).x, torch.tensor([0, 0, 0, 1, 1, 1])
    conditioning = start.context.conditioning
    found = diffusion.record(x, i, conditioning, row, preview)
    exact = diffusion.denoise(x, i, conditioning, row)
    assert torch.equal(found.pop("x0"), exact.x0)
    assert torch.equal(found.pop("mean"), exact.mean)
    assert all(len(part) == 6 for part in found.values())
    assert any(name.startswith("unconditional") for name in found) == (preview == Preview(feature_depth=1))
    order = torch.tensor([4, 0, 0, 5])  # rows in another order, one of them twice
    reused = {name: part[order] for name, part in found.items()}
    same = diffusion.preview(x[order], i, conditioning, row[order], preview, reused)
    if preview.guidance_scale is None:
        torch.testing.assert_close(same, exact.x0[order], rtol=1e-4, atol=1e-4)
    else:
        unguided = diffusion.preview(x[order], i, conditioning, row[order], Preview(preview.guidance_scale), {})
        torch.testing.assert_close(same, unguided, rtol=1e-4, atol=1e-4)
    conditional = Preview(guidance_scale=1.0)  # takes nothing of the parent
    own, others = (diffusion.preview(x, i, conditioning, row, conditional, parts) for parts in ({}, found))
    assert torch.equal(own, others)
    moved = diffusion.preview(x[order] + 0.3, i, conditioning, row[order], preview, reused)
    assert (moved - same).flatten(1).abs().amax(1).min() > 1e-2
    first = {name: part[:1] for name, part in reused.items()}
    alone = diffusion.preview(x[order[:1]], i, conditioning, row[order[:1]], preview, first)
    torch.testing.assert_close(alone, same[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", PREVIEWS)
def test_the_cost_of_a_preview_is_its_share_and_the_winner_is_evaluated_in_full(emoji, kind):
    diffusion, preview, m, steps = emoji["emoji"], PREVIEWS[kind], 5, 4
    value = PosteriorMean("tiny", preview.guidance_scale, preview.reuse_guidance, preview.feature_depth)
    model = GuidedDiffusion(Compressibility(), diffusion, SVDD(m), value)
    final = model.draw(["apple", "blue car"], [0, 1])
    share = diffusion.preview_rows(preview, 1)
    halves = 2 if preview == Preview(feature_depth=1) else 1
    assert share == halves or 0 < share < halves
    ledger = final.context.ledger
    assert ledger.denoiser_rows == 2 * (1 + (m + 1) * (steps - 1))
    assert ledger.network_rows == pytest.approx(2 * (2 * steps + m * share * (steps - 1)))
    assert count(model.sampler, diffusion, value).rows == pytest.approx(steps + m * share / 2 * (steps - 1))
    alone = model.draw(["blue car"], [1])
    assert torch.equal(alone.x, final.x[1:])  # in the reproducible mode


def test_chains_without_values_keep_nothing_for_previews(emoji):
    model = GuidedDiffusion(Compressibility(), emoji["emoji"], BestOfN(2), PosteriorMean(feature_depth=1))
    final = model.draw(["apple"], [0])
    assert final._parents is None
    assert torch.equal(final.x, GuidedDiffusion(Compressibility(), emoji["emoji"], BestOfN(2)).draw(["apple"], [0]).x)


def test_a_budget_counts_a_preview_by_its_share(emoji):
    cheap = PosteriorMean(reuse_guidance=True)
    plain, more = (
        GuidedDiffusion(Compressibility(), emoji["emoji"], SVDD(), value, budget=40) for value in (None, cheap)
    )
    assert (plain.sampler.num_candidates, more.sampler.num_candidates) == (13, 24)  # 1 + 3 M and 4 + 3 M / 2
    assert more.chosen == {"num_candidates": 24, "denoiser_rows": 76, "equivalent_rows": 40}


def test_starts_have_no_parent_and_are_evaluated_in_full(emoji):
    value, exact = PosteriorMean(reuse_guidance=True), PosteriorMean()
    images = []
    for each in (value, exact):
        model = GuidedDiffusion(Compressibility(), emoji["emoji"], SVDD(3, choose_start=True, guide_stop=0.25), each)
        images.append(model.draw(["apple"], [3]).context.trace.selections[0].values)
    torch.testing.assert_close(*images)


def test_impossible_previews_are_refused_when_they_are_bound(emoji):
    unguided = AutoDiffusion("emoji", 4, guidance_scale=1.0)
    for value, diffusion, message in [
        (PosteriorMean(reuse_guidance=True), unguided, "computes no unconditional half, and there is nothing to save"),
        (PosteriorMean(feature_depth=9), emoji["emoji"], "feature_depth must lie in 1 .. 3"),
        (PosteriorMean(feature_depth=4), emoji["emoji-flow"], "feature_depth must lie in 1 .. 3"),
    ]:
        with pytest.raises(UserError, match=message):
            value.bind(Compressibility(), diffusion)
    for arguments, message in [
        ({"feature_depth": 0}, "feature_depth must be >= 1"),
        ({"guidance_scale": 1.0, "reuse_guidance": True}, "leave out guidance_scale=1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            PosteriorMean(**arguments)
    value = PosteriorMean(feature_depth=1)
    value.bind(CLIPScore(), emoji["emoji"])
    with pytest.raises(UserError, match="value PosteriorMean with feature_depth=1 is not differentiable"):
        DPS().check(emoji["emoji"], value)
