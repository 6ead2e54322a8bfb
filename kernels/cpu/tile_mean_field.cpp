#include "cpu/tile_mean_field.h"

#include <algorithm>
#include <cmath>

#include "cpu/mean_field_rules.h"
#include "cpu/softmax_lanes.h"

namespace crf {

namespace {

class TileMeanField {
   public:
    TileMeanField(const TileSet& set, const std::vector<std::unique_ptr<TileFilter>>& kernels, const MeanFieldOptions<float>& options,
                  const uint8_t* is_open, int64_t num_voxels, float unsent, const float* logits, float* out, const BorderCheck* check,
                  ThreadPool& pool)
        : set_(set),
          kernels_(kernels),
          options_(options),
          is_open_(is_open),
          num_voxels_(num_voxels),
          unsent_(unsent),
          logits_(logits),
          out_(out),
          check_(check),
          pool_(pool),
          voxels_(set.tiling.tile_voxels()),
          num_rows_(voxels_ / kLanes),
          size_(set.num_entries() * voxels_),
          marginals_(size_),
          change_(size_),
          inside_(set.num_active * voxels_),
          sends_(set.num_active * num_rows_),
          row_entropy_(set.num_active * num_rows_),
          sums_(set.num_active),
          scratch_(pool.num_threads()) {
        if (options.damping > 0) kept_ = Buffer<float>(size_);
    }

    MeanFieldOutcome run(const StepCallback& callback) {
        MeanFieldOutcome outcome;
        step_length_ = 1 - options_.damping;
        for_tiles([&](int64_t tile, Scratch&) { initialize(tile); });
        const StepSums start = total(sums_);
        double negative_entropy = start.negative_entropy, last_energy = 0;
        if (options_.num_iterations > 0 && has_settled_rows()) send_settled();
        for_tiles([&](int64_t tile, Scratch&) { send_open(tile); });
        for (int t = 0; t < options_.num_iterations; ++t) {
            if (callback) callback(t, options_.num_iterations);
            send({change_.get(), sends_.get(), t == 0 && !from_settled_, t > 0});
            outcome.step.push_back(static_cast<double>(step_length_));
            for_tiles([&](int64_t tile, Scratch& scratch) { update(tile, scratch); });
            const StepSums sums = total(sums_);
            const double linear = start.linear + sums.linear, energy = negative_entropy - linear + 0.5 * sums.quadratic;
            const double size = std::abs(negative_entropy) + std::abs(linear) + 0.5 * std::abs(sums.quadratic);
            negative_entropy = sums.negative_entropy;
            if (options_.watch_energy && t > 0 && energy > last_energy + kEnergyRounding * size) step_length_ *= 0.5f;
            // A shorter step starts from the logits of the step before: kept from the first such step on, which few runs reach.
            if (step_length_ < 1 && !kept_.get()) {
                kept_ = Buffer<float>(size_);
                for_tiles([&](int64_t tile, Scratch& scratch) { write_logits(tile, scratch, kept_.get()); });
            }
            last_energy = energy;
            outcome.energy.push_back(energy - start.largest);
            outcome.num_iterations = t + 1;
            if (options_.tolerance > 0 && sums.divergence / static_cast<double>(num_voxels_) < options_.tolerance &&
                static_cast<double>(sums.flips) < kFlipsAtConvergence * static_cast<double>(num_voxels_)) {
                outcome.converged = true;
                break;
            }
        }
        for_tiles([&](int64_t tile, Scratch& scratch) { finish(tile, scratch); });
        return outcome;
    }

   private:
    // One row of voxels per label.
    struct Scratch {
        std::vector<float> pairwise, logits, marginals;
    };

    template <class Body>
    void for_tiles(Body&& body) {
        pool_.run(set_.num_active, [&](int64_t tile, int thread) { body(tile, scratch_[thread]); });
    }

    template <class T>
    T* entries(T* values, int64_t tile) const {
        return values + set_.first_entry[tile] * voxels_;
    }
    int num_labels(int64_t tile) const { return static_cast<int>(set_.first_entry[tile + 1] - set_.first_entry[tile]); }
    bool is_open(int64_t tile, int64_t row) const { return is_open_[tile * num_rows_ + row] != 0; }

    bool has_settled_rows() const {
        const uint8_t* const end = is_open_ + set_.num_active * num_rows_;
        return std::find(is_open_, end, uint8_t{0}) != end;
    }

    void send(const SentRows& sent) {
        for (size_t k = 0; k < kernels_.size(); ++k) kernels_[k]->accumulate(sent, is_open_, options_.weight[k].data(), out_);
    }

