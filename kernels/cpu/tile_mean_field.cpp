#include "cpu/tile_filter.h"

#include "cpu/update.h"
#include "cpu/voxel_rows.h"

namespace crf {
namespace {
class TileMeanField {
   public:
    TileMeanField(const TileRun& run, const std::vector<std::unique_ptr<TileFilter>>& kernels,
                  ThreadPool& pool)
        : run_(run),
          set_(run.set),
          kernels_(kernels),
          options_(run.options),
          pool_(pool),
          voxels_(set_.tiling.tile_voxels()),
          num_rows_(set_.tiling.tile_rows()),
          size_(set_.num_entries() * voxels_),
          marginals_(size_),
          change_(size_),
          inside_(set_.num_active() * num_rows_),
          sends_(set_.num_active() * num_rows_),
          sends_label_(set_.num_entries() * num_rows_),
          row_unary_(set_.num_active() * num_rows_),
          sums_(set_.num_active()),
          scratch_(pool.num_threads()) {}

    MeanFieldOutcome run(const StepCallback& callback) {
        MeanFieldOutcome outcome;
        for_tiles([&](int64_t tile, Scratch&) { initialize(tile); });

        const StepSums start = total(sums_);
        bool has_settled = false;
        for (int64_t row = 0; row < set_.num_active() * num_rows_; ++row)
            has_settled |= (inside_[row] & ~run_.open[row]) != 0;
        const bool has_settled_tiles = std::any_of(set_.settled.begin(), set_.settled.end(),
                                                   [](int32_t label) { return label >= 0; });
        const bool sends_settled_first = options_.num_iterations > 0 && has_settled;
        // Settled voxels do not receive: the energy of their pairs is known only if it is the same
        // in both directions.
        knows_energy_ = options_.has_symmetric_pairs || !(has_settled || has_settled_tiles);
        double unary = start.unary;
        if (sends_settled_first) send_settled();
        for_tiles([&](int64_t tile, Scratch&) {
            send_all(tile, [&](int64_t row) { return open(tile, row); });
        });
        for (int t = 0; t < options_.num_iterations; ++t) {
            if (callback) callback(t, options_.num_iterations);
            send({change_.get(), sends_.get(), sends_label_.data(), t == 0 && !sends_settled_first,
                  t > 0});
            for_tiles([&](int64_t tile, Scratch& scratch) { update(tile, scratch); });
            const StepSums sums = total(sums_);
            if (knows_energy_)
                outcome.energy.push_back(unary + 0.5 * sums.quadratic - start.largest);
            unary = sums.unary;
            outcome.num_iterations = t + 1;
            if (options_.tolerance > 0 &&
                sums.divergence / static_cast<double>(run_.num_voxels) < options_.tolerance &&
                static_cast<double>(sums.flips) <
                    numerics::FLIPPED_SHARE * static_cast<double>(run_.num_voxels)) {
                outcome.converged = true;
                break;
            }
        }
        for_tiles([&](int64_t tile, Scratch& scratch) { write_logits(tile, scratch); });
        return outcome;
    }

   private:
    // One row of voxels per label.
    struct Scratch {
        std::vector<float> pairwise, logits, marginals;
    };

    template <class Body>
    void for_tiles(Body&& body) {
        pool_.run(set_.num_active(),
                  [&](int64_t tile, int thread) { body(tile, scratch_[thread]); });
    }

    template <class T>
    T* entries(T* values, int64_t tile) const {
        return values + set_.first_entry[tile] * voxels_;
    }
    int num_labels(int64_t tile) const {
        return static_cast<int>(set_.first_entry[tile + 1] - set_.first_entry[tile]);
    }
    // The voxels of a row that receive messages.
    LaneMask open(int64_t tile, int64_t row) const { return run_.open[tile * num_rows_ + row]; }
    LaneMask settled(int64_t tile, int64_t row) const {
        return static_cast<LaneMask>(inside_[tile * num_rows_ + row] & ~open(tile, row));
    }

    void send(const SentVoxels& sent) {
        for (size_t k = 0; k < kernels_.size(); ++k)
            kernels_[k]->accumulate(sent, run_.open, options_.weight[k].data(), run_.out);
    }

