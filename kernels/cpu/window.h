// The window of the truncated sum: an ellipsoid of voxels around each voxel.
#pragma once

#include "cpu/filter.h"

namespace crf {
// A pair of voxels of the window: their offset along each box axis, in voxels, and their squared
// distance in standard deviations.
struct WindowOffset {
    int64_t distance[kMaxAxes];
    double squared;
};

// Relative: voxels on the window's surface belong to it, however their distance was rounded.
constexpr double kRounding = 1e-6;

// Squared distance in standard deviations up to which a voxel belongs to the window.
constexpr double kLargestSquare = kTruncationRadius * kTruncationRadius * (1 + kRounding);

// Windows with more rows are not counted: they are far too large for any use.
constexpr double kMostRows = 1e6;

// A list of more pairs would take over 250 MB, and their sums days.
constexpr double kMostPairs = 1e6;

// Voxels on either side along an axis. sigma: standard deviation in voxels; extent: of the box.
inline int64_t window_radius(double sigma, int64_t extent) {
    // Compared as floating point, because a huge bandwidth overflows any integer.
    return static_cast<int64_t>(
        std::min(kTruncationRadius * sigma * (1 + kRounding), static_cast<double>(extent - 1)));
}

// Counts places of a box from -radius to radius along the first axes, the last of them fastest;
// false after the last place.
inline bool next_place(const int64_t* radius, int num_axes, int64_t* place) {
    for (int a = num_axes - 1; a >= 0; --a) {
        if (++place[a] <= radius[a]) return true;
        place[a] = -radius[a];
    }
    return false;
}

// Pairs per voxel, half of the window's other voxels, counted without a list.
inline double num_window_pairs(const BilateralInput& input) {
    // Rows of the window are counted as a whole: the sum over the last axis has a closed form.
    const Voxels& voxels = *input.voxels;
    const int last = voxels.num_axes - 1;
    double step[kMaxAxes];
    int64_t radius[kMaxAxes], d[kMaxAxes];
    double rows = 1;
    for (int a = 0; a <= last; ++a) {
        step[a] = voxels.spacing[a] / input.theta_position[a];
        radius[a] = window_radius(1 / step[a], voxels.box_shape[a]);
        d[a] = -radius[a];
        if (a < last) rows *= static_cast<double>(2 * radius[a] + 1);
    }
    if (rows > kMostRows) return rows;
    double count = 0;
    do {
        double left = kLargestSquare;
        for (int a = 0; a < last; ++a) left -= d[a] * step[a] * d[a] * step[a];
        if (left >= 0)
            count += 1 + 2 * std::min<double>(std::floor(std::sqrt(left) / step[last]),
                                              static_cast<double>(radius[last]));
    } while (next_place(radius, last, d));
    return (count - 1) / 2;
}

// One of each pair of opposite offsets: the one whose first nonzero distance is positive.
inline std::vector<WindowOffset> list_window(const BilateralInput& input) {
    if (num_window_pairs(input) > kMostPairs) {
        std::string theta, spacing;
        for (int a = 0; a < input.voxels->num_axes; ++a) {
            theta += (a ? " x " : "") + printed(input.theta_position[a]);
            spacing += (a ? " x " : "") + printed(input.voxels->spacing[a]);
        }
        throw CapacityError("a truncated sum with theta_alpha " + theta + " on voxels of " +
                            spacing +
                            " visits over a million pairs for each voxel; use a smaller bandwidth, "
                            "or mean_field.filter = \"auto\"");
    }
    const Voxels& voxels = *input.voxels;
    const int axes = voxels.num_axes;
    std::vector<WindowOffset> window;
    int64_t radius[kMaxAxes];
    WindowOffset offset{};
    for (int a = 0; a < axes; ++a) {
        radius[a] = window_radius(input.sigma(a), voxels.box_shape[a]);
        offset.distance[a] = -radius[a];
    }
    do {
        offset.squared = 0;
        int sign = 0;
        for (int a = 0; a < axes; ++a) {
            const double scaled = input.in_bandwidths(a, offset.distance[a]);
            offset.squared += scaled * scaled;
            if (sign == 0) sign = offset.distance[a] > 0 ? 1 : offset.distance[a] < 0 ? -1 : 0;
        }
        if (sign > 0 && offset.squared <= kLargestSquare) window.push_back(offset);
    } while (next_place(radius, axes, offset.distance));
    return window;
}
}  // namespace crf
