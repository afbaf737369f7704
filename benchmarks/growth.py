"""How cost grows along a series of cases."""

import math
import statistics
from collections.abc import Sequence

from .recording import Row


def slopes(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, float]]:
    """The least-squares slope of log(seconds) over log(value), by (series, variable) and provider.

    1 is growth in proportion, 0 no growth. A provider with fewer than three timed points has none.
    """
    points: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if row.sweep is not None and row.status == "timed":
            series = points.setdefault((row.sweep.name, row.sweep.variable), {})
            series.setdefault(row.provider, []).append((math.log(row.sweep.value), math.log(row.seconds)))
    fitted = {
        key: {
            provider: statistics.linear_regression(*zip(*measured, strict=True)).slope
            for provider, measured in series.items()
            if len(measured) >= 3
        }
        for key, series in points.items()
    }
    return {key: series for key, series in fitted.items() if series}
