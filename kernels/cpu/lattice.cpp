// Filtering on the permutohedral lattice: splat into tiles, sum the tiles' shares, blur along every
// direction, slice.

#include "cpu/filter_moments.h"
#include "cpu/lattice_build.h"
#include "cpu/simd.h"

namespace crf {
namespace {
// Blurring rows along one direction: of two successive lists, the vertices that have the other as
// neighbor correspond in their order (Lattice::Chains), so that memory is read from list to list,
// without an index per vertex.

// Rows of scratch for blur_lists; vertices are listed by eight.
constexpr int64_t kListPadding = kLanes;
inline int64_t blur_scratch(const Lattice& lattice) {
    return 4 * (lattice.longest_list + kListPadding);
}

// Up to 25 bits from a vertex's on, the lowest first.
inline uint32_t bits_from(const uint8_t* bits, int64_t vertex) {
    uint32_t word;
    std::memcpy(&word, bits + (vertex >> 3), sizeof word);
    return word >> (vertex & 7);
}

// For each set of eight, a bit each: which are in it, one after another.
struct SetsOfEight {
    alignas(32) int32_t members[256][8]{};

    constexpr SetsOfEight() {
        for (int set = 0; set < 256; ++set)
            for (int i = 0, count = 0; i < 8; ++i)
                if (set >> i & 1) members[set][count++] = i;
    }
};
inline constexpr SetsOfEight kSetsOfEight{};

// The vertices of [first, end) whose bits are set, as numbers from `first` on; returns how many. Up
// to eight more are written.
inline int64_t list_marked(const uint8_t* bits, int64_t first, int64_t end, uint32_t* marked) {
    typedef LanesOfSize<int32_t, 32> Eight;
    uint32_t* to = marked;
    for (int64_t v = first; v < end; v += 8) {
        const uint32_t present = (1u << std::min<int64_t>(8, end - v)) - 1;
        const uint32_t set = bits_from(bits, v) & present;
        store_lanes(to, load_lanes<Eight>(kSetsOfEight.members[set]) +
                            splat<Eight>(static_cast<int32_t>(v - first)));
        to += std::popcount(set);
    }
    return to - marked;
}

// Blurs the chains of lists of one piece of a direction in place.
template <class Row>
void blur_lists(const Lattice& lattice, const Lattice::Chains& chains, int64_t piece, Row* scratch,
                Row* rows) {
    const int64_t longest = lattice.longest_list + kListPadding;
    // The received values of the vertices of a list, and of the next one; which of them are
    // neighbors.
    Row *received = scratch, *next_received = scratch + longest;
    auto* const own = reinterpret_cast<uint32_t*>(scratch + 2 * longest);
    auto* const next = reinterpret_cast<uint32_t*>(scratch + 3 * longest);
    const auto first_of = [&](uint32_t entry) { return &lattice.first_of_list[entry >> 1]; };
    constexpr int64_t kFloats = sizeof(Row) / sizeof(float);
    const auto has_values = [&](uint32_t entry) {
        const int64_t begin = first_of(entry)[0], count = first_of(entry)[1] - begin;
        return !is_zero(reinterpret_cast<const float*>(rows + begin), count * kFloats);
    };
    // Whether the list holds anything but zeros, and receives anything from the one before. Where
    // few voxels send, most lists do neither.
    bool holds = false, receives = false;
    bool is_first = true;
    for (int64_t i = chains.pieces[piece]; i < chains.pieces[piece + 1]; ++i) {
        const uint32_t entry = chains.entries[i];
        const int64_t begin = first_of(entry)[0], count = first_of(entry)[1] - begin;
        Row* const at = rows + begin;
        if (is_first) {
            holds = has_values(entry);
            receives = false;
        }
        is_first = entry & 1;
        const bool next_holds = !is_first && has_values(chains.entries[i + 1]);
        if (!receives && !holds && !next_holds) continue;
        if (!receives) std::fill_n(received, count, Row{});
        if (!is_first) {
            const int64_t next_begin = first_of(chains.entries[i + 1])[0];
            const int64_t next_end = first_of(chains.entries[i + 1])[1];
            const Row* const after = rows + next_begin;
            const int64_t num_pairs = list_marked(chains.after.get(), begin, begin + count, own);
            list_marked(chains.before.get(), next_begin, next_end, next);
            std::fill_n(next_received, next_end - next_begin, Row{});
            for (int64_t k = 0; k < num_pairs; ++k) {
                received[own[k]] += after[next[k]];
                next_received[next[k]] = at[own[k]];
            }
        }
        receives = holds;
        holds = next_holds;
        // As floats, which are more at a time than those of a row.
        float* const to = reinterpret_cast<float*>(at);
        const float* const from = reinterpret_cast<const float*>(received);
        for (int64_t f = 0; f < count * kFloats; ++f) to[f] += from[f] * 0.5f;
        std::swap(received, next_received);
    }
}

// One row of channels at a vertex or voxel.
template <int C>
struct RowOf {
    typedef LanesOfSize<float, 4 * C> type;
};
template <>
struct RowOf<1> {
    typedef float type;
};

class LatticeFilter final : public Filter {
   public:
    LatticeFilter(const KernelInput& input, ThreadPool& pool)
        : Filter({.is_symmetric = false}),
          num_voxels_(input.voxels->num_voxels),
          pool_(pool),
          lattice_(build_lattice(input, pool)),
          sent_rows_(Lattice::tile_voxels(lattice_.num_features) + kLanes) {
        scratch_.resize(pool.num_threads());
        // With far more vertices than voxels, their rows use most of the memory, so fewer channels
        // are filtered at a time.
        widest_ = lattice_.num_vertices > 4 * num_voxels_ ? 2
                  : lattice_.slot.size > num_voxels_ / 2  ? 4
                                                          : 8;
        // With [1 2 1] / 4 along each direction the lattice conserves mass; this gives its kernel
        // the mass of exp(-d^2 / 2), for one vertex in a volume of (D + 1)^(D - 1/2), if the blur
        // is [1 2 1] / 2 and the weights of splatting and slicing are in 1 / 65535.
        constexpr double pi = 3.14159265358979323846;
        const int d = lattice_.num_features;
        amplitude_ = static_cast<float>(std::sqrt(d + 1.0) * std::pow(4 * pi / 3, d / 2.0) *
                                        std::pow(0.5, d + 1) / (65535.0 * 65535.0));
    }

