// The messages of a mean-field step (docs/reference/math.md): each kernel filters every channel,
// and the results are weighted and summed. If all labels have the same weight, the last label's
// channel is not filtered: its message is the message of all ones minus the other labels'.
#pragma once

#include "cpu/mean_field.h"
#include "cpu/simd.h"

namespace crf {
class Messages {
   public:
    // Computes the messages of all ones, except where they come with the first step's: before it,
    // when little memory is in use.
    Messages(std::vector<Kernel>& kernels, const MeanFieldOptions& options, int64_t num_voxels,
             bool is_recorded, ThreadPool& pool, Workspace& workspace);

    // Whether the first step sends a channel of all ones, after those of the marginals.
    bool joins_ones() const { return joins_ones_; }

    // The messages of the last step, (channel, voxel); and the message of all ones, (voxel), only
    // if the last channel is not filtered.
    float* received() const { return received_; }
    const float* ones() const { return weighted_ones_.get(); }

    // Allocates memory for the steps. memory: holds the messages; nullptr: they are allocated here.
    void prepare(float* memory);

    // marginals: (channel, voxel).
    void send(float* marginals);

    // Frees the kernels and the workspace, which only further steps would need.
    void finish();

   private:
    void for_blocks(FunctionRef<int64_t, int> body);

    // Whether a kernel's message of all ones can come with the first step's messages, for little
    // more time.
    bool can_join_ones(const Kernel& k) const;

    void find_other_ones();

    void sum_ones();

    // Sends a kernel's messages and, as the last label's channel, its message of all ones.
    void send_ones_too(Kernel& k, float* marginals, const float* weight);

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
