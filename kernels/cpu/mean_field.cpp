#include "cpu/mean_field.h"

#include <algorithm>
#include <cmath>

#include "cpu/simd.h"

namespace crf {

namespace {

constexpr float kTiny = 1.17549435e-38f;      // smallest normal number: keeps logarithms of vanished marginals finite
constexpr double kEnergyRounding = 1e-6;      // relative rise of the energy that counts as rounding
constexpr double kFlipsAtConvergence = 1e-4;  // of the voxels, in the last step

// Sums over one block of voxels.
struct BlockSums {
    double negative_entropy = 0;  // sum Q log Q of the new marginals
    double largest = 0;           // sum of the largest a / T of each voxel
    double linear = 0;            // <a / T, Q> of the old ones, a taken relative to its largest label
    double quadratic = 0;         // <Q, pairwise> of the old ones
    double divergence = 0;        // sum of KL(new || old)
    int64_t flips = 0;
};

bool same_for_all(const std::vector<float>& weight) {
    return std::all_of(weight.begin(), weight.end(), [&](float w) { return w == weight.front(); });
}

class MeanField {
   public:
    MeanField(const Voxels& voxels, std::vector<Kernel> kernels, const MeanFieldOptions& options, const float* logits, ThreadPool& pool,
              Workspace workspace)
        : voxels_(voxels),
          kernels_(std::move(kernels)),
          workspace_(std::move(workspace)),
          options_(options),
          logits_(logits),
          pool_(pool),
          num_labels_(options.num_labels),
          num_voxels_(voxels.num_voxels),
          num_blocks_(num_voxel_blocks(voxels.num_voxels)) {
        // With one weight for all labels the last label's message follows from the others': marginals sum to 1.
        implied_ = std::all_of(kernels_.begin(), kernels_.end(), [](const Kernel& k) { return same_for_all(k.weight); });
        num_channels_ = implied_ ? num_labels_ - 1 : num_labels_;
        marginals_ = Buffer<float>(num_channels_ * num_voxels_);
        messages_ = Buffer<float>(num_channels_ * num_voxels_);
        if (implied_) sum_ones();
        block_sums_.resize(num_blocks_);
        scratch_.resize(pool.num_threads());
        for (auto& s : scratch_) s = Buffer<float>(3 * num_labels_ * kVoxelBlock);
        BlockCache::release_idle();
    }

    MeanFieldOutcome run(float* out, const StepCallback& callback) {
        MeanFieldOutcome outcome;
        step_ = 1.0f - options_.damping;
        for_blocks([&](int64_t block, int thread) { initialize(block, scratch_[thread].get()); });
        const BlockSums start = total();
        const double largest = start.largest;
        double negative_entropy = start.negative_entropy, last_energy = 0;
        // A step that may turn out to be the last one leaves its logits behind; a damped step starts from those of the step before.
        const bool may_stop = options_.tolerance > 0;
        const bool keep = may_stop || options_.damping > 0 || (options_.watch_energy && !options_.is_potts);
        if (keep || options_.num_iterations == 0) write_start(out);
        kept_ = keep ? out : nullptr;
        for (int t = 0; t < options_.num_iterations; ++t) {
            if (callback) callback(t, options_.num_iterations);
            send_messages();
            if (t + 1 == options_.num_iterations) {
                kernels_.clear();
                workspace_ = Workspace();
                BlockCache::release_idle();
            }
            float* target = keep || t + 1 == options_.num_iterations ? out : nullptr;
            for_blocks([&](int64_t block, int thread) { update(block, scratch_[thread].get(), target); });
            const BlockSums sums = total();
            // Each voxel's largest logit is left out until the end: it shifts the energy, and is no measure of its rounding.
            const double energy = negative_entropy - sums.linear + 0.5 * sums.quadratic;
            const double size = std::abs(negative_entropy) + std::abs(sums.linear) + 0.5 * std::abs(sums.quadratic);
            negative_entropy = sums.negative_entropy;
            if (options_.watch_energy && t > 0 && energy > last_energy + kEnergyRounding * size) step_ *= 0.5f;
            last_energy = energy;
            outcome.energy.push_back(energy - largest);
            outcome.num_iterations = t + 1;
            if (may_stop && sums.divergence / num_voxels_ < options_.tolerance && sums.flips < kFlipsAtConvergence * num_voxels_) {
                outcome.converged = true;
                break;
            }
        }
        return outcome;
    }

