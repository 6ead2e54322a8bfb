"""Half precision works on GPUs only: everywhere else it is refused, never replaced."""

from __future__ import annotations

from crfrefine.errors import ConfigError


def require_single(precision: str, what: str) -> None:
    """Raise ConfigError unless the precision is "single".

    Args:
        precision: `mean_field.precision`.
        what: has no half precision, a phrase such as "the device cpu".
    """
    if precision != "single":
        raise ConfigError(
            f"mean_field.precision: {what} has no '{precision}'; set it to 'single'; 'half' is for infer and refine with --device cuda, "
            "where the filter is lattice"
        )
