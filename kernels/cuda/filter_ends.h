// The last launch of a filtering, as functions of one voxel or place: kernels of the filters call
// them, and so does the update of the mean field, which then needs no launch of theirs.
#pragma once

#include "cuda/launch.h"

namespace crf {
// The lattice's vertices around the voxels. corner_vertex, corner_weight: (corner, voxel), weights
// in 1 / 65535.
template <int Width>
struct Slice {
    const Row<Width>* rows;  // (vertex)
    const uint32* corner_vertex;
    const uint16* corner_weight;
    int num_corners;
    int64 num_voxels;

    // The rows around voxel n, interpolated.
    CRF_D Row<Width> at(int64 n) const {
        Row<Width> total = zero_row<Width>();
        for (int k = 0; k < num_corners; ++k)
            add_scaled(total, rows[corner_vertex[k * num_voxels + n]],
                       static_cast<Real>(corner_weight[k * num_voxels + n]));
        return total;
    }
};

// An axis of the mask's bounding box, and the Gaussian along it.
struct BoxAxis {
    int64 stride, extent;
    const Real* taps;  // (radius + 1) weights at distance 0, 1, ...
    int64 radius;

    // A place's coordinate along the axis.
    CRF_D int64 coordinate_of(int64 place) const { return place / stride % extent; }

    // The Gaussian at a place of a box, (place), whose coordinate is x.
    template <int Width>
    CRF_D Row<Width> filtered_box(const Row<Width>* from, int64 place, int64 x) const {
        Row<Width> total = zero_row<Width>();
        for (int64 k = first_of(x); k <= last_of(x); ++k)
            add_scaled(total, from[place + k * stride], tap(k));
        return total;
    }

    // The same of the voxels' values, (voxel), with the factors `sent`, (voxel) or nullptr for
    // ones. number: (place) number of the voxel, -1: none; nullptr: all places are voxels, in
    // order.
    template <int Width>
    CRF_D Row<Width> filtered_values(const Row<Width>* values, const Real* sent, const int* number,
                                     int64 place, int64 x) const {
        Row<Width> total = zero_row<Width>();
        for (int64 k = first_of(x); k <= last_of(x); ++k) {
            const int64 other = place + k * stride;
            const int64 n = number ? number[other] : other;
            if (n >= 0) add_scaled(total, values[n], sent ? tap(k) * sent[n] : tap(k));
        }
        return total;
    }

    // The steps to the first and to the last place within the radius.
    CRF_D int64 first_of(int64 x) const { return x < radius ? -x : -radius; }
    CRF_D int64 last_of(int64 x) const { return extent - 1 - x < radius ? extent - 1 - x : radius; }
    CRF_D Real tap(int64 k) const { return taps[k < 0 ? -k : k]; }
};
}  // namespace crf