    // Settled voxels never change, so they send once. A pair of an open voxel and a settled one is
    // in the energy twice, but only the open one receives a message: `from_settled_` is counted a
    // second time in each step.
    void send_settled() {
        for_tiles([&](int64_t tile, Scratch&) {
            send_all(tile, [&](int64_t row) { return settled(tile, row); });
        });
        send({change_.get(), sends_.get(), sends_label_.data(), true});
        if (!knows_energy_) return;
        from_settled_ = Buffer<float>(size_);
        for_tiles([&](int64_t tile, Scratch&) {
            std::copy(entries(run_.out, tile), entries(run_.out, tile + 1),
                      entries(from_settled_.get(), tile));
        });
    }

    // All that some voxels of each row hold is new. A row leaves out labels whose marginals are so
    // small that their change is not sent.
    template <class Lanes>
    void send_all(int64_t tile, Lanes&& lanes_of_row) {
        const float* const from = entries(marginals_.get(), tile);
        float* const to = entries(change_.get(), tile);
        uint8_t* const sends_label = sends_label_.data() + set_.first_entry[tile] * num_rows_;
        for (int64_t row = 0; row < num_rows_; ++row) {
            const LaneMask lanes = sends_[tile * num_rows_ + row] = lanes_of_row(row);
            for (int l = 0; l < num_labels(tile); ++l) {
                const int64_t i = l * voxels_ + row * kLanes;
                const bool is_sent = mask_of(load(from + i) > run_.unsent) & lanes;
                sends_label[l * num_rows_ + row] = is_sent;
                if (lanes)
                    store(to + i, select(lanes_of(is_sent ? lanes : LaneMask{0}), load(from + i),
                                         vfloat{}));
            }
        }
    }

    // Marginals of a row, one label `stride` after the other; 0 in lanes that are not valid.
    struct ValidLanes {
        LabelLanes lanes;
        vint valid;

        vfloat operator[](int label) const { return lanes[label]; }
        void set(int label, const vfloat& value) const {
            lanes.set(label, select(valid, value, vfloat{}));
        }
    };

    // The network's marginals.
    void initialize(int64_t tile) {
        const int labels = num_labels(tile);
        const float scale = 1 / options_.temperature;
        const float* const logits = entries(run_.logits, tile);
        float* const marginals = entries(marginals_.get(), tile);
        float* const x = entries(change_.get(), tile);
        for (int64_t i = 0; i < labels * voxels_; ++i) x[i] = logits[i] * scale;
        std::fill(entries(run_.out, tile), entries(run_.out, tile + 1), 0.0f);
        std::fill_n(inside_.get() + tile * num_rows_, num_rows_, LaneMask{0});
        set_.tiling.for_rows(set_.active[tile], [&](const TileRow& row) {
            inside_[tile * num_rows_ + row.number] = set_.lanes_inside(row);
        });
        StepSums sums;
        for (int64_t row = 0; row < num_rows_; ++row) {
            const int64_t i = row * kLanes;
            const vint valid = lanes_of(inside_[tile * num_rows_ + row]);
            const UpdateLanes start = update_marginals<0>(
                LabelLanes{x + i, voxels_}, ValidLanes{{marginals + i, voxels_}, valid}, labels);
            const vfloat largest = select(valid, start.largest, vfloat{});
            for (int lane = 0; lane < kLanes; ++lane)
                sums.largest += static_cast<double>(largest[lane]);
            row_unary_[tile * num_rows_ + row] = -sum_lanes(select(valid, start.log_sum, vfloat{}));
        }
        sums.unary = unary(tile);
        sums_[tile] = sums;
    }

    double unary(int64_t tile) const {
        double sum = 0;
        for (int64_t row = 0; row < num_rows_; ++row)
            sum += static_cast<double>(row_unary_[tile * num_rows_ + row]);
        return sum;
    }

