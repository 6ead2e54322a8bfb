// The bilateral kernel summed over all pairs of voxels: O(N^2), exact to single precision.

#include "cpu/filter_moments.h"
#include "cpu/simd.h"

namespace crf {
namespace {
// exp(-d^2 / 2) = 2^-(d * this)^2
constexpr float kFeatureScale = static_cast<float>(kSqrtHalfLog2e);
// senders that are summed in a register before the total: limits rounding
constexpr int64_t kPartial = 1024;

class ExactFilter final : public Filter {
   public:
    ExactFilter(const KernelInput& input, ThreadPool& pool)
        : pool_(pool),
          num_voxels_(input.voxels->num_voxels),
          num_features_(input.num_features()),
          num_modalities_(static_cast<int>(input.intensity.size())),
          axis_feature_(input.voxels->feature,
                        input.voxels->feature + input.theta_position.size()) {
        padded_ = whole_vectors(num_voxels_);
        features_ = Buffer<float>(padded_ * num_features_);
        std::fill(features_.get(), features_.get() + features_.size, 0.0f);
        for (int f = 0; f < num_features_; ++f)
            gather_feature(input, f, 0, num_voxels_, features_.get() + input.row_of(f) * padded_);
        for (int64_t i = 0; i < features_.size; ++i) features_[i] *= kFeatureScale;
    }

    void accumulate(const Filtering& wanted, Workspace&) override {
        for (int c = 0; c < wanted.num_channels; c += kChannelGroup) {
            const int count = std::min(kChannelGroup, wanted.num_channels - c);
            accumulate_group(wanted.of_channels(c, count, num_voxels_));
        }
    }

    // Pair by pair, like the weights.
    void add_moments(const FilteredPair& pair, const KernelInput& input, double* squared,
                     float* image, MomentSums& sums) override {
        if (num_features_ > kMostFeatures)
            return Filter::add_moments(pair, input, squared, image, sums);
        float* const pull = sums.cleared_pull(input, image);
        add_pairs(pair.u, pair.v, pair.num_channels, squared, pull);
        sums.add_pull(input, image);
    }

    std::string description() const override {
        return "exact (all " + std::to_string(num_voxels_) + " x N pairs)";
    }

   private:
    static constexpr int kMostFeatures = 12;

    // The sums of `add_moments`. pull: (modality, voxel), added to, or nullptr.
    void add_pairs(const float* u, const float* v, int num_channels, double* squared, float* pull) {
        // Features are scaled to give exponents of 2.
        constexpr float kUnscale = 1.0f / kFeatureScale;
        const int64_t num_items = padded_ / kLanes;
        std::vector<double> sums(num_items * num_features_);
        Buffer<float> sent(2 * num_voxels_ *
                           num_channels);  // (voxel; channels of u, channels of v)
        for (int64_t n = 0; n < num_voxels_; ++n)
            for (int c = 0; c < num_channels; ++c) {
                sent[2 * n * num_channels + c] = u[c * num_voxels_ + n];
                sent[(2 * n + 1) * num_channels + c] = v[c * num_voxels_ + n];
            }
        pool_.run(num_items, [&](int64_t item, int) {
            const int64_t first = item * kLanes;
            const int64_t count = std::min<int64_t>(kLanes, num_voxels_ - first);
            vfloat total[kMostFeatures]{}, pulled[kMostFeatures]{};
            std::vector<vfloat> own(2 * num_channels);
            for (int c = 0; c < num_channels; ++c) {
                own[c] = load_some(u + c * num_voxels_ + first, count);
                own[num_channels + c] = load_some(v + c * num_voxels_ + first, count);
            }
            for (int64_t begin = 0; begin < num_voxels_; begin += kPartial) {
                vfloat partial[kMostFeatures]{};
                for (int64_t m = begin; m < std::min(begin + kPartial, num_voxels_); ++m) {
                    vfloat exponent{}, difference[kMostFeatures];
                    for (int d = 0; d < num_features_; ++d) {
                        const float* feature = features_.get() + d * padded_;
                        difference[d] = load(feature + first) - feature[m];
                        exponent -= difference[d] * difference[d];
                    }
                    const vfloat weight = Exp2<vfloat>()(exponent);
                    const float* other_u = sent.get() + 2 * m * num_channels;
                    const float* other_v = other_u + num_channels;
                    vfloat forth{}, back{};
                    for (int c = 0; c < num_channels; ++c) {
                        forth += own[c] * other_v[c];
                        back += own[num_channels + c] * other_u[c];
                    }
                    const vfloat product = weight * forth, both = weight * (forth + back);
                    for (int d = 0; d < num_features_; ++d) {
                        partial[d] += product * (difference[d] * difference[d]);
                        pulled[d] += both * difference[d];
                    }
                }
                for (int d = 0; d < num_features_; ++d) total[d] += partial[d];
            }
            for (int d = 0; d < num_features_; ++d) {
                sums[item * num_features_ + d] = static_cast<double>(sum_lanes(total[d])) *
                                                 static_cast<double>(kUnscale * kUnscale);
                if (!pull || d >= num_modalities_) continue;
                float* to = pull + d * num_voxels_ + first;
                store_some(to, load_some(to, count) + pulled[d] * kUnscale, count);
            }
        });
        for (int64_t item = 0; item < num_items; ++item) {
            const double* of_item = sums.data() + item * num_features_;
            for (int m = 0; m < num_modalities_; ++m) squared[m] += of_item[m];
            for (size_t a = 0; a < axis_feature_.size(); ++a)
                squared[num_modalities_ + a] += of_item[num_modalities_ + axis_feature_[a]];
        }
    }

