// The voxels of the model: those inside the mask, numbered in raster order ("compact" index n),
// inside the mask's bounding box.
#pragma once

#include "cpu/thread_pool.h"

namespace crf {
constexpr int kMaxAxes = numerics::MAX_AXES;

// Along planes, rows of a plane, and voxels of a row.
typedef std::array<int64_t, 3> Extents;

// Consecutive voxels along the last axis, all inside the mask.
struct Run {
    int64_t voxel;  // compact index of the first
    int64_t grid;   // its linear index in the whole grid
    int64_t box;    // its linear index in the bounding box
    int32_t length;
};

constexpr int64_t kRunBlock = 256;  // runs that a thread takes at a time

struct Voxels {
    int num_axes = 0;  // axes of the box that are longer than one voxel (at least one axis is kept)
    int64_t box_shape[kMaxAxes]{};  // C order, last axis fastest
    double spacing[kMaxAxes]{};     // mm
    int source_axis[kMaxAxes]{};    // the grid's axis that each box axis came from
    int64_t first[kMaxAxes]{};      // the box's first voxel along that axis, in the grid
    // from one voxel along that axis to the next, in linear indices of the grid
    int64_t grid_stride[kMaxAxes]{};
    // index of the axis among the positions of the features; independent of its place in memory
    int feature[kMaxAxes]{};
    int64_t grid_size = 0;
    int64_t grid_corner = 0;  // linear index of the box's first voxel in the grid
    int64_t box_size = 0;
    int64_t num_voxels = 0;
    std::vector<Run> runs;

    // mask: nullptr, or grid_size bytes, nonzero = inside. Throws InputError if no voxel is inside.
    // user_axis: the user's number of each axis, if the grid is a transposed view of the user's;
    // empty: the same order.
    Voxels(const std::vector<int64_t>& grid_shape, const std::vector<double>& spacing_mm,
           const uint8_t* mask, const std::vector<int>& user_axis = {});

    // The run that holds compact voxel n.
    int64_t find_run(int64_t voxel) const;

    // The first run of each of some parts of the box or the grid, and the end. part_of(run)
    // ascends.
    template <class PartOf>
    std::vector<int64_t> first_runs(int64_t num_parts, PartOf&& part_of) const {
        std::vector<int64_t> first(num_parts + 1);
        for (const Run& run : runs) ++first[part_of(run) + 1];
        std::partial_sum(first.begin(), first.end(), first.begin());
        return first;
    }

    // Coordinates in the box of a linear box index.
    void coordinates(int64_t box_index, int64_t* coordinate) const;

    // Linear index in the grid of a linear box index.
    int64_t grid_index(int64_t box_index) const;

    // Calls body(voxel, grid, box, length) for each part of a run within compact voxels [begin,
    // end).
    template <class Body>
    [[gnu::always_inline]] void for_pieces(int64_t begin, int64_t end, Body&& body) const {
        for (int64_t r = find_run(begin); begin < end; ++r) {
            const Run& run = runs[r];
            const int64_t skip = begin - run.voxel;
            const int64_t length = std::min<int64_t>(run.length - skip, end - begin);
            body(begin, run.grid + skip, run.box + skip, length);
            begin += length;
        }
    }
};

// Blocks of compact voxels for loops over voxels: fixed size, so that sums over blocks do not
// depend on the number of threads.
constexpr int64_t kVoxelBlock = 1024;
// Distance between rows of a block. Rows a power of two apart would share one set of the L1 cache.
constexpr int64_t kBlockRow = kVoxelBlock + 16;
inline int64_t num_voxel_blocks(int64_t num_voxels) { return divided_up(num_voxels, kVoxelBlock); }

// A range of consecutive items, such as the floats of a row that hold numbers: [begin, end).
struct Stretch {
    int64_t begin = 0, end = 0;

    bool is_empty() const { return begin >= end; }
    // The smallest stretch around both.
    Stretch with(const Stretch& other) const {
        if (is_empty()) return other;
        if (other.is_empty()) return *this;
        return {std::min(begin, other.begin), std::max(end, other.end)};
    }
    Stretch within(const Stretch& other) const {
        return {std::max(begin, other.begin), std::min(end, other.end)};
    }
};

// Functions of a whole grid, voxel by voxel.

// logits: (label, *grid). out: (*grid). Label: uint8_t or uint16_t. Ties go to the lowest label.
template <class Label>
void label_map(const float* logits, int num_labels, int64_t grid_size, ThreadPool& pool,
               Label* out);

// out: (label, *grid), sums to 1 over labels; may be the logits.
void softmax(const float* logits, int num_labels, int64_t grid_size, ThreadPool& pool, float* out);

// Smallest and largest value of each channel of (channel, *grid), in turn; both NaN for a channel
// with a value that is not finite.
std::vector<float> channel_ranges(const float* channels, int64_t num_channels, int64_t grid_size,
                                  ThreadPool& pool);
}  // namespace crf
