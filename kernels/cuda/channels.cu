// Questions about channels on the whole grid that need not bring them back to the host: their ranges, the largest one, where all of
// them are equal, and how often each label occurs; and the map of intensities to the scale of the kernels.
#include "cuda/launch.h"

namespace crf {

// The number of the largest channel at a place, the lowest number of several. channels: (channel, size).
CRF_D int largest_channel(const Real* channels, int64 size, int num_channels, int64 i) {
    int label = 0;
    Real largest = channels[i];
    for (int c = 1; c < num_channels; ++c) {
        const Real value = channels[c * size + i];
        if (value > largest) {
            largest = value;
            label = c;
        }
    }
    return label;
}

// One thread per place of the grid; for up to 256 channels.
CRF_KERNEL(label_places, const Real* channels, int64 size, int num_channels, uint8* labels) {
    const int64 i = thread_number();
    if (i < size) labels[i] = static_cast<uint8>(largest_channel(channels, size, num_channels, i));
}

// The same for more channels.
CRF_KERNEL(label_places_wide, const Real* channels, int64 size, int num_channels, uint16* labels) {
    const int64 i = thread_number();
    if (i < size) labels[i] = static_cast<uint16>(largest_channel(channels, size, num_channels, i));
}

// One thread per place of the grid: 1 where all channels are equal. found: set if that is so anywhere.
CRF_KERNEL(find_equal, const Real* channels, int64 size, int num_channels, uint8* equal, uint64* found) {
    const int64 i = thread_number();
    if (i >= size) return;
    const Real first = channels[i];
    bool same = true;
    for (int c = 1; c < num_channels && same; ++c) same = channels[c * size + i] == first;
    equal[i] = same ? 1 : 0;
    if (same && read_shared(found) == 0) compare_and_swap(found, 0, 1);
}

// One thread per channel and remainder modulo num_folded: the smallest and the largest of the values with that remainder; both are not a
// number if one of them is not finite.
//
// low, high: (channel, count); the same array at first. folded: (2, channel, num_folded).
CRF_KERNEL(fold_ranges, const Real* low, const Real* high, int64 count, int num_channels, int64 num_folded, Real* folded) {
    const int64 i = thread_number();
    if (i >= num_channels * num_folded) return;
    const int64 channel = i / num_folded;
    Real least = low[channel * count + i % num_folded], most = high[channel * count + i % num_folded];
    Real doubt = least - least + (most - most);  // 0, or not a number
    for (int64 j = i % num_folded + num_folded; j < count; j += num_folded) {
        const Real a = low[channel * count + j], b = high[channel * count + j];
        doubt += a - a + (b - b);
        least = a < least ? a : least;
        most = larger(b, most);
    }
    folded[i] = least + doubt;
    folded[num_channels * num_folded + i] = most + doubt;
}

// One row of counts: how often a label occurs in one of two label maps, or how many places differ; at places with one remainder.
template <class Label>
CRF_D uint32 count_places(const Label* before, const Label* after, int64 size, int num_labels, int row, int64 first, int64 step) {
    uint32 count = 0;
    for (int64 j = first; j < size; j += step) {
        if (row < num_labels) {
            count += before[j] == row;
        } else if (row < 2 * num_labels) {
            count += after[j] == row - num_labels;
        } else {
            count += before[j] != after[j];
        }
    }
    return count;
}

// One thread per row and remainder modulo num_folded. Rows: the labels before, the labels after, and the places that differ; the first
// num_rows of them. counts: (row, num_folded).
CRF_KERNEL(count_labels, const uint8* before, const uint8* after, int64 size, int num_labels, int num_rows, int64 num_folded,
           uint32* counts) {
    const int64 i = thread_number();
    if (i >= num_rows * num_folded) return;
    counts[i] = count_places(before, after, size, num_labels, static_cast<int>(i / num_folded), i % num_folded, num_folded);
}

// The same for labels of two bytes.
CRF_KERNEL(count_labels_wide, const uint16* before, const uint16* after, int64 size, int num_labels, int num_rows, int64 num_folded,
           uint32* counts) {
    const int64 i = thread_number();
    if (i >= num_rows * num_folded) return;
    counts[i] = count_places(before, after, size, num_labels, static_cast<int>(i / num_folded), i % num_folded, num_folded);
}

// One thread per place: (value - shift) * scale, between 0 and 1 if it clips. As on the host, where the product is rounded after the
// difference is.
CRF_KERNEL(map_intensities, const Real* values, int64 size, Real shift, Real scale, int clips, Real* mapped) {
    const int64 i = thread_number();
    if (i >= size) return;
    Real value = (values[i] - shift) * scale;
    if (clips) {
        value = value > Real(0) ? value : Real(0);
        value = value < Real(1) ? value : Real(1);
    }
    mapped[i] = value;
}

}  // namespace crf