    void accumulate(const Filtering& wanted, Workspace& workspace) override {
        filter_groups(wanted, workspace, false);
    }

    void accumulate_mean(const Filtering& wanted, float* scale, Workspace& workspace) {
        filter_groups(wanted, workspace, false, scale);
    }

    // Splatting and slicing are each other's transpose; the blurs of two directions do not commute
    // where vertices are missing.
    void accumulate_transposed(const Filtering& wanted, Workspace& workspace) override {
        filter_groups(wanted, workspace, true);
    }

    // Rows of sixteen are a cache line and cost little more than rows of four. With more vertices
    // than voxels they would use most memory.
    void add_moments(const FilteredPair& pair, const KernelInput& input, double* squared,
                     float* image, MomentSums& sums) override {
        if (image || lattice_.num_vertices > num_voxels_)
            return Filter::add_moments(pair, input, squared, image, sums);
        sums.add_together(
            pair, input, squared, [&](const float* const* columns, int num_columns, double* cross) {
                add_cross_moments(columns, num_columns, pair, cross, sums.workspace());
            });
    }

    std::string description() const override {
        const double per_voxel =
            static_cast<double>(lattice_.num_vertices) / static_cast<double>(num_voxels_);
        return "lattice (" + std::to_string(lattice_.num_vertices) + " vertices, " +
               printed(per_voxel, 2) + " per voxel)";
    }

   private:
    static constexpr int64_t kSharedBlock = 4096;

