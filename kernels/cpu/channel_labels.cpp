#include "cpu/channel_labels.h"

#include <map>

namespace crf {

ChannelLabels::ChannelLabels(const Voxels& voxels, const std::vector<int64_t>& grid_shape, const std::vector<int64_t>& tile,
                             const int32_t* table, int num_channels, int num_labels)
    : num_channels_(num_channels), num_labels_(num_labels), num_voxels_(voxels.num_voxels) {
    const int num_axes = static_cast<int>(grid_shape.size());
    std::vector<int64_t> stride(num_axes);  // in tiles
    int64_t num_tiles = 1;
    for (int a = num_axes - 1; a >= 0; --a) {
        stride[a] = num_tiles;
        num_tiles *= (grid_shape[a] + tile[a] - 1) / tile[a];
    }
    std::map<std::vector<int32_t>, int64_t> known;
    std::vector<int64_t> set_of_tile(num_tiles);
    std::vector<int32_t> labels(num_channels);
    for (int64_t t = 0; t < num_tiles; ++t) {
        for (int c = 0; c < num_channels; ++c) labels[c] = std::max(table[c * num_tiles + t], 0);
        const auto [set, is_new] = known.try_emplace(labels, static_cast<int64_t>(known.size()));
        if (is_new) sets_.insert(sets_.end(), labels.begin(), labels.end());
        set_of_tile[t] = set->second;
    }
    const int last = num_axes - 1;
    for (const Run& run : voxels.runs) {
        int64_t rest = run.grid / grid_shape[last], row = 0;
        for (int a = last - 1; a >= 0; --a) {
            row += rest % grid_shape[a] / tile[a] * stride[a];
            rest /= grid_shape[a];
        }
        const int64_t start = run.grid % grid_shape[last];
        for (int64_t i = 0; i < run.length;) {
            const int64_t column = (start + i) / tile[last], set = set_of_tile[row + column];
            if (stretches_.empty() || stretches_.back().set != set) stretches_.push_back({run.voxel + i, set});
            i = (column + 1) * tile[last] - start;
        }
    }
}

}  // namespace crf