    // The pairwise terms of a row, by the messages in an array of all entries.
    void find_pairwise(int64_t tile, int64_t row, const float* messages, float* pairwise) const {
        const int labels = num_labels(tile);
        const int32_t* const label = set_.label.data() + set_.first_entry[tile];
        const float* const from = entries(messages, tile) + row * kLanes;
        const auto message = [&](int l) { return load(from + l * voxels_); };
        vfloat all{};
        for (int l = 0; l < labels; ++l) all += message(l);
        for (int l = 0; l < labels; ++l) {
            const auto penalty = [&](int k) {
                return options_
                    .compatibility[static_cast<int64_t>(label[k]) * options_.num_labels + label[l]];
            };
            store(pairwise + l * kLanes, pairwise_term(options_, labels, l, all, message, penalty));
        }
    }

    // From the messages to new marginals, and their changes.
    void update(int64_t tile, Scratch& scratch) {
        const int labels = num_labels(tile);
        for (auto* of_row : {&scratch.pairwise, &scratch.logits, &scratch.marginals})
            of_row->resize(labels * kLanes);
        std::fill(sends_label_.begin() + set_.first_entry[tile] * num_rows_,
                  sends_label_.begin() + set_.first_entry[tile + 1] * num_rows_, uint8_t{0});
        StepSums sums;
        LaneSums lanes;
        for (int64_t row = 0; row < num_rows_; ++row)
            if (open(tile, row)) update_row(tile, row, scratch, lanes);
        sums.quadratic = static_cast<double>(sum_lanes(lanes.quadratic));
        sums.divergence = static_cast<double>(sum_lanes(lanes.divergence));
        for (int lane = 0; lane < kLanes; ++lane) sums.flips -= lanes.flips[lane];
        sums.unary = unary(tile);
        sums_[tile] = sums;
        if (!run_.borders.empty()) check_borders(tile);
    }

    // Sums over the rows of a tile, by lane.
    struct LaneSums {
        vfloat quadratic{}, divergence{};
        vint flips{};
    };

    void update_row(int64_t tile, int64_t row, Scratch& scratch, LaneSums& sums) {
        const int labels = num_labels(tile);
        const int64_t i = row * kLanes;
        const float scale = 1 / options_.temperature;
        const float* const logits = entries(run_.logits, tile) + i;
        float* const q = entries(marginals_.get(), tile) + i;
        float* const change = entries(change_.get(), tile) + i;
        float* const x = scratch.logits.data();
        float* const now = scratch.marginals.data();
        float* const pairwise = scratch.pairwise.data();
        LaneMask& sends = sends_[tile * num_rows_ + row];
        const vint valid = lanes_of(open(tile, row));
        if (from_settled_) {
            find_pairwise(tile, row, from_settled_.get(), pairwise);
            for (int l = 0; l < labels; ++l)
                sums.quadratic +=
                    select(valid, load(pairwise + l * kLanes) * load(q + l * voxels_), vfloat{});
        }
        find_pairwise(tile, row, run_.out, pairwise);
        for (int l = 0; l < labels; ++l) {
            sums.quadratic +=
                select(valid, load(pairwise + l * kLanes) * load(q + l * voxels_), vfloat{});
            store(x + l * kLanes, load(logits + l * voxels_) * scale - load(pairwise + l * kLanes));
        }
        const vint label =
            update_marginals<0>(LabelLanes{x, kLanes}, ValidLanes{{now, kLanes}, valid}, labels)
                .label;
        vfloat moved{};
        for (int l = 0; l < labels; ++l) {
            const vfloat difference = load(now + l * kLanes) - load(q + l * voxels_);
            moved = vmax(vmax(difference, -difference), moved);
        }
        const vint flips = label != largest_label<0>(LabelLanes{q, voxels_}, labels).label;
        sends = mask_of((moved > run_.unsent) | flips) & open(tile, row);
        if (!sends) return;
        const vint some = lanes_of(sends);
        if (options_.tolerance > 0) {
            sums.flips += some & flips;
            const vfloat change = kl_divergence<0>({now, kLanes}, {q, voxels_}, labels, false);
            sums.divergence += select(some, change, vfloat{});
        }
        // A label that has hardly changed in the row is not sent.
        for (int l = 0; l < labels; ++l) {
            const vfloat old = load(q + l * voxels_), difference = load(now + l * kLanes) - old;
            const bool is_sent =
                mask_of((vmax(difference, -difference) > run_.unsent) | flips) & sends;
            const vint to_send = lanes_of(is_sent ? sends : LaneMask{0});
            store(change + l * voxels_, select(to_send, difference, vfloat{}));
            store(q + l * voxels_, select(to_send, load(now + l * kLanes), old));
            sends_label_[(set_.first_entry[tile] + l) * num_rows_ + row] = is_sent;
        }
        row_unary_[tile * num_rows_ + row] = row_unary(tile, row);
    }

