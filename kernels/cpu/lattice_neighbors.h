// Pass 4 of building a lattice: the next vertex along each direction, as chains of vertices or of lists.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/lattice_vertices.h"
#include "cpu/vertex_lists.h"

namespace crf {

// The members of a Lattice with these names.
struct LatticeNeighbors {
    Buffer<uint32_t> first_of_list;
    int64_t longest_list = 0;
    std::vector<Lattice::Chains> directions;
    int num_local = 0;
};

constexpr uint32_t kNoNeighbor = VertexLists<uint64_t>::kNone;

// Number of vertices whose chains are listed together, at least.
constexpr int64_t kChainBlock = 4096;

// Bytes after the last bit, so that any vertex's bits can be read together with the following ones.
constexpr int64_t kBitPadding = 8;

// Most vertices of a piece of local directions, or this part of all vertices: blurring it stays in the L2 cache, and there are enough
// pieces for many threads.
constexpr int64_t kLargePiece = 65536, kFewPieces = 64;

// Lists chains, of vertices or of lists; each thread reuses its memory.
template <class Key>
class ChainLister {
   public:
    using Links = typename VertexLists<Key>::Links;

    // Chains that begin among these vertices or lists are to be listed.
    void add(const Links& links, uint32_t begin, uint32_t end) {
        first_.resize(num_chains_ + (end - begin) + 1);
        for (uint32_t v = begin; v < end; ++v) {
            first_[num_chains_] = v;
            const int is_first = !links.has_before[v], goes_on = links.after[v] != kNoNeighbor;
            num_chains_ += is_first & goes_on;
        }
    }

    // Their entries. Chains' lengths cannot be predicted: one loop goes through the entries of all, without a branch at their ends.
    std::vector<uint32_t> list(const Links& links) {
        first_.resize(num_chains_ + 1);
        first_[num_chains_] = 0;
        uint32_t u = first_[0];
        size_t count = 0;
        for (size_t chain = 0; chain < num_chains_;) {
            const size_t room = count + kChainBlock;
            if (entries_.size() < room) entries_.resize(2 * room);
            while (count < room && chain < num_chains_) {
                const uint32_t next = links.after[u];
                const bool is_end = next == kNoNeighbor;
                entries_[count++] = 2 * u + is_end;
                chain += is_end;
                u = is_end ? first_[chain] : next;
            }
        }
        num_chains_ = 0;
        return {entries_.begin(), entries_.begin() + static_cast<std::ptrdiff_t>(count)};
    }

