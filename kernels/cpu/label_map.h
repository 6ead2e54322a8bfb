// Per-voxel functions of a whole grid of logits: the largest label, and the softmax.
#pragma once

#include <nanobind/ndarray.h>

namespace crf {

// logits: (label, *grid) float32. out: (*grid) uint8 or uint16. Ties go to the lowest label.
void label_map(const nanobind::ndarray<const float, nanobind::c_contig, nanobind::device::cpu>& logits, int threads,
               const nanobind::ndarray<nanobind::c_contig, nanobind::device::cpu>& out);

// out: (label, *grid) float32, sums to 1 over labels.
void softmax(const nanobind::ndarray<const float, nanobind::c_contig, nanobind::device::cpu>& logits, int threads,
             const nanobind::ndarray<float, nanobind::c_contig, nanobind::device::cpu>& out);

}  // namespace crf