    void add_cross_moments(const float* const* columns, int num_columns, const FilteredPair& pair,
                           double* cross, Workspace& workspace) {
        const int64_t num_tiles = static_cast<int64_t>(lattice_.tiles.size());
        auto* const rows = reinterpret_cast<vfloat*>(workspace.floats(lattice_.slot.size * kLanes));
        std::vector<vfloat> of_tile(num_tiles);
        grow_scratch(kLanes);
        for (int c = 0; c < pair.num_channels; c += 4) {
            const int group = std::min(4, pair.num_channels - c);
            pool_.run(num_tiles, [&](int64_t t, int thread) {
                vfloat* const sent = reinterpret_cast<vfloat*>(scratch_[thread].get());
                load_products(lattice_.tiles[t], columns, num_columns, pair.v + c * num_voxels_,
                              group, sent);
                splat_rows(lattice_.tiles[t], sent, sent + sent_rows_, rows);
            });
            sum_shares(rows);
            blur(rows, false);
            return_shares(rows);
            pool_.run(num_tiles, [&](int64_t t, int thread) {
                vfloat* const received = reinterpret_cast<vfloat*>(scratch_[thread].get());
                vfloat* const buffer = received + sent_rows_;
                load_vertices(lattice_.tiles[t], rows, buffer);
                slice_rows(lattice_.tiles[t], buffer, received,
                           [](int64_t, int64_t) { return true; });
                // The tile's vertices are no longer needed: their memory serves the products with
                // u.
                load_products(lattice_.tiles[t], columns, num_columns, pair.u + c * num_voxels_,
                              group, buffer);
                vfloat total{};
                for (int64_t i = 0; i < lattice_.tiles[t].num_voxels; ++i)
                    total += received[i] * buffer[i];
                of_tile[t] = total;
            });
            for (const vfloat& total : of_tile)
                for (int lane = 0; lane < 4 * num_columns; ++lane)
                    cross[lane / 4] +=
                        static_cast<double>(total[lane]) * static_cast<double>(amplitude_);
        }
    }

    // scale: nullptr, or room for the `post` of all channels, which then comes with the first
    // group: the inverse of the ones' sums.
    void filter_groups(Filtering wanted, Workspace& workspace, bool transposed,
                       float* scale = nullptr) {
        for (int c = 0, count; c < wanted.num_channels; c += count) {
            const int room = widest_ - (scale ? 1 : 0);
            count = std::min(wanted.num_channels - c, room);
            const Filtering group = wanted.of_channels(c, count, num_voxels_);
            const int width =
                static_cast<int>(std::bit_ceil(static_cast<unsigned>(count + widest_ - room)));
            with_constant<1, 2, 4, 8>(
                width, [&](auto width) { filter<width()>(group, workspace, transposed, scale); });
            if (scale) wanted.post = std::exchange(scale, nullptr);
        }
    }

    template <int C>
    void filter(const Filtering& group, Workspace& workspace, bool transposed, float* scale) {
        using Row = typename RowOf<C>::type;
        auto* const rows = reinterpret_cast<Row*>(workspace.floats(lattice_.slot.size * C));
        grow_scratch(C);
        pool_.run(static_cast<int64_t>(lattice_.tiles.size()), [&](int64_t t, int thread) {
            splat<C>(lattice_.tiles[t], group, scale != nullptr,
                     reinterpret_cast<Row*>(scratch_[thread].get()), rows);
        });
        sum_shares(rows);
        blur(rows, transposed);
        return_shares(rows);
        pool_.run(static_cast<int64_t>(lattice_.tiles.size()), [&](int64_t t, int thread) {
            auto* const scratch = reinterpret_cast<Row*>(scratch_[thread].get());
            slice_<C>(lattice_.tiles[t], rows, group, scratch, scale);
        });
    }

    // Buffers for a tile's voxels and for its vertices, in rows of `width`, or for blurring;
    // add_cross_moments needs two for voxels.
    void grow_scratch(int64_t width) {
        const int64_t of_tile = std::max(lattice_.largest_tile, sent_rows_) + sent_rows_;
        const int64_t size = std::max(of_tile, blur_scratch(lattice_)) * width;
        for (auto& s : scratch_) s.grow(size);
    }

    // Adds the shares of further tiles to the first tile's.
    template <class Row>
    void sum_shares(Row* rows) {
        for_shared([&](const Lattice::Shared& shared) {
            Row total = rows[shared.vertex];
            for (uint32_t i = 0; i < shared.num_slots; ++i) total += rows[shared.first_slot + i];
            rows[shared.vertex] = total;
        });
    }

