// The iteration of the mean field, equation by equation, and then its loops and memory.
#include "cpu/mean_field.h"

#include "cpu/mean_field_messages.h"
#include "cpu/update.h"
#include "cpu/volume.h"

namespace crf {
namespace {
// Rows of a block, kBlockRow values per label, in the memory of a thread.
struct BlockRows {
    float* logits;     // x: (a + beta) / T at first, then the new logits, then the new marginals
    float* marginals;  // Q, of the step before
    float* messages;   // weighted, sum over kernels
    // Logits a / T minus the largest of their voxel, which the energy of the new marginals needs.
    // They take the place of the messages, unless a matrix needs all messages for each label.
    float* relative;

    static constexpr int num_rows(bool is_potts) { return is_potts ? 3 : 4; }

    BlockRows(float* memory, int num_labels, bool is_potts)
        : logits(memory),
          marginals(memory + num_labels * kBlockRow),
          messages(memory + 2 * num_labels * kBlockRow),
          relative(memory + (num_rows(is_potts) - 1) * num_labels * kBlockRow) {}
};

// The iteration of docs/reference/math.md, section 3, whose equations the comments number. Below
// the equations come the loops over blocks of voxels, and then the memory.
class MeanField {
   public:
    MeanFieldOutcome run(const StepCallback& callback) {
        MeanFieldOutcome outcome;
        for_blocks([&](int64_t block, float* memory) { start(block, memory); });
        const StepSums at_start = total(block_sums_);
        double unary = at_start.unary;
        volumes_.start();
        if (keeps_logits_ || options_.num_iterations == 0)
            for_blocks([&](int64_t block, float* memory) {
                load_logits(block, memory);
                store_to_grid(voxels_, memory, block, num_labels_, out_);
            });

        for (int t = 0; t < options_.num_iterations; ++t) {
            if (callback) callback(t, options_.num_iterations);
            const bool is_last = t + 1 == options_.num_iterations;

            messages_.send(old_marginals_);  // (2)
            if (is_last && options_.is_last_run) {
                messages_.finish();
                release_idle();
            }
            choose_new_marginals(is_last);
            const double of_volumes = volumes_.energy();
            if (volumes_)
                outcome.volume_bias.push_back(
                    volumes_.balance(pool_, [&](int64_t block, int thread) {
                        float* const memory = scratch_[thread].get();
                        with_num_labels([&](auto known) { preview<known.value>(block, memory); });
                        return memory;
                    }));
            const GridView<float>* const target = keeps_logits_ || is_last ? &out_ : nullptr;
            for_blocks([&](int64_t block, float* memory) {
                with_num_labels([&](auto known) { update<known.value>(block, memory, target); });
            });
            old_marginals_ = new_marginals_;

            const StepSums sums = total(block_sums_);
            // (6), of the marginals that the step began with. Their unary part is known from
            // before.
            outcome.energy.push_back(unary + 0.5 * sums.quadratic + of_volumes - at_start.largest);
            unary = sums.unary;
            outcome.num_iterations = t + 1;
            if (has_converged(sums)) {
                outcome.converged = true;
                break;
            }
        }
        return outcome;
    }

   private:
    // ---- The equations, for the lanes from voxel `i` of a block on.

    // (1): x_0 = (a + beta) / T of a block; rows are padded with zeros to whole vectors.
    void load_logits(int64_t block, float* rows) const {
        const float scale = 1.0f / options_.temperature;
        if (options_.bias.empty())
            return load_from_grid(voxels_, logits_, scale, block, num_labels_, rows);
        load_from_grid(voxels_, logits_, 1.0f, block, num_labels_, rows);
        const int64_t count = num_in_block(block);
        for (int l = 0; l < num_labels_; ++l) {
            float* const row = rows + l * kBlockRow;
            for (int64_t i = 0; i < count; ++i) row[i] = (row[i] + options_.bias[l]) * scale;
        }
    }

