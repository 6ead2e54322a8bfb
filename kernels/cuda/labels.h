// The labels of a voxel: loops over them, rows of their channels, and the one with the largest number.
//
// CRF_LABELS. CRF_CHANNELS: of the labels that are filtered, all of them or all but the last.
// CRF_WIDTH: channels side by side; label l is in group l / CRF_WIDTH.
#pragma once

#include "cuda/launch.h"

// Arrays of many labels are in the thread's local memory in any case; unrolled loops over them would take a compiler minutes.
#if CRF_LABELS <= 32
#define CRF_OVER_LABELS CRF_UNROLL
#else
#define CRF_OVER_LABELS CRF_ROLLED
#endif

namespace crf {

using Channels = Row<CRF_WIDTH>;
constexpr int kLabels = CRF_LABELS;
constexpr int kLast = kLabels - 1;
constexpr int kChannels = CRF_CHANNELS;
constexpr int kGroups = (kChannels + CRF_WIDTH - 1) / CRF_WIDTH;

// Stores the channels of voxel n as rows; places of a row without a channel are zero. rows: (group, voxel). number_of: of a channel.
template <class NumberOf>
CRF_D void store_rows(int64 num_voxels, int64 n, Channels* rows, NumberOf number_of) {
    CRF_OVER_LABELS
    for (int g = 0; g < kGroups; ++g) {
        Channels row = zero_row<CRF_WIDTH>();
        CRF_UNROLL
        for (int c = 0; c < CRF_WIDTH; ++c)
            if (g * CRF_WIDTH + c < kChannels) row.value[c] = number_of(g * CRF_WIDTH + c);
        rows[g * num_voxels + n] = row;
    }
}

// The first of the labels with the largest number.
struct Largest {
    Real value = kLowest;
    int label = 0;
    CRF_D void add(int l, Real x) {
        if (x > value) label = l;
        value = larger(x, value);
    }
};

}  // namespace crf