    // Copies the vertices of several tiles to the slots of further tiles, so that each tile finds
    // what it needs where it left its shares.
    template <class Row>
    void return_shares(Row* rows) {
        for_shared([&](const Lattice::Shared& shared) {
            std::fill_n(rows + shared.first_slot, shared.num_slots, Row{rows[shared.vertex]});
        });
    }

    template <class Body>
    void for_shared(Body&& body) {
        const int64_t num_shared = static_cast<int64_t>(lattice_.shared.size());
        pool_.run_blocks(num_shared, kSharedBlock, [&](int64_t begin, int64_t end, int) {
            for (int64_t s = begin; s < end; ++s) body(lattice_.shared[s]);
        });
    }

    // Direction by direction, the last one first if `transposed`; pieces of the local ones stay in
    // the cache for all of them.
    template <class Row>
    void blur(Row* rows, bool transposed) {
        const int all = static_cast<int>(lattice_.directions.size()), local = lattice_.num_local;
        const auto blur_some = [&](int first,
                                   int last) {  // in pieces, each along all of these directions
            if (first == last) return;
            pool_.run(static_cast<int64_t>(lattice_.directions[first].pieces.size()) - 1,
                      [&](int64_t piece, int thread) {
                          for (int i = 0; i < last - first; ++i)
                              blur_lists(lattice_,
                                         lattice_.directions[transposed ? last - 1 - i : first + i],
                                         piece, reinterpret_cast<Row*>(scratch_[thread].get()),
                                         rows);
                      });
        };
        if (!transposed) blur_some(0, local);
        for (int i = local; i < all; ++i) {
            const int direction = transposed ? all - 1 - (i - local) : i;
            blur_some(direction, direction + 1);
        }
        if (transposed) blur_some(0, local);
    }

    // Calls body(piece, first voxel, number of voxels) for the vectors of a tile's pieces, and
    // prefetches a later piece of all channels (channel, voxel). Always inline, because gcc drops
    // calls of functions that only prefetch.
    template <bool kToWrite, class Body>
    [[gnu::always_inline]] void for_vectors(const Lattice::Tile& tile, const float* channels,
                                            int num_channels, Body&& body) const {
        const int64_t num_pieces = static_cast<int64_t>(lattice_.pieces.size());
        for (int64_t p = tile.first_piece; p < tile.first_piece + tile.num_pieces; ++p) {
            for (int c = 0; p + kPiecesAhead < num_pieces && c < num_channels; ++c) {
                const auto [voxel, length] = lattice_.pieces[p + kPiecesAhead];
                __builtin_prefetch(channels + c * num_voxels_ + voxel, kToWrite);
                __builtin_prefetch(channels + c * num_voxels_ + voxel + length - 1, kToWrite);
            }
            const Lattice::Piece& piece = lattice_.pieces[p];
            for (int64_t n = piece.voxel, end = piece.voxel + piece.length; n < end; n += kLanes)
                body(piece, n, std::min<int64_t>(kLanes, end - n));
        }
    }

    // For the voxels of a tile, rows of all products of up to four columns and up to four channels:
    // column after column.
    void load_products(const Lattice::Tile& tile, const float* const* columns, int num_columns,
                       const float* values, int group, vfloat* rows) const {
        float* to = reinterpret_cast<float*>(rows);
        for_vectors<false>(tile, values, group, [&](const auto&, int64_t n, int64_t count) {
            vfloat channel[4]{}, column[4]{};
            float channels[4 * kLanes], features[4 * kLanes];
            for (int c = 0; c < group; ++c)
                channel[c] = load_some(values + c * num_voxels_ + n, count);
            for (int f = 0; f < num_columns; ++f) column[f] = load_some(columns[f] + n, count);
            interleave<4>(channel, channels);
            interleave<4>(column, features);
            for (int64_t i = 0; i < count; ++i, to += kLanes) {
                const vfloat4 own = load4(channels + 4 * i);
                for (int f = 0; f < 4; ++f) store_lanes(to + 4 * f, own * features[4 * i + f]);
            }
        });
    }

