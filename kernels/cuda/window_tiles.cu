// The sum over a window (direct.cu: filter_window) in tiles of the box: the threads of a block load a tile's surroundings into shared
// memory together, and each computes the sums of its own few receivers. A sender fetched from shared memory serves all of them.
//
// CRF_WIDTH: channels that are filtered together. CRF_FEATURES: modalities. CRF_OUTER: axes of the box before y and x, its last two; at
// least 1. CRF_THREADS: per block. CRF_OUTPUTS: receivers per thread, neighbors along y. CRF_SENDERS: number that fits into shared memory.
#include "cuda/launch.h"

namespace crf {

using Channels = Row<CRF_WIDTH>;
using Intensities = Features<CRF_FEATURES>;
constexpr int kFeatures = CRF_FEATURES;
constexpr int kOutputs = CRF_OUTPUTS;
constexpr int kOuter = CRF_OUTER;
constexpr int kLanes = 32;  // of a warp: a tile's places along x
constexpr int kRows = CRF_THREADS / kLanes * kOutputs;

struct Receivers {
    int number[kOutputs];  // of the voxel; -1: none
    Intensities intensity[kOutputs];
    bool any;
};

struct Sums {
    Channels row[kOutputs];
};

// One block per tile of the box, 1 * ... * kRows * kLanes places. For each plane of the window (the tile moved along the outer axes), and
// there for `most_steps` steps along x at a time, the tile's surroundings are loaded and summed.
//
// intensity, values: (box), zero where there is no voxel. number: (box) of the voxels, -1 elsewhere; nullptr: each place is the voxel of
// its number. tile: (block) numbers of tiles, those along x fastest. extent, radius: (axis) of the box and the window. plane_offset:
// (plane, outer axis). plane_distance: (plane), distance_y, distance_x: (radius + 1): log2 of the spatial part of the weight is the sum of
// three. half_height: (plane, 2 radius_x + 1) steps along y that belong to the window, either way; -1: none.
CRF_BLOCK_KERNEL(filter_window_tiles, const Intensities* intensity, const Channels* values, const int* number, const int64* tile,
                 const int64* extent, const int* radius, const int* plane_offset, const Real* plane_distance, const Real* distance_y,
                 const Real* distance_x, const int* half_height, int num_planes, int most_steps, const Real* received_scale,
                 const Real* channel_weight, Channels* sum, int adds) {
    CRF_SHARED(Intensities, near_intensity, CRF_SENDERS);
    CRF_SHARED(Channels, near_values, CRF_SENDERS);
    CRF_PER_THREAD(Receivers, receivers);
    CRF_PER_THREAD(Sums, total);

    const int64 extent_y = extent[kOuter], extent_x = extent[kOuter + 1];
    const int radius_y = radius[kOuter], radius_x = radius[kOuter + 1];
    const int64 tiles_x = (extent_x + kLanes - 1) / kLanes, tiles_y = (extent_y + kRows - 1) / kRows;
    int64 rest = tile[block_number()];
    const int64 first_x = rest % tiles_x * kLanes;
    rest /= tiles_x;
    const int64 first_y = rest % tiles_y * kRows;
    rest /= tiles_y;
    const int64 own_plane = rest;
    int64 outer[kOuter];
    CRF_UNROLL
    for (int a = kOuter - 1; a >= 0; --a) {
        outer[a] = rest % extent[a];
        rest /= extent[a];
    }

    CRF_PHASE(thread) {
        Receivers own;
        own.any = false;
        const int64 x = first_x + thread % kLanes;
        CRF_UNROLL
        for (int k = 0; k < kOutputs; ++k) {
            const int64 y = first_y + thread / kLanes * kOutputs + k;
            const int64 place = (own_plane * extent_y + y) * extent_x + x;
            own.number[k] = -1;
            own.intensity[k] = Intensities{};
            if (y < extent_y && x < extent_x) own.number[k] = number ? number[place] : static_cast<int>(place);
            if (own.number[k] >= 0) {
                own.intensity[k] = intensity[place];
                own.any = true;
            }
            total[thread].row[k] = zero_row<CRF_WIDTH>();
        }
        receivers[thread] = own;
    }

    for (int p = 0; p < num_planes; ++p) {
        bool is_inside = true;
        int64 plane = 0;
        CRF_UNROLL
        for (int a = 0; a < kOuter; ++a) {
            const int64 there = outer[a] + plane_offset[p * kOuter + a];
            is_inside = is_inside && there >= 0 && there < extent[a];
            plane = plane * extent[a] + there;
        }
        if (!is_inside) continue;
        for (int begin = -radius_x; begin <= radius_x; begin += most_steps) {
            const int steps = radius_x - begin + 1 < most_steps ? radius_x - begin + 1 : most_steps;
            const int columns = kLanes - 1 + steps;
            const int count = (kRows + 2 * radius_y) * columns;
            const uint32 inverse = 0xffffffffu / static_cast<uint32>(columns) + 1;  // i / columns is the upper half of i * inverse
            CRF_PHASE(thread) {
                for (int i = thread; i < count; i += CRF_THREADS) {
                    const int row = static_cast<int>(static_cast<uint64>(i) * inverse >> 32);
                    const int64 y = first_y - radius_y + row, x = first_x + begin + (i - row * columns);
                    Intensities at = {};
                    Channels sent = zero_row<CRF_WIDTH>();
                    if (y >= 0 && y < extent_y && x >= 0 && x < extent_x) {
                        const int64 place = (plane * extent_y + y) * extent_x + x;
                        at = intensity[place];
                        sent = values[place];
                    }
                    near_intensity[i] = at;
                    near_values[i] = sent;
                }
            }
            CRF_PHASE(thread) {
                const Receivers own = receivers[thread];
                if (!own.any) continue;
                Sums partial;  // of few senders, to limit rounding
                CRF_UNROLL
                for (int k = 0; k < kOutputs; ++k) partial.row[k] = zero_row<CRF_WIDTH>();
                for (int s = 0; s < steps; ++s) {
                    const int dx = begin + s;
                    const int half = half_height[p * (2 * radius_x + 1) + radius_x + dx];
                    if (half < 0) continue;
                    const Real column = plane_distance[p] + distance_x[dx < 0 ? -dx : dx];
                    // At each step along y every receiver moves to the next sender, and one more sender is fetched for the last receiver.
                    int from = (thread / kLanes * kOutputs + radius_y - half) * columns + thread % kLanes + s;
                    Intensities at[kOutputs];
                    Channels sent[kOutputs];
                    CRF_UNROLL
                    for (int k = 0; k + 1 < kOutputs; ++k) {
                        at[k] = near_intensity[from];
                        sent[k] = near_values[from];
                        from += columns;
                    }
                    for (int first = -half; first <= half; first += kOutputs) {
                        CRF_UNROLL
                        for (int turn = 0; turn < kOutputs; ++turn) {
                            const int dy = first + turn;
                            if (dy > half) break;
                            constexpr int kLast = kOutputs - 1;
                            at[(turn + kLast) % kOutputs] = near_intensity[from];
                            sent[(turn + kLast) % kOutputs] = near_values[from];
                            from += columns;
                            const Real distance = column + distance_y[dy < 0 ? -dy : dy];
                            CRF_UNROLL
                            for (int k = 0; k < kOutputs; ++k) {
                                const int other = (turn + k) % kOutputs;
                                add_scaled(partial.row[k], sent[other], weight_of<kFeatures>(distance, own.intensity[k], at[other]));
                            }
                        }
                    }
                }
                CRF_UNROLL
                for (int k = 0; k < kOutputs; ++k) add_scaled(total[thread].row[k], partial.row[k], Real(1.0));
            }
        }
    }

    CRF_PHASE(thread) {
        CRF_UNROLL
        for (int k = 0; k < kOutputs; ++k) {
            const int64 n = receivers[thread].number[k];
            if (n < 0) continue;
            put_weighted(sum, n, total[thread].row[k], received_scale ? received_scale[n] : Real(1.0), channel_weight, adds);
        }
    }
}

}  // namespace crf
