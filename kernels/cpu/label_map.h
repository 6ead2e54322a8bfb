// Per-voxel functions of a whole grid: the largest label, the softmax, and the range of an array.
#pragma once

#include <nanobind/ndarray.h>

#include <vector>

namespace crf {

// logits: (label, *grid) float32. out: (*grid) uint8 or uint16. Ties go to the lowest label.
void label_map(const nanobind::ndarray<const float, nanobind::c_contig, nanobind::device::cpu>& logits, int threads,
               const nanobind::ndarray<nanobind::c_contig, nanobind::device::cpu>& out);

// out: (label, *grid) float32, sums to 1 over labels.
void softmax(const nanobind::ndarray<const float, nanobind::c_contig, nanobind::device::cpu>& logits, int threads,
             const nanobind::ndarray<float, nanobind::c_contig, nanobind::device::cpu>& out);

// Smallest and largest value of each channel of (channel, *grid), one after the other; both NaN for a channel with a value that is
// not finite.
std::vector<float> channel_ranges(const nanobind::ndarray<const float, nanobind::c_contig, nanobind::device::cpu>& channels, int threads);

}  // namespace crf