    // Calls body(voxel, number of corners, their numbers in the tile, weights) where needed(first,
    // count); both kLanes apart.
    template <class Needed, class Body>
    void for_corners(const Lattice::Tile& tile, Needed&& needed, Body&& body) const {
        with_constant<4, 5, 6, 7, 8, 9, 0>(lattice_.num_features + 1, [&](auto corners) {
            for_corners<corners()>(tile, needed, body);
        });
    }

    // kCorners: D + 1, or 0 if known only at run time.
    template <int kCorners, class Needed, class Body>
    void for_corners(const Lattice::Tile& tile, Needed&& needed, Body&& body) const {
        const int num_corners = kCorners > 0 ? kCorners : lattice_.num_features + 1;
        const uint16_t* local = lattice_.local.get() + tile.first_entry * num_corners;
        const uint16_t* weight = lattice_.weight.get() + tile.first_entry * num_corners;
        float converted[kLanes * (kCorners > 0 ? kCorners : kMaxLatticeFeatures + 1)];
        for (int64_t first = 0; first < tile.num_voxels; first += kLanes) {
            const int64_t count = std::min<int64_t>(kLanes, tile.num_voxels - first);
            if (!needed(first, count)) continue;
            for (int64_t j = 0; j < kLanes * num_corners; ++j)
                converted[j] = static_cast<float>(weight[first * num_corners + j]);
            for (int64_t i = 0; i < count; ++i)
                body(first + i, num_corners, local + first * num_corners + i, converted + i);
        }
    }

    // The tile's voxels, into a buffer of the tile's vertices, and from there to the tile's slots.
    // has_ones: behind the group's channels.
    template <int C, class Row>
    void splat(const Lattice::Tile& tile, const Filtering& group, bool has_ones, Row* scratch,
               Row* rows) const {
        Row* sent = scratch;
        Row* buffer = scratch + sent_rows_;
        if (!has_any(tile, senders)) {
            std::fill_n(buffer, tile.num_vertices, Row{});
            return store_vertices(tile, buffer, rows);
        }
        float* to = reinterpret_cast<float*>(sent);
        for_vectors<false>(
            tile, group.values, group.num_channels,
            [&](const Lattice::Piece& piece, int64_t n, int64_t count) {
                const bool sends = has_any(piece, senders);
                vfloat channel[C];
                for (int c = 0; c < C; ++c) {
                    channel[c] = sends && c < group.num_channels
                                     ? load_some(group.values + c * num_voxels_ + n, count)
                                     : vfloat{};
                    if (sends && group.pre) channel[c] *= load_some(group.pre + n, count);
                }
                if (has_ones) channel[group.num_channels] = splat_lanes(1.0f);
                interleave<C>(channel, to);  // whole vectors: the next voxels overwrite the excess
                to += count * C;
            });
        splat_rows(tile, sent, buffer, rows);
    }

    // Whether a voxel of a tile is among the marked ones, such as `receivers`; nullptr: all are.
    bool has_any(const Lattice::Tile& tile, const uint8_t* marked) const {
        const auto first = lattice_.pieces.begin() + tile.first_piece;
        return std::any_of(first, first + tile.num_pieces,
                           [&](const Lattice::Piece& piece) { return has_any(piece, marked); });
    }
    static bool has_any(const Lattice::Piece& piece, const uint8_t* marked) {
        return !marked || std::memchr(marked + piece.voxel, 1, piece.length) != nullptr;
    }

    // From a tile's rows to its vertices in `buffer`, and from there to their slots.
    template <class Row>
    void splat_rows(const Lattice::Tile& tile, const Row* sent, Row* buffer, Row* rows) const {
        std::fill(buffer, buffer + tile.num_vertices, Row{});
        constexpr int64_t kFloats = sizeof(Row) / sizeof(float);
        const auto needed = [&](int64_t first, int64_t count) {
            return !is_zero(reinterpret_cast<const float*>(sent + first), count * kFloats);
        };
        for_corners(
            tile, needed,
            [&](int64_t voxel, int num_corners, const uint16_t* local, const float* weight) {
                const Row row = sent[voxel];
                for (int k = 0; k < num_corners; ++k)
                    buffer[local[k * kLanes]] += row * weight[k * kLanes];
            });
        store_vertices(tile, buffer, rows);
    }