    // The sum of Q log Q - <a / T, Q> over a row, with a relative to the largest of its voxel.
    float row_unary(int64_t tile, int64_t row) const {
        const int labels = num_labels(tile);
        const float scale = 1 / options_.temperature;
        const float* const q = entries(marginals_.get(), tile) + row * kLanes;
        const float* const logits = entries(run_.logits, tile) + row * kLanes;
        vfloat largest = load(logits);
        for (int l = 1; l < labels; ++l) largest = vmax(load(logits + l * voxels_), largest);
        vfloat sum{};
        for (int l = 0; l < labels; ++l) {
            const vfloat marginal = load(q + l * voxels_);
            const vfloat relative = (load(logits + l * voxels_) - largest) * scale;
            sum += marginal * (log_positive(vmax(marginal, splat_lanes(kTiny))) - relative);
        }
        return sum_lanes(select(lanes_of(inside_[tile * num_rows_ + row]), sum, vfloat{}));
    }

    // A label may be negligible again at the end, after its messages have crossed the border.
    // Marginals are known up to unsent changes.
    void check_borders(int64_t tile) const {
        for (int64_t e = set_.first_entry[tile]; e < set_.first_entry[tile + 1]; ++e) {
            const std::vector<LaneMask>& border = run_.borders[e];
            for (size_t row = 0; row < border.size(); ++row) {
                const vfloat marginal = load(marginals_.get() + e * voxels_ + row * kLanes);
                if (mask_of(marginal > run_.threshold - run_.unsent) & border[row] &
                    inside_[tile * num_rows_ + row])
                    run_.exceeds[e] = 1;
            }
        }
    }

    // From the messages in `out` to the refined logits; those of settled voxels are the network's.
    void write_logits(int64_t tile, Scratch& scratch) const {
        const float scale = 1 / options_.temperature;
        const float* const logits = entries(run_.logits, tile);
        scratch.pairwise.resize(num_labels(tile) * kLanes);
        for (int64_t row = 0; row < num_rows_; ++row) {
            const LaneMask receives = options_.num_iterations > 0 ? open(tile, row) : LaneMask{0};
            const vint some = lanes_of(receives);
            if (receives) find_pairwise(tile, row, run_.out, scratch.pairwise.data());
            for (int l = 0; l < num_labels(tile); ++l) {
                const int64_t i = l * voxels_ + row * kLanes;
                const vfloat a = load(logits + i) * scale;
                store(
                    entries(run_.out, tile) + i,
                    receives ? select(some, a - load(scratch.pairwise.data() + l * kLanes), a) : a);
            }
        }
    }

    const TileRun& run_;
    const TileSet& set_;
    const std::vector<std::unique_ptr<TileFilter>>& kernels_;
    const MeanFieldOptions& options_;
    ThreadPool& pool_;
    const int64_t voxels_, num_rows_, size_;
    Buffer<float> marginals_;  // as they were sent last
    Buffer<float> change_;     // (entry, voxel) what voxels that send have to send
    // (entry, voxel) messages of settled voxels and tiles, if active tiles have settled voxels
    Buffer<float> from_settled_;
    Buffer<LaneMask> inside_, sends_;   // (tile, row)
    std::vector<uint8_t> sends_label_;  // (entry, row) whether the row sends the label
    bool knows_energy_ = true;
    Buffer<float> row_unary_;  // (tile, row) sum of Q log Q - <a / T, Q>
    std::vector<StepSums> sums_;
    std::vector<Scratch> scratch_;
};
}  // namespace

MeanFieldOutcome run_tile_mean_field(const TileRun& run,
                                     const std::vector<std::unique_ptr<TileFilter>>& kernels,
                                     ThreadPool& pool, const StepCallback& callback) {
    return TileMeanField(run, kernels, pool).run(callback);
}
}  // namespace crf
