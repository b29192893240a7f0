"""Every model family, most samplers, and previews draw on a CUDA device what they draw on the CPU."""

import numpy as np
import pytest
import torch

from svdd.diffusion.auto import AutoDiffusion
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards.clip import CLIPScore
from svdd.samplers.cross_entropy_search import CrossEntropySearch
from svdd.samplers.dps import DPS
from svdd.samplers.evolutionary_search import EvolutionarySearch
from svdd.samplers.noise_optimisation import NoiseOptimisation
from svdd.samplers.refinement import Refinement
from svdd.samplers.rollover_budget import RolloverBudget
from svdd.samplers.smc import SMC
from svdd.samplers.svdd import SVDD
from svdd.samplers.twisted_smc import TwistedSMC
from svdd.samplers.zero_order_search import ZeroOrderSearch
from svdd.values.posterior_mean import PosteriorMean
from svdd.values.screened import Screened
from tests.test_samplers import label
from tests.tiny_families import FAMILIES
from tests.tiny_families.drawing import build, draw

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_gpu_draws_the_same_pictures(family, tmp_path):
    folder, step = family.save(tmp_path), family.steps[-1]
    expected = draw(build(family, folder, **step.ours), "guided", 3)

    def difference(dtype: torch.dtype, offload: str) -> float:
        diffusion = build(family, folder, **step.ours, offload=offload).to("cuda", dtype)
        return float(np.abs(draw(diffusion, "guided", 3) - expected).mean())

    for offload in ("none", "text_encoders", "model"):
        assert difference(torch.float32, offload) < 1e-5
    for dtype in (torch.bfloat16, torch.float16):
        assert difference(dtype, "none") < 0.05


CASES = {
    "feature_depth": lambda: (SVDD(3), PosteriorMean(feature_depth=2)),
    "reuse_guidance": lambda: (SVDD(3), PosteriorMean(reuse_guidance=True)),
    "both and tiny": lambda: (SVDD(3), PosteriorMean("tiny", reuse_guidance=True, feature_depth=1)),
    "Screened": lambda: (SVDD(4), Screened(PosteriorMean("tiny", guidance_scale=1.0), PosteriorMean(), 2)),
    "auto": lambda: (SVDD(3, "auto", 2, choose_start=True), PosteriorMean()),
    **{
        label(sampler): lambda sampler=sampler: (sampler, PosteriorMean())
        for sampler in (
            SVDD({0.5: 3, 1.0: 2}),
            SMC(4),
            TwistedSMC(3),
            DPS(),
            RolloverBudget(3, 2),
            ZeroOrderSearch(2, 2),
            EvolutionarySearch(2, 2, 2, frequencies=0.5),
            CrossEntropySearch(2, 2, 3),
            NoiseOptimisation(3),
            Refinement(1, sampler=SVDD(2)),
        )
    },
}


def guided(case: str, device: str, **options) -> tuple[np.ndarray, list[list[float]]]:
    """Returns two images of the embedded model, and the values that were chosen on the way."""
    sampler, value = CASES[case]()
    model = GuidedDiffusion(CLIPScore(), AutoDiffusion("emoji", 4, guidance_scale=3.0, **options), sampler, value)
    final = model.to(device).draw(["red apple", "panda"], [3, 1])
    return final.images.detach().cpu().numpy(), [row["value_chosen"] for row in final.context.trace.per_image()]


@pytest.mark.parametrize("case", CASES)
def test_a_gpu_guides_to_the_same_pictures(case):
    expected, chosen = guided(case, "cpu")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found, also = guided(case, "cuda")
    assert float(np.abs(found - expected).mean()) < 1e-3
    for one, other in zip(also, chosen, strict=True):
        assert one == pytest.approx(other, abs=1e-3)
