"""How often to save: Young's and Daly's rule."""

from __future__ import annotations

import math

SECONDS_AN_HOUR = 3600.0


def save_interval_s(blocking_s: float, *, mtbf_hours: float) -> float:
    """Seconds between saves at which waiting for them and work that failures undo cost the least together.

    ``sqrt(2 * d * M)``, where d is far less than M: Young's optimum, which is also the first term of Daly's.

    Args:
        blocking_s: d, seconds for which a save holds training up; not those that it is written beside it.
        mtbf_hours: M, mean hours between failures of all nodes together.
    Raises:
        ValueError: either is not above 0.
    """
    if blocking_s <= 0 or mtbf_hours <= 0:
        raise ValueError(f"blocking_s={blocking_s} and mtbf_hours={mtbf_hours} must be above 0")
    return math.sqrt(2.0 * blocking_s * mtbf_hours * SECONDS_AN_HOUR)