    // What settled rows and tiles send never changes, so they send once. Pairs of an open row and a settled one are in the energy twice,
    // but only the open row receives a message: `from_settled_` is counted a second time in each step.
    void send_settled() {
        for_tiles([&](int64_t tile, Scratch&) {
            for (int64_t row = 0; row < num_rows_; ++row) sends_[tile * num_rows_ + row] = !is_open(tile, row);
        });
        send({marginals_.get(), sends_.get(), true});
        from_settled_ = Buffer<float>(size_);
        for_tiles(
            [&](int64_t tile, Scratch&) { std::copy(entries(out_, tile), entries(out_, tile + 1), entries(from_settled_.get(), tile)); });
    }

    // All that open rows hold is new.
    void send_open(int64_t tile) {
        for (int64_t row = 0; row < num_rows_; ++row) sends_[tile * num_rows_ + row] = is_open(tile, row);
        std::copy(entries(marginals_.get(), tile), entries(marginals_.get(), tile + 1), entries(change_.get(), tile));
    }

    // Which voxels of a tile are inside the mask and the grid.
    void find_inside(int64_t tile) {
        const Tiling& tiling = set_.tiling;
        uint8_t* const inside = inside_.get() + tile * voxels_;
        std::fill(inside, inside + voxels_, uint8_t{0});
        int64_t at[3];
        tiling.place(set_.active[tile], at);
        for (int64_t z = tiling.begin(0, at[0]); z < tiling.end(0, at[0]); ++z)
            for (int64_t y = tiling.begin(1, at[1]); y < tiling.end(1, at[1]); ++y) {
                const int64_t row = ((z % tiling.tile[0]) * tiling.tile[1] + y % tiling.tile[1]) * tiling.tile[2];
                for (int64_t x = tiling.begin(2, at[2]); x < tiling.end(2, at[2]); ++x)
                    inside[row + x % tiling.tile[2]] = set_.is_inside((z * tiling.shape[1] + y) * tiling.shape[2] + x);
            }
    }

    vint valid_lanes(int64_t tile, int64_t row) const {
        typedef uint8_t bytes __attribute__((vector_size(kLanes)));
        bytes inside;
        std::memcpy(&inside, inside_.get() + tile * voxels_ + row * kLanes, sizeof inside);
        return __builtin_convertvector(inside, vint) != 0;
    }

    // What a softmax finds besides the marginals.
    struct Softened {
        vfloat negative_entropy, largest;
        vint label;
    };

    // The softmax of a row of `x` (label, `stride` apart) to `marginals` (label, `out_stride` apart); 0 in lanes that are not valid.
    static Softened soften(int labels, const float* x, int64_t stride, const vint& valid, float* marginals, int64_t out_stride) {
        vfloat largest = load(x);
        vint label{};
        for (int l = 1; l < labels; ++l) {
            const vfloat v = load(x + l * stride);
            const vint more = v > largest;
            largest = more ? v : largest;
            label = more ? vint{} + l : label;
        }
        vfloat sum{}, weighted{};
        for (int l = 0; l < labels; ++l) {
            const vfloat shifted = load(x + l * stride) - largest;
            const vfloat e = exp_nonpositive(shifted);
            sum += e;
            weighted += e * shifted;
            store(marginals + l * out_stride, e);
        }
        const vfloat inverse = 1.0f / sum;
        for (int l = 0; l < labels; ++l) {
            const vfloat marginal = load(marginals + l * out_stride) * inverse;
            store(marginals + l * out_stride, valid ? marginal : vfloat{});
        }
        return {valid ? weighted * inverse - log_positive(sum) : vfloat{}, valid ? largest : vfloat{}, label};
    }

    // The network's marginals; of settled rows, which stay as they are, the linear part of the energy, too.
    void initialize(int64_t tile) {
        find_inside(tile);
        const int labels = num_labels(tile);
        const float scale = 1 / options_.temperature;
        const float* const logits = entries(logits_, tile);
        float *const marginals = entries(marginals_.get(), tile), *const x = entries(change_.get(), tile);
        for (int64_t i = 0; i < labels * voxels_; ++i) x[i] = logits[i] * scale;
        if (kept_.get()) std::copy(x, x + labels * voxels_, entries(kept_.get(), tile));
        std::fill(entries(out_, tile), entries(out_, tile + 1), 0.0f);
        StepSums sums;
        vfloat linear{};
        for (int64_t row = 0; row < num_rows_; ++row) {
            const vint valid = valid_lanes(tile, row);
            const int64_t i = row * kLanes;
            const Softened found = soften(labels, x + i, voxels_, valid, marginals + i, voxels_);
            for (int lane = 0; lane < kLanes; ++lane) sums.largest += static_cast<double>(found.largest[lane]);
            row_entropy_[tile * num_rows_ + row] = sum_lanes(found.negative_entropy);
            if (is_open(tile, row)) continue;
            for (int l = 0; l < labels; ++l)
                linear += (valid ? load(x + l * voxels_ + i) - found.largest : vfloat{}) * load(marginals + l * voxels_ + i);
        }
        sums.linear = static_cast<double>(sum_lanes(linear));
        sums.negative_entropy = entropy(tile);
        sums_[tile] = sums;
    }