    template <class Row>
    void store_vertices(const Lattice::Tile& tile, const Row* buffer, Row* rows) const {
        const uint32_t* slot = lattice_.slot.get() + tile.first_vertex;
        for (int64_t i = 0; i < tile.num_vertices; ++i) rows[slot[i]] = buffer[i];
    }

    template <class Row>
    void load_vertices(const Lattice::Tile& tile, const Row* rows, Row* buffer) const {
        const uint32_t* slot = lattice_.slot.get() + tile.first_vertex;
        for (int64_t i = 0; i < tile.num_vertices; ++i) buffer[i] = rows[slot[i]];
    }

    template <class Row, class Needed>
    void slice_rows(const Lattice::Tile& tile, const Row* buffer, Row* received,
                    Needed&& needed) const {
        for_corners(
            tile, needed,
            [&](int64_t voxel, int num_corners, const uint16_t* local, const float* weight) {
                Row total{};
                for (int k = 0; k < num_corners; ++k)
                    total += buffer[local[k * kLanes]] * weight[k * kLanes];
                received[voxel] = total;
            });
    }

    template <int C, class Row>
    void slice_(const Lattice::Tile& tile, const Row* rows, const Filtering& group, Row* scratch,
                float* inverse) const {
        Row *received = scratch, *buffer = scratch + sent_rows_;
        if (!has_any(tile, receivers)) return;
        load_vertices(tile, rows, buffer);
        if (!inverse && is_zero(reinterpret_cast<const float*>(buffer), tile.num_vertices * C))
            return;
        bool needed[Lattice::tile_voxels(0) / kLanes]{};  // (batch) whether a voxel of it receives
        for (int64_t p = tile.first_piece, voxel = 0; p < tile.first_piece + tile.num_pieces; ++p) {
            const Lattice::Piece& piece = lattice_.pieces[p];
            if (has_any(piece, receivers))
                std::fill(needed + voxel / kLanes, needed + (voxel + piece.length - 1) / kLanes + 1,
                          true);
            voxel += piece.length;
        }
        slice_rows(tile, buffer, received,
                   [&](int64_t first, int64_t) { return needed[first / kLanes]; });
        const float* from = reinterpret_cast<const float*>(received);
        for_vectors<true>(
            tile, group.sum, group.num_channels,
            [&](const Lattice::Piece& piece, int64_t n, int64_t count) {
                const float* const own = std::exchange(from, from + count * C);
                if (!has_any(piece, receivers)) return;
                vfloat channel[C];
                deinterleave<C>(own, channel);
                vfloat scale = splat_lanes(1.0f);
                if (inverse) {
                    scale =
                        1.0f / vmax(channel[group.num_channels] * amplitude_, splat_lanes(kTiny));
                    store_some(inverse + n, scale, count);
                } else if (group.post) {
                    scale = load_some(group.post + n, count);
                }
                scale *= amplitude_;
                for (int c = 0; c < group.num_channels; ++c) {
                    float* to = group.sum + c * num_voxels_ + n;
                    store_some(to, load_some(to, count) + channel[c] * (scale * group.weight_of(c)),
                               count);
                }
            });
    }

    const int64_t num_voxels_;
    ThreadPool& pool_;
    const Lattice lattice_;
    const int64_t sent_rows_;  // room for a tile's voxels, and for a whole vector at the end
    int widest_ = 4;           // channels of a group
    float amplitude_ = 0;
    std::vector<Buffer<float>> scratch_;
};
}  // namespace

std::unique_ptr<Filter> make_lattice_filter(const KernelInput& input, ThreadPool& pool) {
    return std::make_unique<LatticeFilter>(input, pool);
}

bool accumulate_mean(Filter& filter, const Filtering& wanted, float* scale, Workspace& workspace) {
    auto* const lattice = dynamic_cast<LatticeFilter*>(&filter);
    if (lattice) lattice->accumulate_mean(wanted, scale, workspace);
    return lattice != nullptr;
}
}  // namespace crf
