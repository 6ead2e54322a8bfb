// The entries of a vertex's list, its voxels and their weights, added up by one thread or by several.
#pragma once

#include "cuda/launch.h"

namespace crf {

// The weighted sum of every Step-th entry from `begin` on.
template <int Step, int Width, class Weight>
CRF_D Row<Width> sum_entries(const Row<Width>* values, const uint32* entry_voxel, const Weight* entry_weight, int64 begin, int64 end) {
    Row<Width> total = zero_row<Width>();
    CRF_UNROLL_BY_4
    for (int64 i = begin; i < end; i += Step) add_scaled(total, values[entry_voxel[i]], static_cast<Real>(entry_weight[i]));
    return total;
}

}  // namespace crf
