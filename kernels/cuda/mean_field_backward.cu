// A step of the mean field backward (docs/reference/math.md, section 9): x are the logits after a
// step, y is the gradient with respect to them, z = compatibility y, and -weight z the gradient
// with respect to a kernel's message. Rows have the channels of all labels but the last, which is
// never filtered here. CRF_WIDTH: channels that are filtered together.
#include "cuda/update.h"

namespace crf {
using Channels = Row<CRF_WIDTH>;

// The factors of a kernel's messages, and y. weights: (label). compatibility: (label, label), row:
// the neighbor's label. by_x: (label, voxel).
struct Penalty {
    const Real* weights;
    const Real* compatibility;
    int is_potts, num_labels;
    const Real* by_x;
    int64 num_voxels, n;

    CRF_D Real y(int l) const { return by_x[l * num_voxels + n]; }
    CRF_D Real all() const {
        Real sum = Real(0.0);
        for (int l = 0; l < num_labels; ++l) sum += y(l);
        return sum;
    }
    // weight z of label k. sum: of all y.
    CRF_D Real operator()(Real sum, int k) const {
        if (is_potts) return weights[k] * (sum - y(k));
        Real z = Real(0.0);
        for (int l = 0; l < num_labels; ++l) z += compatibility[k * num_labels + l] * y(l);
        return weights[k] * z;
    }
};

// One thread per voxel: the gradient with respect to a kernel's messages, minus the last label's,
// whose channel is not filtered. by_x: gradient with respect to the logits after the step.
// by_message: (group, voxel).
CRF_KERNEL(send_back, const Real* weights, const Real* compatibility, int is_potts, int num_labels,
           const Real* by_x, int64 num_voxels, Channels* by_message) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    const Penalty penalty{weights, compatibility, is_potts, num_labels, by_x, num_voxels, n};
    const Real all = penalty.all(), last = penalty(all, num_labels - 1);
    for (int first = 0; first < num_labels - 1; first += CRF_WIDTH) {
        Channels row = zero_row<CRF_WIDTH>();
        CRF_UNROLL
        for (int c = 0; c < CRF_WIDTH; ++c)
            if (first + c < num_labels - 1) row.value[c] = last - penalty(all, first + c);
        by_message[first / CRF_WIDTH * num_voxels + n] = row;
    }
}

// One thread per voxel, after both filterings of a kernel: its messages, and gradients with respect
// to normalization and marginals. marginals: as they are sent; by_message: as from send_back.
// filtered: the kernel's sums of the marginals; filtered_back: the transpose's of by_message.
// scale, back_scale: (voxel) factors of both, or nullptr. ones: (voxel) message of all ones.
// by_received, by_sent: (voxel) added to: gradients with respect to the factors of the receiver and
// of the sender; nullptr: not asked for, or by_sent is added to by_received. by_marginals: added
// to, unless this is the first kernel. messages: (label, voxel).
CRF_KERNEL(take_messages, int num_labels, int64 num_voxels, const Channels* marginals,
           const Channels* by_message, const Channels* filtered, const Channels* filtered_back,
           const Real* scale, const Real* back_scale, const Real* ones, Real* by_received,
           Real* by_sent, Channels* by_marginals, int adds, Real* messages) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    const Real own_scale = scale ? scale[n] : Real(1.0);
    const Real own_back_scale = back_scale ? back_scale[n] : Real(1.0);
    Real rest = ones[n], received = Real(0.0), sent = Real(0.0);
    for (int first = 0; first < num_labels - 1; first += CRF_WIDTH) {
        const int64 at = first / CRF_WIDTH * num_voxels + n;
        const Channels row = filtered[at], back = filtered_back[at];
        Channels sum = adds ? by_marginals[at] : zero_row<CRF_WIDTH>();
        add_scaled(sum, back, own_back_scale);
        by_marginals[at] = sum;
        if (by_received) {
            const Channels u = by_message[at], q = marginals[at];
            CRF_UNROLL
            for (int c = 0; c < CRF_WIDTH; ++c) {
                received += u.value[c] * row.value[c];
                sent += q.value[c] * back.value[c];
            }
        }
        CRF_UNROLL
        for (int c = 0; c < CRF_WIDTH; ++c) {
            if (first + c >= num_labels - 1) continue;
            const Real message = row.value[c] * own_scale;
            messages[(first + c) * num_voxels + n] = message;
            rest -= message;
        }
    }
    messages[(num_labels - 1) * num_voxels + n] = rest;
    if (by_received) by_received[n] += by_sent ? received : received + sent;
    if (by_sent) by_sent[n] += sent;
}

