// The first step of filtering on the permutohedral lattice: the sums of voxels at the vertices. Sums are gathered in a fixed order, never
// scattered: the same bits on every run.
//
// CRF_WIDTH: channels that are filtered together. CRF_THREADS: per block.
#include "cuda/launch.h"

namespace crf {

using Channels = Row<CRF_WIDTH>;
constexpr int kGroup = 8;  // threads that share a segment: their entries are adjacent, and long segments delay a warp less
constexpr int kSegments = CRF_THREADS / kGroup;
constexpr int kStride = kSegments + 1;  // odd: the rows that a group writes are in different banks

// One block per kSegments segments of vertices' lists: for each, the weighted sum of its voxels' values, in units of the 16-bit weights.
//
// segment_begin: (segment + 1) places in the entries. segment_row: row of the sum. scale: (voxel) or nullptr for ones.
CRF_BLOCK_KERNEL(splat, const Channels* values, const Real* scale, const uint32* entry_voxel, const uint16* entry_weight,
                 const int64* segment_begin, const int64* segment_row, int64 num_segments, Channels* rows) {
    CRF_SHARED(Channels, partial, kGroup * kStride);
    const int64 first = block_number() * kSegments;
    CRF_PHASE(thread) {
        const int64 s = first + thread / kGroup;
        if (s >= num_segments) continue;
        Channels total = zero_row<CRF_WIDTH>();
        const int64 end = segment_begin[s + 1];
        CRF_UNROLL_BY_4
        for (int64 i = segment_begin[s] + thread % kGroup; i < end; i += kGroup) {
            const uint32 n = entry_voxel[i];
            const Real weight = static_cast<Real>(entry_weight[i]);
            add_scaled(total, values[n], scale ? weight * scale[n] : weight);
        }
        partial[thread % kGroup * kStride + thread / kGroup] = total;
    }
    CRF_PHASE(thread) {
        if (thread >= kSegments || first + thread >= num_segments) continue;
        Channels total = partial[thread];
        CRF_UNROLL
        for (int j = 1; j < kGroup; ++j) {
            const Channels other = partial[j * kStride + thread];
            add_scaled(total, other, Real(1.0));
        }
        rows[segment_row[first + thread]] = total;
    }
}

}  // namespace crf
