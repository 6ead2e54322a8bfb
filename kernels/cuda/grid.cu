// The bilateral grid between its planes of cells (grid_voxels.cu): they are added up along the axes
// before the last two of the box, filtered, and blended again. Arrays are (before, along the axis,
// after); sums are gathered in a fixed order. The three taps of an axis before the last are in the
// weights, which reach one cell further at either end. blur_cells does the others. CRF_WIDTH:
// channels that are filtered together. CRF_MODALITIES: 1 or 2.
#include "cuda/launch.h"
#include "grid_math.h"

namespace crf {
using Channels = Row<CRF_WIDTH>;

// One thread per cell of `to`, (before, cell, after): the sum of the places that reach it.
// first_cell: (place) the first cell under its spline. begin: (cell + 1) the first place whose
// spline begins at this cell or a later one. reach: (place, kSpan + 2) weights from the cell before
// the first one on. from: (before, place, after).
CRF_KERNEL(splat_axis, const Channels* from, int64 num_threads, int64 num_places, int64 num_cells,
           int64 after, const int* first_cell, const int* begin, const Real* reach, Channels* to) {
    const int64 i = thread_number();
    if (i >= num_threads) return;
    const int64 cell = i / after % num_cells,
                place = i / after / num_cells * num_places * after + i % after;
    const int64 first = begin[cell < kSpan ? 0 : cell - kSpan],
                end = begin[cell + 2 < num_cells ? cell + 2 : num_cells];
    Channels total = zero_row<CRF_WIDTH>();
    for (int64 p = first; p < end; ++p)
        add_scaled(total, from[place + p * after],
                   reach[p * (kSpan + 2) + cell - first_cell[p] + 1]);
    to[i] = total;
}

// One thread per place of `to`, (before, place, after): blends the cells under its spline. weight:
// (place, kSpan). Others: see splat_axis.
CRF_KERNEL(slice_axis, const Channels* from, int64 num_threads, int64 num_places, int64 num_cells,
           int64 after, const int* first_cell, const Real* weight, Channels* to) {
    const int64 i = thread_number();
    if (i >= num_threads) return;
    const int64 p = i / after % num_places;
    const int64 cell = (i / after / num_places * num_cells + first_cell[p]) * after + i % after;
    Channels total = zero_row<CRF_WIDTH>();
    CRF_UNROLL
    for (int j = 0; j < kSpan; ++j)
        add_scaled(total, from[cell + j * after], weight[p * kSpan + j]);
    to[i] = total;
}

CRF_D Real tap(int distance) { return static_cast<Real>(distance == 0 ? kCenterTap : kSideTap); }

// One thread per cell, (before, cell along the last axis, intensity cells): the three taps along
// the last axis and each modality. bins, inner_bins: intensity cells, and those of the second
// modality among them.
CRF_KERNEL(blur_cells, const Channels* from, int64 num_threads, int64 num_cells, int64 bins,
           int64 inner_bins, Channels* to) {
    const int64 i = thread_number();
    if (i >= num_threads) return;
    constexpr int kInner = CRF_MODALITIES == 2 ? 1 : 0;
    const int64 cell = i / bins % num_cells, bin = i % bins / inner_bins, inner = i % inner_bins;
    Channels total = zero_row<CRF_WIDTH>();
    CRF_UNROLL
    for (int x = -1; x <= 1; ++x) {
        CRF_UNROLL
        for (int a = -1; a <= 1; ++a) {
            if (cell + x < 0 || cell + x >= num_cells || bin + a < 0 ||
                (bin + a) * inner_bins >= bins)
                continue;
            CRF_UNROLL
            for (int b = -kInner; b <= kInner; ++b) {
                if (inner + b < 0 || inner + b >= inner_bins) continue;
                const Real factor = tap(x) * tap(a) * (kInner ? tap(b) : Real(1.0));
                add_scaled(total, from[i + x * bins + a * inner_bins + b], factor);
            }
        }
    }
    to[i] = total;
}
}  // namespace crf
