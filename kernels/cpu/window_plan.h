// The memory access order of the truncated sum: a function of only the mask, the spacing and the
// window. The box is padded so that a neighbor is at a fixed linear distance. Vectors along the
// last axis hold voxels, a few rows at a time.
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

// An offset's squared distance along each axis over the bandwidth, apart from the data of
// filtering: only derivatives need it.
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
    int64_t radius[kMaxAxes]{},
        stride[kMaxAxes]{};   // per box axis: of the window, and of the padded box
    int64_t padded_size = 0;  // of the padded box
    int64_t total_size = 0;   // including the places that its last voxels reach beyond it
    int64_t row_stride = 0;   // between rows that are processed together
    int64_t slab_size = 0;
    int64_t num_pairs = 0;  // per voxel
    // where both rows have a pair, then where only the first has one, then only the second
    std::vector<PlannedOffset> offsets;
    int64_t num_of_both = 0, num_of_first = 0;
    std::vector<OffsetDistances> distances;  // of each offset
    std::vector<int64_t> padded_run;         // place of each run in the padded box
    // block of each run's first voxel; the next along the row are the next numbers
    std::vector<int64_t> run_block;
    std::vector<std::vector<WindowChunk>> slabs;  // the vectors to visit, slab by slab
    WindowBlocks blocks;
};

WindowPlan plan_window(const BilateralInput& input);

// Where channels are zero, by blocks of the padded box: pairs of voxels that both send zero need
// not be visited.
class WindowOccupancy {
   public:
    WindowOccupancy(const WindowPlan& plan, int num_channels);

    // Reads a channel of the padded box. Threads may work on different channels.
    void find(int channel, const Voxels& voxels, const float* padded);

    // Whether a voxel of the block, or a voxel paired with it, sends anything.
    bool has_pairs(int channel, int64_t block) const {
        return paired_[channel * plan_.blocks.total + block] != 0;
    }

    // Whether a voxel of these consecutive blocks may receive anything.
    bool receives(int channel, int64_t first_block, int64_t count) const {
        const uint8_t* of_channel = receives_.data() + channel * plan_.blocks.total;
        for (int64_t block = first_block; block < first_block + count; ++block)
            if (of_channel[block]) return true;
        return false;
    }

   private:
    const WindowPlan& plan_;
    std::vector<uint8_t> paired_, receives_;  // (channel, block)
};
}  // namespace crf
