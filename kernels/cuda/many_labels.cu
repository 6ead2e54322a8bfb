// The iteration's kernels over voxels for more labels than a thread has registers for: `start` and `update` of mean_field.cu in two passes
// over groups of CRF_WIDTH labels. The first finds the sums, the softmax's divisor among them; the second finds the logits again, or reads
// them where they are stored, and divides. Nothing that grows with the labels is kept in between.
//
// Constants as in mean_field.cu.
#include "cuda/mean_field.h"

namespace crf {

constexpr int kLabelGroups = (kLabels + CRF_WIDTH - 1) / CRF_WIDTH;

// The divisor of a softmax, from logits that come one group after the other: what was summed up is rescaled if the largest one grows.
struct Softmax {
    Real largest = kLowest, total = Real(0.0), weighted = Real(0.0);  // weighted: sum of e^s s, with s = x - largest

    CRF_D void add(Channels x, int g) {
        Real most = largest;
        CRF_UNROLL
        for (int c = 0; c < CRF_WIDTH; ++c)
            if (g * CRF_WIDTH + c < kLabels) most = larger(most, x.value[c]);
        const Real lower = larger(largest - most, kVanished);
        const Real factor = exp(lower);
        weighted = factor * (weighted + total * lower);
        total *= factor;
        largest = most;
        CRF_UNROLL
        for (int c = 0; c < CRF_WIDTH; ++c) {
            if (g * CRF_WIDTH + c >= kLabels) continue;
            const Real shifted = larger(x.value[c] - largest, kVanished);
            const Real e = exp(shifted);
            total += e;
            weighted += e * shifted;
        }
    }
    CRF_D Real marginal(Real x) const { return exp(larger(x - largest, kVanished)) * (Real(1.0) / total); }
    CRF_D Real negative_entropy() const { return weighted * (Real(1.0) / total) - log(total); }
};

CRF_D Channels load_group(const Channels* rows, int64 num_voxels, int64 n, int g) {
    return g < kGroups ? rows[g * num_voxels + n] : zero_row<CRF_WIDTH>();
}

// The channels among the marginals of a group; the others stay zero.
CRF_D void store_group(Channels row, int64 num_voxels, int64 n, int g, Channels* rows) {
    if (g >= kGroups) return;
    CRF_UNROLL
    for (int c = 0; c < CRF_WIDTH; ++c)
        if (g * CRF_WIDTH + c >= kChannels) row.value[c] = Real(0.0);
    rows[g * num_voxels + n] = row;
}

// One group of a label's numbers on the grid. place: of the voxel.
CRF_D Channels load_labels(const Real* labels, int64 grid_size, int64 place, int g) {
    Channels x = zero_row<CRF_WIDTH>();
    CRF_UNROLL
    for (int c = 0; c < CRF_WIDTH; ++c)
        if (g * CRF_WIDTH + c < kLabels) x.value[c] = labels[(g * CRF_WIDTH + c) * grid_size + place];
    return x;
}
CRF_D void store_labels(Channels x, int64 grid_size, int64 place, int g, Real* labels) {
    CRF_UNROLL
    for (int c = 0; c < CRF_WIDTH; ++c)
        if (g * CRF_WIDTH + c < kLabels) labels[(g * CRF_WIDTH + c) * grid_size + place] = x.value[c];
}

CRF_D Channels calibrated_group(const Real* logits, int64 grid_size, int64 place, const Real* bias, int g, Real inverse_temperature) {
    Channels x = load_labels(logits, grid_size, place, g);
    CRF_UNROLL
    for (int c = 0; c < CRF_WIDTH; ++c)
        if (g * CRF_WIDTH + c < kLabels) x.value[c] = calibrated(x.value[c], bias, g * CRF_WIDTH + c, inverse_temperature);
    return x;
}

// The products of all messages with a matrix, for the labels of a group. ones: the message of all ones, if the last label is implied.
CRF_D Channels multiplied(const Channels* messages, int64 num_voxels, int64 n, Real ones, const Real* compatibility, int g) {
    Channels pairwise = zero_row<CRF_WIDTH>();
    Real all = Real(0.0);
    const auto add = [&](int k, Real message) {
        CRF_UNROLL
        for (int c = 0; c < CRF_WIDTH; ++c)
            if (g * CRF_WIDTH + c < kLabels) pairwise.value[c] += message * compatibility[k * kLabels + g * CRF_WIDTH + c];
    };
    CRF_ROLLED
    for (int j = 0; j < kGroups; ++j) {
        const Channels message = messages[j * num_voxels + n];
        CRF_UNROLL
        for (int i = 0; i < CRF_WIDTH; ++i) {
            if (j * CRF_WIDTH + i >= kChannels) continue;
            all += message.value[i];
            add(j * CRF_WIDTH + i, message.value[i]);
        }
    }
    if (kImplied) add(kLabels - 1, ones - all);
    return pairwise;
}

// See `start` in mean_field.cu.
CRF_KERNEL(start_many, const Real* logits, const Real* bias, int64 grid_size, const int64* grid_index, int64 num_voxels,
           Real inverse_temperature, Channels* marginals, Real* out, int64 num_threads, double* partial) {
    sum_over_voxels(num_voxels, num_threads, partial, [&](int64 n, Sums& sums) {
        const int64 place = grid_index[n];
        Softmax softmax;
        CRF_ROLLED
        for (int g = 0; g < kLabelGroups; ++g) {
            const Channels x = calibrated_group(logits, grid_size, place, bias, g, inverse_temperature);
            if (out) store_labels(x, grid_size, place, g, out);
            softmax.add(x, g);
        }
        sums[kLargest] += static_cast<double>(softmax.largest);
        sums[kNegativeEntropy] += static_cast<double>(softmax.negative_entropy());
        CRF_ROLLED
        for (int g = 0; g < kGroups; ++g) {
            Channels x = calibrated_group(logits, grid_size, place, bias, g, inverse_temperature);
            CRF_UNROLL
            for (int c = 0; c < CRF_WIDTH; ++c) x.value[c] = softmax.marginal(x.value[c]);
            store_group(x, num_voxels, n, g, marginals);
        }
    });
}

// See `update` in mean_field.cu. With the Potts model and no implied label, the sum of all messages is known after the first pass only:
// until then it is left out of the logits, which changes no marginal.
CRF_KERNEL(update_many, const Real* logits, const Real* bias, int64 grid_size, const int64* grid_index, int64 num_voxels,
           Real inverse_temperature, Channels* marginals, const Channels* messages, const Real* weighted_ones, const Real* compatibility,
           int is_potts, int wants_divergence, const double* state, const Real* kept, Real* out, int64 num_threads, double* partial) {
    const Real step = static_cast<Real>(state[kStep]);
    sum_over_voxels(num_voxels, num_threads, partial, [&](int64 n, Sums& sums) {
        const int64 place = grid_index[n];
        const Real ones = kImplied ? weighted_ones[n] : Real(0.0);
        Real rest = Real(1.0), all = Real(0.0);  // what is left for an implied marginal; the messages so far

        // A group's old marginals; adds up the channels that come before the implied label.
        const auto old_group = [&](int g, Real& left) {
            Channels old = load_group(marginals, num_voxels, n, g);
            CRF_UNROLL
            for (int c = 0; c < CRF_WIDTH; ++c) {
                if (g * CRF_WIDTH + c < kChannels) left -= old.value[c];
                if (kImplied && g * CRF_WIDTH + c == kLabels - 1) old.value[c] = larger(left, Real(0.0));
            }
            return old;
        };
        const auto pairwise_group = [&](int g, Real& sent) {
            if (!is_potts) return multiplied(messages, num_voxels, n, ones, compatibility, g);
            Channels message = load_group(messages, num_voxels, n, g);
            CRF_UNROLL
            for (int c = 0; c < CRF_WIDTH; ++c) {
                if (g * CRF_WIDTH + c < kChannels) sent += message.value[c];
                message.value[c] = kImplied && g * CRF_WIDTH + c == kLabels - 1 ? sent : ones - message.value[c];
            }
            return message;
        };
        const auto logits_after = [&](int g, Channels x, Channels pairwise, Channels old) {
            CRF_UNROLL
            for (int c = 0; c < CRF_WIDTH; ++c) x.value[c] -= pairwise.value[c];
            if (step < Real(1.0)) {
                const Channels before = kept ? load_labels(kept, grid_size, place, g) : old;
                CRF_UNROLL
                for (int c = 0; c < CRF_WIDTH; ++c)
                    x.value[c] = shortened(kept ? before.value[c] : log(larger(before.value[c], kTiny)), x.value[c], step);
            }
            return x;
        };

        Softmax softmax;
        Largest now_largest, old_largest;
        Real top = kLowest, mass = Real(0.0);  // the largest calibrated logit so far; the marginals that count in `linear`
        Real linear = Real(0.0), quadratic = Real(0.0), old_total = Real(0.0);
        CRF_ROLLED
        for (int g = 0; g < kLabelGroups; ++g) {
            const Channels old = old_group(g, rest);
            const Channels pairwise = pairwise_group(g, all);
            Channels x = calibrated_group(logits, grid_size, place, bias, g, inverse_temperature);
            Real higher = top;
            CRF_UNROLL
            for (int c = 0; c < CRF_WIDTH; ++c)
                if (g * CRF_WIDTH + c < kLabels) higher = larger(x.value[c], higher);
            linear += (top - higher) * mass;
            top = higher;
            CRF_UNROLL
            for (int c = 0; c < CRF_WIDTH; ++c) {
                const int l = g * CRF_WIDTH + c;
                if (l >= kLabels) continue;
                if (x.value[c] >= kLowest && !may_be_rounding(l, x.value[c], top, old.value[c])) {
                    linear += (x.value[c] - top) * old.value[c];
                    mass += old.value[c];
                }
                quadratic += pairwise.value[c] * old.value[c];
                old_total += old.value[c];
                old_largest.add(l, old.value[c]);
            }
            x = logits_after(g, x, pairwise, old);
            CRF_UNROLL
            for (int c = 0; c < CRF_WIDTH; ++c)
                if (g * CRF_WIDTH + c < kLabels) now_largest.add(g * CRF_WIDTH + c, x.value[c]);
            softmax.add(x, g);
            if (out) store_labels(x, grid_size, place, g, out);
        }
        const Real left_out = is_potts && !kImplied ? all : Real(0.0);
        sums[kLinear] += static_cast<double>(linear);
        sums[kQuadratic] += static_cast<double>(quadratic + left_out * old_total);
        if (wants_divergence && now_largest.label != old_largest.label) sums[kFlips] += 1.0;
        sums[kNegativeEntropy] += static_cast<double>(softmax.negative_entropy());

        Real divergence = Real(0.0);
        rest = Real(1.0);
        all = Real(0.0);
        CRF_ROLLED
        for (int g = 0; g < kLabelGroups; ++g) {
            const bool needs_old = wants_divergence || (!out && step < Real(1.0));
            const Channels old = needs_old ? old_group(g, rest) : zero_row<CRF_WIDTH>();
            Channels x;
            if (out) {
                x = load_labels(out, grid_size, place, g);
            } else {
                x = calibrated_group(logits, grid_size, place, bias, g, inverse_temperature);
                x = logits_after(g, x, pairwise_group(g, all), old);
            }
            Channels now;
            CRF_UNROLL
            for (int c = 0; c < CRF_WIDTH; ++c) {
                now.value[c] = softmax.marginal(x.value[c]);
                if (wants_divergence && g * CRF_WIDTH + c < kLabels)
                    divergence += divergence_of_label(g * CRF_WIDTH + c, now.value[c], old.value[c]);
                x.value[c] -= step * left_out;
            }
            if (out && left_out != Real(0.0)) store_labels(x, grid_size, place, g, out);
            store_group(now, num_voxels, n, g, marginals);
        }
        sums[kDivergence] += static_cast<double>(divergence);
    });
}

}  // namespace crf
