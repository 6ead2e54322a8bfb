#include "cpu/mean_field.h"

#include "cpu/mean_field_messages.h"
#include "cpu/simd.h"
#include "cpu/volume.h"
#include "cpu/voxel_rows.h"

namespace crf {
namespace {
class MeanField {
   public:
    MeanField(const Voxels& voxels, std::vector<Kernel>& kernels, const MeanFieldOptions& options,
              const GridView<const float>& logits, const GridView<float>& out, float* record,
              ThreadPool& pool, Workspace& workspace)
        : voxels_(voxels),
          options_(options),
          logits_(logits),
          out_(out),
          record_(record),
          pool_(pool),
          num_labels_(options.num_labels),
          num_channels_(options.num_channels()),
          num_voxels_(voxels.num_voxels),
          num_blocks_(num_voxel_blocks(voxels.num_voxels)),
          implied_(options.last_is_implied()),
          num_stored_(num_channels_),
          messages_(kernels, options, voxels.num_voxels, record != nullptr, pool, workspace),
          volumes_(options, voxels.num_voxels, pool) {
        keep_ = options_.tolerance > 0;  // a step that may be the last one stores its logits
        if (!record_)
            own_marginals_ = Buffer<float>(
                (gives_marginals() || messages_.joins_ones() ? num_labels_ : num_channels_) *
                num_voxels_);
        old_marginals_ = new_marginals_ = record_ ? record_ : own_marginals_.get();
        // The result's memory serves the messages until the last step puts logits in their place.
        messages_.prepare(keep_ || !is_whole(out) ? nullptr : out.data);
        block_sums_.resize(num_blocks_);
        scratch_.resize(pool.num_threads());
        for (auto& s : scratch_)
            s = Buffer<float>((options_.is_potts ? 3 : 4) * num_labels_ * kBlockRow);
        // In memory that has just been freed. In a box of a mask the spatial filter needs more.
        if (num_voxels_ == voxels.box_size) workspace.floats(num_voxels_);
        release_idle();
    }

    MeanFieldOutcome run(const StepCallback& callback) {
        MeanFieldOutcome outcome;
        for_blocks([&](int64_t block, int thread) { initialize(block, scratch_[thread].get()); });
        const StepSums start = total(block_sums_);
        const double largest = start.largest;
        volumes_.start();
        double unary = start.unary;
        const bool may_stop = options_.tolerance > 0;
        const auto preview = [&](int64_t block, int thread) {
            float* const rows = scratch_[thread].get();
            with_constant<2, 3, 4, 5, 0>(
                num_labels_, [&](auto known) { preview_labels<known.value>(block, rows); });
            return rows;
        };
        if (keep_ || options_.num_iterations == 0) write_start(out_);
        for (int t = 0; t < options_.num_iterations; ++t) {
            if (callback) callback(t, options_.num_iterations);
            messages_.send(old_marginals_);
            const bool is_last = t + 1 == options_.num_iterations;
            if (is_last && options_.is_last_run) {
                messages_.finish();
                release_idle();
            }
            const GridView<float>* const target = keep_ || is_last ? &out_ : nullptr;
            const bool is_recorded = record_ && (!is_last || volumes_);
            if (is_recorded) new_marginals_ = old_marginals_ + num_channels_ * num_voxels_;
            // No step reads the last marginals, and the record has no room for them.
            num_stored_ = !is_last || is_recorded ? num_channels_
                          : gives_marginals()     ? num_labels_
                                                  : 0;
            const double divergence = volumes_.energy();
            if (volumes_) outcome.volume_bias.push_back(volumes_.balance(pool_, preview));
            for_blocks(
                [&](int64_t block, int thread) { update(block, scratch_[thread].get(), target); });
            old_marginals_ = new_marginals_;
            const StepSums sums = total(block_sums_);
            outcome.energy.push_back(unary + 0.5 * sums.quadratic + divergence - largest);
            unary = sums.unary;
            outcome.num_iterations = t + 1;
            if (may_stop && sums.divergence / num_voxels_ < options_.tolerance &&
                sums.flips < kFlipsAtConvergence * num_voxels_) {
                outcome.converged = true;
                break;
            }
        }
        return outcome;
    }

