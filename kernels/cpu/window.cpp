#include "cpu/window.h"

namespace crf {
namespace {
// Windows with more rows are not counted: they are far too large for any use.
constexpr double kMostRows = 1e6;

// Counts places of a box from -radius to radius along the first axes, the last of them fastest;
// false after the last place.
bool next_place(const std::vector<int64_t>& radius, int num_axes, int64_t* place) {
    for (int a = num_axes - 1; a >= 0; --a) {
        if (++place[a] <= radius[a]) return true;
        place[a] = -radius[a];
    }
    return false;
}

std::vector<int64_t> window_radii(const std::vector<double>& sigma,
                                  const std::vector<int64_t>& shape) {
    std::vector<int64_t> radius;
    for (size_t a = 0; a < sigma.size(); ++a) radius.push_back(window_radius(sigma[a], shape[a]));
    return radius;
}
}  // namespace

int64_t window_radius(double sigma, int64_t extent) {
    // Compared as floating point, because a huge bandwidth overflows any integer.
    return static_cast<int64_t>(
        std::min(kTruncationRadius * (1 + kRounding) * sigma, static_cast<double>(extent - 1)));
}

std::vector<WindowOffset> list_window(const std::vector<double>& sigma,
                                      const std::vector<int64_t>& shape) {
    const int num_axes = static_cast<int>(sigma.size());
    const std::vector<int64_t> radius = window_radii(sigma, shape);
    std::vector<WindowOffset> window;
    WindowOffset offset{};
    for (int a = 0; a < num_axes; ++a) offset.distance[a] = -radius[a];
    do {
        double total = 0;
        int sign = 0;
        for (int a = 0; a < num_axes; ++a) {
            const double scaled = static_cast<double>(offset.distance[a]) / sigma[a];
            offset.squared[a] = scaled * scaled;
            total += offset.squared[a];
            if (sign == 0) sign = (offset.distance[a] > 0) - (offset.distance[a] < 0);
        }
        if (sign > 0 && total <= kLargestSquare) window.push_back(offset);
    } while (next_place(radius, num_axes, offset.distance));
    return window;
}

double num_window_pairs(const std::vector<double>& sigma, const std::vector<int64_t>& shape) {
    // Rows of the window are counted as a whole: the sum over the last axis has a closed form.
    const std::vector<int64_t> radius = window_radii(sigma, shape);
    const int last = static_cast<int>(sigma.size()) - 1;
    int64_t distance[kMaxAxes];
    double rows = 1;
    for (int a = 0; a < last; ++a) {
        distance[a] = -radius[a];
        rows *= static_cast<double>(2 * radius[a] + 1);
    }
    if (rows > kMostRows) return rows;
    double count = 0;
    do {
        double left = kLargestSquare;
        for (int a = 0; a < last; ++a) {
            const double scaled = static_cast<double>(distance[a]) / sigma[a];
            left -= scaled * scaled;
        }
        if (left >= 0)
            count += 1 + 2 * std::min<double>(std::floor(std::sqrt(left) * sigma[last]),
                                              static_cast<double>(radius[last]));
    } while (next_place(radius, last, distance));
    return (count - 1) / 2;
}
}  // namespace crf