   private:
    void for_blocks(const std::function<void(int64_t, int)>& body) { pool_.run(num_blocks_, body); }

    BlockSums total() const {
        BlockSums sums;
        for (const BlockSums& b : block_sums_) {
            sums.negative_entropy += b.negative_entropy;
            sums.largest += b.largest;
            sums.linear += b.linear;
            sums.quadratic += b.quadratic;
            sums.divergence += b.divergence;
            sums.flips += b.flips;
        }
        return sums;
    }

    void sum_ones() {
        weighted_ones_ = Buffer<float>(num_voxels_);
        for_blocks([&](int64_t block, int) {
            for (int64_t n = block * kVoxelBlock; n < std::min((block + 1) * kVoxelBlock, num_voxels_); ++n) {
                float total = 0;
                for (const Kernel& k : kernels_) total += k.weight.front() * (k.ones ? k.ones[n] : 1.0f);
                weighted_ones_[n] = total;
            }
        });
        for (Kernel& k : kernels_) k.ones = Buffer<float>();
    }

    void send_messages() {
        for (const Kernel& k : kernels_)
            k.filter->accumulate(marginals_.get(), num_channels_, k.scales_sent ? k.scale.get() : nullptr, k.scale.get(), k.weight.data(),
                                 messages_.get(), workspace_);
    }

    // Logits over temperature of a block, one row of kVoxelBlock a label; rows are padded with zeros to whole vectors.
    void load_logits(int64_t block, float* rows) const { load_from_grid(logits_, 1.0f / options_.temperature, block, rows); }

    void load_from_grid(const float* array, float scale, int64_t block, float* rows) const {
        const int64_t begin = block * kVoxelBlock, end = std::min(begin + kVoxelBlock, num_voxels_);
        voxels_.for_pieces(begin, end, [&](int64_t voxel, int64_t grid, int64_t, int64_t length) {
            for (int l = 0; l < num_labels_; ++l) {
                const float* from = array + l * voxels_.grid_size + grid;
                float* to = rows + l * kVoxelBlock + (voxel - begin);
                for (int64_t i = 0; i < length; ++i) to[i] = from[i] * scale;
            }
        });
        for (int l = 0; l < num_labels_; ++l) std::fill(rows + l * kVoxelBlock + (end - begin), rows + (l + 1) * kVoxelBlock, 0.0f);
    }

    void store_to_grid(const float* rows, int64_t block, float* array) const {
        const int64_t begin = block * kVoxelBlock, end = std::min(begin + kVoxelBlock, num_voxels_);
        voxels_.for_pieces(begin, end, [&](int64_t voxel, int64_t grid, int64_t, int64_t length) {
            for (int l = 0; l < num_labels_; ++l) {
                const float* from = rows + l * kVoxelBlock + (voxel - begin);
                std::copy(from, from + length, array + l * voxels_.grid_size + grid);
            }
        });
    }

    void store_marginals(int64_t block, const float* rows) {
        const int64_t begin = block * kVoxelBlock, end = std::min(begin + kVoxelBlock, num_voxels_);
        for (int c = 0; c < num_channels_; ++c)
            std::copy(rows + c * kVoxelBlock, rows + c * kVoxelBlock + (end - begin), marginals_.get() + c * num_voxels_ + begin);
    }

    // x, in place, becomes the softmax over rows; returns sum Q log Q, and the first largest row.
    struct Softmax {
        vfloat negative_entropy;
        vint label;
    };
    template <int L>
    Softmax softmax(float* x) const {
        const int num_labels = L > 0 ? L : num_labels_;
        vfloat largest = load(x);
        vint label{};
        for (int l = 1; l < num_labels; ++l) {
            const vfloat v = load(x + l * kVoxelBlock);
            const vint more = v > largest;
            largest = more ? v : largest;
            label = more ? splat_lanes(l) : label;
        }
        vfloat total{}, weighted{};
        for (int l = 0; l < num_labels; ++l) {
            const vfloat shifted = load(x + l * kVoxelBlock) - largest;
            const vfloat e = exp_nonpositive(shifted);
            total += e;
            weighted += e * shifted;
            store(x + l * kVoxelBlock, e);
        }
        const vfloat inverse = 1.0f / total;
        for (int l = 0; l < num_labels; ++l) store(x + l * kVoxelBlock, load(x + l * kVoxelBlock) * inverse);
        return {weighted * inverse - log_positive(total), label};
    }

