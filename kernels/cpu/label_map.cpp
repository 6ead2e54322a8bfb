#include "cpu/label_map.h"

#include <algorithm>
#include <limits>

#include "cpu/module_arguments.h"
#include "cpu/simd.h"
#include "cpu/thread_pool.h"

namespace nb = nanobind;

namespace crf {

namespace {

constexpr int64_t kPiece = 4096;  // voxels: 16 KiB per label, so that a piece of a few labels stays in L1

// body(first voxel, number of voxels) over pieces of the grid, in parallel.
template <class Body>
void for_pieces_of_grid(int64_t grid_size, int threads, Body&& body) {
    nb::gil_scoped_release release;
    ThreadPool pool(threads);
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

void label_map(const nb::ndarray<const float, nb::c_contig, nb::device::cpu>& logits, int threads,
               const nb::ndarray<nb::c_contig, nb::device::cpu>& out) {
    require(logits.ndim() > 0 && logits.shape(0) > 0, "expected logits (label, *grid), one label or more");
    require(shape_of(out) == grid_shape(logits), "expected a label map on the grid of the logits");
    require(logits.shape(0) <= (out.dtype() == nb::dtype<uint8_t>() ? 256 : kMostLabels), "expected a type that holds all labels");
    const int num_labels = static_cast<int>(logits.shape(0));
    const int64_t grid_size = static_cast<int64_t>(logits.size()) / num_labels;
    const float* from = logits.data();
    if (out.dtype() == nb::dtype<uint8_t>()) {
        auto* to = static_cast<uint8_t*>(out.data());
        for_pieces_of_grid(grid_size, threads,
                           [&](int64_t first, int64_t count) { argmax_piece(from, num_labels, grid_size, first, count, to); });
    } else if (out.dtype() == nb::dtype<uint16_t>()) {
        auto* to = static_cast<uint16_t*>(out.data());
        for_pieces_of_grid(grid_size, threads,
                           [&](int64_t first, int64_t count) { argmax_piece(from, num_labels, grid_size, first, count, to); });
    } else {
        throw InputError("label maps are uint8 or uint16");
    }
}

void softmax(const nb::ndarray<const float, nb::c_contig, nb::device::cpu>& logits, int threads,
             const nb::ndarray<float, nb::c_contig, nb::device::cpu>& out) {
    require(logits.ndim() > 0 && logits.shape(0) > 0 && logits.shape(0) <= kMostLabels,
            "expected logits (label, *grid), one label or more");
    require(shape_of(out) == shape_of(logits), "expected room for the marginals in the shape of the logits");
    const int num_labels = static_cast<int>(logits.shape(0));
    const int64_t grid_size = static_cast<int64_t>(logits.size()) / num_labels;
    for_pieces_of_grid(grid_size, threads, [&](int64_t first, int64_t count) {
        softmax_piece(logits.data(), num_labels, grid_size, first, count, out.data());
    });
}

std::vector<float> channel_ranges(const nb::ndarray<const float, nb::c_contig, nb::device::cpu>& channels, int threads) {
    require(channels.ndim() > 0, "expected channels on a grid, (channel, *grid)");
    const int64_t num_channels = static_cast<int64_t>(channels.shape(0));
    const int64_t grid_size = num_channels ? static_cast<int64_t>(channels.size()) / num_channels : 0;
    const int64_t num_pieces = (grid_size + kPiece - 1) / kPiece;
    const float* from = channels.data();
    std::vector<float> lowest(num_channels * num_pieces), highest(num_channels * num_pieces);
    for_pieces_of_grid(grid_size, threads, [&](int64_t first, int64_t count) {
        for (int64_t c = 0; c < num_channels; ++c) {
            const float* values = from + c * grid_size + first;
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

}  // namespace crf
