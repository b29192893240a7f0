"""Guidance windows, and the traces of their selections."""

from itertools import pairwise

import pytest
import torch

from svdd.samplers.toolbox.window import Window
from svdd.state.trace import Selection, Trace, count_distinct


@pytest.mark.parametrize(
    ("window", "steps", "guided"),
    [
        (Window(), 5, [0, 1, 2, 3, 4]),
        (Window(0.4, 0.8), 5, [2, 3]),
        (Window(every=2), 5, [0, 2, 4]),
        (Window(every=3), 5, [1, 4]),
        (Window(0.2, 0.8, 2), 10, [3, 5, 7]),
        (Window(0.9), 5, []),  # no step starts that late
        (Window(stop=0.1), 5, [0]),
        (Window(every=9), 5, [4]),
        (Window(), 1, [0]),
    ],
)
def test_guided_steps(window, steps, guided):
    assert [i for i in range(steps) if window.guides(i, steps)] == guided


@pytest.mark.parametrize("steps", [1, 7, 25, 30, 50, 1000])
def test_adjacent_windows_share_no_step_and_miss_none(steps):
    """Rounding errors such as 0.28 * 25 = 7.000000000000001 do not shift a window."""
    cuts = [0, 0.07, 0.1, 0.14, 0.28, 0.29, 0.3, 0.55, 0.57, 0.58, 0.7, 1]
    windows = [Window(start, stop) for start, stop in pairwise(cuts)]
    for i in range(steps):
        assert sum(window.guides(i, steps) for window in windows) == 1
        expected = next(
            k
            for k, (start, stop) in enumerate(pairwise(cuts))
            if round(100 * start) * steps <= 100 * i < round(100 * stop) * steps
        )
        assert windows[expected].guides(i, steps)


@pytest.mark.parametrize("every", [1, 2, 3, 4])
def test_the_last_step_of_a_window_is_guided(every):
    for start, stop in ((0.0, 1.0), (0.3, 0.9), (0.5, 0.6)):
        inside = [i for i in range(20) if Window(start, stop).guides(i, 20)]
        guided = [i for i in range(20) if Window(start, stop, every).guides(i, 20)]
        assert guided == inside[::-every][::-1]


@pytest.mark.parametrize("arguments", [(-0.1, 1), (0, 1.1), (0.5, 0.5), (0.6, 0.5), (float("nan"), 1)])
def test_fractions_out_of_order_are_refused(arguments):
    with pytest.raises(ValueError, match="0 <= start < stop <= 1"):
        Window(*arguments)


def test_distinct_numbers_are_counted():
    groups = torch.tensor([[3, 3, 3], [1, 0, 1], [2, 1, 0]])
    assert count_distinct(groups).tolist() == [1, 2, 3]


def test_a_trace_has_one_entry_per_selection():
    trace = Trace()
    assert trace.per_image() == []
    values, kept = torch.tensor([[1.0, 3.0], [0.0, -2.0]]), torch.tensor([[1], [0]])
    trace.selections.append(Selection(1, values, kept, torch.tensor([1, 1])))
    trace.selections.append(
        Selection(4, values, kept, torch.tensor([1, 1]), torch.tensor([2.0, 1.5]), torch.tensor([0.1, 0.0]))
    )
    first, second = trace.per_image(lineage=True)
    assert first == {
        "step": [1, 4],
        "ess": [None, 2.0],
        "log_normaliser": [None, 0.1],
        "alpha": [None, None],
        "candidates": [2, 2],
        "value_mean": [2.0, 2.0],
        "value_std": [1.414214, 1.414214],
        "value_max": [3.0, 3.0],
        "value_chosen": [3.0, 3.0],
        "ancestors": [1, 1],
        "lineage": [[1], [1]],
    }
    assert second["value_chosen"] == [0.0, 0.0]
    assert "lineage" not in trace.per_image()[0]