    // (label, voxel), after the last step; empty where it was not the last possible one, or if they
    // are not asked for.
    Buffer<float> marginals() {
        return num_stored_ == num_labels_ && gives_marginals() ? std::move(own_marginals_)
                                                               : Buffer<float>();
    }

   private:
    bool gives_marginals() const { return options_.gives_marginals && !record_; }

    // Whether an array has the voxels and no others, in their order.
    bool is_whole(const GridView<float>& array) const {
        return num_voxels_ == (array.is_box ? voxels_.box_size : voxels_.grid_size) &&
               array.label_stride == num_voxels_;
    }

    void for_blocks(FunctionRef<int64_t, int> body) { pool_.run(num_blocks_, body); }

    // Before an array of all labels is touched for the first time.
    void release_idle() const {
        BlockCache::release_idle(num_labels_ * num_voxels_ * static_cast<int64_t>(sizeof(float)));
    }

    // Logits with their bias over temperature of a block, one row of kBlockRow per label; rows are
    // padded with zeros to whole vectors.
    void load_logits(int64_t block, float* rows) const {
        const float scale = 1.0f / options_.temperature;
        if (options_.bias.empty())
            return load_from_grid(voxels_, logits_, scale, block, num_labels_, rows);
        load_from_grid(voxels_, logits_, 1.0f, block, num_labels_, rows);
        const int64_t count = block_end(block, num_voxels_) - block * kVoxelBlock;
        for (int l = 0; l < num_labels_; ++l) {
            float* const row = rows + l * kBlockRow;
            for (int64_t i = 0; i < count; ++i) row[i] = (row[i] + options_.bias[l]) * scale;
        }
    }

    void store_marginals(int64_t block, const float* rows) {
        store_rows(rows, num_voxels_, block, num_stored_, new_marginals_);
    }

    void initialize(int64_t block, float* x) {
        load_logits(block, x);
        const int64_t count = std::min(kVoxelBlock, num_voxels_ - block * kVoxelBlock);
        const bool counts_labels = volumes_.counts_labels(block);
        vfloat largest{}, log_sum{};
        for (int64_t i = 0; i < count; i += kLanes) {
            const int lanes = static_cast<int>(std::min<int64_t>(count - i, kLanes));
            const vint valid = first_lanes(lanes);
            largest += select(valid, largest_row<0>(x + i, num_labels_), vfloat{});
            const SoftmaxLanes start = softmax_rows<0>(x + i, num_labels_);
            log_sum += select(valid, start.log_sum, vfloat{});
            for (int lane = 0; counts_labels && lane < lanes; ++lane)
                volumes_.count(block * kVoxelBlock + i + lane, static_cast<int>(start.label[lane]));
        }
        store_marginals(block, x);
        volumes_.store_masses(block, x);
        for (int c = 0; c < num_channels_; ++c) {
            float* row = messages_.received() + c * num_voxels_ + block * kVoxelBlock;
            std::fill(row, row + count, 0.0f);
        }
        block_sums_[block] = {.unary = -sum_lanes(log_sum), .largest = sum_lanes(largest)};
    }

    // One step for a block: from messages and old marginals to new ones (and logits, if `out` is
    // given). Messages become zero.
    void update(int64_t block, float* scratch, const GridView<float>* out) {
        with_constant<2, 3, 4, 5, 0>(
            num_labels_, [&](auto known) { update_labels<known.value>(block, scratch, out); });
    }

