#include "cpu/label_map.h"

#include <algorithm>
#include <limits>

#include "cpu/simd.h"

namespace crf {

namespace {

constexpr int64_t kPiece = 4096;  // voxels: 16 KiB per label, so that a piece of a few labels stays in L1

// body(first voxel, number of voxels) over pieces of the grid, in parallel.
template <class Body>
void for_pieces_of_grid(int64_t grid_size, ThreadPool& pool, Body&& body) {
    pool.run((grid_size + kPiece - 1) / kPiece,
             [&](int64_t piece, int) { body(piece * kPiece, std::min(kPiece, grid_size - piece * kPiece)); });
}

template <class Label>
void argmax_piece(const float* logits, int num_labels, int64_t grid_size, int64_t first, int64_t count, Label* out) {
    float largest[kPiece];
    Label label[kPiece];
    std::copy(logits + first, logits + first + count, largest);
    std::fill(label, label + count, Label{0});
    for (int l = 1; l < num_labels; ++l) {
        const float* row = logits + l * grid_size + first;
        for (int64_t i = 0; i < count; ++i) {
            const bool more = row[i] > largest[i];
            largest[i] = more ? row[i] : largest[i];
            label[i] = more ? static_cast<Label>(l) : label[i];
        }
    }
    std::copy(label, label + count, out + first);
}

void softmax_piece(const float* logits, int num_labels, int64_t grid_size, int64_t first, int64_t count, float* out) {
    float largest[kPiece], total[kPiece];
    std::copy(logits + first, logits + first + count, largest);
    for (int l = 1; l < num_labels; ++l)
        for (int64_t i = 0; i < count; ++i) largest[i] = std::max(largest[i], logits[l * grid_size + first + i]);
    std::fill(total, total + count, 0.0f);
    for (int l = 0; l < num_labels; ++l) {
        float* row = out + l * grid_size + first;
        for (int64_t i = 0; i < count; ++i) row[i] = logits[l * grid_size + first + i] - largest[i];
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes) store(row + i, exp_nonpositive(load(row + i)));
        if (i < count) {
            float tail[kLanes]{};
            std::copy(row + i, row + count, tail);
            store(tail, exp_nonpositive(load(tail)));
            std::copy(tail, tail + (count - i), row + i);
        }
        for (i = 0; i < count; ++i) total[i] += row[i];
    }
    for (int64_t i = 0; i < count; ++i) total[i] = 1.0f / total[i];
    for (int l = 0; l < num_labels; ++l)
        for (int64_t i = 0; i < count; ++i) out[l * grid_size + first + i] *= total[i];
}

}  // namespace

template <class Label>
void label_map(const float* logits, int num_labels, int64_t grid_size, ThreadPool& pool, Label* out) {
    for_pieces_of_grid(grid_size, pool,
                       [&](int64_t first, int64_t count) { argmax_piece(logits, num_labels, grid_size, first, count, out); });
}

void softmax(const float* logits, int num_labels, int64_t grid_size, ThreadPool& pool, float* out) {
    for_pieces_of_grid(grid_size, pool,
                       [&](int64_t first, int64_t count) { softmax_piece(logits, num_labels, grid_size, first, count, out); });
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
