"""NaN and infinity end where they arise: no reward scores them, and no picture shows them."""

import pytest
import torch

from svdd import NotFinite, RewardError
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards.brightness import Brightness
from svdd.rewards.function import FunctionReward
from svdd.rewards.jpeg import Compressibility
from svdd.runs.rows import Prompt
from svdd.samplers.dps import DPS
from svdd.samplers.noise_optimisation import NoiseOptimisation
from svdd.samplers.svdd import SVDD
from svdd.samplers.unguided import Unguided
from svdd.state.state import State
from svdd.values.feature import FeatureValue
from svdd.values.lookahead import Lookahead
from svdd.values.posterior_mean import PosteriorMean
from svdd.values.training.rollouts import draw_rollouts

PROMPTS = ["red apple", "panda"]


@pytest.fixture(scope="module")
def overflowing() -> StableDiffusion:
    """The embedded model in float16, with a decoder that overflows for one of the prompts."""
    diffusion = StableDiffusion("emoji", 3, 3.0)
    for parameter in diffusion.vae.decoder.conv_in.parameters():
        parameter.data *= 650  # the panda overflows from 500 on, the apple above 800
    return diffusion.half()


def test_a_decoder_that_overflows_is_named_with_step_prompt_and_remedy(overflowing):
    """Compressibility took NaN for black, whose file is the smallest, and preferred it."""
    model = GuidedDiffusion(Compressibility(), overflowing, SVDD(num_candidates=2))
    message = (
        r"the decoder returned NaN or infinity for .* at step \d of 3, first for the prompt .*; float16 overflows "
    )
    with pytest.raises(NotFinite, match=message + ".*--trainer.precision to bf16-true or 32-true"):
        model.sample(PROMPTS, seeds=[0, 2])


def test_skipped_prompts_are_those_whose_pictures_are_not_finite(overflowing):
    model = GuidedDiffusion(Compressibility(), overflowing, Unguided(), on_error="skip")
    batch = [Prompt(k, text, None, 2 * k, {}) for k, text in enumerate(PROMPTS)]
    prediction = model.predict_step(batch, 0)
    assert [row["prompt"] for row in prediction.rows] == ["red apple"]
    assert prediction.images.isfinite().all()
    (failure,) = prediction.failures
    assert failure["prompt"] == "panda"
    assert failure["error"].startswith("NotFinite: the decoder returned NaN or infinity for 1 of 1 rows at step 3 of 3")


def spoil(module, number=float("inf")) -> None:
    next(reversed([*module.parameters()])).data[0] = number


@pytest.mark.parametrize(
    ("part", "value", "sampler", "message"),
    [
        ("unet", PosteriorMean(), Unguided(), "the denoiser returned .* at step 0 of 2, .*; check the model's weights"),
        ("unet", PosteriorMean(), DPS(), "the denoiser returned .* at step 0 of 2"),
        (
            "text_encoder.final_layer_norm",
            PosteriorMean(),
            Unguided(),
            "the text encoder returned .* 2 of 2 rows, first",
        ),
        ("vae.decoder", PosteriorMean(), Unguided(), "the decoder returned .* at step 2 of 2"),
        ("vae.decoder", Lookahead(1), SVDD(2), "the decoder returned .* at step 2 of 2"),
        ("vae.decoder", PosteriorMean(), SVDD(2), "the decoder returned .* 4 of 4 rows at step 1 of 2"),
        ("preview", PosteriorMean("tiny"), SVDD(2), "the preview decoder returned .* 4 of 4 rows at step 1 of 2"),
    ],
)
def test_the_part_and_the_step_are_named(part, value, sampler, message):
    model = GuidedDiffusion(Brightness(), StableDiffusion("emoji", 2, 1.0), sampler, value)
    spoil(value.preview_decoder if part == "preview" else model.diffusion.get_submodule(part))
    with pytest.raises(NotFinite, match=message):
        model.sample(PROMPTS)


def root(images, prompts):
    return (images.flatten(1).sum(1) * 0).sqrt()  # finite, with an infinite slope


@pytest.mark.parametrize(
    ("sampler", "part"),
    [(DPS(), "value"), (DPS(through_denoiser=False), "value"), (NoiseOptimisation(2), "reward")],
)
def test_a_gradient_that_is_not_finite_is_refused(sd15, sampler, part):
    model = GuidedDiffusion(FunctionReward(root, differentiable=True), StableDiffusion(sd15, 2), sampler)
    message = f"the {part}'s gradient returned NaN or infinity for 2 of 2 rows at step 0 of 2, first for .*'red apple'"
    with pytest.raises(NotFinite, match=message):
        model.sample(PROMPTS)


@torch.no_grad()
def test_latents_that_a_sampler_made_infinite_are_not_the_networks_fault(sd15):
    start = State.start(StableDiffusion(sd15, 1), PROMPTS, [0, 1])
    shift = torch.tensor([0, torch.inf]).view(2, 1, 1, 1)
    with pytest.raises(NotFinite, match=r"the sampler returned .* 1 of 2 rows at step 1 of 1, first for .*'panda'"):
        _ = start.propose(mean=start.prediction.mean + shift).images


@torch.no_grad()
def test_rollouts_and_features_are_finite(sd15):
    """What `svdd fit` and `svdd calibrate` draw, and what a value reads from a decoded latent."""
    diffusion, value = StableDiffusion(sd15, 2), FeatureValue()
    value.bind(Brightness(), diffusion)
    spoil(diffusion.vae.decoder)
    prompts = [Prompt(0, "red apple", None, None, {})]
    _, end = draw_rollouts(diffusion, prompts, [0], [1], lambda state: state.x)
    with pytest.raises(NotFinite, match="the decoder returned"):
        end.scores(value.reward)
    with pytest.raises(NotFinite, match="the decoder returned NaN or infinity for 1 of 1 rows; check"):
        value.predict(end.x, torch.tensor([1]), torch.zeros(1, value.network[0].in_features))
    spoil(diffusion.unet, torch.nan)
    with pytest.raises(NotFinite, match=r"the denoiser returned .* at step 0 of 2"):
        draw_rollouts(diffusion, prompts, [0], [1], lambda state: state.x)


def test_a_reward_refuses_pictures_that_are_not_finite():
    images = torch.rand(2, 3, 8, 8)
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(RewardError, match=r"Compressibility received NaN or infinity in 1 of 2 images.*'panda'"):
        Compressibility().score(images, PROMPTS)