    // The new logits of a block as the first rows of `scratch`, the old marginals as the next;
    // returns <Q, pairwise> of these. The messages are reset to zero for the next step if this is
    // the final computation of the step.
    template <int L>
    vfloat new_logits(int64_t block, float* scratch, bool is_final) {
        const int num_labels = L > 0 ? L : num_labels_;
        const int64_t begin = block * kVoxelBlock;
        const int64_t count = std::min(kVoxelBlock, num_voxels_ - begin);
        const int last = num_labels - 1;
        float* x = scratch;                               // logits, then the new logits
        float* q = scratch + num_labels * kBlockRow;      // old marginals of all labels
        float* s = scratch + 2 * num_labels * kBlockRow;  // weighted messages of all labels
        float* const relative = relative_logits(scratch, num_labels);
        const float* marginals = old_marginals_ + begin;
        float* messages = messages_.received() + begin;
        load_logits(block, x);

        const vfloat lowest = splat_lanes(std::numeric_limits<float>::lowest());
        vfloat quadratic{};
        for (int64_t i = 0; i < count; i += kLanes) {
            const vfloat largest = largest_row<L>(x + i, num_labels_);
            const int64_t left = count - i;
            const vint valid = first_lanes(static_cast<int>(std::min<int64_t>(left, kLanes)));
            vfloat rest = splat_lanes(1.0f), all{};
            for (int c = 0; c < num_channels_; ++c) {
                const vfloat marginal = load_some(marginals + c * num_voxels_ + i, left);
                const vfloat message = load_some(messages + c * num_voxels_ + i, left);
                if (is_final) store_some(messages + c * num_voxels_ + i, vfloat{}, left);
                store(q + c * kBlockRow + i, marginal);
                store(s + c * kBlockRow + i, message);
                rest -= marginal;
                all += message;
            }
            if (implied_) {
                const vfloat ones = load_some(messages_.ones() + begin + i, left);
                store(q + last * kBlockRow + i, vmax(rest, vfloat{}));
                store(s + last * kBlockRow + i, ones - all);
                all = ones;
            }
            for (int l = 0; l < num_labels; ++l) {
                const auto message = [&](int k) { return load(s + k * kBlockRow + i); };
                const auto penalty = [&](int k) {
                    return options_.compatibility[k * num_labels + l];
                };
                const vfloat pairwise =
                    pairwise_term(options_, num_labels, l, all, message, penalty);
                const vfloat a = load(x + l * kBlockRow + i);
                quadratic += select(valid, pairwise * load(q + l * kBlockRow + i), vfloat{});
                // A label with a logit of minus infinity is excluded from the energy.
                store(relative + l * kBlockRow + i, select(a >= lowest, a - largest, vfloat{}));
                store(x + l * kBlockRow + i, a - pairwise);
            }
        }
        if (volumes_) volumes_.add_bias(block, x);
        return quadratic;
    }

    // Rows for the logits relative to the largest of their voxel, which the energy of the new
    // marginals needs: those of the messages, unless a matrix needs all messages for each label.
    float* relative_logits(float* scratch, int num_labels) const {
        return scratch + (options_.is_potts ? 2 : 3) * num_labels * kBlockRow;
    }

    // The marginals that a block would have with the present biases of the volume term, as the
    // first rows of `scratch`.
    template <int L>
    void preview_labels(int64_t block, float* scratch) {
        new_logits<L>(block, scratch, false);
        const int64_t count = block_end(block, num_voxels_) - block * kVoxelBlock;
        for (int64_t i = 0; i < count; i += kLanes) softmax_rows<L>(scratch + i, num_labels_);
    }

    // L: number of labels, 0 = any.
    template <int L>
    void update_labels(int64_t block, float* scratch, const GridView<float>* out) {
        const int num_labels = L > 0 ? L : num_labels_;
        const int64_t count = block_end(block, num_voxels_) - block * kVoxelBlock;
        const vfloat quadratic = new_logits<L>(block, scratch, true);
        const float* const relative = relative_logits(scratch, num_labels);
        float* const x = scratch;  // the new logits, then the new marginals
        const float* const q = scratch + num_labels * kBlockRow;
        if (out) store_to_grid(voxels_, x, block, num_labels_, *out);
        StepSums sums;
        vfloat linear{}, divergence{};
        vint flips{};
        for (int64_t i = 0; i < count; i += kLanes) {
            const vint valid = first_lanes(static_cast<int>(std::min<int64_t>(count - i, kLanes)));
            const SoftmaxLanes now = softmax_rows<L>(x + i, num_labels_);
            linear -= select(valid, now.negative_entropy, vfloat{});
            for (int l = 0; l < num_labels; ++l)
                linear +=
                    select(valid, load(relative + l * kBlockRow + i) * load(x + l * kBlockRow + i),
                           vfloat{});
            if (options_.tolerance > 0) {
                divergence +=
                    select(valid, kl_divergence<L>(x + i, q + i, num_labels_, implied_), vfloat{});
                vint old_label{};
                vfloat largest = load(q + i);
                for (int l = 1; l < num_labels; ++l) {
                    const vfloat v = load(q + l * kBlockRow + i);
                    const vint more = v > largest;
                    largest = select(more, v, largest);
                    old_label = select(more, vint{} + l, old_label);
                }
                flips += select(valid, now.label != old_label, vint{});  // -1 where true
            }
        }
        store_marginals(block, x);
        volumes_.store_masses(block, x);
        sums.unary -= sum_lanes(linear);
        sums.quadratic = sum_lanes(quadratic);
        sums.divergence = sum_lanes(divergence);
        for (int i = 0; i < kLanes; ++i) sums.flips -= flips[i];
        block_sums_[block] = sums;
    }

