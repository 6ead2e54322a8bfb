#include "cpu/tile_mean_field.h"

#include <algorithm>
#include <cmath>

#include "cpu/mean_field_rules.h"
#include "cpu/simd.h"

namespace crf {

namespace {

constexpr float kTinyMarginal = std::numeric_limits<float>::min();

class TileMeanField {
   public:
    TileMeanField(const TileSet& set, const std::vector<std::unique_ptr<TileFilter>>& kernels, const MeanFieldOptions<float>& options,
                  const uint8_t* is_open, int64_t num_voxels, const float* logits, float* out, const BorderCheck* check, ThreadPool& pool)
        : set_(set),
          kernels_(kernels),
          options_(options),
          is_open_(is_open),
          num_voxels_(num_voxels),
          logits_(logits),
          out_(out),
          check_(check),
          pool_(pool),
          voxels_(set.tiling.tile_voxels()),
          size_(set.num_entries() * voxels_),
          marginals_(size_),
          inside_(set.num_active * voxels_),
          sums_(set.num_active),
          scratch_(pool.num_threads()) {
        if (options.damping > 0) kept_ = Buffer<float>(size_);
    }

    MeanFieldOutcome run(const StepCallback& callback) {
        MeanFieldOutcome outcome;
        step_length_ = 1 - options_.damping;
        for_tiles([&](int64_t tile, Scratch& scratch) { initialize(tile, scratch); });
        const StepSums start = total(sums_);
        if (std::all_of(kernels_.begin(), kernels_.end(), [](const auto& kernel) { return kernel->skips_rows(); })) send_settled();
        double negative_entropy = start.negative_entropy, last_energy = 0;
        for (int t = 0; t < options_.num_iterations; ++t) {
            if (callback) callback(t, options_.num_iterations);
            pool_.run(set_.num_active, [&](int64_t tile, int) { std::fill(entries(out_, tile), entries(out_, tile + 1), 0.0f); });
            for (size_t k = 0; k < kernels_.size(); ++k)
                kernels_[k]->accumulate(marginals_.get(), is_open_, options_.weight[k].data(), out_);
            outcome.step.push_back(static_cast<double>(step_length_));
            for_tiles([&](int64_t tile, Scratch& scratch) { update(tile, scratch); });
            const StepSums sums = total(sums_);
            const double energy = negative_entropy - sums.linear + 0.5 * sums.quadratic;
            const double size = std::abs(negative_entropy) + std::abs(sums.linear) + 0.5 * std::abs(sums.quadratic);
            negative_entropy = sums.negative_entropy;
            if (options_.watch_energy && t > 0 && energy > last_energy + kEnergyRounding * size) step_length_ *= 0.5f;
            // A shorter step starts from the logits of the step before: kept from the first such step on, which few runs reach.
            if (step_length_ < 1 && !kept_.get()) {
                kept_ = Buffer<float>(size_);
                for_tiles(
                    [&](int64_t tile, Scratch&) { std::copy(entries(out_, tile), entries(out_, tile + 1), entries(kept_.get(), tile)); });
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
        return outcome;
    }

   private:
    // Rows of a tile's voxels, one per label.
    struct Scratch {
        std::vector<float> logits, old_marginals;
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

    // Pairs of an open row and a settled one are in the energy twice, but only the open row receives a message. The marginals of settled
    // rows do not change, so what they send is summed once: `from_settled_` is counted a second time in each step.
    void send_settled() {
        const int64_t num_rows = voxels_ / kLanes;
        const uint8_t* const end = is_open_ + set_.num_active * num_rows;
        if (std::find(is_open_, end, uint8_t{0}) == end) return;
        from_settled_ = Buffer<float>(size_);
        for_tiles([&](int64_t tile, Scratch&) {
            std::fill(entries(from_settled_.get(), tile), entries(from_settled_.get(), tile + 1), 0.0f);
            for (int64_t e = set_.first_entry[tile]; e < set_.first_entry[tile + 1]; ++e)
                for (int64_t i = 0; i < voxels_; ++i)
                    out_[e * voxels_ + i] = is_open_[tile * num_rows + i / kLanes] ? 0.0f : marginals_[e * voxels_ + i];
        });
        for (size_t k = 0; k < kernels_.size(); ++k)
            kernels_[k]->accumulate(out_, is_open_, options_.weight[k].data(), from_settled_.get());
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

    vint valid_lanes(int64_t tile, int64_t first) const {
        typedef uint8_t bytes __attribute__((vector_size(kLanes)));
        bytes inside;
        std::memcpy(&inside, inside_.get() + tile * voxels_ + first, sizeof inside);
        return __builtin_convertvector(inside, vint) != 0;
    }

    // The softmax of `x` (label, voxel) of the voxels inside, 0 elsewhere, to `marginals`; their entropy and label to `sums`.
    template <class Visit>
    void soften(int64_t tile, const float* x, float* marginals, StepSums& sums, Visit&& visit) {
        const int labels = num_labels(tile);
        for (int64_t i = 0; i < voxels_; i += kLanes) {
            const vint valid = valid_lanes(tile, i);
            vfloat largest = load(x + i);
            vint label{};
            for (int l = 1; l < labels; ++l) {
                const vfloat v = load(x + l * voxels_ + i);
                const vint more = v > largest;
                largest = more ? v : largest;
                label = more ? vint{} + l : label;
            }
            vfloat sum{}, weighted{};
            for (int l = 0; l < labels; ++l) {
                const vfloat shifted = load(x + l * voxels_ + i) - largest;
                const vfloat e = exp_nonpositive(shifted);
                sum += e;
                weighted += e * shifted;
                store(marginals + l * voxels_ + i, e);
            }
            const vfloat inverse = 1.0f / sum;
            sums.negative_entropy += sum_lanes(valid ? weighted * inverse - log_positive(sum) : vfloat{});
            for (int l = 0; l < labels; ++l) {
                const vfloat marginal = load(marginals + l * voxels_ + i) * inverse;
                store(marginals + l * voxels_ + i, valid ? marginal : vfloat{});
            }
            visit(i, valid, largest, label);
        }
    }

    void initialize(int64_t tile, Scratch& scratch) {
        find_inside(tile);
        const int64_t count = num_labels(tile) * voxels_;
        scratch.logits.resize(count);
        const float* const from = entries(logits_, tile);
        const float scale = 1 / options_.temperature;
        for (int64_t i = 0; i < count; ++i) scratch.logits[i] = from[i] * scale;
        if (kept_.get()) std::copy(scratch.logits.begin(), scratch.logits.end(), entries(kept_.get(), tile));
        if (options_.num_iterations == 0) std::copy(scratch.logits.begin(), scratch.logits.end(), entries(out_, tile));
        StepSums sums;
        soften(tile, scratch.logits.data(), entries(marginals_.get(), tile), sums,
               [&](int64_t, const vint& valid, const vfloat& largest, const vint&) {
                   const vfloat counted = valid ? largest : vfloat{};
                   for (int lane = 0; lane < kLanes; ++lane) sums.largest += static_cast<double>(counted[lane]);
               });
        sums_[tile] = sums;
    }

    // From the weighted messages in `out` and the marginals to the refined logits in `out` and the new marginals.
    void update(int64_t tile, Scratch& scratch) {
        const int labels = num_labels(tile);
        const int32_t* const label = set_.label + set_.first_entry[tile];
        const float scale = 1 / options_.temperature;
        const float* const logits = entries(logits_, tile);
        float *const marginals = entries(marginals_.get(), tile), *const x = entries(out_, tile);
        scratch.old_marginals.assign(marginals, marginals + labels * voxels_);
        scratch.logits.resize(labels * voxels_);
        const float* const q = scratch.old_marginals.data();
        vfloat linear{}, quadratic{};
        for (int64_t i = 0; i < voxels_; i += kLanes) {
            const vint valid = valid_lanes(tile, i);
            vfloat largest = load(logits + i) * scale, all = load(x + i);
            for (int l = 1; l < labels; ++l) {
                largest = vmax(load(logits + l * voxels_ + i) * scale, largest);
                all += load(x + l * voxels_ + i);
            }
            for (int l = 0; l < labels; ++l) {
                vfloat pairwise{};
                if (options_.is_potts) {
                    pairwise = all - load(x + l * voxels_ + i);
                } else {
                    for (int k = 0; k < labels; ++k)
                        pairwise += load(x + k * voxels_ + i) *
                                    options_.compatibility[static_cast<int64_t>(label[k]) * options_.num_labels + label[l]];
                }
                const vfloat a = load(logits + l * voxels_ + i) * scale, old = load(q + l * voxels_ + i);
                linear += valid ? (a - largest) * old : vfloat{};
                quadratic += valid ? (pairwise + settled_pairwise(tile, l, i)) * old : vfloat{};
                store(scratch.logits.data() + l * voxels_ + i, a - pairwise);
            }
        }
        if (step_length_ < 1) shorten(tile, scratch.logits);
        std::copy(scratch.logits.begin(), scratch.logits.end(), x);
        if (kept_.get()) std::copy(scratch.logits.begin(), scratch.logits.end(), entries(kept_.get(), tile));
        StepSums sums;
        vfloat divergence{};
        vint flips{};
        soften(tile, x, marginals, sums, [&](int64_t i, const vint& valid, const vfloat&, const vint& now) {
            if (options_.tolerance <= 0) return;
            vint before{};
            vfloat largest = load(q + i);
            for (int l = 1; l < labels; ++l) {
                const vfloat v = load(q + l * voxels_ + i);
                const vint more = v > largest;
                largest = more ? v : largest;
                before = more ? vint{} + l : before;
            }
            flips += valid ? (now != before) : vint{};
            const vfloat tiny = splat_lanes(kTinyMarginal);
            vfloat change{};
            for (int l = 0; l < labels; ++l) {
                const vfloat p = vmax(load(marginals + l * voxels_ + i), tiny), ratio = vmax(load(q + l * voxels_ + i), tiny) / p;
                change += vmax(p * (ratio - 1.0f - log_positive(vmax(ratio, tiny))), vfloat{});
            }
            divergence += valid ? change : vfloat{};
        });
        sums.linear = static_cast<double>(sum_lanes(linear));
        sums.quadratic = static_cast<double>(sum_lanes(quadratic));
        sums.divergence = static_cast<double>(sum_lanes(divergence));
        for (int lane = 0; lane < kLanes; ++lane) sums.flips -= flips[lane];
        sums_[tile] = sums;
        if (check_) check_borders(tile);
    }

    // A label that was not negligible in one step may be so again at the end, after its messages have crossed the border.
    void check_borders(int64_t tile) const {
        for (int64_t e = set_.first_entry[tile]; e < set_.first_entry[tile + 1]; ++e) {
            const float* const marginals = marginals_.get() + e * voxels_;
            if (check_->borders->any(e, [&](int64_t place) { return marginals[place] > check_->threshold; })) check_->exceeds[e] = 1;
        }
    }

    // The penalty of a label by what settled rows send.
    vfloat settled_pairwise(int64_t tile, int own, int64_t i) const {
        vfloat pairwise{};
        if (!from_settled_.get()) return pairwise;
        const float* const message = entries(from_settled_.get(), tile);
        const int32_t* const label = set_.label + set_.first_entry[tile];
        for (int k = 0; k < num_labels(tile); ++k) {
            const float penalty = options_.is_potts
                                      ? static_cast<float>(k != own)
                                      : options_.compatibility[static_cast<int64_t>(label[k]) * options_.num_labels + label[own]];
            pairwise += load(message + k * voxels_ + i) * penalty;
        }
        return pairwise;
    }

    // x becomes a point between the logits of the step before and x.
    void shorten(int64_t tile, std::vector<float>& x) const {
        const float* const from = entries(kept_.get(), tile);
        for (size_t i = 0; i < x.size(); ++i) x[i] = from[i] + (x[i] - from[i]) * step_length_;
    }

    const TileSet& set_;
    const std::vector<std::unique_ptr<TileFilter>>& kernels_;
    const MeanFieldOptions<float>& options_;
    const uint8_t* const is_open_;
    const int64_t num_voxels_;
    const float* const logits_;
    float* const out_;  // messages, then refined logits
    const BorderCheck* const check_;
    ThreadPool& pool_;
    const int64_t voxels_, size_;
    Buffer<float> marginals_, kept_;
    Buffer<float> from_settled_;  // (entry, voxel) messages of settled rows, if there are any
    Buffer<uint8_t> inside_;
    float step_length_ = 1;
    std::vector<StepSums> sums_;
    std::vector<Scratch> scratch_;
};

}  // namespace

MeanFieldOutcome run_tile_mean_field(const TileSet& set, const std::vector<std::unique_ptr<TileFilter>>& kernels,
                                     const MeanFieldOptions<float>& options, const uint8_t* is_open, int64_t num_voxels,
                                     const float* logits, float* out, const BorderCheck* check, ThreadPool& pool,
                                     const StepCallback& callback) {
    return TileMeanField(set, kernels, options, is_open, num_voxels, logits, out, check, pool).run(callback);
}

}  // namespace crf