    // (2): the weighted messages and the marginals of all labels, also of the last one if its
    // channel is not filtered: its message is that of all ones minus the others'. Returns the sum
    // of the messages over labels. `clears` sets the received messages to zero for the next step.
    [[gnu::always_inline]] vfloat load_messages(const BlockRows& rows, int64_t begin, int64_t i,
                                                int64_t left, bool clears) {
        const float* const marginals = old_marginals_ + begin + i;
        float* const messages = messages_.received() + begin + i;
        vfloat rest = splat_lanes(1.0f);
        vfloat all{};
        for (int c = 0; c < num_channels_; ++c) {
            const vfloat marginal = load_some(marginals + c * num_voxels_, left);
            const vfloat message = load_some(messages + c * num_voxels_, left);
            if (clears) store_some(messages + c * num_voxels_, vfloat{}, left);
            store(rows.marginals + c * kBlockRow + i, marginal);
            store(rows.messages + c * kBlockRow + i, message);
            rest -= marginal;
            all += message;
        }
        if (!implied_) return all;
        const int last = num_labels_ - 1;
        const vfloat ones = load_some(messages_.ones() + begin + i, left);
        store(rows.marginals + last * kBlockRow + i, vmax(rest, vfloat{}));
        store(rows.messages + last * kBlockRow + i, ones - all);
        return ones;
    }

    // (3) and (4): x = x_0 - pairwise. `all` is the sum of the messages over labels, `largest` the
    // largest x_0 of each voxel. Adds Q pairwise of the valid lanes to `quadratic`.
    template <int L>
    [[gnu::always_inline]] void subtract_pairwise(const BlockRows& rows, int64_t i,
                                                  const vfloat& all, const vfloat& largest,
                                                  const vint& valid, vfloat& quadratic) const {
        const int num_labels = L > 0 ? L : num_labels_;
        const vfloat lowest = splat_lanes(std::numeric_limits<float>::lowest());
        for (int l = 0; l < num_labels; ++l) {
            const auto message = [&](int k) { return load(rows.messages + k * kBlockRow + i); };
            const auto penalty = [&](int k) { return options_.compatibility[k * num_labels + l]; };
            const vfloat pairwise = pairwise_term(options_, num_labels, l, all, message, penalty);
            const vfloat start = load(rows.logits + l * kBlockRow + i);
            const vfloat marginal = load(rows.marginals + l * kBlockRow + i);
            quadratic += select(valid, pairwise * marginal, vfloat{});
            // A label with a logit of minus infinity is excluded from the energy.
            const vfloat relative = select(start >= lowest, start - largest, vfloat{});
            store(rows.relative + l * kBlockRow + i, relative);
            store(rows.logits + l * kBlockRow + i, start - pairwise);
        }
    }

    // (6), the unary part: adds -(Q log Q - Q a / T) of the new marginals to `linear`, a / T
    // relative to the largest of its voxel.
    template <int L>
    [[gnu::always_inline]] void add_unary(const BlockRows& rows, int64_t i, const vint& valid,
                                          const vfloat& negative_entropy, vfloat& linear) const {
        const int num_labels = L > 0 ? L : num_labels_;
        linear -= select(valid, negative_entropy, vfloat{});
        for (int l = 0; l < num_labels; ++l) {
            const vfloat relative = load(rows.relative + l * kBlockRow + i);
            const vfloat marginal = load(rows.logits + l * kBlockRow + i);
            linear += select(valid, relative * marginal, vfloat{});
        }
    }

    // (7).
    bool has_converged(const StepSums& sums) const {
        return options_.tolerance > 0 && sums.divergence / num_voxels_ < options_.tolerance &&
               sums.flips < numerics::FLIPPED_SHARE * num_voxels_;
    }

    // ---- Blocks of voxels.

    // Q_0, the update of x_0, and its part of the energy. The received messages become zero.
    void start(int64_t block, float* memory) {
        load_logits(block, memory);
        const int64_t count = num_in_block(block);
        const bool counts_labels = volumes_.counts_labels(block);
        vfloat largest{}, log_sum{};
        for (int64_t i = 0; i < count; i += kLanes) {
            const vint valid = first_lanes(count - i);
            const LabelLanes rows{memory + i};
            largest += select(valid, largest_label<0>(rows, num_labels_).largest, vfloat{});
            const UpdateLanes lanes_start = update_marginals<0>(rows, rows, num_labels_);
            log_sum += select(valid, lanes_start.log_sum, vfloat{});
            const int lanes = static_cast<int>(std::min<int64_t>(count - i, kLanes));
            for (int lane = 0; counts_labels && lane < lanes; ++lane)
                volumes_.count(block * kVoxelBlock + i + lane, lanes_start.label[lane]);
        }
        store_marginals(block, memory);
        volumes_.store_masses(block, memory);
        for (int c = 0; c < num_channels_; ++c) {
            float* row = messages_.received() + c * num_voxels_ + block * kVoxelBlock;
            std::fill(row, row + count, 0.0f);
        }
        block_sums_[block] = {.unary = -sum_lanes(log_sum), .largest = sum_lanes(largest)};
    }

