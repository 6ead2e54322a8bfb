// The spatial kernel where it is wide: its result is so smooth that half as many rows hold it.
// Along a wide axis K = H^T C H: H halves the rows, C filters them, H^T spreads them to all rows
// (docs/reference/math.md, 5.4).
#pragma once

#include "cpu/buffer.h"
#include "cpu/simd.h"
#include "cpu/spatial_rows.h"
#include "cpu/thread_pool.h"
#include "cpu/voxels.h"

namespace crf {
class HalvedBox {
   public:
    // Whether rows are halved along an axis: only the first axis and the last but one can be
    // halved. sigma: the kernel's standard deviation along each axis, in voxels.
    static bool is_wide(const Voxels& voxels, const std::vector<double>& sigma);

    // taps: the kernel's taps along each axis. first: the box's first voxel along each axis, from
    // the feature origin.
    HalvedBox(const Voxels& voxels, const std::vector<double>& sigma,
              const std::vector<int64_t>& first, std::vector<std::vector<float>> taps,
              int num_threads);

    // fill(slab, to, thread) writes the values of a slab, the voxels of one place along the first
    // axis; add(run, row, thread) takes the filtered values of a run. first_run: of each slab, and
    // the end.
    template <class Fill, class Add>
    void filter(const std::vector<int64_t>& first_run, ThreadPool& pool, Workspace& workspace,
                const Fill& fill, const Add& add) {
        float* const half = workspace.floats(
            (slabs_.num_rows + (slabs_.is_halved ? slabs_.length : 0)) * slab_size_);
        float* const box = slabs_.is_halved ? half + slabs_.num_rows * slab_size_ : half;
        pool.run(slabs_.num_rows, [&](int64_t slab, int thread) {
            float* const to = half + slab * slab_size_;
            float* const whole = rows_.is_halved ? scratch_[thread].whole.get() : to;
            fill(slab, whole, thread);
            if (rows_.is_halved) halve_rows(whole, to);
            if (!slabs_.is_halved) filter_slab(to, thread);
        });
        if (slabs_.is_halved) {
            pool.run((slabs_.length + 1) / 2, [&](int64_t pair, int thread) {
                halve(half, slabs_, pair, slab_size_, box);
                for (int64_t place = 2 * pair; place < std::min(2 * pair + 2, slabs_.length);
                     ++place)
                    filter_slab(box + place * slab_size_, thread);
            });
        }
        pool.run(num_panels(slab_size_), [&](int64_t panel, int thread) {
            float* const from = box + panel * kColumns;
            filter_panel(from, slabs_.length, slab_size_,
                         std::min(kColumns, slab_size_ - panel * kColumns), {0, slabs_.length},
                         taps_[0], scratch_[thread].padded);
        });
        pool.run(slabs_.is_halved ? slabs_.length - 4 : slabs_.num_rows,
                 [&](int64_t place, int thread) {
                     float* const whole = scratch_[thread].whole.get();
                     if (slabs_.is_halved) spread(box + place * slab_size_, slab_size_, whole);
                     const int64_t first = slabs_.is_halved ? 2 * place - slabs_.shift : place;
                     const int64_t end = first + (slabs_.is_halved ? 2 : 1);
                     for (int64_t slab = std::max<int64_t>(first, 0);
                          slab < std::min(end, slabs_.num_rows); ++slab)
                         add_slab(slabs_.is_halved ? whole + (slab - first) * slab_size_
                                                   : box + slab * slab_size_,
                                  first_run[slab], first_run[slab + 1], add, thread);
                 });
    }

   private:
    static constexpr int kReach = 4;  // rows on either side
    // Weights at 1/2, 3/2, 5/2, 7/2 voxels: with these, K is closest to a Gaussian of 3 voxels, the
    // narrowest halved.
    static constexpr double kHalving[kReach] = {0.52397772, 0.33204407, 0.12331876, 0.02065945};
    static float weight(int k) { return static_cast<float>(kHalving[k]); }

    struct Axis {
        int64_t num_rows = 1;  // rows of voxels
        bool is_halved = false;
        int64_t shift = 0;   // 1: the first row of voxels is the second row of its pair
        int64_t length = 1;  // rows, halved if they are
    };

