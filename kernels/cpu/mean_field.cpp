#include "cpu/mean_field.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>

#include "cpu/mean_field_rules.h"
#include "cpu/softmax_lanes.h"
#include "cpu/two_labels.h"
#include "cpu/with_constant.h"

namespace crf {

namespace {

constexpr int kFarBelow = 100;  // nats under the largest logit: a rounding error of the marginal would count in the energy

template <class T>
class MeanField {
    using Lanes = typename LanesOf<T>::type;
    using Integers = typename LanesOf<T>::integer;

    // Double precision is for checks, where speed is no concern: it has only the code for any number of labels.
    static constexpr bool kIsFast = std::is_same_v<T, float>;

   public:
    MeanField(const Voxels& voxels, std::vector<Kernel<T>>& kernels, const MeanFieldOptions<T>& options, const GridView<const T>& logits,
              const GridView<T>& out, T* record, ThreadPool& pool, Workspace& workspace)
        : voxels_(voxels),
          kernels_(kernels),
          workspace_(workspace),
          options_(options),
          logits_(logits),
          out_(out),
          record_(record),
          pool_(pool),
          num_labels_(options.num_labels),
          num_voxels_(voxels.num_voxels),
          num_blocks_(num_voxel_blocks(voxels.num_voxels)) {
        implied_ = options.last_is_implied();
        num_channels_ = num_stored_ = options.num_channels();
        if (implied_) find_other_ones();
        if (implied_ && !joins_ones_) sum_ones();
        // A step that may be the last one stores its logits; a damped step starts from those of the previous step. The energy of a Potts
        // model with one weight for all labels does not rise.
        keep_ = options_.tolerance > 0 || options_.damping > 0 || (options_.watch_energy && !(options_.is_potts && implied_));
        if (!record_) own_marginals_ = Buffer<T>((gives_marginals() || joins_ones_ ? num_labels_ : num_channels_) * num_voxels_);
        old_marginals_ = new_marginals_ = record_ ? record_ : own_marginals_.get();
        // The result's memory serves the messages until the last step puts logits in their place.
        if (keep_ || !is_whole(out)) own_messages_ = Buffer<T>((num_channels_ + joins_ones_) * num_voxels_);
        overwrites_ = !kernels_.empty() && kernels_.front().filter->can_overwrite();
        messages_ = own_messages_ ? own_messages_.get() : out.data;
        if (options_.is_last_run) free_scales();
        if (options.channel_labels) plan_weights();
        block_sums_.resize(num_blocks_);
        scratch_.resize(pool.num_threads());
        for (auto& s : scratch_) s = Buffer<T>((looks_up_penalties_ ? 4 : 3) * num_labels_ * kBlockRow);
        if (options.keeps_volumes()) block_masses_.resize(num_blocks_ * num_labels_);
        if (options.keeps_volumes() && options.keeps_counts) block_counts_.resize(num_blocks_ * num_labels_);
        if (!options.volume_part.empty()) find_volume_blocks();
        // In memory that has just been freed. In a box of a mask the spatial filter needs more.
        if (num_voxels_ == voxels.box_size) workspace_.floats(num_voxels_);
        release_idle();
    }

