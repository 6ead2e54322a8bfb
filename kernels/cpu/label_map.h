// Per-voxel functions of a whole grid: the largest label, the softmax, and the range of an array.
#pragma once

#include "cpu/thread_pool.h"

namespace crf {

// logits: (label, *grid). out: (*grid). Label: uint8_t or uint16_t. Ties go to the lowest label.
template <class Label>
void label_map(const float* logits, int num_labels, int64_t grid_size, ThreadPool& pool, Label* out);

// out: (label, *grid), sums to 1 over labels; may be the logits.
void softmax(const float* logits, int num_labels, int64_t grid_size, ThreadPool& pool, float* out);

// Smallest and largest value of each channel of (channel, *grid), one after the other; both NaN for a channel with a value that is
// not finite.
std::vector<float> channel_ranges(const float* channels, int64_t num_channels, int64_t grid_size, ThreadPool& pool);

}  // namespace crf
