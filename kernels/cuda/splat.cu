// The first step of filtering on the permutohedral lattice: the sums of voxels at the vertices, by groups of threads (by single ones:
// lattice.cu). Sums are gathered in a fixed order, never scattered: the same bits on every run.
//
// CRF_WIDTH: channels that are filtered together. CRF_THREADS: per block. CRF_GROUP: threads that share a segment, 2 or 8.
// CRF_HALF: as in lattice.cu.
#include "cuda/entries.h"
#include "cuda/launch.h"
#include "cuda/vertices.h"

namespace crf {

using Channels = Row<CRF_WIDTH>;
using Vertices = VertexRow<CRF_WIDTH>;
constexpr int kGroup = CRF_GROUP;  // their entries are adjacent, and long segments delay a warp less
constexpr int kSegments = CRF_THREADS / kGroup;
constexpr int kStride = kSegments + 1;  // odd: the rows that a group writes are in different banks

// The sum of what the threads of a group have found.
template <class Partial>
CRF_D Channels sum_group(Partial& partial, int segment) {
    Channels total = partial[segment];
    CRF_UNROLL
    for (int j = 1; j < kGroup; ++j) {
        const Channels other = partial[j * kStride + segment];
        add_scaled(total, other, Real(1.0));
    }
    return total;
}

// One block per kSegments segments of vertices' lists: for each, the weighted sum of its voxels' values.
template <class Weight>
CRF_D void sum_segments(const Channels* values, const uint32* entry_voxel, const Weight* entry_weight, const uint32* segment_begin,
                        const uint32* segment_row, int64 num_segments, Vertices* rows) {
    CRF_SHARED(Channels, partial, kGroup * kStride);
    const int64 first = block_number() * kSegments;
    CRF_PHASE(thread) {
        const int64 s = first + thread / kGroup;
        if (s >= num_segments) continue;
        partial[thread % kGroup * kStride + thread / kGroup] =
            sum_entries<kGroup>(values, entry_voxel, entry_weight, segment_begin[s] + thread % kGroup, segment_begin[s + 1]);
    }
    CRF_PHASE(thread) {
        if (thread >= kSegments || first + thread >= num_segments) continue;
        rows[segment_row[first + thread]] = packed(sum_group(partial, thread));
    }
}

// The sums in units of the 16-bit weights.
//
// segment_begin: (segment + 1) places in the entries. segment_row: row of the sum.
CRF_BLOCK_KERNEL(splat, const Channels* values, const uint32* entry_voxel, const uint16* entry_weight, const uint32* segment_begin,
                 const uint32* segment_row, int64 num_segments, Vertices* rows) {
    sum_segments(values, entry_voxel, entry_weight, segment_begin, segment_row, num_segments, rows);
}

// The same with weights from weigh_entries: the factors of the voxels need not be gathered.
CRF_BLOCK_KERNEL(splat_weighed, const Channels* values, const uint32* entry_voxel, const Real* weight, const uint32* segment_begin,
                 const uint32* segment_row, int64 num_segments, Vertices* rows) {
    sum_segments(values, entry_voxel, weight, segment_begin, segment_row, num_segments, rows);
}

}  // namespace crf
