"""Every model family on a CUDA device draws what it draws on the CPU, in each precision and with offload."""

import numpy as np
import pytest
import torch

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
