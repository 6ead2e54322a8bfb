// The messages of a mean-field step (docs/reference/math.md): each kernel filters every channel,
// and the results are weighted and summed. If all labels have the same weight, the last label's
// channel is not filtered: its message is the message of all ones minus the other labels'.
#pragma once

#include "cpu/mean_field.h"
#include "cpu/voxel_rows.h"

namespace crf {
class Messages {
   public:
    // Computes the messages of all ones, except where they come with the first step's: before it,
    // when little memory is in use.
    Messages(std::vector<Kernel>& kernels, const MeanFieldOptions& options, int64_t num_voxels,
             bool is_recorded, ThreadPool& pool, Workspace& workspace)
        : kernels_(kernels),
          options_(options),
          pool_(pool),
          workspace_(workspace),
          num_channels_(options.num_channels()),
          num_voxels_(num_voxels),
          implied_(options.last_is_implied()),
          is_recorded_(is_recorded) {
        if (!implied_) return;
        for (Kernel& k : kernels_) {
            if (can_join_ones(k)) {
                joins_ones_ = true;
            } else {
                find_ones(k, num_voxels_, pool_, workspace_);
            }
        }
        if (!joins_ones_) sum_ones();
    }

    // Whether the first step sends a channel of all ones, after those of the marginals.
    bool joins_ones() const { return joins_ones_; }

    // The messages of the last step, (channel, voxel); and the message of all ones, (voxel), only
    // if the last channel is not filtered.
    float* received() const { return received_; }
    const float* ones() const { return weighted_ones_.get(); }

    // Allocates memory for the steps. memory: holds the messages; nullptr: they are allocated here.
    void prepare(float* memory) {
        if (!memory) own_ = Buffer<float>((num_channels_ + joins_ones_) * num_voxels_);
        received_ = memory ? memory : own_.get();
    }

    // marginals: (channel, voxel).
    void send(float* marginals) {
        for (size_t k = 0; k < kernels_.size(); ++k) {
            const float* const weight = options_.weight[k].data();
            if (joins_ones_ && can_join_ones(kernels_[k])) {
                send_ones_too(kernels_[k], marginals, weight);
            } else {
                kernels_[k].accumulate(marginals, num_channels_, weight, received_, workspace_);
            }
        }
        if (joins_ones_) sum_ones();
    }

    // Frees the kernels and the workspace, which only further steps would need.
    void finish() {
        kernels_.clear();
        workspace_ = Workspace();
    }

   private:
    // Whether a kernel's message of all ones can come with the first step's messages, for little
    // more time.
    bool can_join_ones(const Kernel& k) const {
        return k.scales_sent && !k.ones && k.filter->traits.shares_weights && !is_recorded_ &&
               num_channels_ % kChannelGroup > 0;
    }

    void sum_ones() {
        joins_ones_ = false;
        std::vector<const float*> ones;
        for (const Kernel& k : kernels_) ones.push_back(k.ones.get());
        const bool in_place = options_.is_last_run && !kernels_.empty() && kernels_.front().ones;
        weighted_ones_ = in_place ? std::move(kernels_.front().ones) : Buffer<float>(num_voxels_);
        pool_.run_blocks(num_voxels_, kVoxelBlock, [&](int64_t begin, int64_t end, int) {
            for (int64_t n = begin; n < end; ++n) {
                float total = 0;
                for (size_t k = 0; k < kernels_.size(); ++k)
                    total += options_.weight[k].front() * (ones[k] ? ones[k][n] : 1.0f);
                weighted_ones_[n] = total;
            }
        });
        if (!options_.is_last_run) return;
        for (Kernel& k : kernels_) k.ones = Buffer<float>();
    }

    // Sends a kernel's messages and, as the last label's channel, its message of all ones.
    void send_ones_too(Kernel& k, float* marginals, const float* weight) {
        float* const ones = marginals + num_channels_ * num_voxels_;
        float* const received = received_ + num_channels_ * num_voxels_;
        std::vector<float> weights(weight, weight + num_channels_);
        weights.push_back(1);
        pool_.run_blocks(num_voxels_, kVoxelBlock, [&](int64_t begin, int64_t end, int) {
            std::fill(received + begin, received + end, 0.0f);
            std::fill(ones + begin, ones + end, 1.0f);
        });
        k.accumulate(marginals, num_channels_ + 1, weights.data(), received_, workspace_);
        k.ones = Buffer<float>(num_voxels_);
        pool_.run_blocks(num_voxels_, kVoxelBlock, [&](int64_t begin, int64_t end, int) {
            std::copy(received + begin, received + end, k.ones.get() + begin);
        });
    }

    std::vector<Kernel>& kernels_;
    const MeanFieldOptions& options_;
    ThreadPool& pool_;
    Workspace& workspace_;
    const int num_channels_;
    const int64_t num_voxels_;
    const bool implied_, is_recorded_;
    // at least one kernel's message of all ones comes with its first messages
    bool joins_ones_ = false;
    Buffer<float> own_;
    float* received_ = nullptr;
    Buffer<float> weighted_ones_;  // (voxel), only when implied
};
}  // namespace crf