    template <int L>
    vfloat largest_row(const float* x) const {
        const int num_labels = L > 0 ? L : num_labels_;
        vfloat largest = load(x);
        for (int l = 1; l < num_labels; ++l) largest = vmax(load(x + l * kVoxelBlock), largest);
        return largest;
    }

    // KL(new || old) of sixteen voxels, as a sum of p (r - 1 - log r) with r = old / new: no term is negative, and near r = 1 nothing
    // cancels. An implied marginal is 1 minus the others: what is below their rounding counts as equal.
    template <int L>
    vfloat kl_divergence(const float* now, const float* old) const {
        const int num_labels = L > 0 ? L : num_labels_;
        const vfloat tiny = splat_lanes(kTiny), rounding = splat_lanes(static_cast<float>(num_labels_) * 1.2e-7f);
        vfloat total{};
        for (int l = 0; l < num_labels; ++l) {
            const vfloat least = implied_ && l == num_labels - 1 ? rounding : tiny;
            const vfloat p = vmax(load(now + l * kVoxelBlock), least);
            const vfloat ratio = vmax(load(old + l * kVoxelBlock), least) / p;
            total += vmax(p * (ratio - 1.0f - log_positive(vmax(ratio, tiny))), vfloat{});
        }
        return total;
    }

    void initialize(int64_t block, float* x) {
        load_logits(block, x);
        const int64_t count = std::min(kVoxelBlock, num_voxels_ - block * kVoxelBlock);
        BlockSums sums;
        for (int64_t i = 0; i < count; i += kLanes) {
            const int lanes = static_cast<int>(std::min<int64_t>(count - i, kLanes));
            const vfloat largest = largest_row<0>(x + i);
            for (int lane = 0; lane < lanes; ++lane) sums.largest += static_cast<double>(largest[lane]);
            sums.negative_entropy += sum_lanes(first_lanes(lanes) ? softmax<0>(x + i).negative_entropy : vfloat{});
        }
        store_marginals(block, x);
        for (int c = 0; c < num_channels_; ++c) {
            float* row = messages_.get() + c * num_voxels_ + block * kVoxelBlock;
            std::fill(row, row + count, 0.0f);
        }
        block_sums_[block] = sums;
    }

    // One step for a block: from the messages and old marginals to the new marginals (and logits, where `out` is given). Leaves the
    // messages at zero, for the next step to add to.
    void update(int64_t block, float* scratch, float* out) {
        switch (num_labels_) {
            case 2:
                return update_labels<2>(block, scratch, out);
            case 3:
                return update_labels<3>(block, scratch, out);
            case 4:
                return update_labels<4>(block, scratch, out);
            case 5:
                return update_labels<5>(block, scratch, out);
            default:
                return update_labels<0>(block, scratch, out);
        }
    }

