// The spatial kernel exp(-|p_i - p_j|^2 / 2 theta_gamma^2), axis by axis on the mask's bounding
// box: exact except for its tails (spatial_rows.h). Skips sums of zeros.

#include "cpu/filter_moments.h"
#include "cpu/spatial_rows.h"

namespace crf {
namespace {
std::vector<SpatialTaps> taps_of(const Voxels& voxels, const std::vector<double>& theta_gamma) {
    std::vector<double> sigma;
    for (int a = 0; a < voxels.num_axes; ++a) sigma.push_back(theta_gamma[a] / voxels.spacing[a]);
    return spatial_taps(sigma, {voxels.box_shape, voxels.box_shape + voxels.num_axes});
}

class SpatialFilter final : public Filter {
   public:
    SpatialFilter(const Voxels& voxels, const std::vector<double>& theta_gamma, ThreadPool& pool)
        : voxels_(voxels), pool_(pool) {
        for (const SpatialTaps& taps : taps_of(voxels, theta_gamma)) {
            taps_.emplace_back(taps.weight.begin(), taps.weight.end());
            slopes_.emplace_back(taps.slope.begin(), taps.slope.end());
        }
        scratch_.resize(pool.num_threads());
        // Runs do not cross slabs. A box of one axis is a single slab.
        slab_size_ = voxels.num_axes == 1 ? voxels.box_size : voxels.box_size / voxels.box_shape[0];
        first_run_ = voxels.first_runs(voxels.box_size / slab_size_,
                                       [&](const Run& run) { return run.box / slab_size_; });
        for (int a = 0; a < voxels.num_axes - 1; ++a) needed_.push_back(find_needed(a));
    }

    void accumulate(const Filtering& wanted, Workspace& workspace) override {
        box_ = workspace.floats(voxels_.box_size);
        const auto taps = [&](int axis) -> const std::vector<float>& { return taps_[axis]; };
        for (int c = 0; c < wanted.num_channels; ++c) {
            if (wanted.weight_of(c) == 0.0f) continue;
            filter_box(wanted.values + c * voxels_.num_voxels, wanted.pre, taps);
            gather(wanted.of_channels(c, 1, voxels_.num_voxels));
        }
    }

    // The derivative with respect to one axis's bandwidth is the same filter with that axis's
    // slopes instead of its weights.
    void add_moments(const FilteredPair& pair, const KernelInput&, double* squared,
                     float* /*image*/, MomentSums& sums) override {
        box_ = sums.workspace().floats(voxels_.box_size);
        for (int c = 0; c < pair.num_channels; ++c)
            for (int differentiated = 0; differentiated < voxels_.num_axes; ++differentiated) {
                const auto taps = [&](int axis) -> const std::vector<float>& {
                    return axis == differentiated ? slopes_[axis] : taps_[axis];
                };
                filter_box(pair.v + c * voxels_.num_voxels, nullptr, taps);
                squared[differentiated] += dot_with_box(pair.u + c * voxels_.num_voxels);
            }
    }

    std::string description() const override { return "separable"; }

   private:
    // The distance in the box from a voxel to its neighbor along an axis.
    int64_t stride_of(int axis) const {
        int64_t stride = 1;
        for (int a = axis + 1; a < voxels_.num_axes; ++a) stride *= voxels_.box_shape[a];
        return stride;
    }

    // The rows of an axis's panels that voxels inside the mask depend on. The axes before this axis
    // are filtered later, so rows within reach of their taps are needed too.
    std::vector<Stretch> find_needed(int axis) const {
        const int64_t inner = stride_of(axis);
        const int64_t length = voxels_.box_shape[axis];
        const int64_t panels = num_panels(inner);
        std::vector<Stretch> needed(voxels_.box_size / (length * inner) * panels);
        for (const Run& run : voxels_.runs) {
            const int64_t column = run.box % inner;
            const int64_t row = run.box / inner % length;
            const int64_t first = run.box / (length * inner) * panels;
            for (int64_t p = column / kColumns; p <= (column + run.length - 1) / kColumns; ++p)
                needed[first + p] = needed[first + p].with({row, row + 1});
        }
        int64_t stride = panels;
        for (int a = axis - 1; a >= 0; stride *= voxels_.box_shape[a], --a) {
            const int64_t radius = static_cast<int64_t>(taps_[a].size()) - 1;
            const int64_t extent = voxels_.box_shape[a];
            const std::vector<Stretch> own = needed;
            for (int64_t i = 0; i < static_cast<int64_t>(own.size()); ++i) {
                const int64_t place = i / stride % extent;
                for (int64_t j = std::max<int64_t>(0, place - radius);
                     j <= std::min(extent - 1, place + radius); ++j)
                    needed[i] = needed[i].with(own[i + (j - place) * stride]);
            }
        }
        return needed;
    }

