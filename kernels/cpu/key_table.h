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

    // Numbers of the keys, assigned in order of first touch. Stage by stage, so that several keys are on their way from memory at once.
    void find_or_add(const Key* keys, int count, uint16_t* numbers) {
        while (3 * (found_.size() + static_cast<size_t>(count)) > buckets_.size()) grow();
        found_.reserve(found_.size() + static_cast<size_t>(count));
        if (home_.size() < static_cast<size_t>(count)) home_.resize(count);
        uint64_t* const home = home_.data();
        Bucket* const buckets = buckets_.data();
        const uint64_t mask = mask_;
        const int down = down_;
        for (int i = 0; i < count; ++i) home[i] = hash_key(keys[i]) >> down;
        uint32_t num_found = static_cast<uint32_t>(found_.size());
        for (int i = 0; i < count; ++i) {
            const Key key = keys[i];
            uint64_t bucket = home[i];
            while (buckets[bucket].key != key) {
                if (buckets[bucket].key == kEmpty) {
                    buckets[bucket] = {key, num_found++};
                    found_.push_back(key);
                    places_.push_back(static_cast<uint32_t>(bucket));
                    break;
                }
                bucket = (bucket + 1) & mask;
            }
            numbers[i] = static_cast<uint16_t>(buckets[bucket].number);
        }
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
    std::vector<uint64_t> home_;    // the bucket to begin with, for each key of a batch
    uint64_t mask_ = 0;
    int down_ = 0, bits_ = 0;
};

}  // namespace crf
