#include "cpu/label_map.h"

#include <algorithm>
#include <stdexcept>

#include "cpu/simd.h"
#include "cpu/thread_pool.h"

namespace nb = nanobind;

namespace crf {

namespace {

constexpr int64_t kPiece = 4096;  // voxels: 16 KiB a label, so that a piece of a few labels stays in L1

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
        throw std::invalid_argument("label maps are uint8 or uint16");
    }
}

void softmax(const nb::ndarray<const float, nb::c_contig, nb::device::cpu>& logits, int threads,
             const nb::ndarray<float, nb::c_contig, nb::device::cpu>& out) {
    const int num_labels = static_cast<int>(logits.shape(0));
    const int64_t grid_size = static_cast<int64_t>(logits.size()) / num_labels;
    for_pieces_of_grid(grid_size, threads, [&](int64_t first, int64_t count) {
        softmax_piece(logits.data(), num_labels, grid_size, first, count, out.data());
    });
}

}  // namespace crf
