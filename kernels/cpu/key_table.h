// A small hash table that numbers keys in order of insertion; each thread reuses its table.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/lattice_keys.h"

namespace crf {

template <class Key>
class KeyTable {
   public:
    // Most keys of a table: their numbers have 16 bits, and one marks an empty bucket.
    static constexpr int64_t kMostKeys = 65535;

    KeyTable() : found_(kMostKeys + 1) {
        found_[kNoNumber] = kNoKey;
        resize(kFirstBits);
    }

    // Numbers of the keys, assigned in order of first touch: numbers[lane * num_corners + k] of keys[k * kLanes + lane], lane by lane.
    // No more than kMostKeys different ones may come between two calls of `take`.
    void find_or_add(const Key* keys, int lanes, int num_corners, uint16_t* numbers) {
        while ((static_cast<int64_t>(num_found_) + lanes * num_corners) * kBucketsPerKey > buckets_.size) grow();
        // All places first: several buckets are on their way from memory at once.
        uint32_t home[kLanes * (kMaxLatticeFeatures + 1)];
        for (int i = 0; i < num_corners * kLanes; ++i) home[i] = static_cast<uint32_t>(hash_key(keys[i]) >> down_);
        uint16_t* const buckets = buckets_.get();
        Key* const found = found_.get();
        for (int lane = 0; lane < lanes; ++lane)
            for (int i = lane; i < num_corners * kLanes; i += kLanes) {
                uint32_t number = buckets[home[i]];
                if (found[number] != keys[i]) number = search(keys[i], home[i]);
                *numbers++ = static_cast<uint16_t>(number);
            }
    }

    // Moves the keys out, and empties the table for its next use.
    std::vector<Key> take() {
        std::vector<Key> keys(found_.get(), found_.get() + num_found_);
        num_found_ = 0;
        std::fill(buckets_.get(), buckets_.get() + buckets_.size, kNoNumber);
        return keys;
    }

   private:
    // An empty bucket has the number of a key of all ones. No vertex has this key, as each field has room above its range.
    static constexpr uint16_t kNoNumber = kMostKeys;
    static constexpr Key kNoKey = ~Key(0);

    static constexpr int kFirstBits = 12;
    static constexpr int64_t kBucketsPerKey = 4;

    // The number of a key that is not in its first bucket.
    uint32_t search(Key key, uint32_t bucket) {
        const uint32_t mask = static_cast<uint32_t>(buckets_.size - 1);
        for (;; bucket = (bucket + 1) & mask) {
            const uint32_t number = buckets_[bucket];
            if (found_[number] == key) return number;
            if (number != kNoNumber) continue;
            buckets_[bucket] = static_cast<uint16_t>(num_found_);
            found_[num_found_] = key;
            return num_found_++;
        }
    }

    void resize(int bits) {
        buckets_ = Buffer<uint16_t>(int64_t{1} << bits);
        std::fill(buckets_.get(), buckets_.get() + buckets_.size, kNoNumber);
        down_ = 64 - bits;
    }

    void grow() {
        resize(64 - down_ + 1);
        const uint32_t mask = static_cast<uint32_t>(buckets_.size - 1);
        for (uint32_t n = 0; n < num_found_; ++n) {
            uint32_t bucket = static_cast<uint32_t>(hash_key(found_[n]) >> down_);
            while (buckets_[bucket] != kNoNumber) bucket = (bucket + 1) & mask;
            buckets_[bucket] = static_cast<uint16_t>(n);
        }
    }

    Buffer<uint16_t> buckets_;  // the number of the key in it
    Buffer<Key> found_;         // by number
    uint32_t num_found_ = 0;
    int down_ = 0;
};

}  // namespace crf
