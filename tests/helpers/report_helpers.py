"""Made-up values and changes of cases, for the tests of statistics."""

import numpy as np

from crfrefine.statistics.comparison import Measurement, ResultTable


def spread(num_cases, center, width):
    """Changes around a center without ties among the magnitudes."""
    return center + width * np.linspace(-1, 1, num_cases) + 1e-3 * np.cos(np.arange(num_cases))


def table_of(values, metric="dice"):
    """Values of numbered cases, by method, region and, if it is not the same for all, metric."""
    return ResultTable(
        Measurement(f"case_{number}", region, *(own or [metric]), value, method)
        for (method, region, *own), row in values.items()
        for number, value in enumerate(row)
    )
