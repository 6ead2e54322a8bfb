// Filtering on the permutohedral lattice: blur and slice, and the end of the splat (splat.cu). Sums are gathered in a fixed order,
// never scattered: the same bits on every run.
//
// CRF_WIDTH: channels that are filtered together.
#include "cuda/launch.h"
#include "cuda/slice.h"

namespace crf {

using Channels = Row<CRF_WIDTH>;

// One thread per entry of the vertices' lists: its weight times the factor of its voxel, as every splat with these factors needs it.
CRF_KERNEL(weigh_entries, const Real* scale, const uint32* entry_voxel, const uint16* entry_weight, int64 num_entries, Real* weight) {
    const int64 i = thread_number();
    if (i < num_entries) weight[i] = static_cast<Real>(entry_weight[i]) * scale[entry_voxel[i]];
}

// One thread per vertex whose list has several segments: the sum of the segments.
CRF_KERNEL(sum_segments, const int64* shared_vertex, const int64* first_row, const int64* num_rows, int64 num_shared, Channels* rows) {
    const int64 i = thread_number();
    if (i >= num_shared) return;
    Channels total = zero_row<CRF_WIDTH>();
    for (int64 s = 0; s < num_rows[i]; ++s) add_scaled(total, rows[first_row[i] + s], Real(1.0));
    rows[shared_vertex[i]] = total;
}

// One thread per vertex, [1 2 1] / 2 along one direction; the missing factors of 1 / 2 are in `amplitude` of slice_values.
CRF_KERNEL(blur, const Channels* from, const int* before, const int* after, int64 num_vertices, Channels* to) {
    const int64 v = thread_number();
    if (v >= num_vertices) return;
    Channels total = from[v];
    const int down = before[v], up = after[v];
    if (down >= 0) add_scaled(total, from[down], Real(0.5));
    if (up >= 0) add_scaled(total, from[up], Real(0.5));
    to[v] = total;
}

// One thread per voxel: sum += channel_weight * amplitude * scale * (values of its vertices, interpolated); see put_weighted.
//
// corner_vertex, corner_weight: (corner, voxel). scale: (voxel) or nullptr. channel_weight: (CRF_WIDTH).
CRF_KERNEL(slice_values, const Channels* rows, const uint32* corner_vertex, const uint16* corner_weight, int num_corners, int64 num_voxels,
           Real amplitude, const Real* scale, const Real* channel_weight, Channels* sum, int adds) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    const Channels total = interpolated(rows, corner_vertex, corner_weight, num_corners, num_voxels, n);
    const Real factor = scale ? amplitude * scale[n] : amplitude;
    put_weighted(sum, n, total, factor, channel_weight, adds);
}

}  // namespace crf
