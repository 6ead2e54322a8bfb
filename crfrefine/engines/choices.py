"""The numbers by which filters are chosen, and tiles, each with where it was measured.

The choices, and their places:

- The filter of `auto` on the CPU: exact, truncated, grid or lattice, by the engine's own costs
  (kernels/cpu/cost_model.cpp). Python asks `CpuBackend.plan_filters`.
- The same on a GPU: exact, truncated or lattice (`choose_filter` in cuda/kernel_set.py). It has no
  grid, and where the CPU takes the grid, it takes one of the others
  (docs/reference/math.md, section 5.3).
- The same in tensor operations, and the method of points: `exact_or_lattice`.
- Whether labels are left out on tiles, and whether the tiles' sums are direct: `plan_array`,
  `choose_tiles` and `plan_label_map` (refinement/tiles/planning.py), `solve` (slabs.py there).

How far apart the filters' results are is in docs/reference/accuracy.md.
"""

# ---- Points, and plain tensor operations

# Points up to which all pairs are summed, in about .1 s by the C++ engine.
MAX_EXACT = 8192


def exact_or_lattice(num_points: int) -> str:
    """Return the method of `auto` for a number of points where there are only these two."""
    return "exact" if num_points <= MAX_EXACT else "lattice"


# ---- A GPU. Operations and bytes are counted in the text of its kernels, not measured.

# Operations in the time in which a GPU moves a byte.
OPERATIONS_A_BYTE = 8.0
# With fewer operations the time is imperceptible, and the most accurate filter is chosen.
UNNOTICED = 1e10


def pair_operations(num_features: int, width: int) -> float:
    """Return the operations of a pair that compares features, and filters rows of channels."""
    return 6.0 + 3.0 * num_features + 2.0 * width


def lattice_operations(num_filterings: int, width: int, vertices_per_voxel: float) -> float:
    """Return the operations of a lattice for a corner of a voxel's simplex, from moved bytes.

    They are those of its build, and of each filtering: splat, slice, and blur of the vertices.
    """
    filtering = 2.0 * (6.0 + 4.0 * width) + vertices_per_voxel * (8.0 + 16.0 * width)
    return OPERATIONS_A_BYTE * (400.0 + num_filterings * filtering)


# ---- Tiles: a sample of a case in memory, before all its labels are surveyed

# Every fifth layer of tiles shows whether label sets would hold nearly all labels, if they are few.
# The sample takes 2 to 4 ms for 1.8 million voxels, the survey 20, a tenth of the case.
SAMPLED_LAYERS = 5
MIN_LAYERS = 13
MAX_CROWDED_LABELS = 8
# Share of the work with all labels everywhere from which on a sample rules out tiles.
CROWDED = 1.1

# ---- Tiles: direct sums or filters. Pairs are the voxels that a sum visits for one voxel.

# Voxels along an axis up to which sums are direct: else the copies of tiles outgrow the cache.
MAX_DIRECT_REACH = 12
# Pairs that take as long as a grid or a lattice for one voxel and a group of channels: 400 to 550
# with AVX-512 and 30 labels, 210 with AVX2, on an AMD EPYC.
PAIRS_OF_FILTERS = 250
# The same for volumes that are streamed, where filters need arrays of all voxels around.
PAIRS_OF_LARGE_FILTERS = 400
# Pairs up to which sums of a label map are direct; they then take half the time of the lattice.
MAX_PAIRS = 1000

# ---- Tiles, or all labels everywhere: shares of the work with all labels

# With direct sums, and with filters, tiles are used below these shares; they are margins for what a
# survey and channels of their own take, not measured.
WORTH_TILES = 0.9
WORTH_CHANNELS = 0.5
# A grid filters tiles below this share: two atria with certain logits took .47 s, not .56.
WORTH_ROWS = 0.8
# Share of a grid's rows that are filtered over the share of voxels that are uncertain.
ROWS_OF_UNCERTAIN = 6.0
