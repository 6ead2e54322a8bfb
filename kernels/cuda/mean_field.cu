// The mean-field iteration, except its filters (docs/reference/math.md, section 3): compatibility,
// softmax, energy and divergence. The sums of a step stay on the device: each thread sums its own
// voxels, and these sums are added up in a fixed order. CRF_LABELS. CRF_CHANNELS: of the labels
// that are filtered, all of them or all but the last, whose marginals follow from the others'.
// CRF_WIDTH: channels side by side; label l is in group l / CRF_WIDTH. Up to 32 labels are kept in
// a thread's registers.
#include "cuda/filter_ends.h"
#include "cuda/update.h"

namespace crf {
using Channels = Row<CRF_WIDTH>;
constexpr int kLabels = CRF_LABELS;
constexpr int kChannels = CRF_CHANNELS;
constexpr int kGroups = (kChannels + CRF_WIDTH - 1) / CRF_WIDTH;
constexpr bool kImplied = kChannels < kLabels;

// Sums over the voxels. Without messages, the first sum keeps its value. kUnary: sum Q log Q - <a /
// T, Q>, new marginals, logits a relative to the largest.
enum { kQuadratic, kUnary, kLargest, kDivergence, kFlips, kNumSums };

// Label l's part of KL(now || old), a sum of p (r - 1 - log r) with r = old / now: none is
// negative, and near r = 1 nothing cancels. An implied marginal is 1 minus the others: differences
// below the rounding of the others count as zero.
CRF_D Real divergence_of_label(int l, Real now, Real old) {
    const Real least = kImplied && l == kLabels - 1 ? kLabels * kEpsilon : kTiny;
    const Real p = larger(now, least);
    const Real ratio = larger(old, least) / p;
    return larger(p * (ratio - Real(1.0) - log(larger(ratio, kTiny))), Real(0.0));
}

CRF_D void load_channels(const Channels* rows, int64 num_voxels, int64 n,
                         Real (&channel)[kLabels]) {
    CRF_OVER_LABELS
    for (int g = 0; g < kGroups; ++g) {
        const Channels row = rows[g * num_voxels + n];
        CRF_UNROLL
        for (int c = 0; c < CRF_WIDTH; ++c)
            if (g * CRF_WIDTH + c < kChannels) channel[g * CRF_WIDTH + c] = row.value[c];
    }
}

// Places of a row without a channel become zero.
CRF_D void store_channels(const Real (&channel)[kLabels], int64 num_voxels, int64 n,
                          Channels* rows) {
    CRF_OVER_LABELS
    for (int g = 0; g < kGroups; ++g) {
        Channels row = zero_row<CRF_WIDTH>();
        CRF_UNROLL
        for (int c = 0; c < CRF_WIDTH; ++c)
            if (g * CRF_WIDTH + c < kChannels) row.value[c] = channel[g * CRF_WIDTH + c];
        rows[g * num_voxels + n] = row;
    }
}

// message += channel_weight * factor * from, where all channels are one group.
CRF_D void add_message(Channels from, Real factor, const Real* channel_weight,
                       Real (&message)[kLabels]) {
    CRF_UNROLL
    for (int c = 0; c < CRF_WIDTH; ++c)
        if (c < kChannels) message[c] += channel_weight[c] * factor * from.value[c];
}

// The lowest label with the largest number.
CRF_D int largest_label(const Real (&x)[kLabels]) {
    Real largest = x[0];
    int label = 0;
    CRF_OVER_LABELS
    for (int l = 1; l < kLabels; ++l) {
        if (x[l] > largest) label = l;
        largest = larger(x[l], largest);
    }
    return label;
}

// Each thread takes every num_threads-th voxel: from its logits, messages and old marginals to the
// new marginals. logits: (label, *grid). bias: (label) or nullptr. grid_index: (voxel). old,
// marginals: (group, voxel), may be the same; old: nullptr if no marginals exist yet. has_messages:
// 0: the marginals of the logits are wanted. messages: (group, voxel), those of the filters that
// have added theirs, or nullptr. weighted_ones: (voxel) the weighted message of all ones, only if
// the last label is implied. compatibility: (label, label), row: the neighbor's. refined: (label,
// *grid) the logits whose marginals are wanted, or nullptr: those of the network. out: (label,
// *grid) or nullptr. partial: (sum, thread).
//
// With one group of channels, the last pass of two filters is done here, too: that of a lattice,
// from vertex_rows to slice_weight, see slice_values; and that along an axis of the box, from `box`
// to axis_weight, see filter_axis. places: (voxel) those in the box, or nullptr: the voxels' own
// numbers. vertex_rows, box: nullptr without this filter.
CRF_KERNEL(update, const Real* __restrict__ logits, const Real* __restrict__ bias, int64 grid_size,
           const int64* __restrict__ grid_index, int64 num_voxels, Real inverse_temperature,
           const Channels* old_marginals, Channels* marginals, int has_messages,
           const Channels* __restrict__ messages, const Channels* __restrict__ vertex_rows,
           const uint32* __restrict__ corner_vertex, const uint16* __restrict__ corner_weight,
           int num_corners, Real amplitude, const Real* __restrict__ slice_scale,
           const Real* __restrict__ slice_weight, const Channels* __restrict__ box,
           const int64* __restrict__ places, int64 stride, int64 extent,
           const Real* __restrict__ taps, int64 radius, const Real* __restrict__ axis_scale,
           const Real* __restrict__ axis_weight, const Real* __restrict__ weighted_ones,
           const Real* __restrict__ compatibility, int is_potts, int wants_divergence,
           const Real* refined, Real* out, int64 num_threads, double* partial) {
    const int64 thread = thread_number();
    if (thread >= num_threads) return;
    const Slice<CRF_WIDTH> slice{vertex_rows, corner_vertex, corner_weight, num_corners,
                                 num_voxels};
    const BoxAxis axis{stride, extent, taps, radius};
    double sums[kNumSums] = {};
    for (int64 n = thread; n < num_voxels; n += num_threads) {
        const int64 place = grid_index[n];
        Real x[kLabels], relative[kLabels], old[kLabels], message[kLabels] = {};
        if (old_marginals) {
            load_channels(old_marginals, num_voxels, n, old);
            if (kImplied) {
                Real rest = Real(1.0);
                CRF_OVER_LABELS
                for (int c = 0; c < kChannels; ++c) rest -= old[c];
                old[kLabels - 1] = larger(rest, Real(0.0));
            }
        }
        if (messages) load_channels(messages, num_voxels, n, message);
        if constexpr (kGroups == 1) {
            if (vertex_rows)
                add_message(slice.at(n), slice_scale ? amplitude * slice_scale[n] : amplitude,
                            slice_weight, message);
            if (box) {
                const int64 in_box = places ? places[n] : n;
                add_message(axis.filtered_box(box, in_box, axis.coordinate_of(in_box)),
                            axis_scale ? axis_scale[n] : Real(1.0), axis_weight, message);
            }
        }
        CRF_OVER_LABELS
        for (int l = 0; l < kLabels; ++l) {  // before anything is stored
            const Real logit = logits[l * grid_size + place];
            x[l] = (bias ? logit + bias[l] : logit) * inverse_temperature;
        }
        const Real largest = largest_of(kLabels, x);
        sums[kLargest] += static_cast<double>(largest);
        CRF_OVER_LABELS
        for (int l = 0; l < kLabels;
             ++l) {  // a label with a logit of minus infinity is excluded from the energy
            relative[l] = x[l] >= kLowest ? x[l] - largest : Real(0.0);
            if (refined) x[l] = refined[l * grid_size + place];
        }
        if (has_messages) {
            Real all = Real(0.0), quadratic = Real(0.0);
            CRF_OVER_LABELS
            for (int c = 0; c < kChannels; ++c) all += message[c];
            if (kImplied) {
                const Real ones = weighted_ones[n];
                message[kLabels - 1] = ones - all;
                all = ones;
            }
            CRF_OVER_LABELS
            for (int l = 0; l < kLabels; ++l) {
                Real pairwise = Real(0.0);
                if (is_potts) {
                    pairwise = all - message[l];
                } else {
                    CRF_OVER_LABELS
                    for (int k = 0; k < kLabels; ++k)
                        pairwise += message[k] * compatibility[k * kLabels + l];
                }
                quadratic += pairwise * old[l];
                x[l] -= pairwise;
            }
            sums[kQuadratic] += static_cast<double>(quadratic);
        }
        if (out) {
            CRF_OVER_LABELS
            for (int l = 0; l < kLabels; ++l) out[l * grid_size + place] = x[l];
        }
        if (wants_divergence && largest_label(x) != largest_label(old)) sums[kFlips] += 1.0;
        Real unary = update_marginals(kLabels, x, x);  // (5)
        CRF_OVER_LABELS
        for (int l = 0; l < kLabels; ++l) unary -= relative[l] * x[l];
        sums[kUnary] += static_cast<double>(unary);
        if (wants_divergence) {
            Real divergence = Real(0.0);
            CRF_OVER_LABELS
            for (int l = 0; l < kLabels; ++l) divergence += divergence_of_label(l, x[l], old[l]);
            sums[kDivergence] += static_cast<double>(divergence);
        }
        store_channels(x, num_voxels, n, marginals);
    }
    CRF_UNROLL
    for (int i = 0; i < kNumSums; ++i)
        if (has_messages || i > kQuadratic) partial[i * num_threads + thread] = sums[i];
}
}  // namespace crf
