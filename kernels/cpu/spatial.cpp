// The spatial kernel exp(-|p_i - p_j|^2 / 2 theta_gamma^2): a product of one-dimensional Gaussians, so it is applied axis by axis on
// the mask's bounding box, exact except for its tails (spatial_taps.h). Where labels share channels, most of a channel is zero: what
// follows from zeros alone is not computed.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "cpu/filter.h"
#include "cpu/simd.h"
#include "cpu/spatial_taps.h"

namespace crf {

namespace {

constexpr int64_t kColumns = 4 * kLanes;  // columns of a panel: four vectors, so that a panel of some hundred rows stays in L1 and L2

class SpatialFilter final : public Filter {
   public:
    SpatialFilter(const Voxels& voxels, const std::vector<double>& theta_gamma, ThreadPool& pool) : voxels_(voxels), pool_(pool) {
        for (const SpatialTaps& taps : spatial_taps(voxels, theta_gamma, kSpatialRadius<float>)) {
            taps_.emplace_back(taps.weight.begin(), taps.weight.end());
            slopes_.emplace_back(taps.slope.begin(), taps.slope.end());
        }
        scratch_.resize(pool.num_threads());
    }

    void accumulate(const float* values, int num_channels, const float* pre, const float* post, const float* channel_weight, float* sum,
                    Workspace& workspace) override {
        box_ = workspace.floats(voxels_.box_size);
        for (int c = 0; c < num_channels; ++c) {
            if (channel_weight[c] == 0.0f) continue;
            scatter(values + c * voxels_.num_voxels, pre);
            for (int a = voxels_.num_axes - 1; a >= 0; --a) filter_axis(a, taps_[a]);
            gather(post, channel_weight[c], sum + c * voxels_.num_voxels);
        }
    }

    // Without a mask K 1 is a product over the axes, and so is everything computed from it.
    bool normalize(bool symmetric, float* scale, float* ones) override {
        if (voxels_.num_voxels != voxels_.box_size) return false;
        std::vector<std::vector<float>> scales, messages;
        for (int a = 0; a < voxels_.num_axes; ++a) {
            scales.push_back(filter_profile(a, std::vector<float>(voxels_.box_shape[a], 1.0f)));
            for (float& s : scales.back()) s = symmetric ? 1.0f / std::sqrt(s) : 1.0f / s;
            messages.push_back(filter_profile(a, scales.back()));
            for (size_t i = 0; i < messages.back().size(); ++i) messages.back()[i] *= scales.back()[i];
        }
        fill_product(scales, scale);
        if (ones) fill_product(messages, ones);
        scales_ = std::move(scales);
        return true;
    }

    bool apply_normalization(bool to_sent) override {
        if (scales_.empty()) return false;
        scales_sent_ = to_sent;
        scales_received_ = true;
        own_rows_.assign(pool_.num_threads(), std::vector<float>(voxels_.box_shape[voxels_.num_axes - 1]));
        return true;
    }

    // The derivative with respect to one axis's bandwidth is the same filter with that axis's slopes instead of its weights.
    bool second_moments(const float* u, const float* v, int num_channels, double* squared, float* /*pull*/, Workspace& workspace) override {
        box_ = workspace.floats(voxels_.box_size);
        for (int c = 0; c < num_channels; ++c)
            for (int differentiated = 0; differentiated < voxels_.num_axes; ++differentiated) {
                scatter(v + c * voxels_.num_voxels, nullptr);
                for (int a = voxels_.num_axes - 1; a >= 0; --a) filter_axis(a, a == differentiated ? slopes_[a] : taps_[a]);
                squared[differentiated] += dot_with_box(u + c * voxels_.num_voxels);
            }
        return true;
    }

    std::string description() const override { return "separable"; }

   private:
    static constexpr int64_t kRunBlock = 256;

    int64_t num_run_blocks() const { return (static_cast<int64_t>(voxels_.runs.size()) + kRunBlock - 1) / kRunBlock; }

    // Applies the one-dimensional filter of an axis to a profile along it.
    std::vector<float> filter_profile(int axis, const std::vector<float>& profile) const {
        const int64_t length = static_cast<int64_t>(profile.size()), radius = static_cast<int64_t>(taps_[axis].size()) - 1;
        std::vector<float> filtered(length);
        for (int64_t i = 0; i < length; ++i) {
            double total = 0;
            for (int64_t j = std::max<int64_t>(0, i - radius); j <= std::min(length - 1, i + radius); ++j)
                total += static_cast<double>(taps_[axis][std::abs(i - j)]) * profile[j];
            filtered[i] = static_cast<float>(total);
        }
        return filtered;
    }

    void fill_product(const std::vector<std::vector<float>>& profiles, float* out) {
        const int last = voxels_.num_axes - 1;
        const int64_t length = voxels_.box_shape[last];
        pool_.run(voxels_.box_size / length, [&](int64_t row, int) { fill_row(profiles, row, out + row * length); });
    }