    struct Scratch {
        Buffer<float> padded;  // rows that are filtered
        Buffer<float> whole;   // a slab with all its rows, or two slabs with halved rows
        Buffer<float> rows;    // two rows of voxels
    };

    static Axis axis(int64_t num_rows, double sigma, int64_t first);
    static std::vector<float> halved_taps(double sigma, int64_t num_rows);

    // Computes halved rows 2 pair and 2 pair + 1 from 10 rows of voxels. Halved row n is between
    // rows 2 n - 4 and 2 n - 3 of voxels, minus the shift.
    static void halve(const float* from, const Axis& axis, int64_t pair, int64_t length,
                      float* to) {
        constexpr int kRead = 2 * kReach + 2;
        const int64_t first = 4 * pair - 7 - axis.shift;
        float* const halved = to + 2 * pair * length;
        if (first < 0 || first + kRead > axis.num_rows) {
            for (int64_t n = 2 * pair; n < std::min(2 * pair + 2, axis.length); ++n)
                halve_at_end(from, axis, n, length, to + n * length);
            return;
        }
        for (int64_t i = 0; i < length; i += kLanes) {
            vfloat at[kRead], low{}, high{};
            for (int k = 0; k < kRead; ++k)
                at[k] = load_some(from + (first + k) * length + i, length - i);
            for (int k = 0; k < kReach; ++k) {
                low += (at[kReach - 1 - k] + at[kReach + k]) * weight(k);
                high += (at[kReach + 1 - k] + at[kReach + 2 + k]) * weight(k);
            }
            store_some(halved + i, low, length - i);
            store_some(halved + length + i, high, length - i);
        }
    }

    // Computes one halved row; rows of voxels beyond the ends are zero.
    static void halve_at_end(const float* from, const Axis& axis, int64_t number, int64_t length,
                             float* to) {
        std::fill(to, to + length, 0.0f);
        for (int k = -kReach; k < kReach; ++k) {
            const int64_t row = 2 * number - 3 - axis.shift + k;
            if (row < 0 || row >= axis.num_rows) continue;
            for (int64_t i = 0; i < length; ++i)
                to[i] += weight(k < 0 ? -1 - k : k) * from[row * length + i];
        }
    }

    // Computes two consecutive rows of voxels from the five halved rows around them.
    static void spread(const float* from, int64_t length, float* to) {
        for (int64_t i = 0; i < length; i += kLanes) {
            vfloat at[5];
            for (int k = 0; k < 5; ++k) at[k] = load_some(from + k * length + i, length - i);
            const vfloat nearest = at[2] * weight(0);
            store_some(to + i, nearest + at[1] * weight(1) + at[3] * weight(2) + at[0] * weight(3),
                       length - i);
            store_some(to + length + i,
                       nearest + at[3] * weight(1) + at[1] * weight(2) + at[4] * weight(3),
                       length - i);
        }
    }

    void halve_rows(const float* from, float* to) const {
        for (int64_t outer = 0; outer < num_outer_; ++outer)
            for (int64_t pair = 0; pair < (rows_.length + 1) / 2; ++pair)
                halve(from + outer * rows_.num_rows * row_length_, rows_, pair, row_length_,
                      to + outer * rows_.length * row_length_);
    }

    // Calls add for the runs of one slab.
    template <class Add>
    void add_slab(const float* slab, int64_t run, int64_t end, const Add& add, int thread) {
        const float* spread_from = nullptr;
        for (; run < end; ++run) {
            const Run& own = voxels_.runs[run];
            const int64_t number = own.box / row_length_ % (num_outer_ * rows_.num_rows);
            const int64_t row = number % rows_.num_rows + rows_.shift;
            const float* from = slab + (number / rows_.num_rows * rows_.length +
                                        (rows_.is_halved ? row / 2 : row)) *
                                           row_length_;
            if (rows_.is_halved) {
                float* const rows = scratch_[thread].rows.get();
                if (from != spread_from) spread(from, row_length_, rows);
                spread_from = from;
                from = rows + row % 2 * row_length_;
            }
            add(own, from + own.box % row_length_, thread);
        }
    }