// One thread per voxel, after all kernels: from the logits after a step to those before it.
// record: (channel, voxel) marginals at the start of the step, of all labels but perhaps the last.
// by_marginals: as from take_messages. by_x: (label, voxel), becomes the gradient of the logits
// before. by_start: (label, voxel), added to: of the calibrated ones.
CRF_KERNEL(end_step_back, int num_labels, int num_channels, int64 num_voxels, const Real* record,
           const Channels* by_marginals, Real* by_x, Real* by_start) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    const auto marginal = [&](int l) {
        if (l < num_channels) return record[l * num_voxels + n];
        Real rest = Real(1.0);
        for (int k = 0; k < num_channels; ++k) rest -= record[k * num_voxels + n];
        return larger(rest, Real(0.0));
    };
    // Gradients with respect to the marginals are known up to one number per voxel, to which the
    // update is blind: 0 for the last label.
    const auto by_marginal = [&](int l) {
        return by_marginals[l / CRF_WIDTH * num_voxels + n].value[l % CRF_WIDTH];
    };
    update_back(num_labels, num_labels - 1, ByLabel{marginal}, ByLabel{by_marginal},
                [&](int l, Real by_logit) {
                    const int64 at = l * num_voxels + n;
                    by_start[at] += by_x[at];
                    by_x[at] = by_logit;
                });
}

// One thread per voxel: the gradient with respect to the message of all ones that a kernel
// normalizes, from the gradients of all steps. The last label's message is this message minus the
// other labels' messages.
CRF_KERNEL(differentiate_ones, const Real* weights, const Real* compatibility, int is_potts,
           int num_labels, const Real* by_start, int64 num_voxels, Real* gradient) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    const Penalty penalty{weights, compatibility, is_potts, num_labels, by_start, num_voxels, n};
    gradient[n] = -penalty(penalty.all(), num_labels - 1);
}

// One thread per number of the gradient with respect to the parameters, from the sums of a backward
// pass. totals: for each kernel products of messages and y, (kernel, label, label); sums of the
// features, (num_features); the gradient with respect to the bias, (label); that with respect to
// the inverse temperature, but for the bias. bias: (label), or nullptr. sources, thetas:
// (num_thetas) the sum of each bandwidth among those of the features, or -1, and the bandwidth.
// gradient: weights (kernel, label), compatibility (label, label), bias (label), temperature,
// bandwidths (num_thetas).
CRF_KERNEL(combine_sums, int num_kernels, int num_labels, const double* totals, int num_features,
           const Real* weights, const Real* compatibility, const Real* bias, Real temperature,
           int num_thetas, const int* sources, const double* thetas, double* gradient) {
    const int64 num_pairs = int64(num_labels) * num_labels;
    const double* by_feature = totals + num_kernels * num_pairs;
    const double* by_bias = by_feature + num_features;
    const int64 n = thread_number();
    int64 place = n;
    if (place < num_kernels * num_labels) {
        const int64 label = place % num_labels;
        double sum = 0.0;
        for (int l = 0; l < num_labels; ++l)
            sum += totals[place * num_labels + l] * compatibility[label * num_labels + l];
        gradient[n] = -sum;
        return;
    }
    place -= num_kernels * num_labels;
    if (place < num_pairs) {
        double sum = 0.0;
        for (int k = 0; k < num_kernels; ++k)
            sum += totals[k * num_pairs + place] * weights[k * num_labels + place / num_labels];
        gradient[n] = -sum;
        return;
    }
    place -= num_pairs;
    if (place < num_labels) {
        gradient[n] = by_bias[place];
        return;
    }
    place -= num_labels;
    if (place == 0) {
        double by_inverse = by_bias[num_labels];
        if (bias)
            for (int l = 0; l < num_labels; ++l) by_inverse += by_bias[l] * bias[l];
        gradient[n] = -by_inverse / temperature;
        return;
    }
    place -= 1;
    if (place >= num_thetas) return;
    const int source = sources[place];
    gradient[n] = source < 0 ? 0.0 : by_feature[source] / thetas[place];
}
}  // namespace crf