    void write_start(const GridView<float>& out) {
        for_blocks([&](int64_t block, int thread) {
            float* x = scratch_[thread].get();
            load_logits(block, x);
            store_to_grid(voxels_, x, block, num_labels_, out);
        });
    }

    const Voxels& voxels_;
    const MeanFieldOptions& options_;
    const GridView<const float>& logits_;
    const GridView<float>& out_;
    float* record_;
    ThreadPool& pool_;
    const int num_labels_, num_channels_;
    const int64_t num_voxels_, num_blocks_;
    const bool implied_;  // the last label's channel is not filtered
    int num_stored_;      // new marginals that are stored: channels, in the last step all labels or
                          // none
    Messages messages_;
    KeptVolumes volumes_;
    bool keep_ = false;            // logits are stored in each step
    Buffer<float> own_marginals_;  // (channel, voxel), with room for all labels if they are given
                                   // to the caller
    float *old_marginals_ = nullptr, *new_marginals_ = nullptr;
    std::vector<StepSums> block_sums_;
    std::vector<Buffer<float>> scratch_;
};

// Outside the mask the result is the logits over the temperature. Written last, so that its memory
// is not used while the lattice exists.
void write_outside(const Voxels& voxels, const MeanFieldOptions& options,
                   const GridView<const float>& logits, const GridView<float>& out,
                   ThreadPool& pool) {
    if (voxels.num_voxels == (out.is_box ? voxels.box_size : voxels.grid_size)) return;
    const float scale = 1 / options.temperature;
    pool.run(options.num_labels,
             [&](int64_t label, int) { copy_outside(voxels, logits, out, label, scale); });
}
}  // namespace

bool MeanFieldOptions::has_one_weight(size_t kernel) const {
    const std::vector<float>& of_kernel = weight[kernel];
    return std::all_of(of_kernel.begin(), of_kernel.end(),
                       [&](float w) { return w == of_kernel.front(); });
}

bool MeanFieldOptions::last_is_implied() const {
    for (size_t k = 0; k < weight.size(); ++k)
        if (!has_one_weight(k)) return false;
    return true;
}

bool MeanFieldOptions::has_symmetric_penalties() const {
    const int size = num_labels;
    for (int k = 0; k < size && !is_potts; ++k)
        for (int l = 0; l < k; ++l)
            if (compatibility[k * size + l] != compatibility[l * size + k]) return false;
    return true;
}

MeanFieldOutcome run_mean_field(const Voxels& voxels, std::vector<Kernel>& kernels,
                                const MeanFieldOptions& options,
                                const GridView<const float>& logits, const GridView<float>& out,
                                float* record, Buffer<float>* marginals, ThreadPool& pool,
                                Workspace& workspace, const StepCallback& callback) {
    MeanField mean_field(voxels, kernels, options, logits, out, record, pool, workspace);
    const MeanFieldOutcome outcome = mean_field.run(callback);
    if (marginals) *marginals = mean_field.marginals();
    write_outside(voxels, options, logits, out, pool);
    return outcome;
}
}  // namespace crf
