// Filtering on the permutohedral lattice: splat, blur, slice. Sums are gathered in a fixed order, never scattered: the same bits on every
// run.
//
// CRF_WIDTH: channels that are filtered together.
#include "cuda/launch.h"

namespace crf {

using Channels = Row<CRF_WIDTH>;

// One thread a segment of a vertex's list: the weighted sum of its voxels' values, in units of the 16-bit weights.
//
// segment_begin: (segment + 1) places in the entries. segment_row: where the sum goes. scale: (voxel) or nullptr for ones.
CRF_KERNEL(splat, const Channels* values, const Real* scale, const uint32* entry_voxel, const uint16* entry_weight,
           const int64* segment_begin, const int64* segment_row, int64 num_segments, Channels* rows) {
    const int64 s = thread_number();
    if (s >= num_segments) return;
    Channels total = zero_row<CRF_WIDTH>();
    for (int64 i = segment_begin[s]; i < segment_begin[s + 1]; ++i) {
        const uint32 n = entry_voxel[i];
        const Real weight = static_cast<Real>(entry_weight[i]);
        add_scaled(total, values[n], scale ? weight * scale[n] : weight);
    }
    rows[segment_row[s]] = total;
}

// One thread a vertex whose list has several segments: the sum of theirs.
CRF_KERNEL(sum_segments, const int64* shared_vertex, const int64* first_row, const int64* num_rows, int64 num_shared, Channels* rows) {
    const int64 i = thread_number();
    if (i >= num_shared) return;
    Channels total = zero_row<CRF_WIDTH>();
    for (int64 s = 0; s < num_rows[i]; ++s) add_scaled(total, rows[first_row[i] + s], Real(1.0));
    rows[shared_vertex[i]] = total;
}

// One thread a vertex, [1 2 1] / 2 along one direction; the missing factors of 1 / 2 are in `amplitude` of slice_values.
CRF_KERNEL(blur, const Channels* from, const int* before, const int* after, int64 num_vertices, Channels* to) {
    const int64 v = thread_number();
    if (v >= num_vertices) return;
    Channels total = from[v];
    const int down = before[v], up = after[v];
    if (down >= 0) add_scaled(total, from[down], Real(0.5));
    if (up >= 0) add_scaled(total, from[up], Real(0.5));
    to[v] = total;
}

// One thread a voxel: sum += channel_weight * amplitude * scale * (values of its vertices, interpolated).
//
// corner_vertex, corner_weight: (corner, voxel). scale: (voxel) or nullptr. channel_weight: (CRF_WIDTH).
CRF_KERNEL(slice_values, const Channels* rows, const uint32* corner_vertex, const uint16* corner_weight, int num_corners, int64 num_voxels,
           Real amplitude, const Real* scale, const Real* channel_weight, Channels* sum) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    Channels total = zero_row<CRF_WIDTH>();
    for (int k = 0; k < num_corners; ++k)
        add_scaled(total, rows[corner_vertex[k * num_voxels + n]], static_cast<Real>(corner_weight[k * num_voxels + n]));
    const Real factor = scale ? amplitude * scale[n] : amplitude;
    Channels out = sum[n];
    CRF_UNROLL
    for (int c = 0; c < CRF_WIDTH; ++c) out.value[c] += channel_weight[c] * factor * total.value[c];
    sum[n] = out;
}

}  // namespace crf
