// The memory access order of the truncated sum: a function of only the mask, the spacing and the window.
//
// The box is padded so that every neighbor of a voxel is at one fixed linear distance, and voxels are processed in vectors along the last
// axis, a few rows at a time.
#pragma once

#include "cpu/simd.h"
#include "cpu/window.h"

namespace crf {

// Rows of voxels that are processed together: each loaded neighbor serves all of them.
constexpr int kRows = 2;

// The exponent where a row has no pair, far below all others: a weight of 0.
constexpr float kNoPair = -1e4f;

struct PlannedOffset {
    int64_t linear;         // distance in the padded box from the voxel of the first row, positive
    float exponent[kRows];  // log2 of the spatial part of the weight, from the voxel of each row
};

// Squared distances along each axis over the bandwidth, for derivatives only: an offset's share of them, stored apart from the data of
// filtering.
struct OffsetDistances {
    float squared[kRows][kMaxAxes]{};
};

// The padded box in blocks of some rows of one vector each, numbered in raster order.
struct WindowBlocks {
    int num_axes = 0;
    int64_t count[kMaxAxes]{}, stride[kMaxAxes]{};
    int64_t reach[kMaxAxes]{};  // blocks on either side that hold all neighbors of a block's voxels
    int64_t total = 0;
};

// A vector of voxels in each of kRows rows.
struct WindowChunk {
    int64_t place;  // of the first row's first voxel in the padded box
    int64_t block;
};

struct WindowPlan {
    int64_t radius[kMaxAxes]{}, stride[kMaxAxes]{};  // per box axis: of the window, and of the padded box
    int64_t padded_size = 0;                         // of the padded box
    int64_t total_size = 0;                          // including the places that its last voxels reach beyond it
    int64_t row_stride = 0;                          // between rows that are processed together
    int64_t slab_size = 0;
    int64_t num_pairs = 0;               // per voxel
    std::vector<PlannedOffset> offsets;  // where both rows have a pair, then where only the first has one, then only the second
    int64_t num_of_both = 0, num_of_first = 0;
    std::vector<OffsetDistances> distances;       // of each offset
    std::vector<int64_t> padded_run;              // place of each run in the padded box
    std::vector<int64_t> run_block;               // block of each run's first voxel; the next along the row are the next numbers
    std::vector<std::vector<WindowChunk>> slabs;  // the vectors to visit, slab by slab
    WindowBlocks blocks;
};

WindowPlan plan_window(const BilateralInput& input);

}  // namespace crf