   private:
    std::vector<uint32_t> first_, entries_;
    size_t num_chains_ = 0;
};

// Columns on a line along the diagonal of all axes. A step along a direction that is not an axis's stays in the column or goes to the next
// one of its line; so do chains.
struct ColumnLines {
    std::vector<uint32_t> columns;   // line after line
    std::vector<int64_t> pieces{0};  // cuts between lines, so that each piece but the last has kChainBlock vertices or more
    int64_t largest = 0;             // vertices of the largest piece
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
    lines.columns.reserve(num_columns);
    int64_t size = 0;
    const auto cut = [&] {
        lines.pieces.push_back(static_cast<int64_t>(lines.columns.size()));
        lines.largest = std::max(lines.largest, size);
        size = 0;
    };
    for (int64_t c = 0; c < num_columns; ++c) {
        if (has_before[c]) continue;
        for (uint32_t column = static_cast<uint32_t>(c); column != kNoNeighbor; column = next[column]) {
            lines.columns.push_back(column);
            size += lists.first_vertex(column + 1) - lists.first_vertex(column);
        }
        if (size >= kChainBlock) cut();
    }
    if (size > 0) cut();
    return lines;
}

// One bit for each of the bytes, which are 0 or 1.
inline Buffer<uint8_t> pack_bits(const Buffer<uint8_t>& bytes, ThreadPool& pool) {
    const int64_t size = bytes.size / 8 + 1;
    Buffer<uint8_t> bits(size + kBitPadding);
    pool.run((size + kChainBlock - 1) / kChainBlock, [&](int64_t block, int) {
        for (int64_t i = block * kChainBlock; i < std::min((block + 1) * kChainBlock, size); ++i) {
            uint64_t eight = 0;
            std::memcpy(&eight, bytes.get() + 8 * i, static_cast<size_t>(std::min<int64_t>(8, bytes.size - 8 * i)));
            bits[i] = static_cast<uint8_t>(eight * 0x0102040810204080ull >> 56);  // moves byte k's bit to bit 56 + k
        }
    });
    std::fill(bits.get() + size, bits.get() + bits.size, uint8_t{0});
    return bits;
}

inline Lattice::Chains join_chains(const std::vector<std::vector<uint32_t>>& found, ThreadPool& pool) {
    Lattice::Chains chains;
    chains.pieces.push_back(0);
    for (const auto& entries : found) chains.pieces.push_back(chains.pieces.back() + static_cast<int64_t>(entries.size()));
    chains.entries = Buffer<uint32_t>(chains.pieces.back());
    pool.run(static_cast<int64_t>(found.size()),
             [&](int64_t piece, int) { std::copy(found[piece].begin(), found[piece].end(), chains.entries.get() + chains.pieces[piece]); });
    return chains;
}

// Cuts between lists, so that each piece but the last has kChainBlock vertices or more.
inline std::vector<int64_t> cut_lists(const Buffer<uint32_t>& begins) {
    std::vector<int64_t> pieces{0};
    for (int64_t list = 1; list < begins.size; ++list)
        if (list + 1 == begins.size || begins[list] - begins[pieces.back()] >= kChainBlock) pieces.push_back(list);
    return pieces;
}

// of_lists: whether chains are to be of lists.
template <class Key>
LatticeNeighbors find_neighbors(const LatticeVertices<Key>& vertices, const VertexOrder<Key>& order, const BlockLayout& layout,
                                const KeySpace<Key>& space, bool of_lists, ThreadPool& pool) {
    VertexLists<Key> lists(vertices, order, layout, pool);
    const int64_t num_vertices = vertices.num_vertices, num_lists = lists.num_lists();
    const ColumnLines lines = follow_lines(lists, order.column_of(space.after_all()), pool);
    LatticeNeighbors result;
    if (lines.largest <= std::max(kLargePiece, num_vertices / kFewPieces)) result.num_local = space.num_features() + 1 - layout.num_axes;
    const std::vector<int64_t> cuts = cut_lists(lists.begins());
    const int64_t num_linked = of_lists ? num_lists : num_vertices, num_marked = of_lists ? num_vertices : 0;
    const typename VertexLists<Key>::Links links{Buffer<uint32_t>(num_linked), Buffer<uint8_t>(num_linked), Buffer<uint8_t>(num_marked),
                                                 Buffer<uint8_t>(num_marked)};
    std::vector<ChainLister<Key>> listers(pool.num_threads());
    std::vector<std::vector<uint32_t>> found;
    // Chains that begin among these lists or their vertices.
    const auto add = [&](ChainLister<Key>& lister, uint32_t begin, uint32_t end) {
        lister.add(links, of_lists ? begin : lists.begins()[begin], of_lists ? end : lists.begins()[end]);
    };
    for (int j = 0; j <= space.num_features(); ++j) {
        std::fill(links.has_before.get(), links.has_before.get() + num_linked, uint8_t{0});
        std::fill(links.marked_before.get(), links.marked_before.get() + num_marked, uint8_t{0});
        if (j < result.num_local) {
            found.resize(lines.pieces.size() - 1);
            pool.run(static_cast<int64_t>(found.size()), [&](int64_t piece, int thread) {
                const auto begin = lines.columns.begin() + lines.pieces[piece], end = lines.columns.begin() + lines.pieces[piece + 1];
                for (auto column = begin; column != end; ++column) lists.link_column(*column, j, space, links);
                for (auto column = begin; column != end; ++column)
                    add(listers[thread], lists.first_list(*column), lists.first_list(*column + 1));
                found[piece] = listers[thread].list(links);
            });
        } else {
            for_blocks(lists.num_columns(), pool, [&](int64_t column, int) { lists.link_column(column, j, space, links); });
            found.resize(cuts.size() - 1);
            pool.run(static_cast<int64_t>(found.size()), [&](int64_t piece, int thread) {
                add(listers[thread], static_cast<uint32_t>(cuts[piece]), static_cast<uint32_t>(cuts[piece + 1]));
                found[piece] = listers[thread].list(links);
            });
        }
        result.directions.push_back(join_chains(found, pool));
        if (!of_lists) continue;
        result.directions.back().after = pack_bits(links.marked_after, pool);
        result.directions.back().before = pack_bits(links.marked_before, pool);
    }
    if (!of_lists) return result;
    for (int64_t list = 0; list < num_lists; ++list)
        result.longest_list = std::max<int64_t>(result.longest_list, lists.begins()[list + 1] - lists.begins()[list]);
    result.first_of_list = lists.take_begins();
    return result;
}

}  // namespace crf
