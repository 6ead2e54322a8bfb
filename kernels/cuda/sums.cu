// The last part of sums over the voxels: threads have left numbers that are added up in a fixed
// order. CRF_THREADS: per block, a power of two.
#include "cuda/launch.h"

namespace crf {
// One block per sum. partial: (sum, count).
CRF_BLOCK_KERNEL(add_up, const double* partial, int64 count, double* sums) {
    CRF_SHARED(double, shared, CRF_THREADS);
    CRF_PHASE(thread) {
        double total = 0.0;
        for (int64 j = thread; j < count; j += CRF_THREADS)
            total += partial[block_number() * count + j];
        shared[thread] = total;
    }
    for (int half = CRF_THREADS / 2; half > 0; half /= 2) {
        CRF_PHASE(thread) {
            if (thread >= half) continue;
            const double own = shared[thread], other = shared[thread + half];
            shared[thread] = own + other;
        }
    }
    CRF_PHASE(thread) {
        if (thread > 0) continue;
        const double total = shared[0];
        sums[block_number()] = total;
    }
}
}  // namespace crf
