"""Names of types for annotations: of arrays by the type of their numbers, of grids and labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]  # of any type
Bool = NDArray[np.bool_]  # such as a mask
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Floating = NDArray[np.floating[Any]]  # of any floating-point type
Integers = NDArray[np.int64]  # such as numbers of voxels
Indices = NDArray[np.intp]  # into arrays, as numpy returns them

Labels = NDArray[np.unsignedinteger[Any]]  # labels of voxels, in an unsigned type that holds them

NamesOfLabels = Mapping[int, str]  # by the number of the label

Shape = tuple[int, ...]  # of an array, or voxels along each axis of a grid
Spacing = tuple[float, ...]  # mm between voxels along each axis of a grid
Range = tuple[float, float]  # the low and the high end of an interval
