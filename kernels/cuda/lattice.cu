// Filtering on the permutohedral lattice: splat with one thread per list (with several: splat.cu), blur and slice. Sums are gathered in a
// fixed order, never scattered: the same bits on every run.
//
// CRF_WIDTH: channels that are filtered together. CRF_HALF: 1 if values at the vertices are kept in 16 bits (vertices.h).
#include "cuda/entries.h"
#include "cuda/launch.h"
#include "cuda/slice.h"
#include "cuda/vertices.h"

namespace crf {

using Channels = Row<CRF_WIDTH>;
using Vertices = VertexRow<CRF_WIDTH>;

// One thread per entry of the vertices' lists: its weight times the factor of its voxel, as every splat with these factors needs it.
CRF_KERNEL(weigh_entries, const Real* scale, const uint32* entry_voxel, const uint16* entry_weight, int64 num_entries, Real* weight) {
    const int64 i = thread_number();
    if (i < num_entries) weight[i] = static_cast<Real>(entry_weight[i]) * scale[entry_voxel[i]];
}

// One thread per segment of vertices' lists: the weighted sum of its voxels' values; see `splat` in splat.cu.
CRF_KERNEL(splat_alone, const Channels* values, const uint32* entry_voxel, const uint16* entry_weight, const uint32* segment_begin,
           const uint32* segment_row, int64 num_segments, Vertices* rows) {
    const int64 s = thread_number();
    if (s < num_segments)
        rows[segment_row[s]] = packed(sum_entries<1>(values, entry_voxel, entry_weight, segment_begin[s], segment_begin[s + 1]));
}

// The same with weights from weigh_entries.
CRF_KERNEL(splat_weighed_alone, const Channels* values, const uint32* entry_voxel, const Real* weight, const uint32* segment_begin,
           const uint32* segment_row, int64 num_segments, Vertices* rows) {
    const int64 s = thread_number();
    if (s < num_segments)
        rows[segment_row[s]] = packed(sum_entries<1>(values, entry_voxel, weight, segment_begin[s], segment_begin[s + 1]));
}

// One thread per piece of a list of rows: their sum. No row that is written in a launch is read in it.
//
// piece_begin: (piece + 1). piece_row: (piece) the row of the sum.
CRF_KERNEL(sum_pieces, const uint32* piece_begin, const uint32* piece_row, int64 num_pieces, Vertices* rows) {
    const int64 i = thread_number();
    if (i >= num_pieces) return;
    const int64 end = piece_begin[i + 1];
    Channels total = zero_row<CRF_WIDTH>();
    CRF_UNROLL_BY_4
    for (int64 row = piece_begin[i]; row < end; ++row) add_scaled(total, unpacked(rows[row]), Real(1.0));
    rows[piece_row[i]] = packed(total);
}

// One thread per vertex, [1 2 1] / 2 along one direction, or half of that (`blurred`); the missing factors are in `amplitude` of
// slice_values.
CRF_KERNEL(blur, const Vertices* from, const int* before, const int* after, int64 num_vertices, Vertices* to) {
    const int64 v = thread_number();
    if (v >= num_vertices) return;
    Channels total = unpacked(from[v]);
    const int down = before[v], up = after[v];
    if (down >= 0) add_scaled(total, unpacked(from[down]), Real(0.5));
    if (up >= 0) add_scaled(total, unpacked(from[up]), Real(0.5));
    to[v] = blurred(total);
}

// One thread per voxel: sum += channel_weight * amplitude * scale * (values of its vertices, interpolated); see put_weighted.
//
// corner_vertex, corner_weight: (corner, voxel). scale: (voxel) or nullptr. channel_weight: (CRF_WIDTH).
CRF_KERNEL(slice_values, const Vertices* rows, const uint32* corner_vertex, const uint16* corner_weight, int num_corners, int64 num_voxels,
           Real amplitude, const Real* scale, const Real* channel_weight, Channels* sum, int adds) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    const Channels total = interpolated(rows, corner_vertex, corner_weight, num_corners, num_voxels, n);
    const Real factor = scale ? amplitude * scale[n] : amplitude;
    put_weighted(sum, n, total, factor, channel_weight, adds);
}

}  // namespace crf