    // L: number of labels, 0 = any; loops of known length stay in registers.
    template <int L>
    void update_labels(int64_t block, float* scratch, float* out) {
        const int num_labels = L > 0 ? L : num_labels_;
        const int64_t begin = block * kVoxelBlock;
        const int64_t count = std::min(kVoxelBlock, num_voxels_ - begin);
        const int last = num_labels - 1;
        float* x = scratch;                                 // logits, then the new logits, then the new marginals
        float* q = scratch + num_labels * kVoxelBlock;      // old marginals of all labels
        float* s = scratch + 2 * num_labels * kVoxelBlock;  // weighted messages of all labels
        float* marginals = marginals_.get() + begin;
        float* messages = messages_.get() + begin;
        load_logits(block, x);

        vfloat linear{}, quadratic{};
        for (int64_t i = 0; i < count; i += kLanes) {
            const vfloat largest = largest_row<L>(x + i);
            const int64_t left = count - i;
            const vint valid = first_lanes(static_cast<int>(std::min<int64_t>(left, kLanes)));
            vfloat rest = splat_lanes(1.0f), all{};
            for (int c = 0; c < num_channels_; ++c) {
                const vfloat marginal = load_some(marginals + c * num_voxels_ + i, left);
                const vfloat message = load_some(messages + c * num_voxels_ + i, left);
                store_some(messages + c * num_voxels_ + i, vfloat{}, left);
                store(q + c * kVoxelBlock + i, marginal);
                store(s + c * kVoxelBlock + i, message);
                rest -= marginal;
                all += message;
            }
            if (implied_) {
                const vfloat ones = load_some(weighted_ones_.get() + begin + i, left);
                store(q + last * kVoxelBlock + i, vmax(rest, vfloat{}));
                store(s + last * kVoxelBlock + i, ones - all);
                all = ones;
            }
            for (int l = 0; l < num_labels; ++l) {
                vfloat pairwise{};
                if (options_.is_potts) {
                    pairwise = all - load(s + l * kVoxelBlock + i);
                } else {
                    for (int k = 0; k < num_labels; ++k)
                        pairwise += load(s + k * kVoxelBlock + i) * options_.compatibility[k * num_labels + l];
                }
                const vfloat a = load(x + l * kVoxelBlock + i), old = load(q + l * kVoxelBlock + i);
                linear += valid ? (a - largest) * old : vfloat{};
                quadratic += valid ? pairwise * old : vfloat{};
                store(x + l * kVoxelBlock + i, a - pairwise);
            }
        }
        if (step_ < 1.0f) shorten_step(block, q, s, x);
        if (out) store_to_grid(x, block, out);
        BlockSums sums;
        vfloat divergence{};
        vint flips{};
        for (int64_t i = 0; i < count; i += kLanes) {
            const vint valid = first_lanes(static_cast<int>(std::min<int64_t>(count - i, kLanes)));
            vint old_label{};
            vfloat largest = load(q + i);
            for (int l = 1; l < num_labels; ++l) {
                const vfloat v = load(q + l * kVoxelBlock + i);
                const vint more = v > largest;
                largest = more ? v : largest;
                old_label = more ? splat_lanes(l) : old_label;
            }
            const Softmax now = softmax<L>(x + i);
            sums.negative_entropy += sum_lanes(valid ? now.negative_entropy : vfloat{});
            if (options_.tolerance > 0) {
                divergence += valid ? kl_divergence<L>(x + i, q + i) : vfloat{};
                flips += valid ? (now.label != old_label) : vint{};  // -1 where true
            }
        }
        store_marginals(block, x);
        sums.linear = sum_lanes(linear);
        sums.quadratic = sum_lanes(quadratic);
        sums.divergence = sum_lanes(divergence);
        for (int i = 0; i < kLanes; ++i) sums.flips -= flips[i];
        block_sums_[block] = sums;
    }

    // x becomes a point between the old logits and x. Where no logits were kept, the logarithms of the old marginals `q` stand for them:
    // the same but for labels that have all but vanished. `old` is scratch.
    void shorten_step(int64_t block, const float* q, float* old, float* x) const {
        if (kept_) load_from_grid(kept_, 1.0f, block, old);
        for (int64_t i = 0; i < num_labels_ * kVoxelBlock; i += kLanes) {
            const vfloat from = kept_ ? load(old + i) : log_positive(vmax(load(q + i), splat_lanes(kTiny)));
            store(x + i, from + (load(x + i) - from) * step_);
        }
    }

    void write_start(float* out) {
        for_blocks([&](int64_t block, int thread) {
            float* x = scratch_[thread].get();
            load_logits(block, x);
            store_to_grid(x, block, out);
        });
    }

