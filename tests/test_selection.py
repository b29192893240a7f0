"""Survivors follow the formulas: the best rows, or rows drawn in proportion to exp(log_w)."""

import math

import pytest
import torch

from svdd.samplers.toolbox.selection import draw, top

INF = math.inf
BELOW_ONE = math.nextafter(1.0, 0.0)


def weights(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def stratified(count: int, groups: int = 1) -> torch.Tensor:
    """Returns the midpoints of `count` equal parts of [0, 1)."""
    return ((torch.arange(count, dtype=torch.float64) + 0.5) / count).repeat(groups, 1)


def test_top_sorts_the_best_first_in_each_group():
    log_w = weights([1, 5, 3, 4], [9, -9, 0, 8])
    assert top(log_w).tolist() == [[1], [0]]
    assert top(log_w, 3).tolist() == [[1, 3, 2], [0, 3, 2]]
    assert top(log_w, 4).sort().values.tolist() == [[0, 1, 2, 3]] * 2
    assert top(log_w).dtype == torch.int64


@pytest.mark.parametrize("rows", [2, 17, 1000])
def test_top_breaks_ties_by_the_earlier_row(rows):
    assert top(torch.zeros(3, rows), rows).tolist() == [list(range(rows))] * 3


def test_top_ranks_infinities():
    assert top(weights([-INF, 0, INF, -1]), 4).tolist() == [[2, 1, 3, 0]]
    assert top(weights([-INF, -INF])).tolist() == [[0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_top_and_draw_accept_every_float_type(dtype):
    log_w = torch.tensor([[0.0, -INF, 3.0]], dtype=dtype)
    assert top(log_w).tolist() == [[2]]
    assert draw(log_w, torch.full((1, 2), 0.5, dtype=torch.float32)).tolist() == [[2, 2]]


@pytest.mark.parametrize("log_w", [[0.0, 0, 0, 0], [0.0, 1, 2, 3], [-2.0, -INF, 0.5, 0], [700.0, 701, 690, 702]])
def test_draw_has_the_frequencies_of_the_softmax(log_w):
    log_w, count = weights(log_w), 10_000
    expected = log_w.softmax(1)[0] * count
    counts = torch.bincount(draw(log_w, stratified(count))[0], minlength=4)
    assert (counts - expected).abs().max() <= 1  # midpoints: each share is exact up to one cell at either end
    random = torch.rand(1, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.bincount(draw(log_w, random)[0], minlength=4)
    there = expected > 0
    assert counts[~there].sum() == 0
    chi_square = ((counts - expected)[there] ** 2 / expected[there]).sum()
    assert chi_square < 20  # three degrees of freedom: false alarms have probability 2e-4


def test_draw_gives_a_one_hot_weight_its_row_for_any_uniform():
    uniforms = torch.tensor([[0.0, 0.3, BELOW_ONE]], dtype=torch.float64)
    for k in range(5):
        log_w = torch.full((1, 5), -INF)
        log_w[0, k] = -3.0
        assert draw(log_w, uniforms).tolist() == [[k] * 3]


def test_draw_never_returns_a_row_of_weight_zero_at_either_end():
    ends = torch.tensor([[0.0, BELOW_ONE]], dtype=torch.float64)
    assert draw(weights([-INF, 0, 0, -INF]), ends).tolist() == [[1, 2]]
    assert draw(weights([0, 0, 0]), ends).tolist() == [[0, 2]]
    for rows in (3, 7, 49, 1000):
        assert draw(torch.full((1, rows), 0.1), ends).tolist() == [[0, rows - 1]]


def test_draw_survives_weights_ten_thousand_apart():
    log_w = weights([-1e4, 0, 1e4, 5e3], [1e4, 1e4, -1e4, 0])
    drawn = draw(log_w, stratified(10, 2))
    assert drawn[0].tolist() == [2] * 10
    assert drawn[1].tolist() == [0] * 5 + [1] * 5


@pytest.mark.parametrize("constant", [-1e4, 37.0, 1e4])
def test_a_constant_added_to_a_group_changes_nothing(constant):
    generator = torch.Generator().manual_seed(1)
    log_w = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    shift = torch.zeros(6, 1, dtype=torch.float64)
    shift[2:4] = constant
    uniforms = torch.rand(6, 50, generator=generator, dtype=torch.float64)
    assert torch.equal(draw(log_w, uniforms), draw(log_w + shift, uniforms))
    assert torch.equal(top(log_w, 9), top(log_w + shift, 9))


def test_groups_are_drawn_independently():
    generator = torch.Generator().manual_seed(2)
    log_w = torch.randn(5, 4, generator=generator)
    uniforms = torch.rand(5, 3, generator=generator)
    alone = [draw(log_w[g : g + 1], uniforms[g : g + 1]) for g in range(5)]
    assert torch.equal(draw(log_w, uniforms), torch.cat(alone))


def test_draw_follows_the_temperature():
    values, count = weights([0.0, 1.0]), 10_000
    for alpha in (0.2, 1.0, 5.0, INF):
        counts = torch.bincount(draw(values / alpha, stratified(count))[0], minlength=2)
        assert abs(int(counts[1]) / count - 1 / (1 + math.exp(-1 / alpha))) < 2e-4


def test_draw_becomes_top_as_the_temperature_falls():
    values = torch.randn(8, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.equal(draw(values / 1e-9, torch.full((8, 1), BELOW_ONE, dtype=torch.float64)), top(values))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top(torch.tensor([[0, math.nan]])), "1 of 2 log-weights are NaN"),
        (lambda: draw(torch.tensor([[0, math.nan]]), torch.zeros(1, 1)), "1 of 2 log-weights are NaN"),
        (lambda: draw(torch.tensor([[0, INF]]), torch.zeros(1, 1)), r"below \+inf"),
        (lambda: draw(torch.tensor([[0, 0], [-INF, -INF]]), torch.zeros(2, 1)), "at least one row of every group"),
        (lambda: top(torch.zeros(2, 3), 4), "k must lie in 1 .. 3, the rows of a group, got 4"),
        (lambda: top(torch.zeros(2, 3), 0), "k must lie in 1 .. 3, the rows of a group, got 0"),
        (lambda: top(torch.zeros(3)), r"\[groups, rows\].*got \[3\]"),
        (lambda: top(torch.zeros(3, 0)), r"at least one row, got \[3, 0\]"),
    ],
)
def test_undefined_selections_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
