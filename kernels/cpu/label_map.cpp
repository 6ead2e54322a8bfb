#include "cpu/label_map.h"

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
    for (int64_t i = 0; i < count; i += kLanes) {
        vfloat largest = load_some(logits + i, count - i);
        vint label{};
        for (int l = 1; l < num_labels; ++l) {
            const vfloat value = load_some(logits + l * grid_size + i, count - i);
            const vint more = is_greater(value, largest);
            largest = select(more, value, largest);
            label = select(more, splat_lanes(l), label);
        }
        for (int k = 0; k < std::min<int64_t>(kLanes, count - i); ++k) out[i + k] = static_cast<Label>(label[k]);
    }
}

void softmax_piece(const float* logits, int num_labels, int64_t grid_size, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t left = count - i;
        vfloat largest = load_some(logits + i, left), total{};
        for (int l = 1; l < num_labels; ++l) largest = vmax(load_some(logits + l * grid_size + i, left), largest);
        for (int l = 0; l < num_labels; ++l) {
            const vfloat part = exp_nonpositive(load_some(logits + l * grid_size + i, left) - largest);
            store_some(out + l * grid_size + i, part, left);
            total += part;
        }
        for (int l = 0; l < num_labels; ++l)
            store_some(out + l * grid_size + i, load_some(out + l * grid_size + i, left) * (1.0f / total), left);
    }
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
            LaneRange range;
            range.add(channels + c * grid_size + first, count);
            std::tie(lowest[c * num_pieces + first / kPiece], highest[c * num_pieces + first / kPiece]) = range.ends();
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
