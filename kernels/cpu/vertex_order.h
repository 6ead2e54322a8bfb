// The order of a block's vertices: column by column (one value of the coordinates that depend on position), within a column by
// remainder, and within such a *list* by the rest of the key.
//
// A step along a direction takes all vertices of a list to one other list and adds the same number to each key. So it keeps their order,
// and two lists are matched by walking along both: no vertex is looked up by itself.
#pragma once

#include <algorithm>
#include <bit>
#include <vector>

#include "cpu/lattice_keys.h"

namespace crf {

template <class Key>
class VertexOrder {
   public:
    VertexOrder(const KeyLayout& layout, int num_axes)
        : remainder_bits_(layout.width[0]), rest_end_(layout.shift[layout.num_features - num_axes + 1]) {
        remainder_ = (Key(1) << remainder_bits_) - 1;
        rest_ = ((Key(1) << rest_end_) - 1) & ~remainder_;
    }

    // The fields that name a key's column, or its list; columns and lists are in the order of these numbers.
    Key column_of(Key key) const { return key & ~(rest_ | remainder_); }
    Key list_of(Key key) const { return key & ~rest_; }

    // Keys in the order of these numbers are in the order of vertices: the remainder moves above the rest of the fields.
    Key rank_of(Key key) const {
        return (key & ~(rest_ | remainder_)) | (key & remainder_) << (rest_end_ - remainder_bits_) | (key & rest_) >> remainder_bits_;
    }

   private:
    int remainder_bits_, rest_end_;  // the rest's first bit, and the one after its last
    Key remainder_ = 0, rest_ = 0;   // their bits
};

// Sorts small lists of numbers and remembers where each came from; each thread reuses its memory.
template <class Key>
class KeySorter {
   public:
    struct Item {
        Key rank;
        uint32_t index;
    };

    std::vector<Item> items;

    // Sorts `items` by rank.
    void sort() {
        const size_t count = items.size();
        if (count < kFewItems) {
            std::sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.rank < b.rank; });
            return;
        }
        Key varying = 0;  // bits in which the ranks differ
        for (const Item& item : items) varying |= item.rank ^ items.front().rank;
        other_.resize(count);
        // By digits from the lowest to the highest; bits without a difference are passed over.
        while (varying != 0) {
            const int shift = lowest_bit(varying);
            uint32_t place[kDigits]{};
            for (const Item& item : items) ++place[digit(item.rank, shift)];
            uint32_t total = 0;
            for (uint32_t& p : place) {
                const uint32_t of_digit = p;
                p = total;
                total += of_digit;
            }
            for (const Item& item : items) other_[place[digit(item.rank, shift)]++] = item;
            items.swap(other_);
            varying = varying >> shift >> kDigitBits << kDigitBits << shift;
        }
    }

   private:
    static constexpr size_t kFewItems = 64;
    static constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;

    static int lowest_bit(uint64_t x) { return std::countr_zero(x); }
    static int lowest_bit(WideKey x) {
        const uint64_t low = static_cast<uint64_t>(x);
        return low != 0 ? std::countr_zero(low) : 64 + std::countr_zero(static_cast<uint64_t>(x >> 64));
    }
    static uint32_t digit(Key rank, int shift) { return static_cast<uint32_t>(rank >> shift) & (kDigits - 1); }

    std::vector<Item> other_;
};

}  // namespace crf