    void filter_slab(float* slab, int thread) {
        filter_rows_of(slab, slab_size_ / row_length_, row_length_, taps_.back(),
                       scratch_[thread].padded);
        int64_t stride = row_length_;
        for (size_t a = taps_.size() - 2; a > 0; --a) {
            const int64_t length = a == taps_.size() - 2 ? rows_.length : voxels_.box_shape[a];
            filter_across(slab, slab_size_, length, stride, taps_[a], nullptr,
                          scratch_[thread].padded);
            stride *= length;
        }
    }

    const Voxels& voxels_;
    Axis slabs_, rows_;
    int64_t num_outer_ = 1, row_length_ = 1;  // of the voxels
    int64_t slab_size_ = 1;                   // with its rows halved, if they are
    std::vector<std::vector<float>> taps_;    // per axis
    std::vector<Scratch> scratch_;            // per thread
};

namespace {
constexpr double kPi = 3.14159265358979323846;

// Range of sigma in voxels. Narrower kernels need all rows; wider kernels are wider than volumes.
constexpr double kLeastSigma = 3.0, kLargestSigma = 1000.0;

// halved rows beyond the ends cost more than a shorter one saves
constexpr int64_t kLeastRows = 16;
}  // namespace

HalvedBox::Axis HalvedBox::axis(int64_t num_rows, double sigma, int64_t first) {
    if (!(sigma >= kLeastSigma && sigma <= kLargestSigma && num_rows >= kLeastRows))
        return {num_rows, false, 0, num_rows};
    const int64_t shift = std::abs(first % 2);
    return {num_rows, true, shift, (num_rows + shift - 1) / 2 + 5};
}

bool HalvedBox::is_wide(const Voxels& voxels, const std::vector<double>& sigma) {
    const int n = voxels.num_axes;
    return (n > 1 && axis(voxels.box_shape[0], sigma[0], 0).is_halved) ||
           (n > 2 && axis(voxels.box_shape[n - 2], sigma[n - 2], 0).is_halved);
}

HalvedBox::HalvedBox(const Voxels& voxels, const std::vector<double>& sigma,
                     const std::vector<int64_t>& first, std::vector<std::vector<float>> taps,
                     int num_threads)
    : voxels_(voxels),
      slabs_(axis(voxels.box_shape[0], sigma[0], first[0])),
      taps_(std::move(taps)),
      scratch_(num_threads) {
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
        scratch.whole =
            Buffer<float>(std::max(2 * slab_size_, num_outer_ * rows_.num_rows * row_length_));
        scratch.rows = Buffer<float>(2 * row_length_);
    }
}

// The taps of C for which H^T C H is closest to the Gaussian, in the least-squares sense. Waves of
// frequencies w and pi - w become the same wave of halved rows. H multiplies a wave by h(w), the
// Gaussian by g(w), and C that of halved rows by 2 (g(w) h(w)^2
// + g(pi - w) h(pi - w)^2) / (h(w)^2 + h(pi - w)^2)^2.
std::vector<float> HalvedBox::halved_taps(double sigma, int64_t num_rows) {
    constexpr int kFrequencies = 512;
    const auto gaussian = [&](double w) {
        return sigma * std::sqrt(2 * kPi) * std::exp(-0.5 * sigma * sigma * w * w);
    };
    const auto squared_halving = [](double w) {
        double total = 0;
        for (int k = 0; k < kReach; ++k) total += 2 * kHalving[k] * std::cos(w * (k + 0.5));
        return total * total;
    };
    const int64_t radius = std::min(static_cast<int64_t>(std::ceil(2 * sigma)) + 1, num_rows - 1);
    std::vector<double> taps(radius + 1);
    // beyond 8 / sigma nothing is left
    const double step = std::min(kPi / 2, 8 / sigma) / kFrequencies;
    for (int i = 0; i < kFrequencies; ++i) {
        const double w = (i + 0.5) * step;
        const double own = squared_halving(w);
        const double image = squared_halving(kPi - w);
        const double wanted =
            2 * (gaussian(w) * own + gaussian(kPi - w) * image) / ((own + image) * (own + image));
        for (int64_t k = 0; k <= radius; ++k)
            taps[k] += step * 2 / kPi * wanted * std::cos(2 * w * static_cast<double>(k));
    }
    return std::vector<float>(taps.begin(), taps.end());
}
}  // namespace crf
