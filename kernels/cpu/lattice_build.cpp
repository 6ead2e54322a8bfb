// Builds a lattice, and links its vertices to their neighbors along each direction.
#include "cpu/lattice_build.h"

#include "cpu/lattice_vertices.h"

namespace crf {
namespace {
// Pass 4 of building a lattice: the next vertex along each direction, as chains of lists of
// vertices.

// The columns and lists of all blocks' vertices (VertexOrder), and the steps from list to list.
template <class Key>
class VertexLists {
   public:
    static constexpr uint32_t kNone = 0xffffffff;

    VertexLists(const LatticeVertices<Key>& vertices, const VertexOrder<Key>& order,
                const BlockLayout& layout, ThreadPool& pool)
        : keys_(vertices.keys),
          order_(order),
          layout_(layout),
          first_column_(vertices.blocks.size() + 1, 0) {
        const int64_t num_blocks = static_cast<int64_t>(vertices.blocks.size());
        // Calls begins(vertex, whether a column begins with it too) for the first vertex of every
        // list of a block.
        const auto for_lists = [&](int64_t b, auto&& begins) {
            const uint32_t first = vertices.blocks[b].first_vertex;
            const uint32_t end = first + vertices.blocks[b].num_vertices;
            for (uint32_t v = first; v < end; ++v) {
                if (v != first && order.list_of(keys_[v]) == order.list_of(keys_[v - 1])) continue;
                begins(v, v == first || order.column_of(keys_[v]) != order.column_of(keys_[v - 1]));
            }
        };
        // First the numbers of lists and columns, then their places.
        std::vector<uint32_t> first_list(num_blocks + 1, 0);
        for_blocks(num_blocks, pool, [&](int64_t b, int) {
            for_lists(b, [&](uint32_t, bool of_column) {
                ++first_list[b + 1];
                first_column_[b + 1] += of_column;
            });
        });
        for (int64_t b = 0; b < num_blocks; ++b) {
            first_list[b + 1] += first_list[b];
            first_column_[b + 1] += first_column_[b];
        }
        begin_ = Buffer<uint32_t>(first_list.back() + 1);
        begin_[first_list.back()] = static_cast<uint32_t>(vertices.num_vertices);
        first_list_ = Buffer<uint32_t>(first_column_.back() + 1);
        first_list_[first_column_.back()] = first_list.back();
        for_blocks(num_blocks, pool, [&](int64_t b, int) {
            uint32_t list = first_list[b], column = first_column_[b];
            for_lists(b, [&](uint32_t v, bool of_column) {
                if (of_column) first_list_[column++] = list;
                begin_[list++] = v;
            });
        });
    }

    int64_t num_columns() const { return first_list_.size - 1; }
    int64_t num_lists() const { return begin_.size - 1; }
    // The first vertex of each list, and the end.
    const Buffer<uint32_t>& begins() const { return begin_; }
    Buffer<uint32_t> take_begins() { return std::move(begin_); }
    // A column's vertices, from the first to before the one of the next column.
    uint32_t first_vertex(int64_t column) const { return begin_[first_list_[column]]; }
    // A column's lists, from the first to before the one of the next column.
    uint32_t first_list(int64_t column) const { return first_list_[column]; }
    // The column whose coordinates are larger than a column's by `step`, or kNone.
    uint32_t column_after(int64_t column, Key step) const {
        return find_column(order_.column_of(keys_[first_vertex(column)]) + step);
    }

    // The links of one direction, as they are found.
    struct Links {
        Buffer<uint32_t> after;      // the number of the list after each, or kNone
        Buffer<uint8_t> has_before;  // (list) zero at first
        // (vertex) whether it has one after it or before it; the latter is zero at first
        Buffer<uint8_t> marked_after, marked_before;
    };
    // Fills these in for the vertices and lists of a column.
    void link_column(int64_t column, int direction, const KeySpace<Key>& space,
                     const Links& links) const {
        for (uint32_t list = first_list_[column]; list < first_list_[column + 1]; ++list) {
            const uint32_t begin = begin_[list], end = begin_[list + 1];
            const Key first = space.after(keys_[begin], direction);
            const uint32_t target = find_list(order_.list_of(first), list, column);
            const bool exists = target != kNone;
            const bool any = link(begin, end, exists ? begin_[target] : 0,
                                  exists ? begin_[target + 1] : 0, first - keys_[begin], links);
            links.after[list] = any ? target : kNone;
            if (any) links.has_before[target] = 1;
        }
    }