    // (1) to (4): the new logits in the rows. Returns <Q, pairwise> of the old marginals. Messages
    // become zero if `is_final`, which a preview is not.
    template <int L>
    vfloat new_logits(int64_t block, const BlockRows& rows, bool is_final) {
        const int64_t count = num_in_block(block);
        load_logits(block, rows.logits);
        vfloat quadratic{};
        for (int64_t i = 0; i < count; i += kLanes) {
            const int64_t left = count - i;
            const vfloat largest =
                largest_label<L>(LabelLanes{rows.logits + i}, num_labels_).largest;
            const vfloat all = load_messages(rows, block * kVoxelBlock, i, left, is_final);
            subtract_pairwise<L>(rows, i, all, largest, first_lanes(left), quadratic);
        }
        if (volumes_) volumes_.add_bias(block, rows.logits);
        return quadratic;
    }

    // A step: new marginals from messages and old marginals, and new logits if `out` is given.
    template <int L>
    void update(int64_t block, float* memory, const GridView<float>* out) {
        const BlockRows rows(memory, L > 0 ? L : num_labels_, options_.is_potts);
        const int64_t count = num_in_block(block);
        const vfloat quadratic = new_logits<L>(block, rows, true);
        if (out) store_to_grid(voxels_, rows.logits, block, num_labels_, *out);

        vfloat linear{}, divergence{};
        vint flips{};
        for (int64_t i = 0; i < count; i += kLanes) {
            const vint valid = first_lanes(count - i);
            const LabelLanes lanes{rows.logits + i};
            const UpdateLanes now = update_marginals<L>(lanes, lanes, num_labels_);  // (5)
            add_unary<L>(rows, i, valid, now.negative_entropy, linear);
            if (options_.tolerance > 0) {
                const vfloat change =
                    kl_divergence<L>(lanes, {rows.marginals + i}, num_labels_, implied_);
                divergence += select(valid, change, vfloat{});
                const LabelLanes before{rows.marginals + i};
                const vint label = largest_label<L>(before, num_labels_).label;
                flips += select(valid, now.label != label, vint{});  // -1 if true
            }
        }
        store_marginals(block, rows.logits);
        volumes_.store_masses(block, rows.logits);

        StepSums sums;
        sums.unary -= sum_lanes(linear);
        sums.quadratic = sum_lanes(quadratic);
        sums.divergence = sum_lanes(divergence);
        for (int lane = 0; lane < kLanes; ++lane) sums.flips -= flips[lane];
        block_sums_[block] = sums;
    }

    // The marginals that a block would have with the present biases of the volume term.
    template <int L>
    void preview(int64_t block, float* memory) {
        const BlockRows rows(memory, L > 0 ? L : num_labels_, options_.is_potts);
        new_logits<L>(block, rows, false);
        const int64_t count = num_in_block(block);
        for (int64_t i = 0; i < count; i += kLanes) {
            const LabelLanes lanes{rows.logits + i};
            update_marginals<L>(lanes, lanes, num_labels_);
        }
    }

    // ---- Loops and memory.

   public:
    MeanField(KernelSet& set, const MeanFieldOptions& options, const GridView<const float>& logits,
              const GridView<float>& out, float* record, ThreadPool& pool, Workspace& workspace)
        : voxels_(set.voxels),
          options_(options),
          logits_(logits),
          out_(out),
          record_(record),
          pool_(pool),
          num_labels_(options.num_labels),
          num_channels_(options.num_channels()),
          num_voxels_(voxels_.num_voxels),
          num_blocks_(num_voxel_blocks(num_voxels_)),
          implied_(options.last_is_implied()),
          keeps_logits_(options.tolerance > 0),
          num_stored_(num_channels_),
          messages_(set.kernels, options, num_voxels_, record != nullptr, pool, workspace),
          volumes_(options, num_voxels_, pool) {
        if (!record_) own_marginals_ = Buffer<float>(num_marginal_rows() * num_voxels_);
        old_marginals_ = record_ ? record_ : own_marginals_.get();
        new_marginals_ = old_marginals_;
        // The result's memory serves the messages until the last step puts logits in their place.
        messages_.prepare(keeps_logits_ || !is_whole(out) ? nullptr : out.data);
        block_sums_.resize(num_blocks_);
        scratch_.resize(pool.num_threads());
        const int num_rows = BlockRows::num_rows(options_.is_potts) * num_labels_;
        for (Buffer<float>& memory : scratch_) memory = Buffer<float>(num_rows * kBlockRow);
        // In memory that has just been freed. In a box of a mask the spatial filter needs more.
        if (num_voxels_ == voxels_.box_size) workspace.floats(num_voxels_);
        release_idle();
    }

