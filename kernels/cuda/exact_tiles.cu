// The sum over all pairs (direct.cu: filter_all_pairs) in tiles of senders, which the threads of a block load into shared memory together.
//
// CRF_WIDTH: channels that are filtered together. CRF_FEATURES: features. CRF_THREADS: per block. CRF_SENDERS: per tile.
#include "cuda/launch.h"

namespace crf {

using Channels = Row<CRF_WIDTH>;
using Intensities = Features<CRF_FEATURES>;
constexpr int kFeatures = CRF_FEATURES;

// One block per CRF_THREADS voxels: as filter_all_pairs of direct.cu, with CRF_SENDERS senders at a time in shared memory, where all
// threads of a warp read the same one at once.
CRF_BLOCK_KERNEL(filter_all_tiles, const Real* features, int64 num_voxels, const Channels* values, const Real* sent_scale,
                 const Real* received_scale, const Real* channel_weight, Channels* sum, int adds) {
    CRF_SHARED(Intensities, near_features, CRF_SENDERS);
    CRF_SHARED(Channels, near_values, CRF_SENDERS);
    CRF_PER_THREAD(Intensities, own);
    CRF_PER_THREAD(Channels, total);

    const int64 first = block_number() * CRF_THREADS;
    CRF_PHASE(thread) {
        Intensities mine = {};
        CRF_UNROLL
        for (int f = 0; f < kFeatures; ++f)
            if (first + thread < num_voxels) mine.value[f] = features[f * num_voxels + first + thread];
        own[thread] = mine;
        total[thread] = zero_row<CRF_WIDTH>();
    }
    for (int64 begin = 0; begin < num_voxels; begin += CRF_SENDERS) {
        const int count = num_voxels - begin < CRF_SENDERS ? static_cast<int>(num_voxels - begin) : CRF_SENDERS;
        CRF_PHASE(thread) {
            // Several at once would use the registers that allow twice as many resident threads.
            CRF_ROLLED
            for (int i = thread; i < count; i += CRF_THREADS) {
                const int64 m = begin + i;
                Intensities at = {};
                CRF_UNROLL
                for (int f = 0; f < kFeatures; ++f) at.value[f] = features[f * num_voxels + m];
                near_features[i] = at;
                Channels sent = zero_row<CRF_WIDTH>();
                add_scaled(sent, values[m], sent_scale ? sent_scale[m] : Real(1.0));
                near_values[i] = sent;
            }
        }
        CRF_PHASE(thread) {
            const Intensities mine = own[thread];
            Channels partial = zero_row<CRF_WIDTH>();
            CRF_UNROLL_BY_4
            for (int i = 0; i < count; ++i) {
                const Intensities at = near_features[i];
                const Channels sent = near_values[i];
                add_scaled(partial, sent, weight_of<kFeatures>(Real(0.0), mine, at));
            }
            add_scaled(total[thread], partial, Real(1.0));
        }
    }
    CRF_PHASE(thread) {
        const int64 n = first + thread;
        if (n >= num_voxels) continue;
        put_weighted(sum, n, total[thread], received_scale ? received_scale[n] : Real(1.0), channel_weight, adds);
    }
}

}  // namespace crf
