// Sums over the voxels of products of two arrays: in the backward pass of messages and gradients,
// in the volume term of marginals. CRF_ROWS, CRF_OTHERS: rows of either array. CRF_THREADS: per
// block. CRF_TILE: voxels that a block handles at a time, at most CRF_THREADS.
#include "cuda/launch.h"

namespace crf {
constexpr int kPairs = CRF_ROWS * CRF_OTHERS;
constexpr int kMostSlices = CRF_THREADS / kPairs < CRF_TILE ? CRF_THREADS / kPairs : CRF_TILE;
constexpr int kSlices = kMostSlices > 0 ? kMostSlices : 1;  // threads that share a pair of rows
constexpr int kItems = kPairs * kSlices;
constexpr int kOwn = (kItems + CRF_THREADS - 1) / CRF_THREADS;
constexpr int kStride = CRF_TILE + 1;  // the rows of a voxel are in different banks

// Sums of a thread: item i is in slice i / kPairs of pair i % kPairs.
struct PairSums {
    double value[kOwn];
};

// Blocks take every num_blocks-th tile.
// rows, others: (row, voxel); others: nullptr for ones. part: (voxel), 1 where it counts, or
// nullptr. sums: (pair, block, slice), added to.
CRF_BLOCK_KERNEL(add_products, const Real* rows, const Real* others, const uint8* part,
                 int64 num_voxels, int64 num_blocks, double* sums) {
    CRF_SHARED(Real, near_rows, CRF_ROWS * kStride);
    CRF_SHARED(Real, near_others, CRF_OTHERS * kStride);
    CRF_PER_THREAD(PairSums, total);

    CRF_PHASE(thread) { total[thread] = PairSums(); }
    const int64 num_tiles = (num_voxels + CRF_TILE - 1) / CRF_TILE;
    for (int64 tile = block_number(); tile < num_tiles; tile += num_blocks) {
        CRF_PHASE(thread) {
            if (thread >= CRF_TILE) continue;
            const int64 n = tile * CRF_TILE + thread;
            const bool counts = n < num_voxels && (!part || part[n]);
            CRF_UNROLL_BY_4
            for (int i = 0; i < CRF_ROWS; ++i)
                near_rows[i * kStride + thread] = counts ? rows[i * num_voxels + n] : Real(0.0);
            CRF_UNROLL_BY_4
            for (int i = 0; i < CRF_OTHERS; ++i) {
                const Real other = others && counts ? others[i * num_voxels + n] : Real(1.0);
                near_others[i * kStride + thread] = other;
            }
        }
        CRF_PHASE(thread) {
            CRF_UNROLL_BY_4
            for (int j = 0; j < kOwn; ++j) {
                const int item = thread + j * CRF_THREADS, pair = item % kPairs;
                if (item >= kItems) continue;
                Real sum = Real(0.0);
                CRF_UNROLL_BY_4
                for (int v = item / kPairs; v < CRF_TILE; v += kSlices) {
                    const Real one = near_rows[pair / CRF_OTHERS * kStride + v];
                    const Real other = near_others[pair % CRF_OTHERS * kStride + v];
                    sum += one * other;
                }
                total[thread].value[j] += static_cast<double>(sum);
            }
        }
    }
    CRF_PHASE(thread) {
        CRF_UNROLL_BY_4
        for (int j = 0; j < kOwn; ++j) {
            const int item = thread + j * CRF_THREADS;
            if (item < kItems)
                sums[(item % kPairs * num_blocks + block_number()) * kSlices + item / kPairs] +=
                    total[thread].value[j];
        }
    }
}
}  // namespace crf
