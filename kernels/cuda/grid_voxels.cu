// Between the voxels and the cells of the bilateral grid, one plane of the box's last two axes at a
// time, in blocks (from planes on: grid.cu). Every cell and every voxel gathers its own sum in a
// fixed order: the same bits on every run. A plane has (row cell, cell, intensity cell) cells;
// `rows` are along the last axis but one, `cells` along the last. CRF_WIDTH: channels that are
// filtered together. CRF_MODALITIES: 1 or 2. CRF_THREADS: per block, four warps. CRF_CELLS: cells
// of a block of slice_tiles in shared memory at a time, at least those of one intensity cell under
// kRows times kLanes voxels.
#include "cuda/launch.h"
#include "grid_math.h"

namespace crf {
using Channels = Row<CRF_WIDTH>;
using Weights = Row<kSpan>;  // of the cells from a place's first one on
constexpr int kPart = CRF_WIDTH < 4
                          ? CRF_WIDTH
                          : 4;  // channels per thread of splat_planes: as many as registers hold
constexpr int kParts = CRF_WIDTH / kPart;
constexpr int kLanes = 32, kRows = CRF_THREADS / kLanes;  // of a tile of voxels

// The cubic B-spline at a distance in cells.
CRF_D Real spline(Real distance) {
    const Real r = distance < Real(0.0) ? -distance : distance;
    const Real outer = larger(Real(2.0) - r, Real(0.0)), inner = larger(Real(1.0) - r, Real(0.0));
    return (outer * outer * outer - Real(4.0) * inner * inner * inner) * Real(1.0 / 6.0);
}

// Sums of rows at the four cells along the last axis under a group of voxels, for each of four
// cells along the axis before.
struct Window {
    Row<kPart> at[kSpan][kSpan];
};

// One block per plane, part of the channels, and group of cells along the last axis times intensity
// cells. A thread adds up the voxels between two points of the grid, for one intensity cell, row
// after row. The parts of four neighbors meet in shared memory. values: (voxel). scale: (voxel) or
// nullptr for ones. intensity: (modality, voxel) in cells, from the lowest one. number: (place of
// the box) number of the voxel, -1: none; nullptr: all places are voxels, in order. row_begin,
// begin: (cell + 1) first row, or place along the last axis, whose splines begin at this cell or a
// later one. row_weight, weight: (row or place). bins, inner_bins: intensity cells, and those of
// the second modality among them. homes_at_once * bins_at_once <= CRF_THREADS. planes: (plane, row
// cell, cell, intensity cell).
CRF_BLOCK_KERNEL(splat_planes, const Channels* values, const Real* scale, const Real* intensity,
                 const int* number, int64 num_voxels, int64 num_rows, int64 row_length,
                 const int* row_begin, const Real* row_weight, int64 row_cells, const int* begin,
                 const Real* weight, int64 num_cells, int64 bins, int64 inner_bins,
                 int homes_at_once, int bins_at_once, Channels* planes) {
    CRF_SHARED(Row<kPart>, found, kSpan * CRF_THREADS);
    CRF_PER_THREAD(Window, window);

    // Groups after the first begin three cells early, for what reaches into their own cells from
    // there.
    const int64 step = homes_at_once - (kSpan - 1);
    const int64 groups =
        num_cells <= homes_at_once ? 1 : 1 + (num_cells - homes_at_once + step - 1) / step;
    const int64 bin_groups = (bins + bins_at_once - 1) / bins_at_once;
    const int64 group = block_number() % groups, first_home = group * step;
    const int64 first_bin = block_number() / groups % bin_groups * bins_at_once;
    const int64 part = block_number() / (groups * bin_groups) % kParts,
                plane = block_number() / (groups * bin_groups * kParts);
    const int first_own = group == 0 ? 0 : kSpan - 1;
    const Row<kPart>* parts = reinterpret_cast<const Row<kPart>*>(values) + part;

    CRF_PHASE(thread) {
        Window empty;
        CRF_UNROLL
        for (int j = 0; j < kSpan; ++j) {
            CRF_UNROLL
            for (int k = 0; k < kSpan; ++k) empty.at[j][k] = zero_row<kPart>();
        }
        window[thread] = empty;
    }
    for (int64 row_cell = 0; row_cell < row_cells; ++row_cell) {
        const int64 first_row = row_begin[row_cell], end_row = row_begin[row_cell + 1];
        CRF_PHASE(thread) {
            const int64 home = first_home + thread / bins_at_once,
                        bin = first_bin + thread % bins_at_once;
            if (thread / bins_at_once >= homes_at_once || home >= num_cells || bin >= bins)
                continue;
            // A cell's spline is centered one cell after the first that it reaches.
            const Real center = static_cast<Real>(bin / inner_bins - 1),
                       inner_center = static_cast<Real>(bin % inner_bins - 1);
            const int first = begin[home], end = begin[home + 1];
            Window own = window[thread];
            for (int64 row = first_row; row < end_row; ++row) {
                const int64 first_place = (plane * num_rows + row) * row_length;
                Row<kPart> along[kSpan];
                CRF_UNROLL
                for (int k = 0; k < kSpan; ++k) along[k] = zero_row<kPart>();
                CRF_ROLLED
                for (int64 x = first; x < end; ++x) {
                    const int64 n = number ? number[first_place + x] : first_place + x;
                    if (n < 0) continue;
                    Real factor = spline(intensity[n] - center);
                    if (CRF_MODALITIES == 2)
                        factor *= spline(intensity[num_voxels + n] - inner_center);
                    if (scale) factor *= scale[n];
                    const Row<kPart> sent = parts[n * kParts];
                    const Weights at = reinterpret_cast<const Weights*>(weight)[x];
                    CRF_UNROLL
                    for (int k = 0; k < kSpan; ++k)
                        add_scaled(along[k], sent, factor * at.value[k]);
                }
                const Weights across = reinterpret_cast<const Weights*>(row_weight)[row];
                CRF_UNROLL
                for (int j = 0; j < kSpan; ++j) {
                    CRF_UNROLL
                    for (int k = 0; k < kSpan; ++k)
                        add_scaled(own.at[j][k], along[k], across.value[j]);
                }
            }
            // All rows that reach this cell are there; the next one becomes the first.
            CRF_UNROLL
            for (int k = 0; k < kSpan; ++k) {
                found[k * CRF_THREADS + thread] = own.at[0][k];
                CRF_UNROLL
                for (int j = 0; j + 1 < kSpan; ++j) own.at[j][k] = own.at[j + 1][k];
                own.at[kSpan - 1][k] = zero_row<kPart>();
            }
            window[thread] = own;
        }
        CRF_PHASE(thread) {
            const int place = thread / bins_at_once;
            const int64 cell = first_home + place, bin = first_bin + thread % bins_at_once;
            if (place < first_own || place >= homes_at_once || cell >= num_cells || bin >= bins)
                continue;
            Row<kPart> total = found[thread];
            CRF_UNROLL
            for (int k = 1; k < kSpan; ++k) {
                if (place < k) continue;
                const Row<kPart> other = found[k * CRF_THREADS + thread - k * bins_at_once];
                add_scaled(total, other, Real(1.0));
            }
            reinterpret_cast<Row<kPart>*>(
                planes)[(((plane * row_cells + row_cell) * num_cells + cell) * bins + bin) *
                            kParts +
                        part] = total;
        }
    }
}

// One block per tile of kRows x kLanes places, one thread per place: sum += channel_weight * scale
// * (cells under the voxel, blended); see put_weighted. The cells are blended across rows first, in
// shared memory, where the voxels of a row share them. tiles: (block) numbers of the tiles, along
// the last axis first. row_cell, cell: (row or place) the first cell under its spline. row_reach:
// (row, kSpan + 2) weights from the cell before that on, with the three taps across rows. Others as
// in splat_planes.
CRF_BLOCK_KERNEL(slice_tiles, const Channels* planes, const int64* tiles, const Real* intensity,
                 const int* number, int64 num_voxels, int64 num_rows, int64 row_length,
                 const int* row_cell, const Real* row_reach, int64 row_cells, const int* cell,
                 const Real* weight, int64 num_cells, int64 bins, int64 inner_bins,
                 const Real* scale, const Real* channel_weight, Channels* sum, int adds) {
    CRF_SHARED(Channels, blended, CRF_CELLS);
    CRF_PER_THREAD(Channels, total);
    CRF_PER_THREAD(int64, voxel);  // -1: none

    const int64 tiles_in_row = (row_length + kLanes - 1) / kLanes,
                rows_of_tiles = (num_rows + kRows - 1) / kRows;
    const int64 tile = tiles[block_number()];
    const int64 first_x = tile % tiles_in_row * kLanes,
                first_row = tile / tiles_in_row % rows_of_tiles * kRows;
    const int64 plane = tile / tiles_in_row / rows_of_tiles;
    const int64 last_x = (row_length < first_x + kLanes ? row_length : first_x + kLanes) - 1;
    const int rows = num_rows - first_row < kRows ? static_cast<int>(num_rows - first_row) : kRows;
    const int first_cell = cell[first_x], width = cell[last_x] + kSpan - first_cell;
    // None fits only if the tables are damaged: then the sums are no numbers, where a loop would
    // never end.
    const int most = width < kSpan ? 0 : CRF_CELLS / (kRows * width);
    CRF_PHASE(thread) {
        total[thread] = zero_row<CRF_WIDTH>();
        if (most == 0) total[thread].value[0] = sqrt(Real(-1.0));
        voxel[thread] = -1;
        const int row = thread / kLanes;
        const int64 x = first_x + thread % kLanes;
        if (row >= rows || x > last_x) continue;
        const int64 place = (plane * num_rows + first_row + row) * row_length + x;
        voxel[thread] = number ? number[place] : place;
    }
    for (int64 first_bin = 0; first_bin < bins && most > 0; first_bin += most) {
        const int count = bins - first_bin < most ? static_cast<int>(bins - first_bin) : most;
        CRF_PHASE(thread) {
            CRF_ROLLED
            for (int i = thread; i < rows * width * count; i += CRF_THREADS) {
                const int64 row = first_row + i / (width * count);
                const Channels* there =
                    planes +
                    (plane * row_cells * num_cells + first_cell + i / count % width) * bins +
                    first_bin + i % count;
                Channels at = zero_row<CRF_WIDTH>();
                CRF_UNROLL
                for (int j = 0; j < kSpan + 2; ++j) {
                    const int64 c = row_cell[row] - 1 + j;
                    if (c >= 0 && c < row_cells)
                        add_scaled(at, there[c * num_cells * bins],
                                   row_reach[row * (kSpan + 2) + j]);
                }
                blended[i] = at;
            }
        }
        CRF_PHASE(thread) {
            const int64 n = voxel[thread], x = first_x + thread % kLanes;
            if (n < 0) continue;
            const Weights along = reinterpret_cast<const Weights*>(weight)[x];
            const int own = (thread / kLanes * width + cell[x] - first_cell) * count;
            const Real u = intensity[n];
            const int home = static_cast<int>(u);  // the floor: u is not negative
            const Real inner_u = CRF_MODALITIES == 2 ? intensity[num_voxels + n] : Real(0.0);
            const int inner_home = static_cast<int>(inner_u);
            Channels sliced = total[thread];
            CRF_ROLLED
            for (int k = 0; k < (CRF_MODALITIES == 2 ? kSpan * kSpan : kSpan); ++k) {
                const int a = CRF_MODALITIES == 2 ? home + k / kSpan : home + k;
                const int b = inner_home + k % kSpan;
                const int64 bin = (CRF_MODALITIES == 2 ? a * inner_bins + b : a) - first_bin;
                if (bin < 0 || bin >= count) continue;
                Real factor = spline(u - static_cast<Real>(a - 1));
                if (CRF_MODALITIES == 2) factor *= spline(inner_u - static_cast<Real>(b - 1));
                CRF_UNROLL
                for (int j = 0; j < kSpan; ++j) {
                    const Channels at = blended[own + j * count + static_cast<int>(bin)];
                    add_scaled(sliced, at, factor * along.value[j]);
                }
            }
            total[thread] = sliced;
        }
    }
    CRF_PHASE(thread) {
        const int64 n = voxel[thread];
        if (n < 0) continue;
        put_weighted(sum, n, total[thread], scale ? scale[n] : Real(1.0), channel_weight, adds);
    }
}
}  // namespace crf