    void fill_row(const std::vector<std::vector<float>>& profiles, int64_t row, float* out) const {
        const int last = voxels_.num_axes - 1;
        float factor = 1.0f;
        for (int64_t a = last - 1, rest = row; a >= 0; rest /= voxels_.box_shape[a], --a)
            factor *= profiles[a][rest % voxels_.box_shape[a]];
        for (int64_t i = 0; i < voxels_.box_shape[last]; ++i) out[i] = factor * profiles[last][i];
    }

    // The normalization of a run's voxels, if it is the filter's own: such runs are whole rows.
    const float* own_scale(const Run& run, int thread) {
        fill_row(scales_, run.box / run.length, own_rows_[thread].data());
        return own_rows_[thread].data();
    }

    void scatter(const float* values, const float* pre) {
        const auto& runs = voxels_.runs;
        const int64_t num_runs = static_cast<int64_t>(runs.size());
        // Each block of runs also clears the box from its first run up to the next block's first.
        pool_.run(num_run_blocks(), [&](int64_t block, int thread) {
            const int64_t first = block * kRunBlock, last = std::min(first + kRunBlock, num_runs);
            int64_t cleared = block == 0 ? 0 : runs[first].box;
            for (int64_t r = first; r < last; ++r) {
                const Run& run = runs[r];
                std::fill(box_ + cleared, box_ + run.box, 0.0f);
                float* to = box_ + run.box;
                const float* from = values + run.voxel;
                if (pre || scales_sent_) {
                    const float* scale = scales_sent_ ? own_scale(run, thread) : pre + run.voxel;
                    for (int32_t i = 0; i < run.length; ++i) to[i] = from[i] * scale[i];
                } else {
                    std::copy(from, from + run.length, to);
                }
                cleared = run.box + run.length;
            }
            std::fill(box_ + cleared, box_ + (last < num_runs ? runs[last].box : voxels_.box_size), 0.0f);
        });
    }

    void gather(const float* post, float weight, float* sum) {
        const auto& runs = voxels_.runs;
        const int64_t num_runs = static_cast<int64_t>(runs.size());
        pool_.run(num_run_blocks(), [&](int64_t block, int thread) {
            for (int64_t r = block * kRunBlock; r < std::min((block + 1) * kRunBlock, num_runs); ++r) {
                const Run& run = runs[r];
                const float* from = box_ + run.box;
                float* to = sum + run.voxel;
                if (is_zero(from, run.length)) continue;
                if (post || scales_received_) {
                    const float* scale = scales_received_ ? own_scale(run, thread) : post + run.voxel;
                    for (int32_t i = 0; i < run.length; ++i) to[i] += weight * scale[i] * from[i];
                } else {
                    for (int32_t i = 0; i < run.length; ++i) to[i] += weight * from[i];
                }
            }
        });
    }

    double dot_with_box(const float* values) {
        std::vector<double> sums(num_run_blocks());
        pool_.run(num_run_blocks(), [&](int64_t block, int) {
            const int64_t end = std::min((block + 1) * kRunBlock, static_cast<int64_t>(voxels_.runs.size()));
            for (int64_t r = block * kRunBlock; r < end; ++r) {
                const Run& run = voxels_.runs[r];
                vfloat total{};
                for (int64_t i = 0; i < run.length; i += kLanes)
                    total += load_some(values + run.voxel + i, run.length - i) * load_some(box_ + run.box + i, run.length - i);
                sums[block] += static_cast<double>(sum_lanes(total));
            }
        });
        return std::accumulate(sums.begin(), sums.end(), 0.0);
    }

    void filter_axis(int axis, const std::vector<float>& taps) {
        const int64_t length = voxels_.box_shape[axis];
        int64_t inner = 1;
        for (int a = axis + 1; a < voxels_.num_axes; ++a) inner *= voxels_.box_shape[a];
        const int64_t outer = voxels_.box_size / (length * inner);
        if (inner == 1) {
            constexpr int64_t kRows = 64;
            pool_.run((outer + kRows - 1) / kRows, [&](int64_t block, int thread) {
                for (int64_t row = block * kRows; row < std::min((block + 1) * kRows, outer); ++row)
                    filter_row(box_ + row * length, length, taps, scratch_[thread]);
            });
        } else {
            const int64_t num_panels = (inner + kColumns - 1) / kColumns;
            pool_.run(outer * num_panels, [&](int64_t item, int thread) {
                const int64_t column = item % num_panels * kColumns;
                filter_panel(box_ + item / num_panels * length * inner + column, length, inner, std::min(kColumns, inner - column), taps,
                             scratch_[thread]);
            });
        }
    }

