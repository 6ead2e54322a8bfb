// Where channels are zero, by blocks of the padded box: pairs of voxels that both send zero need not be visited.
//
// Where labels share channels, most channels are zero in most places.
#pragma once

#include <vector>

#include "cpu/window_plan.h"

namespace crf {

class WindowOccupancy {
   public:
    WindowOccupancy(const WindowPlan& plan, int num_channels);

    // Reads a channel of the padded box. Threads may work on different channels.
    void find(int channel, const Voxels& voxels, const float* padded);

    // Whether a voxel of the block, or one that its voxels are paired with, sends anything.
    bool has_pairs(int channel, int64_t block) const { return paired_[channel * plan_.blocks.total + block] != 0; }

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
