"""Names of values that the page and the program send each other."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]  # a table
Place = list[int]  # a voxel of the upright grid, an index per axis
