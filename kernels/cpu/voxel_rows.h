// Blocks of voxels as rows of kBlockRow numbers, one per label or channel, padded with zeros to whole vectors.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/thread_pool.h"
#include "cpu/voxels.h"

namespace crf {

inline int64_t block_end(int64_t block, int64_t num_voxels) { return std::min((block + 1) * kVoxelBlock, num_voxels); }

// From (row, voxel).
inline void load_rows(const float* values, int64_t num_voxels, int64_t block, int num_rows, float* rows) {
    const int64_t begin = block * kVoxelBlock, count = block_end(block, num_voxels) - begin;
    for (int c = 0; c < num_rows; ++c) {
        std::copy(values + c * num_voxels + begin, values + c * num_voxels + begin + count, rows + c * kBlockRow);
        std::fill(rows + c * kBlockRow + count, rows + (c + 1) * kBlockRow, 0.0f);
    }
}

// To (row, voxel).
inline void store_rows(const float* rows, int64_t num_voxels, int64_t block, int num_rows, float* values) {
    const int64_t begin = block * kVoxelBlock, count = block_end(block, num_voxels) - begin;
    for (int c = 0; c < num_rows; ++c) std::copy(rows + c * kBlockRow, rows + c * kBlockRow + count, values + c * num_voxels + begin);
}

// Multiplies each row by factors (voxel); empty: by 1.
inline void multiply_rows(const std::vector<float>& factors, int64_t block, int num_rows, float* rows) {
    if (factors.empty()) return;
    const int64_t begin = block * kVoxelBlock, count = block_end(block, static_cast<int64_t>(factors.size())) - begin;
    for (int c = 0; c < num_rows; ++c)
        for (int64_t i = 0; i < count; ++i) rows[c * kBlockRow + i] *= factors[begin + i];
}

// Sets (row, voxel) to zero.
inline void clear_rows(float* values, int64_t num_voxels, int num_rows, ThreadPool& pool) {
    pool.run(num_voxel_blocks(num_voxels), [&](int64_t block, int) {
        const int64_t begin = block * kVoxelBlock, end = block_end(block, num_voxels);
        for (int c = 0; c < num_rows; ++c) std::fill(values + c * num_voxels + begin, values + c * num_voxels + end, 0.0f);
    });
}

}  // namespace crf
