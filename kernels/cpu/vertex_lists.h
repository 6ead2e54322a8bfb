// The columns and lists of all blocks' vertices (vertex_order.h), and the steps from list to list.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/lattice_vertices.h"

namespace crf {

template <class Key>
class VertexLists {
   public:
    static constexpr uint32_t kNone = 0xffffffff;

    VertexLists(const LatticeVertices<Key>& vertices, const VertexOrder<Key>& order, const BlockLayout& layout, ThreadPool& pool)
        : keys_(vertices.keys), order_(order), layout_(layout), first_column_(vertices.blocks.size() + 1, 0) {
        const int64_t num_blocks = static_cast<int64_t>(vertices.blocks.size());
        // Calls begins(vertex, whether a column begins with it too) for the first vertex of every list of a block.
        const auto for_lists = [&](int64_t b, auto&& begins) {
            const uint32_t first = vertices.blocks[b].first_vertex, end = first + vertices.blocks[b].num_vertices;
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
    // A column's lists, from the first to before the one of the next column.
    uint32_t first_list(int64_t column) const { return first_list_[column]; }
    // The first vertex of each list, and the end.
    const Buffer<uint32_t>& begins() const { return begin_; }
    Buffer<uint32_t> take_begins() { return std::move(begin_); }
    // A column's vertices, from the first to before the one of the next column.
    uint32_t first_vertex(int64_t column) const { return begin_[first_list_[column]]; }

    // The column whose coordinates are larger than a column's by `step`, or kNone.
    uint32_t column_after(int64_t column, Key step) const { return find_column(order_.column_of(keys_[first_vertex(column)]) + step); }

    // The links of one direction, as they are found: between vertices, or between lists.
    struct Links {
        Buffer<uint32_t> after;      // the number of the one after each, or kNone
        Buffer<uint8_t> has_before;  // zero at first
        // If between lists: for each vertex, whether it has one after it or before it. `marked_before` is zero at first.
        Buffer<uint8_t> marked_after, marked_before;
        bool of_lists() const { return marked_after.size > 0; }
    };
    // Fills these in for the vertices and lists of a column.
    void link_column(int64_t column, int direction, const KeySpace<Key>& space, const Links& links) const {
        if (links.of_lists()) {
            link_lists<true>(column, direction, space, links);
        } else {
            link_lists<false>(column, direction, space, links);
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

    // The list with these fields, or kNone. It is most often the one after `list`, which is in this column.
    uint32_t find_list(Key fields, uint32_t list, int64_t column) const {
        const auto fields_of = [&](uint32_t l) { return order_.list_of(keys_[begin_[l]]); };
        if (list + 1 < first_list_[column + 1] && fields_of(list + 1) == fields) return list + 1;
        const uint32_t target = find_column(order_.column_of(fields));
        if (target == kNone) return kNone;
        for (uint32_t l = first_list_[target]; l < first_list_[target + 1]; ++l)
            if (fields_of(l) == fields) return l;
        return kNone;
    }

    template <bool kOfLists>
    void link_lists(int64_t column, int direction, const KeySpace<Key>& space, const Links& links) const {
        for (uint32_t list = first_list_[column]; list < first_list_[column + 1]; ++list) {
            const uint32_t begin = begin_[list], end = begin_[list + 1];
            const Key first = space.after(keys_[begin], direction);
            const uint32_t target = find_list(order_.list_of(first), list, column);
            const bool exists = target != kNone;
            const bool any =
                link<kOfLists>(begin, end, exists ? begin_[target] : 0, exists ? begin_[target + 1] : 0, first - keys_[begin], links);
            if constexpr (kOfLists) {
                links.after[list] = any ? target : kNone;
                if (any) links.has_before[target] = 1;
            }
        }
    }

    // From the vertices [u, u_end) to those of [v, v_end) whose keys are larger by `step`. Without branches, which would be mispredicted:
    // what is written for the vertex that is not passed is written again. Returns whether there are any.
    template <bool kOfLists>
    bool link(uint32_t u, uint32_t u_end, uint32_t v, uint32_t v_end, Key step, const Links& links) const {
        const Key* const keys = keys_.get();
        uint32_t* const after = links.after.get();
        uint8_t* const marked_after = links.marked_after.get();
        uint8_t* const before = (kOfLists ? links.marked_before : links.has_before).get();
        uint8_t any = 0;
        while (u < u_end && v < v_end) {
            const Key wanted = keys[u] + step, present = keys[v];
            const uint8_t is_neighbor = wanted == present;
            before[v] = is_neighbor;
            if constexpr (kOfLists) {
                marked_after[u] = is_neighbor;
                any |= is_neighbor;
            } else {
                after[u] = v | (is_neighbor - 1u);  // v or kNone
            }
            u += wanted <= present;
            v += wanted >= present;
        }
        if constexpr (kOfLists) {
            std::fill(marked_after + u, marked_after + u_end, uint8_t{0});
        } else {
            std::fill(after + u, after + u_end, kNone);
        }
        return any;
    }

    const Buffer<Key>& keys_;
    const VertexOrder<Key>& order_;
    const BlockLayout& layout_;
    std::vector<uint32_t> first_column_;  // of each block, and the end
    Buffer<uint32_t> first_list_;         // of each column, and the end
    Buffer<uint32_t> begin_;              // the first vertex of each list, and the end
};

}  // namespace crf