    // Fills the box with one channel, filtered. taps(axis): the axis's taps. A slab, the voxels of
    // one place along the first axis, is filled and filtered along the others while it is in the
    // cache.
    template <class Taps>
    void filter_box(const float* values, const float* pre, const Taps& taps) {
        const int num_axes = voxels_.num_axes;
        pool_.run(static_cast<int64_t>(first_run_.size()) - 1, [&](int64_t slab, int thread) {
            float* const box = box_ + slab * slab_size_;
            if (first_run_[slab] == first_run_[slab + 1]) {
                std::fill(box, box + slab_size_, 0.0f);
                return;
            }
            fill_rows(slab, values, pre, taps(num_axes - 1), scratch_[thread]);
            for (int a = num_axes - 2; a > 0; --a) {
                const int64_t inner = stride_of(a);
                const int64_t num_of_slab =
                    slab_size_ / (voxels_.box_shape[a] * inner) * num_panels(inner);
                filter_across(box, slab_size_, voxels_.box_shape[a], inner, taps(a),
                              &needed_[a][slab * num_of_slab], scratch_[thread]);
            }
        });
        if (voxels_.num_axes == 1) return;
        pool_.run(num_panels(slab_size_), [&](int64_t panel, int thread) {
            float* const from = box_ + panel * kColumns;
            filter_panel(from, voxels_.box_shape[0], slab_size_,
                         std::min(kColumns, slab_size_ - panel * kColumns), needed_[0][panel],
                         taps(0), scratch_[thread]);
        });
    }

    // Fills the rows of a slab with one channel, filtered along them.
    void fill_rows(int64_t slab, const float* values, const float* pre,
                   const std::vector<float>& taps, Buffer<float>& scratch) {
        const int64_t length = voxels_.box_shape[voxels_.num_axes - 1];
        float* const row = padded_row(scratch, length, taps);
        int64_t r = first_run_[slab];
        for (int64_t first = slab * slab_size_; first < (slab + 1) * slab_size_; first += length) {
            std::fill(row, row + length, 0.0f);
            for (; r < first_run_[slab + 1] && voxels_.runs[r].box < first + length; ++r) {
                const Run& run = voxels_.runs[r];
                float* const to = row + (run.box - first);
                const float* const from = values + run.voxel;
                if (pre) {
                    for (int32_t i = 0; i < run.length; ++i) to[i] = from[i] * pre[run.voxel + i];
                } else {
                    std::copy(from, from + run.length, to);
                }
            }
            if (is_zero(row, length)) {
                std::fill_n(box_ + first, length, 0.0f);
            } else {
                filter_row(row, box_ + first, length, taps);
            }
        }
    }

    // Adds the box to the sum of a channel.
    void gather(const Filtering& wanted) {
        for_runs([&](const Run& run) {
            const float* const from = box_ + run.box;
            if (is_zero(from, run.length)) return;
            float* const to = wanted.sum + run.voxel;
            const float weight = wanted.weight_of(0);
            if (wanted.post) {
                const float* const post = wanted.post + run.voxel;
                for (int32_t i = 0; i < run.length; ++i) to[i] += weight * post[i] * from[i];
            } else {
                for (int32_t i = 0; i < run.length; ++i) to[i] += weight * from[i];
            }
        });
    }

    double dot_with_box(const float* values) {
        std::vector<double> sums(voxels_.runs.size());
        for_runs([&](const Run& run) {
            vfloat total{};
            for (int64_t i = 0; i < run.length; i += kLanes)
                total += load_some(values + run.voxel + i, run.length - i) *
                         load_some(box_ + run.box + i, run.length - i);
            sums[&run - voxels_.runs.data()] = static_cast<double>(sum_lanes(total));
        });
        return std::accumulate(sums.begin(), sums.end(), 0.0);
    }

