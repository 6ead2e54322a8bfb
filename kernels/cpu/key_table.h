// A small hash table that numbers keys in order of insertion; each thread reuses its table.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/lattice_keys.h"

namespace crf {

template <class Key>
class KeyTable {
   public:
    KeyTable() { resize(kFirstBits); }

    // Number of the key, assigned in order of first touch.
    uint32_t find_or_add(Key key) {
        uint64_t bucket = hash_key(key) >> down_;
        while (buckets_[bucket].key != key) {
            if (buckets_[bucket].key == kEmpty) {
                const uint32_t number = static_cast<uint32_t>(found_.size());
                buckets_[bucket] = {key, number};
                found_.push_back(key);
                places_.push_back(static_cast<uint32_t>(bucket));
                if (2 * found_.size() > buckets_.size()) grow();
                return number;
            }
            bucket = (bucket + 1) & mask_;
        }
        return buckets_[bucket].number;
    }

    // Moves the keys out, and empties the table for its next use.
    std::vector<Key> take() {
        for (uint32_t bucket : places_) buckets_[bucket].key = kEmpty;
        places_.clear();
        std::vector<Key> keys(found_);
        found_.clear();
        return keys;
    }

   private:
    // The key of all ones marks an empty bucket; no vertex has it, as each field has room above its range.
    static constexpr Key kEmpty = ~Key(0);

    static constexpr int kFirstBits = 12;  // 4096 buckets: 64 KiB for short keys

    struct Bucket {
        Key key = kEmpty;
        uint32_t number = 0;
    };

    void resize(int bits) {
        buckets_.assign(size_t{1} << bits, Bucket{});
        mask_ = (uint64_t{1} << bits) - 1;
        down_ = 64 - bits;
        bits_ = bits;
    }

    void grow() {
        resize(bits_ + 1);
        for (size_t n = 0; n < found_.size(); ++n) {
            uint64_t bucket = hash_key(found_[n]) >> down_;
            while (buckets_[bucket].key != kEmpty) bucket = (bucket + 1) & mask_;
            buckets_[bucket] = {found_[n], static_cast<uint32_t>(n)};
            places_[n] = static_cast<uint32_t>(bucket);
        }
    }

    std::vector<Bucket> buckets_;
    std::vector<Key> found_;
    std::vector<uint32_t> places_;  // bucket of each key
    uint64_t mask_ = 0;
    int down_ = 0, bits_ = 0;
};

}  // namespace crf
