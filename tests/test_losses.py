"""The soft loss: its minimiser down to low temperatures, and the bound on its gradient."""

import math

import pytest
import torch
from torch.func import grad, vmap

from svdd.values.losses import SoftLoss


@pytest.fixture(scope="module")
def normal():
    """100,000 quantiles of the standard normal law, shuffled, float64."""
    quantiles = torch.special.ndtri((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
    return quantiles[torch.randperm(100_000, generator=torch.Generator().manual_seed(0))]


def minimiser(alpha, targets, batch_size):
    """Returns the prediction where the gradient, averaged over batches, is zero."""
    loss = SoftLoss(alpha)
    batches = targets[: len(targets) // batch_size * batch_size].view(-1, batch_size)
    slope = vmap(grad(lambda v, batch: loss(v.expand_as(batch), batch, 1.0)), (None, 0))
    low, high = 0.0, 4.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        rising = slope(torch.tensor(middle, dtype=torch.float64), batches).mean() < 0
        low, high = (middle, high) if rising else (low, middle)
    return low


@pytest.mark.parametrize(
    ("ratio", "whole", "in_batches"),
    [(1, 1.0, 1.0), (2, 1.0, 1.0), (3, 1.0, 0.96), (4, 0.97, 0.88)],
    ids=["alpha = s", "alpha = s / 2", "alpha = s / 3", "alpha = s / 4"],
)
def test_normal_targets_have_their_soft_value_down_to_low_temperatures(normal, ratio, whole, in_batches):
    """The minimiser covers the shares of s^2 / (2 alpha) stated in the docstring, each within 0.02."""
    alpha = 1 / ratio
    exact = 1 / (2 * alpha)
    assert minimiser(alpha, normal, len(normal)) / exact == pytest.approx(whole, abs=0.02)
    assert minimiser(alpha, normal, 256) / exact == pytest.approx(in_batches, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1.0, 0.1, 1e-3])
def test_the_gradient_of_a_batch_is_bounded_as_documented(normal, dtype, alpha):
    targets, scale = normal[:256].to(dtype), 2.0
    for start in (-5.0, 0.0, 5.0):
        values = torch.full_like(targets, start, requires_grad=True)
        loss = SoftLoss(alpha)(values, targets, scale)
        slope = torch.autograd.grad(loss, values)[0]
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.isfinite(loss)
        assert 0 < float(slope.abs().double().sum()) <= 10 * alpha / scale * 1.01


def test_single_precision_is_enough(normal):
    slopes = []
    for dtype in (torch.float32, torch.float64):
        values = torch.full((256,), 1.0, dtype=dtype, requires_grad=True)
        loss = SoftLoss(0.5)(values, normal[:256].to(dtype), 1.0)
        slopes.append(torch.autograd.grad(loss, values)[0].double())
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-8)


def test_the_value_of_the_loss_is_not_scaled():
    """The loss ranks checkpoints: it grows with the distance below the soft value."""
    targets = torch.tensor([0.0, 1.0])
    losses = [float(SoftLoss(0.25)(torch.full((2,), v), targets, 1.0)) for v in (-1.0, -0.5, 0.0, 0.5)]
    assert losses == sorted(losses, reverse=True)
    u = [(r + 1) / 0.25 for r in (0.0, 1.0)]
    assert losses[0] == pytest.approx(2 * 0.25**2 * sum(math.exp(x) - x - 1 for x in u) / 2)
