// Slicing: the value of a voxel between its vertices on the permutohedral lattice, for slice_values and for the step that slices itself.
#pragma once

#include "cuda/launch.h"
#include "cuda/vertices.h"

namespace crf {

// The values of voxel n's vertices, each times its weight in 1 / 65535. corner_vertex, corner_weight: (corner, voxel).
template <int Width>
CRF_D Row<Width> interpolated(const VertexRow<Width>* rows, const uint32* corner_vertex, const uint16* corner_weight, int num_corners,
                              int64 num_voxels, int64 n) {
    Row<Width> total = zero_row<Width>();
    for (int k = 0; k < num_corners; ++k)
        add_scaled(total, unpacked(rows[corner_vertex[k * num_voxels + n]]), static_cast<Real>(corner_weight[k * num_voxels + n]));
    return total;
}

}  // namespace crf
