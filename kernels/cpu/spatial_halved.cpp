#include "cpu/spatial_halved.h"

#include <cmath>

namespace crf {

namespace {

constexpr double kPi = 3.14159265358979323846;

// In voxels. Below, half as many rows do not hold what the kernel leaves; beyond, it is wider than volumes.
constexpr double kLeastSigma = 3.0, kLargestSigma = 1000.0;

constexpr int64_t kLeastRows = 16;  // halved rows beyond the ends cost more than a shorter one saves

}  // namespace

HalvedBox::Axis HalvedBox::axis(int64_t num_rows, double sigma, int64_t first) {
    if (!(sigma >= kLeastSigma && sigma <= kLargestSigma && num_rows >= kLeastRows)) return {num_rows, false, 0, num_rows};
    const int64_t shift = std::abs(first % 2);
    return {num_rows, true, shift, (num_rows + shift - 1) / 2 + 5};
}

bool HalvedBox::is_wide(const Voxels& voxels, const std::vector<double>& sigma) {
    const int n = voxels.num_axes;
    return (n > 1 && axis(voxels.box_shape[0], sigma[0], 0).is_halved) ||
           (n > 2 && axis(voxels.box_shape[n - 2], sigma[n - 2], 0).is_halved);
}

HalvedBox::HalvedBox(const Voxels& voxels, const std::vector<double>& sigma, const std::vector<int64_t>& first,
                     std::vector<std::vector<float>> taps, int num_threads)
    : voxels_(voxels), slabs_(axis(voxels.box_shape[0], sigma[0], first[0])), taps_(std::move(taps)), scratch_(num_threads) {
    const int n = voxels.num_axes;
    if (slabs_.is_halved) taps_[0] = halved_taps(sigma[0], slabs_.length);
    if (n > 2) {
        rows_ = axis(voxels.box_shape[n - 2], sigma[n - 2], first[n - 2]);
        if (rows_.is_halved) taps_[n - 2] = halved_taps(sigma[n - 2], rows_.length);
    }
    row_length_ = voxels.box_shape[n - 1];
    num_outer_ = voxels.box_size / (slabs_.num_rows * rows_.num_rows * row_length_);
    slab_size_ = num_outer_ * rows_.length * row_length_;
    for (Scratch& scratch : scratch_) {
        scratch.whole = Buffer<float>(std::max(2 * slab_size_, num_outer_ * rows_.num_rows * row_length_));
        scratch.rows = Buffer<float>(2 * row_length_);
    }
}

// Taps whose H^T C H is closest to the Gaussian, in the least-squares sense. A wave of frequency w and its image, pi - w, are the same wave
// of halved rows. With h(w) what H leaves of a wave and g(w) what the Gaussian leaves, C multiplies that wave of halved rows by
// 2 (g(w) h(w)^2 + g(pi - w) h(pi - w)^2) / (h(w)^2 + h(pi - w)^2)^2.
std::vector<float> HalvedBox::halved_taps(double sigma, int64_t num_rows) {
    constexpr int kFrequencies = 512;
    const auto gaussian = [&](double w) { return sigma * std::sqrt(2 * kPi) * std::exp(-0.5 * sigma * sigma * w * w); };
    const auto squared_halving = [](double w) {
        double total = 0;
        for (int k = 0; k < kReach; ++k) total += 2 * kHalving[k] * std::cos(w * (k + 0.5));
        return total * total;
    };
    const int64_t radius = std::min(static_cast<int64_t>(std::ceil(2 * sigma)) + 1, num_rows - 1);
    std::vector<double> taps(radius + 1);
    const double step = std::min(kPi / 2, 8 / sigma) / kFrequencies;  // beyond 8 / sigma nothing is left
    for (int i = 0; i < kFrequencies; ++i) {
        const double w = (i + 0.5) * step, own = squared_halving(w), image = squared_halving(kPi - w);
        const double wanted = 2 * (gaussian(w) * own + gaussian(kPi - w) * image) / ((own + image) * (own + image));
        for (int64_t k = 0; k <= radius; ++k) taps[k] += step * 2 / kPi * wanted * std::cos(2 * w * static_cast<double>(k));
    }
    return std::vector<float>(taps.begin(), taps.end());
}

}  // namespace crf
