"""Numbers of the computation that Python, the C++ engine and the GPU's share.

CMakeLists.txt writes them into a header for the C++ engine, so each is a line `NAME = NUMBER`, with
a literal that C++ has, too.
"""

# ---- Limits

# More than the cores of any machine; a typing error beyond it would exhaust the system's threads.
MAX_THREADS = 1024
# Largest number of axes of a grid in the C++ engine, which gets points on other grids as lists.
MAX_AXES = 8
# Largest extent of a feature, in bandwidths: up to it, single precision resolves a difference of
# one bandwidth.
MAX_SPAN = 1e6
# Smallest probability before the logarithm: an exact zero would otherwise forbid a label forever.
MIN_PROBABILITY = 1e-7

# ---- Filters

# Standard deviations at which the truncated sum ends, where a Gaussian is 0.011: a radius of 4
# would take 2.4 times as many pairs.
TRUNCATION_RADIUS = 3.0
# Standard deviations up to which a tap of the spatial kernel has its full weight, where a Gaussian
# is 3e-4, with 6e-5 of its mass beyond; filtered axis by axis, a wider kernel costs little.
SPATIAL_RADIUS = 4.0
# Positions are multiples of spacing / theta, so pairs may be apart by exactly the radius. With this
# relative margin they count, however their distance is rounded.
RADIUS_MARGIN = 1e-6
# Channels that are filtered together.
CHANNEL_GROUP = 4
# Messages of the lattice are off by a few percent, those of other filters by far less: `auto` takes
# the lattice only where the others need so many times as long.
LATTICE_HANDICAP = 1.5
# Room on either side of the range of a quotient in the key of a lattice's vertex: 1 for rounding in
# single precision, 1 for the coordinates that wrap, 1 for the vertices of a simplex below its
# remainder-0 vertex, 1 for a step to a neighbor.
KEY_MARGIN = 4
# Largest range of an elevated coordinate: quotients fit into 32 bits with that room.
KEY_RANGE = 1e9

# ---- The mean field

# Share of voxels whose label may still change in a step that counts as converged.
FLIPPED_SHARE = 1e-4

# ---- The volume term

# Voxels added to all masses, so that a label whose mass vanishes has a finite energy.
PSEUDO_VOXELS = 1.0
# Newton steps; more than any problem needs in which no label must vanish.
MAX_PASSES = 100
# Nats; a Newton step below this size is the last one in single precision: the next one would be
# about its square.
LAST_CHANGE = 1e-3
# Voxels; with less doubt about all its voxels together, the bias of a label has no gradient: those
# of its voxels are rounding errors of single precision.
LEAST_DOUBT = 1e-6
# Relative; keeps the equations regular if no voxel is uncertain of a label.
RIDGE = 1e-9
