"""Made-up changes of cases, for the tests of statistics."""

import numpy as np


def spread(num_cases, center, width):
    """Changes around a center without ties among the magnitudes."""
    return center + width * np.linspace(-1, 1, num_cases) + 1e-3 * np.cos(np.arange(num_cases))
