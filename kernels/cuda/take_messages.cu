// A step of the backward pass after the filtering of one kernel, in one pass over the voxels: sums for weights and compatibility, gradients
// with respect to the normalization and the marginals; after the last kernel, those with respect to the logits before the step; and what is
// filtered next.
//
// CRF_LABELS, CRF_CHANNELS, CRF_WIDTH: as in backward.h. CRF_THREADS: per block. CRF_TILE: voxels that a block handles at a time, at most
// CRF_THREADS.
#include "cuda/backward.h"

namespace crf {

constexpr int kPairs = kLabels * kLabels;
constexpr int kMostSlices = CRF_THREADS / kPairs < CRF_TILE ? CRF_THREADS / kPairs : CRF_TILE;
constexpr int kSlices = kMostSlices > 0 ? kMostSlices : 1;  // threads that share a pair of labels
constexpr int kItems = kPairs * kSlices;
constexpr int kOwn = (kItems + CRF_THREADS - 1) / CRF_THREADS;
constexpr int kStride = CRF_TILE + 1;  // the labels of a voxel are in different banks

// Sums of a thread: item i is in slice i / kPairs of pair i % kPairs.
struct PairSums {
    double value[kOwn];
};

// Blocks take every num_blocks-th tile.
//
// step: length of the step. by_x: (label, voxel) gradient with respect to the logits after the step. marginals: at its start, as they are
// sent. last_marginal: (voxel) of the last label, or nullptr: it follows from the others. by_message: as from store_by_message.
// filtered: the kernel's sums of the marginals; filtered_back: the transpose's of by_message, or nullptr. scale, back_scale: (voxel)
// factors of both, or nullptr. ones: (voxel) message of all ones.
// by_received, by_sent: (voxel) added to: gradients with respect to the factors of the receiver and of the sender; nullptr: not asked for,
// or by_sent is added to by_received.
// by_marginals: gradient with respect to the marginals from the kernels before; adds: whether there is one. A kernel that is not the last
// stores the sum there if it has a filtered_back.
// by_start: (label, voxel) gradient with respect to the calibrated logits, added to by the last kernel, which changes by_x; nullptr for
// others. next_weights: of the kernel that follows, for which by_message is replaced; nullptr: none follows. next_step: length of its step.
// next_record: (label, voxel) marginals that replace those of this step, or nullptr: the same step.
// sums: (pair, block, slice), added to: the products of message and y.
CRF_BLOCK_KERNEL(take_messages, int64 num_voxels, int64 num_blocks, Real step, Real* by_x, Channels* marginals, const Real* last_marginal,
                 Channels* by_message, const Channels* filtered, const Channels* filtered_back, const Real* scale, const Real* back_scale,
                 const Real* ones, Real* by_received, Real* by_sent, Channels* by_marginals, int adds, Real* by_start,
                 const Real* next_weights, const Real* compatibility, int is_potts, Real next_step, const Real* next_record, double* sums) {
    CRF_SHARED(Real, messages, kLabels * kStride);
    CRF_SHARED(Real, gradients, kLabels * kStride);
    CRF_PER_THREAD(PairSums, total);

    CRF_PHASE(thread) { total[thread] = PairSums(); }
    const int64 num_tiles = (num_voxels + CRF_TILE - 1) / CRF_TILE;
    for (int64 tile = block_number(); tile < num_tiles; tile += num_blocks) {
        CRF_PHASE(thread) {
            if (thread >= CRF_TILE) continue;
            const int64 n = tile * CRF_TILE + thread;
            if (n >= num_voxels) {
                CRF_OVER_LABELS
                for (int l = 0; l < kLabels; ++l) {
                    messages[l * kStride + thread] = Real(0.0);
                    gradients[l * kStride + thread] = Real(0.0);
                }
                continue;
            }
            Real y[kLabels], q[kLabels];  // y: gradients with respect to the marginals at first
            CRF_OVER_LABELS
            for (int l = 0; l < kLabels; ++l) gradients[l * kStride + thread] = by_x[l * num_voxels + n];
            const Real own_scale = scale ? scale[n] : Real(1.0), own_back_scale = back_scale ? back_scale[n] : Real(1.0);
            Real rest = ones[n], received = Real(0.0), sent = Real(0.0), last = Real(1.0), mean = Real(0.0);
            CRF_OVER_LABELS
            for (int g = 0; g < kGroups; ++g) {
                const int64 at = g * num_voxels + n;
                const Channels row = filtered[at];
                Channels own = zero_row<CRF_WIDTH>(), other = own, sum = own;
                if (by_start || by_received) own = marginals[at];
                if (filtered_back) other = filtered_back[at];
                if (adds && (by_start || filtered_back)) sum = by_marginals[at];
                if (by_received) {
                    const Channels u = by_message[at];
                    CRF_UNROLL
                    for (int c = 0; c < CRF_WIDTH; ++c) {
                        received += u.value[c] * row.value[c];
                        sent += own.value[c] * other.value[c];
                    }
                }
                add_scaled(sum, other, own_back_scale);
                if (!by_start && filtered_back) by_marginals[at] = sum;
                CRF_UNROLL
                for (int c = 0; c < CRF_WIDTH; ++c) {
                    const int l = g * CRF_WIDTH + c;
                    if (l >= kChannels) continue;
                    const Real message = row.value[c] * own_scale;
                    messages[l * kStride + thread] = message;
                    rest -= message;
                    q[l] = own.value[c];
                    y[l] = sum.value[c];
                    last -= q[l];
                    mean += q[l] * y[l];
                }
            }
            messages[kLast * kStride + thread] = rest;
            if (by_received) {
                by_received[n] += by_sent ? received : received + sent;
                if (by_sent) by_sent[n] += sent;
            }
            if (by_start) {
                // Gradients with respect to the marginals are known up to one number per voxel, to which the softmax is blind: 0 for the
                // last label.
                q[kLast] = last_marginal ? last_marginal[n] : larger(last, Real(0.0));
                y[kLast] = Real(0.0);
                CRF_OVER_LABELS
                for (int l = 0; l < kLabels; ++l) {
                    const Real x = gradients[l * kStride + thread];
                    by_start[l * num_voxels + n] += step * x;
                    y[l] = (Real(1.0) - step) * x + q[l] * (y[l] - mean);
                    by_x[l * num_voxels + n] = y[l];
                    y[l] *= next_step;
                }
            } else {
                CRF_OVER_LABELS
                for (int l = 0; l < kLabels; ++l) {
                    const Real x = gradients[l * kStride + thread];
                    y[l] = next_step * x;
                }
            }
            if (!next_weights) continue;
            store_by_message(y, Penalty{next_weights, compatibility, is_potts}, num_voxels, n, by_message);
            if (next_record) store_marginals(next_record, num_voxels, n, marginals);
        }
        CRF_PHASE(thread) {
            CRF_OVER_LABELS
            for (int j = 0; j < kOwn; ++j) {
                const int item = thread + j * CRF_THREADS, pair = item % kPairs;
                if (item >= kItems) continue;
                Real part = Real(0.0);
                CRF_UNROLL_BY_4
                for (int v = item / kPairs; v < CRF_TILE; v += kSlices) {
                    const Real message = messages[pair / kLabels * kStride + v];
                    const Real gradient = gradients[pair % kLabels * kStride + v];
                    part += message * gradient;
                }
                total[thread].value[j] += static_cast<double>(step * part);
            }
        }
    }
    CRF_PHASE(thread) {
        CRF_OVER_LABELS
        for (int j = 0; j < kOwn; ++j) {
            const int item = thread + j * CRF_THREADS;
            if (item < kItems) sums[(item % kPairs * num_blocks + block_number()) * kSlices + item / kPairs] += total[thread].value[j];
        }
    }
}

}  // namespace crf
