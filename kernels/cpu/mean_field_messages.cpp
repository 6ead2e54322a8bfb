// Filters the channels of a mean-field step by every kernel, weights the results and adds them up.
#include "cpu/mean_field_messages.h"

#include "cpu/voxel_rows.h"

namespace crf {
Messages::Messages(std::vector<Kernel>& kernels, const MeanFieldOptions& options,
                   int64_t num_voxels, bool is_recorded, ThreadPool& pool, Workspace& workspace)
    : kernels_(kernels),
      options_(options),
      pool_(pool),
      workspace_(workspace),
      num_channels_(options.num_channels()),
      num_voxels_(num_voxels),
      implied_(options.last_is_implied()),
      is_recorded_(is_recorded) {
    if (implied_) find_other_ones();
    if (implied_ && !joins_ones_) sum_ones();
}

void Messages::prepare(float* memory) {
    if (!memory) own_ = Buffer<float>((num_channels_ + joins_ones_) * num_voxels_);
    received_ = memory ? memory : own_.get();
}

void Messages::send(float* marginals) {
    for (size_t k = 0; k < kernels_.size(); ++k) {
        const float* scale = kernels_[k].scale.get();
        const float* weight = options_.weight[k].data();
        const float* const pre = kernels_[k].scales_sent ? scale : nullptr;
        if (joins_ones_ && can_join_ones(kernels_[k])) {
            send_ones_too(kernels_[k], marginals, weight);
        } else {
            kernels_[k].filter->accumulate(marginals, num_channels_, pre, scale, weight, received_,
                                           workspace_);
        }
    }
    if (joins_ones_) sum_ones();
}

void Messages::finish() {
    kernels_.clear();
    workspace_ = Workspace();
}

void Messages::for_blocks(FunctionRef<int64_t, int> body) {
    pool_.run(num_voxel_blocks(num_voxels_), body);
}

bool Messages::can_join_ones(const Kernel& k) const {
    return k.scales_sent && !k.ones && k.filter->traits.shares_weights && !is_recorded_ &&
           num_channels_ % kChannelGroup > 0;
}

void Messages::find_other_ones() {
    for (Kernel& k : kernels_) {
        if (can_join_ones(k)) {
            joins_ones_ = true;
        } else {
            find_ones(k, num_voxels_, pool_, workspace_);
        }
    }
}

void Messages::sum_ones() {
    joins_ones_ = false;
    std::vector<const float*> ones;
    for (const Kernel& k : kernels_) ones.push_back(k.ones.get());
    const bool in_place = options_.is_last_run && !kernels_.empty() && kernels_.front().ones;
    weighted_ones_ = in_place ? std::move(kernels_.front().ones) : Buffer<float>(num_voxels_);
    for_blocks([&](int64_t block, int) {
        for (int64_t n = block * kVoxelBlock; n < std::min((block + 1) * kVoxelBlock, num_voxels_);
             ++n) {
            float total = 0;
            for (size_t k = 0; k < kernels_.size(); ++k)
                total += options_.weight[k].front() * (ones[k] ? ones[k][n] : 1.0f);
            weighted_ones_[n] = total;
        }
    });
    if (!options_.is_last_run) return;
    for (Kernel& k : kernels_) k.ones = Buffer<float>();
}

void Messages::send_ones_too(Kernel& k, float* marginals, const float* weight) {
    float* const ones = marginals + num_channels_ * num_voxels_;
    float* const received = received_ + num_channels_ * num_voxels_;
    std::vector<float> weights(weight, weight + num_channels_);
    weights.push_back(1);
    clear_rows(received, num_voxels_, 1, pool_);
    for_blocks([&](int64_t block, int) {
        std::fill(ones + block * kVoxelBlock, ones + block_end(block, num_voxels_), 1.0f);
    });
    k.filter->accumulate(marginals, num_channels_ + 1, k.scale.get(), k.scale.get(), weights.data(),
                         received_, workspace_);
    k.ones = Buffer<float>(num_voxels_);
    for_blocks([&](int64_t block, int) {
        std::copy(received + block * kVoxelBlock, received + block_end(block, num_voxels_),
                  k.ones.get() + block * kVoxelBlock);
    });
}
}  // namespace crf