    // (label, voxel), after the last step. Empty if it was not the last possible one, or if they
    // are not asked for.
    Buffer<float> marginals() {
        if (num_stored_ != num_labels_ || !gives_marginals()) return Buffer<float>();
        return std::move(own_marginals_);
    }

   private:
    // Calls body(block, the thread's memory) for all blocks.
    template <class Body>
    void for_blocks(const Body& body) {
        pool_.run(num_blocks_,
                  [&](int64_t block, int thread) { body(block, scratch_[thread].get()); });
    }

    // Calls body(L) with the number of labels as a constant: 2 to 5, or 0 for any other number.
    template <class Body>
    void with_num_labels(const Body& body) const {
        with_constant<2, 3, 4, 5, 0>(num_labels_, body);
    }

    int64_t num_in_block(int64_t block) const {
        return block_end(block, num_voxels_) - block * kVoxelBlock;
    }

    bool gives_marginals() const { return options_.gives_marginals && !record_; }

    // Rows of marginals in own memory: a channel each, or a label each if all are needed.
    int num_marginal_rows() const {
        return gives_marginals() || messages_.joins_ones() ? num_labels_ : num_channels_;
    }

    // Whether an array has the voxels and no others, in their order.
    bool is_whole(const GridView<float>& array) const {
        return num_voxels_ == (array.is_box ? voxels_.box_size : voxels_.grid_size) &&
               array.label_stride == num_voxels_;
    }

    // Chooses where the new marginals go: over the old ones, or into the next part of the record.
    // No step reads the last marginals, and the record has no room for them without a volume term.
    void choose_new_marginals(bool is_last) {
        const bool is_recorded = record_ && (!is_last || volumes_);
        if (is_recorded) new_marginals_ = old_marginals_ + num_channels_ * num_voxels_;
        if (!is_last || is_recorded) {
            num_stored_ = num_channels_;
        } else {
            num_stored_ = gives_marginals() ? num_labels_ : 0;
        }
    }

    void store_marginals(int64_t block, const float* rows) {
        store_rows(rows, num_voxels_, block, num_stored_, new_marginals_);
    }

    // Before an array of all labels is touched for the first time.
    void release_idle() const {
        BlockCache::release_idle(num_labels_ * num_voxels_ * static_cast<int64_t>(sizeof(float)));
    }

    const Voxels& voxels_;
    const MeanFieldOptions& options_;
    const GridView<const float>& logits_;
    const GridView<float>& out_;
    float* record_;
    ThreadPool& pool_;
    const int num_labels_, num_channels_;
    const int64_t num_voxels_, num_blocks_;
    const bool implied_;       // the last label's channel is not filtered
    const bool keeps_logits_;  // a step that may be the last one stores its logits
    // Rows of new marginals that are stored: channels; in the last step all labels or none.
    int num_stored_;
    Messages messages_;
    KeptVolumes volumes_;
    // (channel, voxel), with room for all labels if they are given to the caller.
    Buffer<float> own_marginals_;
    float* old_marginals_ = nullptr;
    float* new_marginals_ = nullptr;
    std::vector<StepSums> block_sums_;
    std::vector<Buffer<float>> scratch_;  // a thread's rows
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

MeanFieldOutcome run_mean_field(KernelSet& set, const MeanFieldOptions& options,
                                const GridView<const float>& logits, const GridView<float>& out,
                                float* record, Buffer<float>* marginals, ThreadPool& pool,
                                Workspace& workspace, const StepCallback& callback) {
    MeanField mean_field(set, options, logits, out, record, pool, workspace);
    const MeanFieldOutcome outcome = mean_field.run(callback);
    if (marginals) *marginals = mean_field.marginals();
    write_outside(set.voxels, options, logits, out, pool);
    return outcome;
}
}  // namespace crf
