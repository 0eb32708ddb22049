"""How often to save, against a search over many intervals and the published table."""

from __future__ import annotations

import pytest

from moe_recipes.plan.saves import save_interval_s


def lost_share(blocking_s: float, interval_s: float, *, mtbf_s: float) -> float:
    """Time that saves take, and half an interval that each failure undoes, as parts of the whole."""
    return blocking_s / interval_s + interval_s / (2 * mtbf_s)


@pytest.mark.parametrize(
    ("blocking_s", "mtbf_hours", "minutes"), [(10, 24, 22), (10, 63, 35), (60, 231, 166), (220, 396, 417)]
)
def test_the_interval_is_that_at_which_least_is_lost(blocking_s: float, mtbf_hours: float, minutes: float) -> None:
    interval = save_interval_s(blocking_s, mtbf_hours=mtbf_hours)
    assert interval / 60 == pytest.approx(minutes, abs=0.6)
    tried = {s: lost_share(blocking_s, s, mtbf_s=3600 * mtbf_hours) for s in range(60, 90000, 7)}
    assert min(tried, key=tried.__getitem__) == pytest.approx(interval, abs=7)


@pytest.mark.parametrize(("blocking_s", "mtbf_hours"), [(0.0, 63), (10, 0.0), (-1.0, 63)])
def test_what_is_not_above_zero_is_refused(blocking_s: float, mtbf_hours: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        save_interval_s(blocking_s, mtbf_hours=mtbf_hours)
