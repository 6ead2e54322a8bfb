// The simplices around sixteen voxels at a time (lattice_math.h), for the numbers of features that lattices are compiled for.
//
// Compiled without fused multiply-adds (CMakeLists.txt): the simplex of a voxel must not depend on the compiler.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/simd.h"

namespace crf {

constexpr int kMaxLatticeFeatures = 28;

// Barycentric weights are kept in 16 bits, in units of 1 / kWeightUnit.
constexpr int32_t kWeightUnit = 65535;

// The results of lattice_math.h for sixteen voxels, lane by lane.
struct SimplexBatch {
    int32_t quotient[kMaxLatticeFeatures + 1][kLanes];  // q of the remainder-0 vertex, before the coordinates that wrap
    int32_t order[kMaxLatticeFeatures + 1][kLanes];     // index of the coordinate at each rank
    int32_t weight[kMaxLatticeFeatures + 1][kLanes];    // of the vertex of each remainder; they sum to kWeightUnit, or to D / 2 more
    int32_t wrapped[kLanes];                            // number of coordinates that wrap, with the direction as sign
};

// features: one row of `stride` floats per feature. scale: per feature.
using SimplexFunction = void (*)(const float* features, int64_t stride, const float* scale, SimplexBatch& batch);

struct LatticeGeometry {
    int num_features;          // of the lattice; the first num_features - (those of the image) are zero for every voxel
    std::vector<float> scale;  // of each feature, before elevation
    SimplexFunction find;
};

// The smallest compiled lattice for this many features; features that are zero everywhere do not change the kernel. Throws
// CapacityError for more than kMaxLatticeFeatures.
LatticeGeometry choose_geometry(int num_features);

}  // namespace crf