    // Calls body(run) for the runs of the mask, in parallel.
    template <class Body>
    void for_runs(Body&& body) {
        const int64_t num_runs = static_cast<int64_t>(voxels_.runs.size());
        pool_.run_blocks(num_runs, kRunBlock, [&](int64_t begin, int64_t end, int) {
            for (int64_t r = begin; r < end; ++r) body(voxels_.runs[r]);
        });
    }

    const Voxels& voxels_;
    ThreadPool& pool_;
    std::vector<std::vector<float>> taps_, slopes_;  // per axis: SpatialTaps
    int64_t slab_size_ = 0;           // voxels of the box at one place along the first axis
    std::vector<int64_t> first_run_;  // of each slab, and the end
    std::vector<std::vector<Stretch>> needed_;  // per axis but the last: rows of each panel
    float* box_ = nullptr;                      // in the workspace
    std::vector<Buffer<float>> scratch_;        // per thread: rows begin at cache lines
};

// The one-dimensional filter of an axis, applied to a profile along it.
std::vector<float> filter_profile(const std::vector<float>& taps,
                                  const std::vector<float>& profile) {
    const int64_t length = static_cast<int64_t>(profile.size());
    const int64_t radius = static_cast<int64_t>(taps.size()) - 1;
    std::vector<float> filtered(length);
    for (int64_t i = 0; i < length; ++i) {
        double total = 0;
        for (int64_t j = std::max<int64_t>(0, i - radius); j <= std::min(length - 1, i + radius);
             ++j)
            total += static_cast<double>(taps[std::abs(i - j)]) * profile[j];
        filtered[i] = static_cast<float>(total);
    }
    return filtered;
}

// The product of one profile per axis, at all places of the box.
void fill_product(const Voxels& voxels, const std::vector<std::vector<float>>& profiles, float* out,
                  ThreadPool& pool) {
    const int last = voxels.num_axes - 1;
    const int64_t length = voxels.box_shape[last];
    pool.run(voxels.box_size / length, [&](int64_t row, int) {
        float factor = 1.0f;
        for (int64_t a = last - 1, rest = row; a >= 0; rest /= voxels.box_shape[a], --a)
            factor *= profiles[a][rest % voxels.box_shape[a]];
        float* const to = out + row * length;
        for (int64_t i = 0; i < length; ++i) to[i] = factor * profiles[last][i];
    });
}
}  // namespace

std::unique_ptr<Filter> make_spatial_filter(const Voxels& voxels,
                                            const std::vector<double>& theta_gamma,
                                            ThreadPool& pool) {
    return std::make_unique<SpatialFilter>(voxels, theta_gamma, pool);
}

// Without a mask K 1 is a product over the axes, and so is everything computed from it.
void normalize_spatial_kernel(Kernel& kernel, const Voxels& voxels,
                              const std::vector<double>& theta_gamma, Normalization normalization,
                              ThreadPool& pool, Workspace& workspace) {
    const bool has_mask = voxels.num_voxels != voxels.box_size;
    if (has_mask || normalization == Normalization::kNone)
        return normalize_kernel(kernel, voxels, normalization, pool, workspace);
    kernel.scales_sent = normalization == Normalization::kSymmetric;
    std::vector<std::vector<float>> scales, messages;
    for (const SpatialTaps& of_axis : taps_of(voxels, theta_gamma)) {
        const std::vector<float> taps(of_axis.weight.begin(), of_axis.weight.end());
        const size_t length = voxels.box_shape[scales.size()];
        scales.push_back(filter_profile(taps, std::vector<float>(length, 1.0f)));
        for (float& s : scales.back()) s = kernel.scales_sent ? 1.0f / std::sqrt(s) : 1.0f / s;
        messages.push_back(filter_profile(taps, scales.back()));
        for (size_t i = 0; i < length; ++i) messages.back()[i] *= scales.back()[i];
    }
    kernel.scale = Buffer<float>(voxels.num_voxels);
    fill_product(voxels, scales, kernel.scale.get(), pool);
    if (!kernel.scales_sent) return;
    kernel.ones = Buffer<float>(voxels.num_voxels);
    fill_product(voxels, messages, kernel.ones.get(), pool);
}
}  // namespace crf
