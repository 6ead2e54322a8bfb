// Blocks of voxels as rows of kBlockRow numbers, one per label or channel, padded with zeros to
// whole vectors.
#pragma once

#include "cpu/buffer.h"
#include "cpu/simd.h"
#include "cpu/thread_pool.h"
#include "cpu/voxels.h"

namespace crf {
inline int64_t block_end(int64_t block, int64_t num_voxels) {
    return std::min((block + 1) * kVoxelBlock, num_voxels);
}

// From (row, voxel).
inline void load_rows(const float* values, int64_t num_voxels, int64_t block, int num_rows,
                      float* rows) {
    const int64_t begin = block * kVoxelBlock, count = block_end(block, num_voxels) - begin;
    for (int c = 0; c < num_rows; ++c) {
        std::copy(values + c * num_voxels + begin, values + c * num_voxels + begin + count,
                  rows + c * kBlockRow);
        std::fill(rows + c * kBlockRow + count, rows + (c + 1) * kBlockRow, 0.0f);
    }
}

// To (row, voxel).
inline void store_rows(const float* rows, int64_t num_voxels, int64_t block, int num_rows,
                       float* values) {
    const int64_t begin = block * kVoxelBlock, count = block_end(block, num_voxels) - begin;
    for (int c = 0; c < num_rows; ++c)
        std::copy(rows + c * kBlockRow, rows + c * kBlockRow + count,
                  values + c * num_voxels + begin);
}

// Multiplies each row by factors (voxel); empty: by 1.
inline void multiply_rows(const std::vector<float>& factors, int64_t block, int num_rows,
                          float* rows) {
    if (factors.empty()) return;
    const int64_t begin = block * kVoxelBlock;
    const int64_t count = block_end(block, static_cast<int64_t>(factors.size())) - begin;
    for (int c = 0; c < num_rows; ++c)
        for (int64_t i = 0; i < count; ++i) rows[c * kBlockRow + i] *= factors[begin + i];
}

template <class T>
void fill(T* values, int64_t count, T value, ThreadPool& pool) {
    pool.run_blocks(count, kVoxelBlock, [&](int64_t begin, int64_t end, int) {
        std::fill(values + begin, values + end, value);
    });
}

// An array of so many equal numbers.
template <class T = float>
Buffer<T> filled(int64_t count, T value, ThreadPool& pool) {
    Buffer<T> values(count);
    fill(values.get(), count, value, pool);
    return values;
}

// Arrays (label, *grid) or (label, *box of the mask), whatever lies between their rows: a part of a
// larger array need not be copied.

template <class T>
struct GridView {
    T* data = nullptr;
    bool is_box = false;       // on the mask's bounding box, not on the whole grid
    int64_t label_stride = 0;  // elements from one label to the next
    std::vector<int64_t> shape,
        stride;  // of the grid's axes or the box's; voxels of the last axis follow one another

    // Of a label's first element: where a row continues whose linear index on the grid, or on the
    // box, is `index`.
    int64_t place(int64_t index) const {
        int64_t offset = 0;
        for (size_t a = shape.size() - 1; a > 0; --a) {
            offset += index % shape[a] * stride[a];
            index /= shape[a];
        }
        return offset + index * stride[0];
    }
};

// The view of (label, *shape) without gaps.
template <class T>
GridView<T> dense_view(T* data, const std::vector<int64_t>& shape, bool is_box = false) {
    GridView<T> view{data, is_box, 1, shape, shape};
    for (size_t a = shape.size(); a-- > 0;) {
        view.stride[a] = view.label_stride;
        view.label_stride *= shape[a];
    }
    return view;
}

// One row per label, times `scale`.
inline void load_from_grid(const Voxels& voxels, const GridView<const float>& view, float scale,
                           int64_t block, int num_rows, float* rows) {
    const int64_t begin = block * kVoxelBlock, end = block_end(block, voxels.num_voxels);
    voxels.for_pieces(begin, end, [&](int64_t voxel, int64_t grid, int64_t box, int64_t length) {
        const float* from = view.data + view.place(view.is_box ? box : grid);
        for (int l = 0; l < num_rows; ++l, from += view.label_stride) {
            float* to = rows + l * kBlockRow + (voxel - begin);
            for (int64_t i = 0; i < length; ++i) to[i] = from[i] * scale;
        }
    });
    for (int l = 0; l < num_rows; ++l)
        std::fill(rows + l * kBlockRow + (end - begin), rows + (l + 1) * kBlockRow, 0.0f);
}

inline void store_to_grid(const Voxels& voxels, const float* rows, int64_t block, int num_rows,
                          const GridView<float>& view) {
    const int64_t begin = block * kVoxelBlock, end = block_end(block, voxels.num_voxels);
    voxels.for_pieces(begin, end, [&](int64_t voxel, int64_t grid, int64_t box, int64_t length) {
        float* to = view.data + view.place(view.is_box ? box : grid);
        for (int l = 0; l < num_rows; ++l, to += view.label_stride) {
            const float* from = rows + l * kBlockRow + (voxel - begin);
            std::copy(from, from + length, to);
        }
    });
}

// Copies a label to another view, times `scale`, at the places outside the mask; from the box only
// to the box.
inline void copy_outside(const Voxels& voxels, const GridView<const float>& from,
                         const GridView<float>& to, int64_t label, float scale) {
    const int64_t size = to.is_box ? voxels.box_size : voxels.grid_size;
    const int64_t row_length = to.shape.back();
    const float* const source = from.data + label * from.label_stride;
    float* const target = to.data + label * to.label_stride;
    int64_t done = 0;
    const auto copy_up_to = [&](int64_t end) {
        while (done < end) {
            const int64_t length = std::min(end, (done / row_length + 1) * row_length) - done;
            const float* values =
                source + from.place(from.is_box == to.is_box ? done : voxels.grid_index(done));
            float* out = target + to.place(done);
            for (int64_t i = 0; i < length; ++i) out[i] = values[i] * scale;
            done += length;
        }
    };
    for (const Run& run : voxels.runs) {
        const int64_t place = to.is_box ? run.box : run.grid;
        copy_up_to(place);
        done = place + run.length;
    }
    copy_up_to(size);
}
}  // namespace crf