    const Voxels& voxels_;
    std::vector<Kernel> kernels_;
    Workspace workspace_;
    const MeanFieldOptions& options_;
    const float* logits_;
    ThreadPool& pool_;
    const int num_labels_;
    const int64_t num_voxels_, num_blocks_;
    int num_channels_ = 0;
    bool implied_ = false;  // the last label's channel is not filtered
    float step_ = 1.0f;
    const float* kept_ = nullptr;         // (label, *grid) logits of the step before, or nullptr
    Buffer<float> marginals_, messages_;  // (channel, voxel)
    Buffer<float> weighted_ones_;         // (voxel), only when implied
    std::vector<BlockSums> block_sums_;
    std::vector<Buffer<float>> scratch_;
};

// Outside the mask the result is the logits over the temperature. Written last: memory touched early would lie beside the lattice.
void write_outside(const Voxels& voxels, const MeanFieldOptions& options, const float* logits, float* out, ThreadPool& pool) {
    if (voxels.num_voxels == voxels.grid_size) return;
    const float scale = 1.0f / options.temperature;
    pool.run(options.num_labels, [&](int64_t label, int) {
        const float* from = logits + label * voxels.grid_size;
        float* to = out + label * voxels.grid_size;
        int64_t done = 0;
        const auto copy_up_to = [&](int64_t end) {
            for (int64_t i = done; i < end; ++i) to[i] = from[i] * scale;
        };
        for (const Run& run : voxels.runs) {
            copy_up_to(run.grid);
            done = run.grid + run.length;
        }
        copy_up_to(voxels.grid_size);
    });
}

}  // namespace

void normalize_kernel(Kernel& kernel, const Voxels& voxels, Normalization normalization, ThreadPool& pool, Workspace& workspace) {
    const int64_t num_voxels = voxels.num_voxels;
    const float unit = 1.0f;
    auto fill = [&](Buffer<float>& b, float value) {
        b = Buffer<float>(num_voxels);
        pool.run(num_voxel_blocks(num_voxels), [&](int64_t block, int) {
            std::fill(b.get() + block * kVoxelBlock, b.get() + std::min((block + 1) * kVoxelBlock, num_voxels), value);
        });
    };
    const bool symmetric = normalization == Normalization::kSymmetric;
    if (normalization != Normalization::kNone) {
        kernel.scale = Buffer<float>(num_voxels);
        if (symmetric) kernel.ones = Buffer<float>(num_voxels);
        if (kernel.filter->normalize(symmetric, kernel.scale.get(), kernel.ones.get())) {
            kernel.scales_sent = symmetric;
            return;
        }
        kernel.scale = Buffer<float>();
        kernel.ones = Buffer<float>();
    }
    Buffer<float> ones, degree;
    fill(ones, 1.0f);
    fill(degree, 0.0f);
    kernel.filter->accumulate(ones.get(), 1, nullptr, nullptr, &unit, degree.get(), workspace);
    if (normalization == Normalization::kNone) {
        kernel.ones = std::move(degree);
        return;
    }
    pool.run(num_voxel_blocks(num_voxels), [&](int64_t block, int) {
        float* d = degree.get() + block * kVoxelBlock;
        const int64_t count = std::min(kVoxelBlock, num_voxels - block * kVoxelBlock);
        for (int64_t i = 0; i < count; ++i) d[i] = d[i] > kTiny ? d[i] : kTiny;
        if (symmetric)
            for (int64_t i = 0; i < count; ++i) d[i] = std::sqrt(d[i]);
        for (int64_t i = 0; i < count; ++i) d[i] = 1.0f / d[i];
    });
    kernel.scale = std::move(degree);
    kernel.scales_sent = symmetric;
    if (!symmetric) return;  // D^-1 K 1 = 1
    fill(kernel.ones, 0.0f);
    kernel.filter->accumulate(ones.get(), 1, kernel.scale.get(), kernel.scale.get(), &unit, kernel.ones.get(), workspace);
}

MeanFieldOutcome run_mean_field(const Voxels& voxels, std::vector<Kernel> kernels, const MeanFieldOptions& options, const float* logits,
                                float* out, ThreadPool& pool, Workspace workspace, const StepCallback& callback) {
    const MeanFieldOutcome outcome = MeanField(voxels, std::move(kernels), options, logits, pool, std::move(workspace)).run(out, callback);
    write_outside(voxels, options, logits, out, pool);
    return outcome;
}

}  // namespace crf