   private:
    uint32_t find_column(Key coordinates) const {
        const int64_t block = layout_.block_of(coordinates);
        uint32_t low = first_column_[block], high = first_column_[block + 1];
        while (low < high) {
            const uint32_t middle = low + (high - low) / 2;
            const Key present = order_.column_of(keys_[first_vertex(middle)]);
            if (present == coordinates) return middle;
            if (present < coordinates) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return kNone;
    }

    // The list with these fields, or kNone. It is most often the one after `list`, which is in this
    // column.
    uint32_t find_list(Key fields, uint32_t list, int64_t column) const {
        const auto fields_of = [&](uint32_t l) { return order_.list_of(keys_[begin_[l]]); };
        if (list + 1 < first_list_[column + 1] && fields_of(list + 1) == fields) return list + 1;
        const uint32_t target = find_column(order_.column_of(fields));
        if (target == kNone) return kNone;
        for (uint32_t l = first_list_[target]; l < first_list_[target + 1]; ++l)
            if (fields_of(l) == fields) return l;
        return kNone;
    }

    // From the vertices [u, u_end) to those of [v, v_end) whose keys are larger by `step`. Without
    // branches, which would be mispredicted: the entry of a vertex that is not passed is
    // written again. Returns whether there are any.
    bool link(uint32_t u, uint32_t u_end, uint32_t v, uint32_t v_end, Key step,
              const Links& links) const {
        const Key* const keys = keys_.get();
        uint8_t *const after = links.marked_after.get(), *const before = links.marked_before.get();
        uint8_t any = 0;
        while (u < u_end && v < v_end) {
            const Key wanted = keys[u] + step, present = keys[v];
            const uint8_t is_neighbor = wanted == present;
            before[v] = after[u] = is_neighbor;
            any |= is_neighbor;
            u += wanted <= present;
            v += wanted >= present;
        }
        std::fill(after + u, after + u_end, uint8_t{0});
        return any;
    }

    const Buffer<Key>& keys_;
    const VertexOrder<Key>& order_;
    const BlockLayout& layout_;
    std::vector<uint32_t> first_column_;  // of each block, and the end
    Buffer<uint32_t> first_list_;         // of each column, and the end
    Buffer<uint32_t> begin_;              // the first vertex of each list, and the end
};

constexpr uint32_t kNoNeighbor = VertexLists<uint64_t>::kNone;

// Number of vertices whose chains are listed together, at least.
constexpr int64_t kChainBlock = 4096;

// Bytes after the last bit, so that any vertex's bits can be read together with the following ones.
constexpr int64_t kBitPadding = 8;

// Most vertices of a piece of local directions, or this part of all vertices: it fits into the L2
// cache, and many threads get pieces.
constexpr int64_t kLargePiece = 65536, kFewPieces = 64;

// Appends the entries of the chains that begin among some lists.
template <class Links>
void list_chains(const Links& links, int64_t begin, int64_t end, std::vector<uint32_t>& entries) {
    for (int64_t first = begin; first < end; ++first) {
        if (links.has_before[first] || links.after[first] == kNoNeighbor) continue;
        for (uint32_t list = static_cast<uint32_t>(first); list != kNoNeighbor;
             list = links.after[list])
            entries.push_back(2 * list + (links.after[list] == kNoNeighbor));
    }
}

// Columns on a line along the diagonal of all axes. Steps and chains along other directions stay in
// the column or go to the next.
struct ColumnLines {
    std::vector<uint32_t> columns;  // line after line
    std::vector<int64_t> pieces{
        0};  // cuts between lines, so that each piece but the last has kChainBlock vertices or more
    int64_t largest = 0;  // vertices of the largest piece
};

template <class Key>
ColumnLines follow_lines(const VertexLists<Key>& lists, Key diagonal, ThreadPool& pool) {
    const int64_t num_columns = lists.num_columns();
    Buffer<uint32_t> next(num_columns);
    Buffer<uint8_t> has_before(num_columns);
    std::fill(has_before.get(), has_before.get() + num_columns, uint8_t{0});
    for_blocks(num_columns, pool, [&](int64_t c, int) {
        next[c] = lists.column_after(c, diagonal);
        if (next[c] != kNoNeighbor) has_before[next[c]] = 1;
    });
    ColumnLines lines;
    int64_t size = 0;
    for (int64_t c = 0; c < num_columns; ++c) {
        for (uint32_t column = has_before[c] ? kNoNeighbor : static_cast<uint32_t>(c);
             column != kNoNeighbor; column = next[column]) {
            lines.columns.push_back(column);
            size += lists.first_vertex(column + 1) - lists.first_vertex(column);
        }
        if (size < kChainBlock && c + 1 < num_columns) continue;
        lines.pieces.push_back(static_cast<int64_t>(lines.columns.size()));
        lines.largest = std::max(lines.largest, size);
        size = 0;
    }
    return lines;
}

// One bit for each of the bytes, which are 0 or 1; their number is a multiple of eight.
inline Buffer<uint8_t> pack_bits(const Buffer<uint8_t>& bytes, ThreadPool& pool) {
    const int64_t size = bytes.size / 8;
    Buffer<uint8_t> bits(size + kBitPadding);
    pool.run_blocks(size, kChainBlock, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) bits[i] = bits_of_eight(bytes.get() + 8 * i);
    });
    std::fill(bits.get() + size, bits.get() + bits.size, uint8_t{0});
    return bits;
}

inline Lattice::Chains join_chains(const std::vector<std::vector<uint32_t>>& found,
                                   ThreadPool& pool) {
    Lattice::Chains chains;
    chains.pieces.push_back(0);
    for (const auto& entries : found)
        chains.pieces.push_back(chains.pieces.back() + static_cast<int64_t>(entries.size()));
    chains.entries = Buffer<uint32_t>(chains.pieces.back());
    pool.run(static_cast<int64_t>(found.size()), [&](int64_t piece, int) {
        std::copy(found[piece].begin(), found[piece].end(),
                  chains.entries.get() + chains.pieces[piece]);
    });
    return chains;
}

// Cuts between lists, so that each piece but the last has kChainBlock vertices or more.
inline std::vector<int64_t> cut_lists(const Buffer<uint32_t>& begins) {
    std::vector<int64_t> pieces{0};
    for (int64_t list = 1; list < begins.size; ++list)
        if (list + 1 == begins.size || begins[list] - begins[pieces.back()] >= kChainBlock)
            pieces.push_back(list);
    return pieces;
}

// Fills in the lattice's chains and lists.
template <class Key>
void find_neighbors(const LatticeVertices<Key>& vertices, const VertexOrder<Key>& order,
                    const BlockLayout& layout, const KeySpace<Key>& space, ThreadPool& pool,
                    Lattice& lattice) {
    VertexLists<Key> lists(vertices, order, layout, pool);
    const int64_t num_vertices = vertices.num_vertices, num_lists = lists.num_lists();
    const std::vector<int64_t> cuts = cut_lists(lists.begins());
    const int64_t num_bytes = (num_vertices / 8 + 1) * 8;
    const typename VertexLists<Key>::Links links{
        Buffer<uint32_t>(num_lists), Buffer<uint8_t>(num_lists), Buffer<uint8_t>(num_bytes),
        Buffer<uint8_t>(num_bytes)};
    std::fill_n(links.marked_after.get(), num_bytes, uint8_t{0});
    const ColumnLines lines = follow_lines(lists, order.column_of(space.after_all()), pool);
    if (lines.largest <= std::max(kLargePiece, num_vertices / kFewPieces))
        lattice.num_local = space.num_features() + 1 - layout.num_axes;
    for (int j = 0; j <= space.num_features(); ++j) {
        std::fill_n(links.has_before.get(), num_lists, uint8_t{0});
        std::fill_n(links.marked_before.get(), num_bytes, uint8_t{0});
        for_blocks(lists.num_columns(), pool,
                   [&](int64_t column, int) { lists.link_column(column, j, space, links); });
        const bool is_local = j < lattice.num_local;
        std::vector<std::vector<uint32_t>> found((is_local ? lines.pieces : cuts).size() - 1);
        pool.run(static_cast<int64_t>(found.size()), [&](int64_t piece, int) {
            if (!is_local) return list_chains(links, cuts[piece], cuts[piece + 1], found[piece]);
            for (int64_t i = lines.pieces[piece]; i < lines.pieces[piece + 1]; ++i)
                list_chains(links, lists.first_list(lines.columns[i]),
                            lists.first_list(lines.columns[i] + 1), found[piece]);
        });
        lattice.directions.push_back(join_chains(found, pool));
        lattice.directions.back().after = pack_bits(links.marked_after, pool);
        lattice.directions.back().before = pack_bits(links.marked_before, pool);
    }
    for (int64_t list = 0; list < num_lists; ++list)
        lattice.longest_list = std::max<int64_t>(lattice.longest_list,
                                                 lists.begins()[list + 1] - lists.begins()[list]);
    lattice.first_of_list = lists.take_begins();
}

// Features of points by which vertices are sorted into blocks.
constexpr int kAxesOfPoints = 3;

// Number of tiles for the estimate of the number of vertices.
constexpr int64_t kSampledTiles = 8;

template <class Key>
Lattice build(const KernelInput& input, const LatticeGeometry& geometry, const KeySpace<Key>& space,
              ThreadPool& pool) {
    LatticeTiles<Key> tiles = embed_tiles(input, geometry, space, pool);
    Lattice& lattice = tiles;
    lattice.num_features = geometry.num_features;
    // Points have no position: some of their features take its place in the order of vertices.
    const int num_axes = input.theta_position.empty()
                             ? std::min(kAxesOfPoints, geometry.num_features)
                             : input.voxels->num_axes;
    const BlockLayout layout = lay_out_blocks(
        space.layout(), num_axes, std::min(input.voxels->num_voxels, tiles.num_records));
    const VertexOrder<Key> order(space.layout(), num_axes);
    BlockRecords<Key> records = sort_by_block(tiles, layout, pool);
    // The tiles' own lists, before those of the vertices are allocated.
    BlockCache::release_idle(tiles.num_records * (geometry.num_features + 1) *
                             static_cast<int64_t>(sizeof(float)));
    LatticeVertices<Key> vertices = number_vertices(records, order, pool);
    find_neighbors(vertices, order, layout, space, pool, lattice);
    vertices.keys = Buffer<Key>();
    assign_slots(records, vertices, pool, lattice);
    lattice.num_vertices = vertices.num_vertices;
    return std::move(lattice);
}
}  // namespace

Lattice build_lattice(const KernelInput& input, ThreadPool& pool) {
    return with_key_space(input, [&](const auto& geometry, const auto& space) {
        return build(input, geometry, space, pool);
    });
}

bool fits_lattice(const KernelInput& input) {
    try {
        return with_key_space(input, [](const auto&, const auto&) { return true; });
    } catch (const CapacityError&) {
        return false;
    }
}

double estimate_vertices_per_voxel(const KernelInput& input) {
    if (!fits_lattice(input)) return std::numeric_limits<double>::infinity();
    return with_key_space(input, [&](const auto& geometry, const auto& space) {
        return sample_vertices_per_voxel(input, geometry, space, kSampledTiles);
    });
}
}  // namespace crf
