// The spatial kernel, axis by axis on the mask's bounding box: a product of one-dimensional
// Gaussians. CRF_WIDTH: channels that are filtered together. CRF_THREADS: per block of
// `filter_planes`. CRF_TILE_COLUMNS, CRF_TILE_ROWS: places of its tiles. CRF_REACH: rows on either
// side of a tile that a block has memory for.
#include "cuda/filter_ends.h"

namespace crf {
using Channels = Row<CRF_WIDTH>;

// One thread per place of the box: the Gaussian along one axis. The first pass reads the voxels'
// values, the last one adds to their sums: sum += channel_weight * received * the Gaussian; see
// put_weighted. number: (place) number of the voxel, -1: none; nullptr: all places are voxels, in
// order. values: (voxel), with the factors `sent`, or nullptr: `box` is filtered, (place). stride,
// extent: of the axis in the box. taps: (radius + 1) weights at distance 0, 1, ... sum: (voxel), or
// nullptr: the result goes to `next_box`, (place). sent, received: (voxel) or nullptr for ones.
CRF_KERNEL(filter_axis, const int* number, int64 box_size, const Channels* values, const Real* sent,
           const Channels* box, int64 stride, int64 extent, const Real* taps, int64 radius,
           Channels* next_box, const Real* received, const Real* channel_weight, Channels* sum,
           int adds) {
    const int64 i = thread_number();
    if (i >= box_size) return;
    const int64 own = number ? number[i] : i;
    if (sum && own < 0) return;
    const BoxAxis axis{stride, extent, taps, radius};
    const int64 x = axis.coordinate_of(i);
    const Channels total =
        values ? axis.filtered_values(values, sent, number, i, x) : axis.filtered_box(box, i, x);
    if (sum)
        put_weighted(sum, own, total, received ? received[own] : Real(1.0), channel_weight, adds);
    else
        next_box[i] = total;
}

// One block per tile of a plane of the box's last two axes: the Gaussian along both, the last axis
// first, from the voxels' values to `box`, (place). The filtered rows of a tile, with those that
// the other axis reads on either side, stay in the block. A plane has `height` rows of `width`
// places. row_*: the taps along a row; column_*: those across rows, column_radius <= CRF_REACH. For
// the others see filter_axis.
CRF_BLOCK_KERNEL(filter_planes, const int* number, const Channels* values, const Real* sent,
                 int64 width, int64 height, const Real* row_taps, int64 row_radius,
                 const Real* column_taps, int64 column_radius, Channels* box) {
    constexpr int kRowsOfThreads = CRF_THREADS / CRF_TILE_COLUMNS;
    CRF_SHARED(Channels, rows, (CRF_TILE_ROWS + 2 * CRF_REACH) * CRF_TILE_COLUMNS);
    const int64 tiles_across = (width + CRF_TILE_COLUMNS - 1) / CRF_TILE_COLUMNS;
    const int64 tiles_down = (height + CRF_TILE_ROWS - 1) / CRF_TILE_ROWS;
    const int64 tile = block_number() % (tiles_across * tiles_down);
    const int64 plane = block_number() / (tiles_across * tiles_down) * height * width;
    const int64 first_row = tile / tiles_across * CRF_TILE_ROWS;
    const int64 first_column = tile % tiles_across * CRF_TILE_COLUMNS;
    const int reach = static_cast<int>(column_radius);
    const BoxAxis along_row{1, width, row_taps, row_radius};
    const BoxAxis along_column{width, height, column_taps, column_radius};
    CRF_PHASE(thread) {
        const int column = thread % CRF_TILE_COLUMNS;
        const int64 x = first_column + column;
        for (int r = thread / CRF_TILE_COLUMNS; r < CRF_TILE_ROWS + 2 * reach;
             r += kRowsOfThreads) {
            const int64 y = first_row + r - reach;
            if (x >= width || y < 0 || y >= height) continue;
            const Channels total =
                along_row.filtered_values(values, sent, number, plane + y * width + x, x);
            rows[r * CRF_TILE_COLUMNS + column] = total;
        }
    }
    CRF_PHASE(thread) {
        const int column = thread % CRF_TILE_COLUMNS;
        const int64 x = first_column + column;
        for (int r = thread / CRF_TILE_COLUMNS; r < CRF_TILE_ROWS; r += kRowsOfThreads) {
            const int64 y = first_row + r;
            if (x >= width || y >= height) continue;
            const int last = static_cast<int>(along_column.last_of(y));
            Channels total = zero_row<CRF_WIDTH>();
            for (int k = static_cast<int>(along_column.first_of(y)); k <= last; ++k) {
                const Channels row = rows[(r + reach + k) * CRF_TILE_COLUMNS + column];
                add_scaled(total, row, along_column.tap(k));
            }
            box[plane + y * width + x] = total;
        }
    }
}

// One thread per voxel of a box without gaps: the products over the axes of two factors of its
// coordinates. extent: (axis). factors: (2, sum of the extents), those of the first axis first.
// second: nullptr if it is not wanted.
CRF_KERNEL(multiply_axes, const int64* extent, int num_axes, const Real* factors, int64 num_factors,
           int64 box_size, Real* first, Real* second) {
    const int64 i = thread_number();
    if (i >= box_size) return;
    Real first_product = Real(1.0), second_product = Real(1.0);
    int64 rest = i, end = num_factors;
    for (int a = num_axes - 1; a >= 0; --a) {
        const int64 place = end - extent[a] + rest % extent[a];
        first_product *= factors[place];
        second_product *= factors[num_factors + place];
        rest /= extent[a];
        end -= extent[a];
    }
    first[i] = first_product;
    if (second) second[i] = second_product;
}
}  // namespace crf