    double entropy(int64_t tile) const {
        double sum = 0;
        for (int64_t row = 0; row < num_rows_; ++row) sum += static_cast<double>(row_entropy_[tile * num_rows_ + row]);
        return sum;
    }

    // The pairwise terms of a row, by the messages in an array of all entries.
    void find_pairwise(int64_t tile, int64_t row, const float* messages, float* pairwise) const {
        const int labels = num_labels(tile);
        const int32_t* const label = set_.label + set_.first_entry[tile];
        const float* const message = entries(messages, tile) + row * kLanes;
        vfloat all{};
        for (int l = 0; l < labels; ++l) all += load(message + l * voxels_);
        for (int l = 0; l < labels; ++l) {
            vfloat sum{};
            if (options_.is_potts) {
                sum = all - load(message + l * voxels_);
            } else {
                for (int k = 0; k < labels; ++k)
                    sum += load(message + k * voxels_) *
                           options_.compatibility[static_cast<int64_t>(label[k]) * options_.num_labels + label[l]];
            }
            store(pairwise + l * kLanes, sum);
        }
    }

    // From the messages to new marginals, and what is new in them.
    void update(int64_t tile, Scratch& scratch) {
        const int labels = num_labels(tile);
        for (auto* of_row : {&scratch.pairwise, &scratch.logits, &scratch.marginals}) of_row->resize(labels * kLanes);
        StepSums sums;
        LaneSums lanes;
        for (int64_t row = 0; row < num_rows_; ++row)
            if (is_open(tile, row)) update_row(tile, row, scratch, lanes);
        sums.linear = static_cast<double>(sum_lanes(lanes.linear));
        sums.quadratic = static_cast<double>(sum_lanes(lanes.quadratic));
        sums.divergence = static_cast<double>(sum_lanes(lanes.divergence));
        for (int lane = 0; lane < kLanes; ++lane) sums.flips -= lanes.flips[lane];
        sums.negative_entropy = entropy(tile);
        sums_[tile] = sums;
        if (check_) check_borders(tile);
    }

    // Sums over the rows of a tile, by lane.
    struct LaneSums {
        vfloat linear{}, quadratic{}, divergence{};
        vint flips{};
    };

    void update_row(int64_t tile, int64_t row, Scratch& scratch, LaneSums& sums) {
        const int labels = num_labels(tile);
        const int64_t i = row * kLanes;
        const float scale = 1 / options_.temperature;
        const float* const logits = entries(logits_, tile) + i;
        float *const q = entries(marginals_.get(), tile) + i, *const change = entries(change_.get(), tile) + i;
        float *const x = scratch.logits.data(), *const now = scratch.marginals.data(), *const pairwise = scratch.pairwise.data();
        uint8_t& sends = sends_[tile * num_rows_ + row];
        const vint valid = valid_lanes(tile, row);
        if (from_settled_) {
            find_pairwise(tile, row, from_settled_.get(), pairwise);
            for (int l = 0; l < labels; ++l) sums.quadratic += load(pairwise + l * kLanes) * load(q + l * voxels_);
        }
        find_pairwise(tile, row, out_, pairwise);
        vfloat largest = load(logits) * scale;
        for (int l = 1; l < labels; ++l) largest = vmax(load(logits + l * voxels_) * scale, largest);
        for (int l = 0; l < labels; ++l) {
            const vfloat a = load(logits + l * voxels_) * scale, old = load(q + l * voxels_);
            sums.linear += valid ? (a - largest) * old : vfloat{};
            sums.quadratic += load(pairwise + l * kLanes) * old;
            vfloat to = a - load(pairwise + l * kLanes);
            if (kept_.get()) {
                float* const from = entries(kept_.get(), tile) + l * voxels_ + i;
                to = load(from) + (to - load(from)) * step_length_;
                store(from, to);
            }
            store(x + l * kLanes, to);
        }
        const Softened found = soften(labels, x, kLanes, valid, now, kLanes);
        vint before{};
        vfloat most = load(q), moved{};
        for (int l = 0; l < labels; ++l) {
            const vfloat old = load(q + l * voxels_), difference = load(now + l * kLanes) - old;
            const vint more = old > most;
            most = more ? old : most;
            before = more ? vint{} + l : before;
            moved = vmax(vmax(difference, -difference), moved);
        }
        const vint flips = valid ? (found.label != before) : vint{};
        sends = any_lane((moved > unsent_) | flips);
        if (!sends) return;
        if (options_.tolerance > 0) {
            sums.flips += flips;
            sums.divergence += valid ? divergence(labels, now, q) : vfloat{};
        }
        row_entropy_[tile * num_rows_ + row] = sum_lanes(found.negative_entropy);
        for (int l = 0; l < labels; ++l) {
            const vfloat marginal = load(now + l * kLanes), difference = marginal - load(q + l * voxels_);
            store(change + l * voxels_, difference);
            store(q + l * voxels_, marginal);
        }
    }

