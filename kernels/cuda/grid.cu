// The bilateral grid along one axis at a time: planes of cells (grid_voxels.cu) added up along the axes before the last two of the box, the
// filter of three taps, and the way back to planes. Arrays are (before, along the axis, after); sums are gathered in a fixed order.
//
// CRF_WIDTH: channels that are filtered together.
#include "cuda/launch.h"
#include "grid_math.h"

namespace crf {

using Channels = Row<CRF_WIDTH>;

// One thread per cell of `to`, (before, cell, after): the sum of the places whose splines reach it.
//
// first_cell: (place) the first cell under its spline. begin: (cell + 1) the first place whose spline begins at this cell or a later one.
// weight: (place, kSpan). from: (before, place, after).
CRF_KERNEL(splat_axis, const Channels* from, int64 num_threads, int64 num_places, int64 num_cells, int64 after, const int* first_cell,
           const int* begin, const Real* weight, Channels* to) {
    const int64 i = thread_number();
    if (i >= num_threads) return;
    const int64 cell = i / after % num_cells, place = i / after / num_cells * num_places * after + i % after;
    const int64 end = begin[cell + 1];
    Channels total = zero_row<CRF_WIDTH>();
    for (int64 p = begin[cell < kSpan - 1 ? 0 : cell - (kSpan - 1)]; p < end; ++p)
        add_scaled(total, from[place + p * after], weight[p * kSpan + cell - first_cell[p]]);
    to[i] = total;
}

// One thread per place of `to`, (before, place, after): the four cells under its spline, blended. Others as in splat_axis.
CRF_KERNEL(slice_axis, const Channels* from, int64 num_threads, int64 num_places, int64 num_cells, int64 after, const int* first_cell,
           const Real* weight, Channels* to) {
    const int64 i = thread_number();
    if (i >= num_threads) return;
    const int64 p = i / after % num_places;
    const int64 cell = (i / after / num_places * num_cells + first_cell[p]) * after + i % after;
    Channels total = zero_row<CRF_WIDTH>();
    CRF_UNROLL
    for (int j = 0; j < kSpan; ++j) add_scaled(total, from[cell + j * after], weight[p * kSpan + j]);
    to[i] = total;
}

// One thread per cell, (before, cell, after): the filter of three taps along the axis.
CRF_KERNEL(blur_axis, const Channels* from, int64 num_threads, int64 num_cells, int64 after, Channels* to) {
    const int64 i = thread_number();
    if (i >= num_threads) return;
    const int64 cell = i / after % num_cells;
    Channels total = zero_row<CRF_WIDTH>();
    add_scaled(total, from[i], Real(kCenterTap));
    if (cell > 0) add_scaled(total, from[i - after], Real(kSideTap));
    if (cell + 1 < num_cells) add_scaled(total, from[i + after], Real(kSideTap));
    to[i] = total;
}

}  // namespace crf
