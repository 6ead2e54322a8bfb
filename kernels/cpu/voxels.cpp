// Finds the runs of a mask's voxels and its box; argmax, softmax and ranges of whole grids.
#include "cpu/voxels.h"

#include "cpu/simd.h"
#include "cpu/update.h"

namespace crf {
namespace {
// Length of the piece of one grid row, from `x`, whose mask values are all `inside`.
int64_t piece_length(const uint8_t* row, int64_t x, int64_t length, bool inside) {
    int64_t end = x;
    while (end < length && (row[end] != 0) == inside) ++end;
    return end - x;
}
}  // namespace

Voxels::Voxels(const std::vector<int64_t>& grid_shape, const std::vector<double>& spacing_mm,
               const uint8_t* mask, const std::vector<int>& user_axis) {
    const int grid_axes = static_cast<int>(grid_shape.size());
    grid_size = 1;
    for (int64_t extent : grid_shape) grid_size *= extent;
    if (grid_size == 0) throw InputError("the grid has no voxels");
    const int64_t row_length = grid_shape.back();
    const int64_t num_rows = grid_size / row_length;

    std::vector<int64_t> low(grid_axes, 0), high = grid_shape;
    auto row_coordinates = [&](int64_t row, int64_t* c) {
        for (int a = grid_axes - 2; a >= 0; --a) {
            c[a] = row % grid_shape[a];
            row /= grid_shape[a];
        }
    };
    std::vector<int64_t> c(grid_axes, 0);
    if (mask) {
        low = grid_shape;
        std::fill(high.begin(), high.end(), 0);
        for (int64_t row = 0; row < num_rows; ++row) {
            const uint8_t* values = mask + row * row_length;
            const int64_t first = piece_length(values, 0, row_length, false);
            if (first == row_length) continue;
            int64_t last = row_length - 1;
            while (values[last] == 0) --last;
            row_coordinates(row, c.data());
            for (int a = 0; a < grid_axes - 1; ++a) {
                low[a] = std::min(low[a], c[a]);
                high[a] = std::max(high[a], c[a] + 1);
            }
            low[grid_axes - 1] = std::min(low[grid_axes - 1], first);
            high[grid_axes - 1] = std::max(high[grid_axes - 1], last + 1);
        }
        if (high[grid_axes - 1] == 0) throw InputError("the mask is empty");
    }

    // Axes of one voxel are dropped; the row axis is always kept, because everything is divided
    // into rows.
    std::vector<int64_t> stride(grid_axes, 0), whole(grid_axes, 1);
    box_size = 1;
    for (int a = grid_axes - 1; a >= 0; --a) {
        stride[a] = box_size;
        box_size *= high[a] - low[a];
        if (a > 0) whole[a - 1] = whole[a] * grid_shape[a];
        grid_corner += low[a] * whole[a];
    }
    for (int a = 0; a < grid_axes; ++a) {
        if (high[a] - low[a] == 1 && a != grid_axes - 1) continue;
        if (num_axes == kMaxAxes)
            throw InputError("at most " + std::to_string(kMaxAxes) + " axes longer than one voxel");
        box_shape[num_axes] = high[a] - low[a];
        spacing[num_axes] = spacing_mm[a];
        source_axis[num_axes] = a;
        first[num_axes] = low[a];
        grid_stride[num_axes] = whole[a];
        ++num_axes;
    }
    const auto number = [&](int a) {
        return user_axis.empty() ? source_axis[a] : user_axis[source_axis[a]];
    };
    for (int a = 0; a < num_axes; ++a)
        for (int b = 0; b < num_axes; ++b) feature[a] += number(b) < number(a) ? 1 : 0;

    num_voxels = 0;
    const int64_t x_low = low[grid_axes - 1], x_high = high[grid_axes - 1];
    for (int64_t row = 0; row < num_rows; ++row) {
        row_coordinates(row, c.data());
        int64_t box = 0;
        bool outside = false;
        for (int a = 0; a < grid_axes - 1; ++a) {
            outside |= c[a] < low[a] || c[a] >= high[a];
            box += (c[a] - low[a]) * stride[a];
        }
        if (outside) continue;
        const uint8_t* values = mask ? mask + row * row_length : nullptr;
        for (int64_t x = x_low; x < x_high;) {
            if (values) x += piece_length(values, x, x_high, false);
            if (x >= x_high) break;
            const int64_t length = values ? piece_length(values, x, x_high, true) : x_high - x;
            runs.push_back(
                {num_voxels, row * row_length + x, box + x - x_low, static_cast<int32_t>(length)});
            num_voxels += length;
            x += length;
        }
    }
}

int64_t Voxels::find_run(int64_t voxel) const {
    auto after = std::upper_bound(runs.begin(), runs.end(), voxel,
                                  [](int64_t v, const Run& run) { return v < run.voxel; });
    return (after - runs.begin()) - 1;
}

void Voxels::coordinates(int64_t box_index, int64_t* coordinate) const {
    for (int a = num_axes - 1; a >= 0; --a) {
        coordinate[a] = box_index % box_shape[a];
        box_index /= box_shape[a];
    }
}

int64_t Voxels::grid_index(int64_t box_index) const {
    int64_t place[kMaxAxes], index = grid_corner;
    coordinates(box_index, place);
    for (int a = 0; a < num_axes; ++a) index += place[a] * grid_stride[a];
    return index;
}

namespace {
constexpr int64_t kPiece = 4096;  // voxels

// Voxels of channels on the grid; of the last ones, fewer than sixteen are `left`.
template <class Value>
struct GridLanes {
    Value* first;  // of the first label
    int64_t stride, left;

    vfloat operator[](int label) const { return load_some(first + label * stride, left); }
    void set(int label, const vfloat& value) const {
        store_some(first + label * stride, value, left);
    }
};
}  // namespace

template <class Label>
void label_map(const float* logits, int num_labels, int64_t grid_size, ThreadPool& pool,
               Label* out) {
    pool.run_blocks(grid_size, kPiece, [&](int64_t first, int64_t end, int) {
        for (int64_t i = first; i < end; i += kLanes) {
            const GridLanes<const float> own{logits + i, grid_size, end - i};
            const vint label = largest_label<0>(own, num_labels).label;
            int32_t labels[kLanes];
            store_lanes(labels, label);
            std::copy_n(labels, std::min<int64_t>(kLanes, end - i), out + i);
        }
    });
}

void softmax(const float* logits, int num_labels, int64_t grid_size, ThreadPool& pool, float* out) {
    pool.run_blocks(grid_size, kPiece, [&](int64_t first, int64_t end, int) {
        for (int64_t i = first; i < end; i += kLanes) {
            const int64_t left = end - i;
            update_marginals<0>(GridLanes<const float>{logits + i, grid_size, left},
                                GridLanes<float>{out + i, grid_size, left}, num_labels);
        }
    });
}

std::vector<float> channel_ranges(const float* channels, int64_t num_channels, int64_t grid_size,
                                  ThreadPool& pool) {
    std::vector<float> ranges;
    for (int64_t c = 0; c < num_channels; ++c) {
        const auto add = [&](int64_t begin, int64_t end, LaneRange& range) {
            range.add(channels + c * grid_size + begin, end - begin);
        };
        const auto [least, most] = range_of_blocks(grid_size, kPiece, pool, add);
        ranges.insert(ranges.end(), {least, most});
    }
    return ranges;
}

template void label_map(const float*, int, int64_t, ThreadPool&, uint8_t*);
template void label_map(const float*, int, int64_t, ThreadPool&, uint16_t*);
}  // namespace crf