    // The divergence of a row's new marginals from the old ones.
    vfloat divergence(int labels, const float* now, const float* old) const {
        const vfloat tiny = splat_lanes(kTiny<float>);
        vfloat change{};
        for (int l = 0; l < labels; ++l) change += divergence_of_label(load(now + l * kLanes), load(old + l * voxels_), tiny);
        return change;
    }

    static bool any_lane(const vint& condition) { return !is_zero_vector((vfloat)condition); }

    // A label that was not negligible in one step may be so again at the end, after its messages have crossed the border. Marginals are
    // known up to what is not sent.
    void check_borders(int64_t tile) const {
        for (int64_t e = set_.first_entry[tile]; e < set_.first_entry[tile + 1]; ++e) {
            const float* const marginals = marginals_.get() + e * voxels_;
            if (check_->borders->any(e, [&](int64_t place) { return marginals[place] > check_->threshold - unsent_; }))
                check_->exceeds[e] = 1;
        }
    }

    // The logits of a full step from the network's, by the messages that have arrived; those of settled rows are the network's.
    void write_logits(int64_t tile, Scratch& scratch, float* to) const {
        const float scale = 1 / options_.temperature;
        const float* const logits = entries(logits_, tile);
        scratch.pairwise.resize(num_labels(tile) * kLanes);
        for (int64_t row = 0; row < num_rows_; ++row) {
            const bool receives = is_open(tile, row) && options_.num_iterations > 0;
            if (receives) find_pairwise(tile, row, out_, scratch.pairwise.data());
            for (int l = 0; l < num_labels(tile); ++l) {
                const int64_t i = l * voxels_ + row * kLanes;
                const vfloat a = load(logits + i) * scale;
                store(entries(to, tile) + i, receives ? a - load(scratch.pairwise.data() + l * kLanes) : a);
            }
        }
    }

    // From the messages in `out` to the refined logits.
    void finish(int64_t tile, Scratch& scratch) const {
        if (!kept_.get()) return write_logits(tile, scratch, out_);
        std::copy(entries(kept_.get(), tile), entries(kept_.get(), tile + 1), entries(out_, tile));
    }

    const TileSet& set_;
    const std::vector<std::unique_ptr<TileFilter>>& kernels_;
    const MeanFieldOptions<float>& options_;
    const uint8_t* const is_open_;
    const int64_t num_voxels_;
    const float unsent_;  // a row whose marginals have changed by no more since it sent them does not send
    const float* const logits_;
    float* const out_;  // the messages that have arrived so far, at the end the refined logits
    const BorderCheck* const check_;
    ThreadPool& pool_;
    const int64_t voxels_, num_rows_, size_;
    Buffer<float> marginals_, kept_;  // as they were sent last; logits of the step before, if steps are shortened
    Buffer<float> change_;            // (entry, voxel) what rows that send have to send
    Buffer<float> from_settled_;      // (entry, voxel) messages of settled rows and tiles, if there are settled rows
    Buffer<uint8_t> inside_, sends_;  // (tile, voxel); (tile, row)
    Buffer<float> row_entropy_;       // (tile, row) sum of Q log Q
    float step_length_ = 1;
    std::vector<StepSums> sums_;
    std::vector<Scratch> scratch_;
};

}  // namespace

MeanFieldOutcome run_tile_mean_field(const TileSet& set, const std::vector<std::unique_ptr<TileFilter>>& kernels,
                                     const MeanFieldOptions<float>& options, const uint8_t* is_open, int64_t num_voxels, float unsent,
                                     const float* logits, float* out, const BorderCheck* check, ThreadPool& pool,
                                     const StepCallback& callback) {
    return TileMeanField(set, kernels, options, is_open, num_voxels, unsent, logits, out, check, pool).run(callback);
}

}  // namespace crf
