#include "cpu/label_map.h"

#include <algorithm>
#include <limits>

#include "cpu/simd.h"

namespace crf {

namespace {

constexpr int64_t kPiece = 4096;  // voxels

// body(first voxel, number of voxels) over pieces of the grid, in parallel.
template <class Body>
void for_pieces_of_grid(int64_t grid_size, ThreadPool& pool, Body&& body) {
    pool.run((grid_size + kPiece - 1) / kPiece,
             [&](int64_t piece, int) { body(piece * kPiece, std::min(kPiece, grid_size - piece * kPiece)); });
}

template <class Label>
void argmax_piece(const float* logits, int num_labels, int64_t grid_size, int64_t count, Label* out) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        vfloat largest = load(logits + i);
        vint label{};
        for (int l = 1; l < num_labels; ++l) {
            const vfloat value = load(logits + l * grid_size + i);
            const vint more = is_greater(value, largest);
            largest = select(more, value, largest);
            label = select(more, splat_lanes(l), label);
        }
        for (int k = 0; k < kLanes; ++k) out[i + k] = static_cast<Label>(label[k]);
    }
    for (; i < count; ++i) {
        int label = 0;
        for (int l = 1; l < num_labels; ++l)
            if (logits[l * grid_size + i] > logits[label * grid_size + i]) label = l;
        out[i] = static_cast<Label>(label);
    }
}

// Of as many voxels as there are lanes.
void softmax_lanes(const float* logits, int num_labels, int64_t stride, float* out) {
    vfloat largest = load(logits), total{};
    for (int l = 1; l < num_labels; ++l) largest = vmax(load(logits + l * stride), largest);
    for (int l = 0; l < num_labels; ++l) {
        const vfloat part = exp_nonpositive(load(logits + l * stride) - largest);
        store(out + l * stride, part);
        total += part;
    }
    for (int l = 0; l < num_labels; ++l) store(out + l * stride, load(out + l * stride) * (1.0f / total));
}

void softmax_piece(const float* logits, int num_labels, int64_t grid_size, int64_t count, float* out) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) softmax_lanes(logits + i, num_labels, grid_size, out + i);
    if (i == count) return;
    std::vector<float> rest(num_labels * kLanes);
    for (int l = 0; l < num_labels; ++l) std::copy_n(logits + l * grid_size + i, count - i, rest.data() + l * kLanes);
    softmax_lanes(rest.data(), num_labels, kLanes, rest.data());
    for (int l = 0; l < num_labels; ++l) std::copy_n(rest.data() + l * kLanes, count - i, out + l * grid_size + i);
}

}  // namespace

template <class Label>
void label_map(const float* logits, int num_labels, int64_t grid_size, ThreadPool& pool, Label* out) {
    for_pieces_of_grid(grid_size, pool,
                       [&](int64_t first, int64_t count) { argmax_piece(logits + first, num_labels, grid_size, count, out + first); });
}

void softmax(const float* logits, int num_labels, int64_t grid_size, ThreadPool& pool, float* out) {
    for_pieces_of_grid(grid_size, pool,
                       [&](int64_t first, int64_t count) { softmax_piece(logits + first, num_labels, grid_size, count, out + first); });
}

std::vector<float> channel_ranges(const float* channels, int64_t num_channels, int64_t grid_size, ThreadPool& pool) {
    const int64_t num_pieces = (grid_size + kPiece - 1) / kPiece;
    std::vector<float> lowest(num_channels * num_pieces), highest(num_channels * num_pieces);
    for_pieces_of_grid(grid_size, pool, [&](int64_t first, int64_t count) {
        for (int64_t c = 0; c < num_channels; ++c) {
            const float* values = channels + c * grid_size + first;
            vfloat low = splat_lanes(values[0]), high = low, poison{};
            int64_t i = 0;
            for (; i + kLanes <= count; i += kLanes) {
                const vfloat v = load(values + i);
                low = vmin(v, low);
                high = vmax(v, high);
                poison += v * 0.0f;  // NaN from now on once a value is NaN or infinite
            }
            float least = values[0], most = values[0], bad = sum_lanes(poison);
            for (int lane = 0; lane < kLanes; ++lane) {
                least = std::min(least, low[lane]);
                most = std::max(most, high[lane]);
            }
            for (; i < count; ++i) {
                least = std::min(least, values[i]);
                most = std::max(most, values[i]);
                bad += values[i] * 0.0f;
            }
            const bool finite = bad == 0.0f;
            lowest[c * num_pieces + first / kPiece] = finite ? least : std::numeric_limits<float>::quiet_NaN();
            highest[c * num_pieces + first / kPiece] = finite ? most : std::numeric_limits<float>::quiet_NaN();
        }
    });
    std::vector<float> ranges;
    for (int64_t c = 0; c < num_channels; ++c) {
        float least = std::numeric_limits<float>::infinity(), most = -least;
        for (int64_t p = c * num_pieces; p < (c + 1) * num_pieces; ++p) {
            least = lowest[p] >= least ? least : lowest[p];  // NaN stays
            most = highest[p] <= most ? most : highest[p];
            if (lowest[p] != lowest[p]) break;
        }
        ranges.push_back(least);
        ranges.push_back(most);
    }
    return ranges;
}

template void label_map(const float*, int, int64_t, ThreadPool&, uint8_t*);
template void label_map(const float*, int, int64_t, ThreadPool&, uint16_t*);

}  // namespace crf