    void accumulate_group(const Filtering& wanted) {
        Buffer<float> sent(num_voxels_ * kChannelGroup);  // (voxel, channel)
        for (int64_t n = 0; n < num_voxels_; ++n) {
            const float factor = wanted.pre ? wanted.pre[n] : 1.0f;
            for (int c = 0; c < kChannelGroup; ++c)
                sent[n * kChannelGroup + c] =
                    c < wanted.num_channels ? wanted.values[c * num_voxels_ + n] * factor : 0.0f;
        }
        pool_.run(padded_ / kLanes, [&](int64_t item, int) {
            const int64_t first = item * kLanes;
            vfloat total[kChannelGroup]{};
            for (int64_t begin = 0; begin < num_voxels_; begin += kPartial) {
                vfloat partial[kChannelGroup]{};
                for (int64_t m = begin; m < std::min(begin + kPartial, num_voxels_); ++m) {
                    vfloat squared{};
                    for (int d = 0; d < num_features_; ++d) {
                        const float* feature = features_.get() + d * padded_;
                        const vfloat difference = load(feature + first) - feature[m];
                        squared += difference * difference;
                    }
                    const vfloat weight = Exp2<vfloat>()(-squared);
                    for (int c = 0; c < kChannelGroup; ++c)
                        partial[c] += weight * sent[m * kChannelGroup + c];
                }
                for (int c = 0; c < kChannelGroup; ++c) total[c] += partial[c];
            }
            const int64_t count = std::min<int64_t>(kLanes, num_voxels_ - first);
            const vfloat factor =
                wanted.post ? load_some(wanted.post + first, count) : splat_lanes(1.0f);
            for (int c = 0; c < wanted.num_channels; ++c) {
                float* const to = wanted.sum + c * num_voxels_ + first;
                const vfloat received = total[c] * (factor * wanted.weight_of(c));
                store_some(to, load_some(to, count) + received, count);
            }
        });
    }

    ThreadPool& pool_;
    int64_t num_voxels_, padded_;
    int num_features_, num_modalities_;
    std::vector<int> axis_feature_;  // the position feature of each box axis
    Buffer<float> features_;         // (feature, padded voxel), scaled by kFeatureScale
};
}  // namespace

std::unique_ptr<Filter> make_exact_filter(const KernelInput& input, ThreadPool& pool) {
    return std::make_unique<ExactFilter>(input, pool);
}
}  // namespace crf