    MeanFieldOutcome run(const StepCallback& callback) {
        MeanFieldOutcome outcome;
        step_length_ = T{1} - options_.damping;
        for_blocks([&](int64_t block, int thread) { initialize(block, scratch_[thread].get()); });
        const StepSums start = total(block_sums_);
        const double largest = start.largest;
        if (options_.keeps_volumes()) {
            volume_ =
                std::make_unique<VolumeTerm>(total_by_label(options_.keeps_counts ? block_counts_ : block_masses_), options_.volume_slack);
            volume_bias_.assign(num_labels_, 0);
        }
        // The marginals of the network do not have the masses of its labels, which are kept from the first step on.
        const int first_watched = options_.volume_slack == 0 && options_.keeps_counts ? 2 : 1;
        double negative_entropy = start.negative_entropy, last_energy = 0;
        const bool may_stop = options_.tolerance > 0;
        if (keep_ || options_.num_iterations == 0) write_start(out_);
        if (keep_) kept_ = {out_.data, out_.is_box, out_.label_stride, out_.shape, out_.stride};
        for (int t = 0; t < options_.num_iterations; ++t) {
            if (callback) callback(t, options_.num_iterations);
            send_messages();
            if (joins_ones_) sum_ones();
            const bool is_last = t + 1 == options_.num_iterations;
            if (is_last && options_.is_last_run) {
                kernels_.clear();
                workspace_ = Workspace();
                unweighted_ = Buffer<T>();
                release_idle();
            }
            const GridView<T>* const target = keep_ || is_last ? &out_ : nullptr;
            const bool is_recorded = record_ && (!is_last || volume_);
            if (is_recorded) new_marginals_ = old_marginals_ + num_channels_ * num_voxels_;
            // No step reads the last marginals, and the record has no room for them.
            num_stored_ = !is_last || is_recorded ? num_channels_ : gives_marginals() ? num_labels_ : 0;
            const double divergence = volume_ ? volume_->energy(total_by_label(block_masses_)) : 0;
            if (volume_) outcome.volume_bias.push_back(balance_volumes());
            outcome.step.push_back(static_cast<double>(step_length_));
            for_blocks([&](int64_t block, int thread) { update(block, scratch_[thread].get(), target); });
            old_marginals_ = new_marginals_;
            const StepSums sums = total(block_sums_);
            // Each voxel's largest logit is added only at the end: it shifts the energy, and says nothing about its rounding.
            const double energy = negative_entropy - sums.linear + 0.5 * sums.quadratic + divergence;
            const double size = std::abs(negative_entropy) + std::abs(sums.linear) + 0.5 * std::abs(sums.quadratic);
            negative_entropy = sums.negative_entropy;
            if (options_.watch_energy && t >= first_watched && energy > last_energy + kEnergyRounding * size)
                step_length_ *= static_cast<T>(0.5);
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

    // (label, voxel), after the last step; empty where it was not the last possible one, or if they are not asked for.
    Buffer<T> marginals() { return num_stored_ == num_labels_ && gives_marginals() ? std::move(own_marginals_) : Buffer<T>(); }

   private:
    bool gives_marginals() const { return options_.gives_marginals && !record_; }

    // Whether an array has the voxels and no others, in their order.
    bool is_whole(const GridView<T>& array) const {
        return num_voxels_ == (array.is_box ? voxels_.box_size : voxels_.grid_size) && array.label_stride == num_voxels_;
    }

    void for_blocks(FunctionRef<int64_t, int> body) { pool_.run(num_blocks_, body); }

    // Before an array of all labels is touched for the first time.
    void release_idle() const { BlockCache::release_idle(num_labels_ * num_voxels_ * static_cast<int64_t>(sizeof(T))); }

    // (label), from (block, label).
    std::vector<double> total_by_label(const std::vector<double>& by_block) const {
        std::vector<double> totals(num_labels_);
        for (size_t i = 0; i < by_block.size(); ++i) totals[i % num_labels_] += by_block[i];
        return totals;
    }

    // The main bodies of the labels are in few blocks, and the volume term has nothing to do in the others.
    void find_volume_blocks() {
        block_has_volume_.resize(num_blocks_);
        const T* const part = options_.volume_part.data();
        for_blocks([&](int64_t block, int) {
            block_has_volume_[block] =
                std::any_of(part + block * kVoxelBlock, part + block_end(block, num_voxels_), [](T factor) { return factor != 0; });
        });
    }
    bool has_volume(int64_t block) const { return block_has_volume_.empty() || block_has_volume_[block]; }

    // Of marginals, one row of kBlockRow per label; outside the part of the volume term they become 0.
    void store_masses(int64_t block, T* rows) {
        if (!has_volume(block)) return;  // They stay 0.
        multiply_rows(options_.volume_part, block, num_labels_, rows);
        const int64_t count = block_end(block, num_voxels_) - block * kVoxelBlock;
        for (int l = 0; l < num_labels_; ++l) {
            const T* row = rows + l * kBlockRow;
            double total = 0;
            for (int64_t i = 0; i < count; i += kLanes) {
                const Integers valid = first_lanes_of<T>(static_cast<int>(std::min<int64_t>(count - i, kLanes)));
                total += sum_lanes(select(valid, load(row + i), Lanes{}));
            }
            block_masses_[block * num_labels_ + l] = total;
        }
    }

    // Finds the biases with which the new marginals have the right masses; each pass computes them without storing them.
    std::vector<double> balance_volumes() {
        const double step = static_cast<double>(step_length_);
        for (int pass = 0; pass < kMostVolumePasses; ++pass) {
            const MassSums sums = sum_masses(pool_, num_blocks_, num_labels_, [&](int64_t block, int thread, MassSums& of_group) {
                for_label_count([&](auto known) { preview<known.value>(block, scratch_[thread].get(), of_group); });
            });
            if (volume_->improve(sums, step, volume_bias_) < kLastVolumeChange<T>) break;
        }
        return volume_bias_;
    }

    // Whether a kernel's message of all ones can come with the first step's messages, for little more time.
    bool can_join_ones(const Kernel<T>& k) const {
        return k.scales_sent && !k.ones && k.filter->shares_weights() && !record_ && num_channels_ % kChannelGroup > 0;
    }

    // Before the first step, when little memory is in use.
    void find_other_ones() {
        for (Kernel<T>& k : kernels_) {
            if (can_join_ones(k)) {
                joins_ones_ = true;
            } else {
                find_ones(k, num_voxels_, pool_, workspace_);
            }
        }
    }

    void sum_ones() {
        joins_ones_ = false;
        std::vector<const T*> ones;
        for (const Kernel<T>& k : kernels_) ones.push_back(k.ones.get());
        const bool in_place = options_.is_last_run && !kernels_.empty() && kernels_.front().ones;
        weighted_ones_ = in_place ? std::move(kernels_.front().ones) : Buffer<T>(num_voxels_);
        for_blocks([&](int64_t block, int) {
            for (int64_t n = block * kVoxelBlock; n < std::min((block + 1) * kVoxelBlock, num_voxels_); ++n) {
                T total = 0;
                for (size_t k = 0; k < kernels_.size(); ++k) total += options_.weight[k].front() * (ones[k] ? ones[k][n] : T{1});
                weighted_ones_[n] = total;
            }
        });
        if (!options_.is_last_run) return;
        for (Kernel<T>& k : kernels_) k.ones = Buffer<T>();
    }

    // In the last run: what a filter knows by itself need not be kept.
    void free_scales() {
        for (Kernel<T>& k : kernels_)
            if (k.scale && k.filter->apply_normalization(k.scales_sent)) k.scale = Buffer<T>();
    }

    // Where labels share channels and a kernel has a weight for each, the receiver's channel says which: within the kernel's reach it holds
    // the sender's label.
    void plan_weights() {
        looks_up_penalties_ = !options_.is_potts;
        for (size_t k = 0; k < kernels_.size(); ++k) {
            const T weight = options_.has_one_weight(k) ? options_.weight[k].front() : T{1};
            channel_weight_.emplace_back(num_labels_, weight);
            if (k > 0 && !options_.has_one_weight(k) && !unweighted_) {
                unweighted_ = Buffer<T>(num_channels_ * num_voxels_);
                clear_rows(unweighted_.get(), num_voxels_, num_channels_, pool_);
            }
        }
    }

    void send_messages() {
        for (size_t k = 0; k < kernels_.size(); ++k) {
            const T* scale = kernels_[k].scale.get();
            const bool looks_up = options_.channel_labels && !options_.has_one_weight(k);
            const T* weight = options_.channel_labels ? channel_weight_[k].data() : options_.weight[k].data();
            // The first kernel's messages need no memory of their own.
            T* const received = looks_up && k > 0 ? unweighted_.get() : messages_;
            const T* const pre = kernels_[k].scales_sent ? scale : nullptr;
            if (joins_ones_ && can_join_ones(kernels_[k])) {
                send_ones_too(kernels_[k], weight);
            } else if (k == 0 && overwrites_) {
                kernels_[k].filter->overwrite(old_marginals_, num_channels_, pre, scale, weight, received, workspace_);
            } else {
                kernels_[k].filter->accumulate(old_marginals_, num_channels_, pre, scale, weight, received, workspace_);
            }
            if (!looks_up) continue;
            for_blocks([&](int64_t block, int thread) {
                options_.channel_labels->add_weighted(options_.weight[k].data(), block, received, messages_, scratch_[thread].get());
            });
        }
    }

    // A kernel's messages and, in the place of the last label's channel, its message of all ones.
    void send_ones_too(Kernel<T>& k, const T* weight) {
        T *const ones = old_marginals_ + num_channels_ * num_voxels_, *const received = messages_ + num_channels_ * num_voxels_;
        std::vector<T> weights(weight, weight + num_channels_);
        weights.push_back(1);
        clear_rows(received, num_voxels_, 1, pool_);
        for_blocks([&](int64_t block, int) { std::fill(ones + block * kVoxelBlock, ones + block_end(block, num_voxels_), T{1}); });
        k.filter->accumulate(old_marginals_, num_channels_ + 1, k.scale.get(), k.scale.get(), weights.data(), messages_, workspace_);
        k.ones = Buffer<T>(num_voxels_);
        for_blocks([&](int64_t block, int) {
            std::copy(received + block * kVoxelBlock, received + block_end(block, num_voxels_), k.ones.get() + block * kVoxelBlock);
        });
    }

    // The pairwise terms of a block under a penalty for each pair of labels. `messages` is overwritten.
    void look_up_penalties(int64_t block, T* messages, T* pairwise) const {
        load_rows(messages_, num_voxels_, block, num_channels_, messages);
        if (implied_) {
            T* const last = messages + num_channels_ * kBlockRow;
            load_rows(weighted_ones_.get(), num_voxels_, block, 1, last);
            for (int c = 0; c < num_channels_; ++c)
                for (int64_t i = 0; i < kVoxelBlock; ++i) last[i] -= messages[c * kBlockRow + i];
        }
        options_.channel_labels->penalties(options_.compatibility.data(), false, block, messages, pairwise);
    }

    // Logits with their bias over temperature of a block, one row of kBlockRow per label; rows are padded with zeros to whole vectors.
    void load_logits(int64_t block, T* rows) const {
        const T scale = T{1} / options_.temperature;
        if (options_.bias.empty()) return load_from_grid(voxels_, logits_, scale, block, num_labels_, rows);
        load_from_grid(voxels_, logits_, T{1}, block, num_labels_, rows);
        for (int c = 0; c < num_labels_; ++c)
            options_.for_labels_of(c, block, num_voxels_, [&](int64_t begin, int64_t end, int label) {
                T* const row = rows + c * kBlockRow;
                for (int64_t i = begin; i < end; ++i) row[i] = (row[i] + options_.bias[label]) * scale;
            });
    }

    void store_marginals(int64_t block, const T* rows) { store_rows(rows, num_voxels_, block, num_stored_, new_marginals_); }

    void initialize(int64_t block, T* x) {
        if constexpr (kIsFast)
            if (takes_two_labels()) return initialize_two_labels(block);
        load_logits(block, x);
        const int64_t count = std::min(kVoxelBlock, num_voxels_ - block * kVoxelBlock);
        const bool counts_labels = !block_counts_.empty() && has_volume(block);
        StepSums sums;
        for (int64_t i = 0; i < count; i += kLanes) {
            const int lanes = static_cast<int>(std::min<int64_t>(count - i, kLanes));
            const Lanes largest = largest_row<0>(x + i, num_labels_);
            for (int lane = 0; lane < lanes; ++lane) sums.largest += static_cast<double>(largest[lane]);
            const SoftmaxLanes<T> start = softmax_rows<0>(x + i, num_labels_);
            sums.negative_entropy += sum_lanes(select(first_lanes_of<T>(lanes), start.negative_entropy, Lanes{}));
            for (int lane = 0; counts_labels && lane < lanes; ++lane) {
                const int64_t voxel = block * kVoxelBlock + i + lane;
                const bool counts = options_.volume_part.empty() || options_.volume_part[voxel] != 0;
                block_counts_[block * num_labels_ + start.label[lane]] += counts;
            }
        }
        store_marginals(block, x);
        if (!block_masses_.empty()) store_masses(block, x);
        for (int c = 0; !overwrites_ && c < num_channels_; ++c) {
            T* row = messages_ + c * num_voxels_ + block * kVoxelBlock;
            std::fill(row, row + count, T{0});
        }
        block_sums_[block] = sums;
    }

    // Whether one pass in registers does: two labels whose marginals sum to 1, the same everywhere, without masses to sum.
    bool takes_two_labels() const {
        return num_labels_ == 2 && implied_ && (options_.bias.empty() || !options_.channel_labels) && !options_.keeps_volumes();
    }
    T bias_of(int label) const { return options_.bias.empty() ? T{0} : options_.bias[label]; }

    void initialize_two_labels(int64_t block) {
        const T scale = T{1} / options_.temperature, first_bias = bias_of(0), second_bias = bias_of(1);
        Lanes weighted{};
        vdouble largest{};
        SumOfLogarithms<T> totals;
        voxels_.for_pieces(
            block * kVoxelBlock, block_end(block, num_voxels_), [&](int64_t voxel, int64_t grid, int64_t box, int64_t length) {
                const T *first = logits_.data + logits_.place(logits_.is_box ? box : grid), *second = first + logits_.label_stride;
                for (int64_t i = 0; i < length; i += kLanes) {
                    const int64_t left = length - i;
                    const Lanes a = (load_some(first + i, left) + first_bias) * scale;
                    const Lanes b = (load_some(second + i, left) + second_bias) * scale;
                    const TwoLabelSoftmax<T> now = softmax_of_two<T>(a, b);
                    store_some(new_marginals_ + voxel + i, now.first, left);
                    if (!overwrites_) store_some(messages_ + voxel + i, Lanes{}, left);
                    const Integers valid = first_lanes_of<T>(static_cast<int>(std::min<int64_t>(left, kLanes)));
                    largest += to_double(select(valid, vmax(b, a), Lanes{}));
                    weighted += select(valid, now.weighted, Lanes{});
                    totals.add(select(valid, now.total, splat_lanes(T{1})));
                }
            });
        StepSums sums;
        sums.largest = sum_lanes(largest);
        sums.negative_entropy = sum_lanes(weighted - totals.sum());
        block_sums_[block] = sums;
    }

    // One step for a block: from the messages and old marginals to the new marginals (and logits, if `out` is given). Resets the
    // messages to zero for the next step.
    void update(int64_t block, T* scratch, const GridView<T>* out) {
        if constexpr (kIsFast)
            if (takes_two_labels() && options_.is_potts && step_length_ == T{1}) return update_two_labels(block, out);
        for_label_count([&](auto known) { update_labels<known.value>(block, scratch, out); });
    }

    // Calls `body` with the number of labels as a constant, 0 = any.
    template <class Body>
    void for_label_count(const Body& body) {
        if constexpr (kIsFast) {
            with_constant<2, 3, 4, 5, 0>(num_labels_, body);
        } else {
            with_constant<0>(num_labels_, body);
        }
    }

    // The energy of the old marginals, in parts.
    struct OldEnergy {
        Lanes linear{}, quadratic{};
    };

    // The new logits of a block as the first rows of `scratch`, the old marginals as the next. The messages are reset to zero for the next
    // step, unless that overwrites them, if this is the final computation of the step.
    template <int L>
    OldEnergy new_logits(int64_t block, T* scratch, bool is_final) {
        const int num_labels = L > 0 ? L : num_labels_;
        const int64_t begin = block * kVoxelBlock;
        const int64_t count = std::min(kVoxelBlock, num_voxels_ - begin);
        const int last = num_labels - 1;
        T* x = scratch;                               // logits, then the new logits
        T* q = scratch + num_labels * kBlockRow;      // old marginals of all labels
        T* s = scratch + 2 * num_labels * kBlockRow;  // weighted messages of all labels
        T* p = scratch + 3 * num_labels * kBlockRow;  // pairwise terms, if they are looked up
        const T* marginals = old_marginals_ + begin;
        T* messages = messages_ + begin;
        load_logits(block, x);
        if (looks_up_penalties_) look_up_penalties(block, s, p);

        const Lanes lowest = splat_lanes(std::numeric_limits<T>::lowest());
        const Lanes rounding = splat_lanes(rounding_of_implied<T>(num_labels));
        OldEnergy energy;
        for (int64_t i = 0; i < count; i += kLanes) {
            const Lanes largest = largest_row<L>(x + i, num_labels_);
            const int64_t left = count - i;
            const Integers valid = first_lanes_of<T>(static_cast<int>(std::min<int64_t>(left, kLanes)));
            Lanes rest = splat_lanes(T{1}), all{};
            for (int c = 0; c < num_channels_; ++c) {
                const Lanes marginal = load_some(marginals + c * num_voxels_ + i, left);
                const Lanes message = load_some(messages + c * num_voxels_ + i, left);
                if (is_final && !overwrites_) store_some(messages + c * num_voxels_ + i, Lanes{}, left);
                store(q + c * kBlockRow + i, marginal);
                store(s + c * kBlockRow + i, message);
                rest -= marginal;
                all += message;
            }
            if (implied_) {
                const Lanes ones = load_some(weighted_ones_.get() + begin + i, left);
                store(q + last * kBlockRow + i, vmax(rest, Lanes{}));
                store(s + last * kBlockRow + i, ones - all);
                all = ones;
            }
            for (int l = 0; l < num_labels; ++l) {
                Lanes pairwise{};
                if (options_.is_potts) {
                    pairwise = all - load(s + l * kBlockRow + i);
                } else if (looks_up_penalties_) {
                    pairwise = load(p + l * kBlockRow + i);
                } else {
                    for (int k = 0; k < num_labels; ++k)
                        pairwise += load(s + k * kBlockRow + i) * options_.compatibility[k * num_labels + l];
                }
                const Lanes a = load(x + l * kBlockRow + i), old = load(q + l * kBlockRow + i);
                // A label with a logit of minus infinity is excluded from the sum, and so is the rounding error that is left of an implied
                // marginal where the label is absent.
                Integers counts = valid & (a >= lowest);
                if (implied_ && l == last) counts &= (a >= largest - kFarBelow) | (old > rounding);
                energy.linear += select(counts, (a - largest) * old, Lanes{});
                energy.quadratic += select(valid, pairwise * old, Lanes{});
                store(x + l * kBlockRow + i, a - pairwise);
            }
        }
        if (step_length_ < T{1}) shorten_step(block, q, s, x);
        if (volume_) add_volume_bias(block, num_labels, x);
        return energy;
    }

    void add_volume_bias(int64_t block, int num_labels, T* x) const {
        if (!has_volume(block)) return;
        const std::vector<T>& part = options_.volume_part;
        const int64_t begin = block * kVoxelBlock, count = block_end(block, num_voxels_) - begin;
        for (int l = 0; l < num_labels; ++l) {
            const T bias = step_length_ * static_cast<T>(volume_bias_[l]);
            T* const row = x + l * kBlockRow;
            for (int64_t i = 0; part.empty() && i < count; i += kLanes) store(row + i, load(row + i) + bias);
            for (int64_t i = 0; !part.empty() && i < count; ++i) row[i] += bias * part[begin + i];
        }
    }

    // Adds the masses that the marginals of a block would have with the present biases.
    template <int L>
    void preview(int64_t block, T* x, MassSums& sums) {
        if (!has_volume(block)) return;
        new_logits<L>(block, x, false);
        const int64_t count = block_end(block, num_voxels_) - block * kVoxelBlock;
        for (int64_t i = 0; i < count; i += kLanes) softmax_rows<L>(x + i, num_labels_);
        multiply_rows(options_.volume_part, block, num_labels_, x);
        sums.add(x, count);
    }

    // L: number of labels, 0 = any.
    template <int L>
    void update_labels(int64_t block, T* scratch, const GridView<T>* out) {
        const int num_labels = L > 0 ? L : num_labels_;
        const int64_t count = block_end(block, num_voxels_) - block * kVoxelBlock;
        const OldEnergy energy = new_logits<L>(block, scratch, true);
        T* const x = scratch;  // the new logits, then the new marginals
        const T* const q = scratch + num_labels * kBlockRow;
        if (out) store_to_grid(voxels_, x, block, num_labels_, *out);
        StepSums sums;
        Lanes divergence{};
        Integers flips{};
        for (int64_t i = 0; i < count; i += kLanes) {
            const Integers valid = first_lanes_of<T>(static_cast<int>(std::min<int64_t>(count - i, kLanes)));
            Integers old_label{};
            Lanes largest = load(q + i);
            for (int l = 1; l < num_labels; ++l) {
                const Lanes v = load(q + l * kBlockRow + i);
                const Integers more = v > largest;
                largest = select(more, v, largest);
                old_label = select(more, Integers{} + l, old_label);
            }
            const SoftmaxLanes<T> now = softmax_rows<L>(x + i, num_labels_);
            sums.negative_entropy += sum_lanes(select(valid, now.negative_entropy, Lanes{}));
            if (options_.tolerance > 0) {
                divergence += select(valid, kl_divergence<L>(x + i, q + i, num_labels_, implied_), Lanes{});
                const Integers differs = now.label != old_label;  // -1 where true
                flips += select(valid, differs, Integers{});
            }
        }
        store_marginals(block, x);
        if (volume_) store_masses(block, x);
        sums.linear = sum_lanes(energy.linear);
        sums.quadratic = sum_lanes(energy.quadratic);
        sums.divergence = sum_lanes(divergence);
        for (int i = 0; i < kLanes; ++i) sums.flips -= flips[i];
        block_sums_[block] = sums;
    }

    // The same for a Potts model of two labels with undamped steps: one pass, in registers. The marginals have the same bits.
    void update_two_labels(int64_t block, const GridView<T>* out) {
        const T scale = T{1} / options_.temperature, first_bias = bias_of(0), second_bias = bias_of(1);
        const Lanes lowest = splat_lanes(std::numeric_limits<T>::lowest()), rounding = splat_lanes(rounding_of_implied<T>(2));
        Lanes linear{}, quadratic{}, weighted{}, divergence{};
        Integers flips{};
        SumOfLogarithms<T> totals;
        voxels_.for_pieces(
            block * kVoxelBlock, block_end(block, num_voxels_), [&](int64_t voxel, int64_t grid, int64_t box, int64_t length) {
                const T *first = logits_.data + logits_.place(logits_.is_box ? box : grid), *second = first + logits_.label_stride;
                for (int64_t i = 0; i < length; i += kLanes) {
                    const int64_t left = length - i, n = voxel + i;
                    const Lanes a = (load_some(first + i, left) + first_bias) * scale;
                    const Lanes b = (load_some(second + i, left) + second_bias) * scale;
                    const Lanes received = load_some(messages_ + n, left), ones = load_some(weighted_ones_.get() + n, left);
                    if (!overwrites_) store_some(messages_ + n, Lanes{}, left);
                    Lanes p = load_some(old_marginals_ + n, left), q = vmax(T{1} - p, Lanes{});
                    const Lanes other = ones - received, own = ones - other;
                    const Lanes x = a - other, y = b - own;
                    TwoLabelSoftmax<T> now = softmax_of_two<T>(x, y);
                    if (out) {
                        T* const refined = out->data + out->place(out->is_box ? box : grid) + i;
                        store_some(refined, x, left);
                        store_some(refined + out->label_stride, y, left);
                    }
                    if (num_stored_ > 0) store_some(new_marginals_ + n, now.first, left);
                    if (num_stored_ > 1) store_some(new_marginals_ + num_voxels_ + n, now.second, left);
                    const Integers old_label = q > p, label = y > x;
                    if (left < kLanes) {  // lanes beyond the end count nowhere
                        const Integers valid = first_lanes_of<T>(static_cast<int>(left));
                        p = select(valid, p, Lanes{});
                        q = select(valid, q, Lanes{});
                        now.weighted = select(valid, now.weighted, Lanes{});
                        now.total = select(valid, now.total, splat_lanes(T{1}));
                    }
                    const Lanes largest = vmax(b, a);
                    linear += select(a >= lowest, (a - largest) * p, Lanes{});
                    linear += select((b >= lowest) & ((b >= largest - kFarBelow) | (q > rounding)), (b - largest) * q, Lanes{});
                    quadratic += other * p + own * q;
                    weighted += now.weighted;
                    totals.add(now.total);
                    if (options_.tolerance > 0) {
                        const Integers valid = first_lanes_of<T>(static_cast<int>(std::min<int64_t>(left, kLanes)));
                        const Lanes change =
                            divergence_of_label(now.first, p, splat_lanes(kTiny<T>)) + divergence_of_label(now.second, q, rounding);
                        divergence += select(valid, change, Lanes{});
                        flips += valid & (old_label != label);  // -1 where true
                    }
                }
            });
        StepSums sums;
        sums.negative_entropy = sum_lanes(weighted - totals.sum());
        sums.linear = sum_lanes(linear);
        sums.quadratic = sum_lanes(quadratic);
        sums.divergence = sum_lanes(divergence);
        for (int i = 0; i < kLanes; ++i) sums.flips -= flips[i];
        block_sums_[block] = sums;
    }

    // x becomes a point between the old logits and x. If no logits were kept, the logarithms of the old marginals `q` replace them:
    // the same except for labels that have almost vanished. `old` is scratch.
    void shorten_step(int64_t block, const T* q, T* old, T* x) const {
        if (kept_.data) load_from_grid(voxels_, kept_, T{1}, block, num_labels_, old);
        for (int64_t i = 0; i < num_labels_ * kBlockRow; i += kLanes) {
            const Lanes from = kept_.data ? load(old + i) : log_positive(vmax(load(q + i), splat_lanes(kTiny<T>)));
            const Lanes to = load(x + i);
            store(x + i, select(from == to, to, from + (to - from) * step_length_));  // not only for speed: both may be minus infinity
        }
    }

    void write_start(const GridView<T>& out) {
        for_blocks([&](int64_t block, int thread) {
            T* x = scratch_[thread].get();
            load_logits(block, x);
            store_to_grid(voxels_, x, block, num_labels_, out);
        });
    }

    const Voxels& voxels_;
    std::vector<Kernel<T>>& kernels_;
    Workspace& workspace_;
    const MeanFieldOptions<T>& options_;
    const GridView<const T>& logits_;
    const GridView<T>& out_;
    T* record_;
    ThreadPool& pool_;
    const int num_labels_;
    const int64_t num_voxels_, num_blocks_;
    int num_channels_ = 0;
    bool implied_ = false;  // the last label's channel is not filtered
    T step_length_ = T{1};
    bool keep_ = false;                       // logits are stored in each step
    GridView<const T> kept_;                  // logits of the previous step; no data: they are not kept
    Buffer<T> own_marginals_, own_messages_;  // (channel, voxel), the marginals with room for all labels if they are given to the caller
    T *old_marginals_ = nullptr, *new_marginals_ = nullptr, *messages_ = nullptr;
    bool overwrites_ = false;                     // the first kernel's messages overwrite those of the previous step
    int num_stored_ = 0;                          // new marginals that are stored: channels, in the last step all labels or none
    bool looks_up_penalties_ = false;             // labels share channels, and there is a matrix
    std::vector<std::vector<T>> channel_weight_;  // (kernel, channel), if labels share channels: ones where weights are looked up
    Buffer<T> unweighted_;                        // (channel, voxel) messages of one kernel, if weights are looked up
    Buffer<T> weighted_ones_;                     // (voxel), only when implied
    bool joins_ones_ = false;                     // the first messages come with that of all ones of at least one kernel
    std::unique_ptr<const VolumeTerm> volume_;
    std::vector<double> volume_bias_;                  // (label)
    std::vector<double> block_masses_, block_counts_;  // (block, label), of the marginals and of the labels of the network
    std::vector<char> block_has_volume_;               // (block), whether the volume term applies at any of its voxels; empty: at all
    std::vector<StepSums> block_sums_;
    std::vector<Buffer<T>> scratch_;
};

// Outside the mask the result is the logits over the temperature. Written last, so that its memory is not used while the lattice exists.
template <class T>
void write_outside(const Voxels& voxels, const MeanFieldOptions<T>& options, const GridView<const T>& logits, const GridView<T>& out,
                   ThreadPool& pool) {
    if (voxels.num_voxels == (out.is_box ? voxels.box_size : voxels.grid_size)) return;
    const T scale = 1 / options.temperature;
    pool.run(options.num_labels, [&](int64_t label, int) { copy_outside(voxels, logits, out, label, scale); });
}

}  // namespace

template <class T>
bool MeanFieldOptions<T>::has_one_weight(size_t kernel) const {
    const std::vector<T>& of_kernel = weight[kernel];
    return std::all_of(of_kernel.begin(), of_kernel.end(), [&](T w) { return w == of_kernel.front(); });
}

template <class T>
bool MeanFieldOptions<T>::last_is_implied() const {
    for (size_t k = 0; k < weight.size(); ++k)
        if (!has_one_weight(k)) return false;
    return true;
}

template <class T>
MeanFieldOutcome run_mean_field(const Voxels& voxels, std::vector<Kernel<T>>& kernels, const MeanFieldOptions<T>& options,
                                const GridView<const T>& logits, const GridView<T>& out, T* record, Buffer<T>* marginals, ThreadPool& pool,
                                Workspace& workspace, const StepCallback& callback) {
    MeanField<T> mean_field(voxels, kernels, options, logits, out, record, pool, workspace);
    const MeanFieldOutcome outcome = mean_field.run(callback);
    if (marginals) *marginals = mean_field.marginals();
    write_outside(voxels, options, logits, out, pool);
    return outcome;
}

template struct MeanFieldOptions<float>;
template struct MeanFieldOptions<double>;
template MeanFieldOutcome run_mean_field(const Voxels&, std::vector<Kernel<float>>&, const MeanFieldOptions<float>&,
                                         const GridView<const float>&, const GridView<float>&, float*, Buffer<float>*, ThreadPool&,
                                         Workspace&, const StepCallback&);
template MeanFieldOutcome run_mean_field(const Voxels&, std::vector<Kernel<double>>&, const MeanFieldOptions<double>&,
                                         const GridView<const double>&, const GridView<double>&, double*, Buffer<double>*, ThreadPool&,
                                         Workspace&, const StepCallback&);

}  // namespace crf
