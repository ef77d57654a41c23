// fprop, dgrad and wgrad on a CPU: loops over stored weights as offsets into planes of an image.
//
// An image is copied into planes, one for each channel and residue of the stride. Zeros separate its rows, so that a tap
// of a channel is one constant offset and a whole image one run of pixels:
//
//     position of padded pixel (i, j) of image m in a plane:  (i * images + m) * pitch + j
//
// In batch_last the images are innermost: (i * pitch + j) * images + m, vectors of images where there are enough of them.
// Rows of several small images interleave. The pixels between two rows of an output are computed and dropped. `pitch`
// leaves as many zeros as the widest tap needs; the zeros right of a row are those left of the next one.
//
//     fprop    out[f][l]  = sum over items of w[item][f] * x[item + l]        registers hold F filters x V vectors
//     dgrad    the same on dy, over the transposed index; or, where blocks have few channels, each block-row adds
//              w[item][f] * dy[f][l] to dx[item + l] from F x V vectors of dy in registers
//     wgrad    dv[item][f] = sum over l of dy[f][l] * x[item + l]             F filters x I items of dot products
//
// In channels_last blocks of whole vectors need no planes: channels_last.h. Single weights in kernels larger than 1x1 read
// each pixel of x for one product: narrow.h gives each lane of a vector a tile of the image, so that every tap is aligned.
//
// A task is some images, or some rows of one, times some block-rows; tasks share nothing, and every sum has one order,
// so that results are the same bits for any number of threads. Nothing is kept between calls but scratch memory.
// A NaN or infinity in x may show in the weight gradient at other taps of its channel, too: it meets the dropped pixels.
//
// numbers.h (vectors), call.h (what the caller passes), joined.h (pixels of 1x1 kernels as long rows), planes.h (how work
// is cut), scratch.h, rows.h (rows in vectors), copying.h (planes in, results out), finish.h (residual, ReLU), tiles.h
// (rows as tiles), lists.h (the index as items), shares.h (sums of a weight gradient), phases.h (a strided dx), and a file
// for each product; sources.h, pixel_tiles.h and channels_last.h (all three on tensors as they stand); lanes.h and
// narrow.h (all three on tiles in lanes). Here are the functions that the library exports. Units of their own are
// tiles.cpp (the innermost loops) and norm.cpp (batch normalisation): compiled at once, in less time.

#include <chrono>

#include "dgrad.h"
#include "fprop.h"
#include "wgrad.h"

// Whether several threads work.
extern "C" int bsr_parallel() {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

// Fused multiplications and additions a second, twice counted, of so many threads that do nothing else.
extern "C" double bsr_peak_flops(int64_t threads) {
    using A = Wide;
    constexpr int64_t N = 12, STEPS = 1 << 20;  // products under way at once: more than a core starts before one ends
    double best = 0;
    for (int round = 0; round < 5; round++) {
        const auto begin = std::chrono::steady_clock::now();
#pragma omp parallel num_threads(threads)
        {
            vec<A> sum[N], a = vec<A>{} + A(1e-9), b = vec<A>{} + A(0.5);
            UNROLL for (int64_t j = 0; j < N; j++) sum[j] = vec<A>{} + A(j);
            for (int64_t i = 0; i < STEPS; i++)
                UNROLL for (int64_t j = 0; j < N; j++) {
                    sum[j] = sum[j] * b + a;
                    HOLD(sum[j]);
                }
        }
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
        best = std::max(best, 2.0 * N * STEPS * LANES<A> * threads / seconds.count());
    }
    return best;
}

namespace {
Conv rows_joined(const Conv& g) { return joined(g, sizeof(Wide), LANES<Wide>); }
}  // namespace

// The calls: 0, or 1: no memory, 2: too large.
extern "C" int bsr_fprop(const Conv* g, const NUMBER* x, const NUMBER* values, const NUMBER* bias,
                         const NUMBER* residual, int64_t relu, const int32_t* packed, NUMBER* y) {
    const Epilogue<NUMBER> last{residual, relu != 0};
    return guarded([&] { return fprop<NUMBER>(rows_joined(*g), x, values, bias, last, Index(*g, packed), y); });
}
extern "C" int bsr_dgrad(const Conv* g, const NUMBER* dy, const NUMBER* values, const int32_t* packed, NUMBER* dx) {
    return guarded([&] { return dgrad<NUMBER>(rows_joined(*g), dy, values, Index(*g, packed), dx); });
}
extern "C" int bsr_wgrad(const Conv* g, const NUMBER* x, const NUMBER* dy, const int32_t* packed, NUMBER* dvalues) {
    return guarded([&] { return wgrad<NUMBER>(rows_joined(*g), x, dy, Index(*g, packed), dvalues); });
}
// Both gradients: dx has the strides of x.
extern "C" int bsr_gradients(const Conv* g, const NUMBER* x, const NUMBER* dy, const NUMBER* values, const int32_t* packed,
                             NUMBER* dx, NUMBER* dvalues) {
    const int failed = bsr_dgrad(g, dy, values, packed, dx);
    return failed ? failed : bsr_wgrad(g, x, dy, packed, dvalues);
}