    // One contiguous row, in place; values beyond its ends are zero.
    static void filter_row(float* row, int64_t length, const std::vector<float>& taps, std::vector<float>& scratch) {
        const int64_t radius = static_cast<int64_t>(taps.size()) - 1;
        const int64_t padded = (length + kLanes - 1) / kLanes * kLanes;
        const int64_t margin = std::max<int64_t>(radius, kLanes);
        scratch.assign(padded + 2 * margin + kLanes, 0.0f);
        float* center = scratch.data() + margin;
        std::copy(row, row + length, center);
        if (is_zero(center, length)) return;
        const vint lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        // Neighbors up to one vector away are extracted from three loaded vectors, because most unaligned loads cross a cache line.
        const int64_t near = std::min<int64_t>(radius, kLanes);
        vfloat before = load(center - kLanes), own = load(center);
        for (int64_t i = 0; i < length; i += kLanes) {
            const vfloat after = load(center + i + kLanes);
            vfloat total = own * taps[0];
            for (int64_t k = 1; k <= near; ++k) {
                const int32_t shift = static_cast<int32_t>(k);
                total += (__builtin_shuffle(before, own, lane + (kLanes - shift)) + __builtin_shuffle(own, after, lane + shift)) * taps[k];
            }
            for (int64_t k = near + 1; k <= radius; ++k) total += (load(center + i - k) + load(center + i + k)) * taps[k];
            store_some(row + i, total, length - i);
            before = own;
            own = after;
        }
    }

    // `width` neighboring columns of stride `stride`, in place.
    static void filter_panel(float* panel, int64_t length, int64_t stride, int64_t width, const std::vector<float>& taps,
                             std::vector<float>& scratch) {
        const int64_t radius = static_cast<int64_t>(taps.size()) - 1;
        scratch.resize((length + 2 * radius) * kColumns);
        std::fill(scratch.begin(), scratch.begin() + radius * kColumns, 0.0f);
        std::fill(scratch.begin() + (length + radius) * kColumns, scratch.begin() + (length + 2 * radius) * kColumns, 0.0f);
        float* center = scratch.data() + radius * kColumns;
        for (int64_t i = 0; i < length; ++i) {
            std::copy(panel + i * stride, panel + i * stride + width, center + i * kColumns);
            std::fill(center + i * kColumns + width, center + (i + 1) * kColumns, 0.0f);
        }
        // Rows out of reach of all that are not zero stay zero: only the stretches between them are filtered.
        const auto has_values = [&](int64_t i) { return !is_zero(center + i * kColumns, kColumns); };
        for (int64_t i = 0, end = 0; i < length;) {
            if (!has_values(i)) {
                ++i;
                continue;
            }
            const int64_t begin = std::max(end, i - radius);
            for (end = i + radius + 1; i < std::min(length, end + radius); ++i)
                if (has_values(i)) end = i + radius + 1;
            filter_rows(center, begin, std::min(end, length), taps, panel, stride, width);
        }
    }

    // Rows `begin` to `end` of the panel, from its copy.
    static void filter_rows(const float* copy, int64_t begin, int64_t end, const std::vector<float>& taps, float* panel, int64_t stride,
                            int64_t width) {
        const int64_t radius = static_cast<int64_t>(taps.size()) - 1;
        for (int64_t i = begin; i < end; ++i) {
            const float* row = copy + i * kColumns;
            vfloat total[4];
            for (int v = 0; v < 4; ++v) total[v] = load(row + v * kLanes) * taps[0];
            for (int64_t k = 1; k <= radius; ++k) {
                const float* before = row - k * kColumns;
                const float* after = row + k * kColumns;
                for (int v = 0; v < 4; ++v) total[v] += (load(before + v * kLanes) + load(after + v * kLanes)) * taps[k];
            }
            if (width == kColumns) {
                for (int v = 0; v < 4; ++v) store(panel + i * stride + v * kLanes, total[v]);
            } else {
                float wide[kColumns];
                for (int v = 0; v < 4; ++v) store(wide + v * kLanes, total[v]);
                std::copy(wide, wide + width, panel + i * stride);
            }
        }
    }

    const Voxels& voxels_;
    ThreadPool& pool_;
    std::vector<std::vector<float>> taps_, slopes_;       // per axis: SpatialTaps
    std::vector<std::vector<float>> scales_;              // per axis: the normalization is their product; empty: it is not one
    bool scales_sent_ = false, scales_received_ = false;  // whether the filter applies it
    float* box_ = nullptr;                                // in the workspace
    std::vector<std::vector<float>> scratch_, own_rows_;  // per thread
};

}  // namespace

std::unique_ptr<Filter> make_spatial_filter(const Voxels& voxels, const std::vector<double>& theta_gamma, ThreadPool& pool) {
    return std::make_unique<SpatialFilter>(voxels, theta_gamma, pool);
}

}  // namespace crf
