// Filtering on the permutohedral lattice: splat, blur and slice. Sums are gathered in a fixed
// order: the same bits on every run. CRF_WIDTH: channels that are filtered together.
#include "cuda/launch.h"

namespace crf {
using Channels = Row<CRF_WIDTH>;

// One thread per piece of the vertices' lists: the weighted sum of its voxels' values, in units of
// the 16-bit weights. scale: (voxel) factors of the values, or nullptr for ones. entry_*: (entry).
// piece_begin: (piece + 1). piece_row: (piece) row of the sum.
CRF_KERNEL(splat, const Channels* values, const Real* scale, const uint32* entry_voxel,
           const uint16* entry_weight, const uint32* piece_begin, const uint32* piece_row,
           int64 num_pieces, Channels* rows) {
    const int64 i = thread_number();
    if (i >= num_pieces) return;
    const int64 end = piece_begin[i + 1];
    Channels total = zero_row<CRF_WIDTH>();
    CRF_UNROLL_BY_4
    for (int64 entry = piece_begin[i]; entry < end; ++entry) {
        const uint32 n = entry_voxel[entry];
        const Real weight = static_cast<Real>(entry_weight[entry]);
        add_scaled(total, values[n], scale ? weight * scale[n] : weight);
    }
    rows[piece_row[i]] = total;
}

// One thread per piece of a list of rows: their sum. No row that is written in a launch is read in
// it.
CRF_KERNEL(sum_pieces, const uint32* piece_begin, const uint32* piece_row, int64 num_pieces,
           Channels* rows) {
    const int64 i = thread_number();
    if (i >= num_pieces) return;
    const int64 end = piece_begin[i + 1];
    Channels total = zero_row<CRF_WIDTH>();
    CRF_UNROLL_BY_4
    for (int64 row = piece_begin[i]; row < end; ++row) add_scaled(total, rows[row], Real(1.0));
    rows[piece_row[i]] = total;
}

// One thread per vertex, [1 2 1] / 2 along one direction; the missing factors are in `amplitude` of
// slice_values.
CRF_KERNEL(blur, const Channels* from, const int* before, const int* after, int64 num_vertices,
           Channels* to) {
    const int64 v = thread_number();
    if (v >= num_vertices) return;
    Channels total = from[v];
    const int down = before[v], up = after[v];
    if (down >= 0) add_scaled(total, from[down], Real(0.5));
    if (up >= 0) add_scaled(total, from[up], Real(0.5));
    to[v] = total;
}

// One thread per voxel: sum += channel_weight * amplitude * scale * (values of its vertices,
// interpolated); see put_weighted. corner_vertex, corner_weight: (corner, voxel), weights in 1 /
// 65535. scale: (voxel) or nullptr. channel_weight: (CRF_WIDTH).
CRF_KERNEL(slice_values, const Channels* rows, const uint32* corner_vertex,
           const uint16* corner_weight, int num_corners, int64 num_voxels, Real amplitude,
           const Real* scale, const Real* channel_weight, Channels* sum, int adds) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    Channels total = zero_row<CRF_WIDTH>();
    for (int k = 0; k < num_corners; ++k)
        add_scaled(total, rows[corner_vertex[k * num_voxels + n]],
                   static_cast<Real>(corner_weight[k * num_voxels + n]));
    put_weighted(sum, n, total, scale ? amplitude * scale[n] : amplitude, channel_weight, adds);
}
}  // namespace crf
