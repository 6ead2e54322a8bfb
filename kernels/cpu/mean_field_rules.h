// When the mean field stops, and when a rise of the energy counts (docs/reference/math.md).
#pragma once

namespace crf {

inline constexpr double kEnergyRounding = 1e-6;      // relative rise of the energy that counts as rounding
inline constexpr double kFlipsAtConvergence = 1e-4;  // of the voxels, in the last step

}  // namespace crf
