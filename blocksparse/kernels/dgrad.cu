// dgrad: dx from dy. The block-rows of FILTERS filters or more are a band (narrow ones share a band). A CTA owns bands and
// walks tiles of pixels x IMAGES images: M = channels that a band stores (a chunk), N = images of a pixel, K = (tap,
// filter), in steps of FILTERS filters. Sums stay in registers over all taps and filters of the band.
//
// A channel of one band goes to dx from there. The sums of one that more bands store are passed on, band by band in their
// order, in shared memory, by the warp that owns the pixels: neither atomics nor barriers, the same bits on every run.
// Where several CTAs share the bands of a tile, channels that more than one of them has go to an fp32 workspace, which
// add_shares() adds up in order. No grid depends on which blocks are stored.
//
// More than 400 lines: what a CTA lists of its bands is for these steps alone.
//
// Budget, in instructions of a warp (counts/cupy.json, held by a test):
//   global -> shared  10 to 11 for each 32 slots that are copied, 67 for each 32 slots of a patch before the first filter
//   shared -> mma     2.4 to 4.5 an mma in fp16
//   results           36 to 44 for each 32 slots
//   and 117 to 129 a step, 70 to 210 a chunk (90 to 250 more where sums are passed on), 1450 to 1650 once
// dy is read once, dx is written once.
//
// The pixels of x with (h, w) = (a, b) modulo the stride are tiled apart: only the taps with
// (a + padding - r*dilation) % stride == 0 reach them, and those read neighbours in dy for neighbours in dx.

constexpr int ROWS = MT * 16;  // channels of a chunk
constexpr int ROW = row_bytes(FILTERS);
constexpr int PIECES = FILTERS / SLOT;
constexpr int SUM_PLANE = WARPS * NT * 8 + 8;  // floats from one channel to the next

// A chunk's row: its channel, and on whom the sums of that depend besides this band; -1: there is none.
constexpr int CHANNEL = 0x7fff, FIRST = 1 << 15, LAST = 1 << 16, ELSEWHERE = 1 << 17, PLANE = 18;

// What lies one behind the other at chunks_at.
struct Chunks {
    int *base, *counts, *flags, *held, *plane;  // held: planes that are taken; plane: the first of 32 channels

    __device__ __forceinline__ explicit Chunks(const Conv& g) {
        base = table(g.chunks_at), counts = base + g.bands + 1, flags = counts + g.bands, held = flags + g.capacity;
        plane = held + 1;
    }
};

// Of a chunk: whether the sums of any of its channels are passed on, or are shared with other CTAs.
constexpr int PASSES = 1, MEETS = 2;

// A residue class: where it begins in dy and in dx, how many taps it owns, the items and rows of values of its steps.
struct alignas(16) Class {
    int least_h, least_w, a, b, own, items, rows_of_values, bands;
};

__device__ __forceinline__ Class* class_of(const Conv& g) {
    return (Class*)(shared + g.bits_at);
}

// A step of a tile: the band's filters from `filter` on, the part-th of its band; TURNS: it reads another patch than the
// one before; ENDS: it is the chunk's last.
struct alignas(16) Step {
    int filter, part, chunk, flags;
};
constexpr int TURNS = 1, ENDS = 2;

__device__ __forceinline__ Step* steps_of(const Conv& g) {
    return (Step*)(class_of(g) + 1);
}

// Channels that no CTA has, as bits.
__device__ __forceinline__ unsigned* unread_of(const Conv& g) {
    return (unsigned*)(steps_of(g) + g.capacity * g.band_steps);
}

// Along one axis: dy row of tap `tap` is this much further than the tile's own, for taps that the residue class owns.
__device__ __forceinline__ bool reached(int residue, int pad, int tap, int dilation, int stride, int* further) {
    const int reach = residue + pad - tap * dilation;
    *further = reach / stride;
    return reach % stride == 0;
}

__device__ __forceinline__ int least_reached(int residue, int pad, int taps, int dilation, int stride) {
    int least = 0, further;
#pragma unroll 1
    for (int tap = 0; tap < taps; ++tap) {
        if (reached(residue, pad, tap, dilation, stride, &further)) least = further;  // falls from tap to tap
    }
    return least;
}

// Numbers the taps that reach the residue class (a, b), -1: others, and lists the items of a step: (tap, filter), and what
// else depends on the class.
__device__ __forceinline__ void list_class(int share, int a, int b, const Conv& g) {
    const int least_h = least_reached(a, g.pad_h, g.r_size, g.dilation_h, g.stride_h);
    const int least_w = least_reached(b, g.pad_w, g.s_size, g.dilation_w, g.stride_w);
    const int taps = g.r_size * g.s_size, lane = threadIdx.x % 32;
    int *number = table(g.taps_at), *starts = table(g.starts_at);
    if (threadIdx.x < 32) {
        int total = 0;
#pragma unroll 1
        for (int t = lane; t - lane < taps; t += 32) {
            int dp = 0, dq = 0;
            bool reaches = t < taps && reached(a, g.pad_h, t / g.s_size, g.dilation_h, g.stride_h, &dp);
            reaches = reaches && reached(b, g.pad_w, t % g.s_size, g.dilation_w, g.stride_w, &dq);
            const unsigned vote = __ballot_sync(~0u, reaches);
            const int i = total + __popc(vote & ((1u << lane) - 1));
            if (t < taps) number[t] = reaches ? i : -1;
            if (reaches) starts[i] = ((dp - least_h) * g.cols + dq - least_w) * SLOTS * 16;
            total += __popc(vote);
        }
        if (lane == 0) number[taps] = total;
    }
    __syncthreads();
    const int total = number[taps], items = total * FILTERS, rounded = (items + STEP - 1) / STEP * STEP;
    if (threadIdx.x == 0) {
        const int bands = total ? min(g.bands, g.k_blocks / g.band_rows - share * g.bands) : 0;
        *class_of(g) = Class{least_h, least_w, a, b, total, rounded, (rounded + FILTERS - 1) / FILTERS * ROWS, bands};
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < rounded; i += THREADS) {
        const int f = i % FILTERS;
        table(g.items_at)[i] = i < items ? f * g.plane * 16 + starts[i / FILTERS] : FILTERS * g.plane * 16;
    }
    __syncthreads();
}

// Which of the channels from .. from + channels each band stores, as bits and as how many come before each 32, and where
// its chunks begin; `first` is the CTA's first band. Returns the number of chunks. All threads call it; behind its first
// barrier none reads the last lists any more.
__device__ __forceinline__ int count_chunks(
    const int* __restrict__ indptr, const int* __restrict__ indices, int first, int from, int channels, const Conv& g) {
    const int bands = class_of(g)->bands;
    unsigned *bitmap = (unsigned*)table(g.bitmap_at), *readers = (unsigned*)table(g.filters_at);
    int* before = table(g.before_at);
    const Chunks to(g);
    const int words = (channels + 31) / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const bool shared_out = g.lists > 1;
#pragma unroll 1
    for (int i = threadIdx.x; i < bands * words; i += THREADS) bitmap[i] = 0;
#pragma unroll 1
    for (int i = threadIdx.x; shared_out && i < channels; i += THREADS) readers[i] = 0;
    __syncthreads();
    if (threadIdx.x == 0) *to.held = 0;
    const int first_row = shared_out ? 0 : first * g.band_rows;
    const int last_row = shared_out ? g.k_blocks : first_row + bands * g.band_rows;
#pragma unroll 1
    for (int row = first_row + warp; row < last_row; row += WARPS) {
        const int band = row / g.band_rows, own = band - first, last = indptr[row + 1] * BC;
#pragma unroll 1
        for (int e = indptr[row] * BC + lane; e < last; e += 32) {
            const int c = column_of(indices, e) % g.channels - from;
            if (c < 0 || c >= channels) continue;
            if (own >= 0 && own < bands) atomicOr(&bitmap[own * words + c / 32], 1u << c % 32);
            if (shared_out) atomicOr(&readers[c], 1u << band / g.bands);
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int b = threadIdx.x; b < bands; b += THREADS) {
        int total = 0;
#pragma unroll 1
        for (int w = 0; w < words; ++w) {
            before[b * words + w] = total;
            total += __popc(bitmap[b * words + w]);
        }
        to.counts[b] = (total + ROWS - 1) / ROWS;
    }
#pragma unroll 1
    for (int w = threadIdx.x; w < words; w += THREADS) {
        unsigned any = 0, several = 0;
#pragma unroll 1
        for (int b = 0; b < bands; ++b) {
            const unsigned bits = bitmap[b * words + w];
            several |= bits & any, any |= bits;
        }
        to.plane[w] = atomicAdd(to.held, __popc(several));
    }
    __syncthreads();
#pragma unroll 1
    for (int b = threadIdx.x; b <= bands; b += THREADS) {
        int total = 0;
#pragma unroll 1
        for (int i = 0; i < b; ++i) total += to.counts[i];
        to.base[b] = total;
    }
    __syncthreads();
    return to.base[bands];
}

// Lists the chunks that count_chunks counted, and steps: the code of each row, the entry of each (block-row, tap,
// channel), or -1; which channels no CTA has, and, for add_shares, who has each.
__device__ __forceinline__ void list_chunks(
    const int* __restrict__ indptr, const int* __restrict__ indices, int* __restrict__ all_readers, int share,
    int from, int channels, int chunks, const Conv& g) {
    const int first = share * g.bands, bands = class_of(g)->bands, own = class_of(g)->own;
    const unsigned *bitmap = (const unsigned*)table(g.bitmap_at), *readers = (const unsigned*)table(g.filters_at);
    const int *before = table(g.before_at), words = (channels + 31) / 32;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int *codes = table(g.channels_at), *entries = table(g.entries_at);
    const Chunks to(g);
#pragma unroll 1
    for (int i = threadIdx.x; i < chunks * ROWS; i += THREADS) codes[i] = -1;
#pragma unroll 1
    for (int i = threadIdx.x; i < chunks * g.band_rows * own * ROWS; i += THREADS) entries[i] = -1;
#pragma unroll 1
    for (int b = threadIdx.x; b < bands; b += THREADS) {
        const int filter = (first + b) * g.band_rows * g.bk;
#pragma unroll 1
        for (int chunk = to.base[b]; chunk < to.base[b + 1]; ++chunk) {
            to.flags[chunk] = 0;
#pragma unroll 1
            for (int i = 0; i < g.band_steps; ++i) {
                const int flags = (g.band_steps > 1 || chunk == to.base[b] ? TURNS : 0) | (i + 1 == g.band_steps ? ENDS : 0);
                steps_of(g)[chunk * g.band_steps + i] = Step{filter + i * FILTERS, i * FILTERS, chunk, flags};
            }
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int row = warp; row < bands * g.band_rows; row += WARPS) {
        const int band = row / g.band_rows, last = indptr[first * g.band_rows + row + 1] * BC;
#pragma unroll 1
        for (int e = indptr[first * g.band_rows + row] * BC + lane; e < last; e += 32) {
            const int column = column_of(indices, e), tap = table(g.taps_at)[column / g.channels];
            const int c = column % g.channels - from, w = band * words + c / 32;
            if (c < 0 || c >= channels || tap < 0) continue;
            const int i = to.base[band] * ROWS + before[w] + __popc(bitmap[w] & ((1u << c % 32) - 1));
            entries[((i / ROWS * g.band_rows + row % g.band_rows) * own + tap) * ROWS + i % ROWS] = e;
        }
    }
#pragma unroll 1
    for (int w = warp; w < words; w += WARPS) {  // lane i: channel i of 32
        const int c = w * 32 + lane;
        int stored = 0;
#pragma unroll 1
        for (int b = 0; b < bands; ++b) stored += bitmap[b * words + w] >> lane & 1;
        const unsigned below = (1u << lane) - 1, others = c < channels && g.lists > 1 ? readers[c] : 0;
        const int plane = to.plane[w] + __popc(__ballot_sync(~0u, stored > 1) & below);
        const unsigned none = __ballot_sync(~0u, c < channels && stored == 0 && others == 0);
        if (lane == 0) unread_of(g)[w] = none;
        if (all_readers && blockIdx.x == 0 && c < channels) all_readers[from + c] = readers[c];
        const bool meets = others & ~(1u << share);
        const int code = (from + c) | (meets ? ELSEWHERE : 0) | plane << PLANE;
        int seen = 0;
#pragma unroll 1
        for (int b = 0; b < bands; ++b) {
            const unsigned bits = bitmap[b * words + w];
            if (!(bits >> lane & 1)) continue;
            const int i = to.base[b] * ROWS + before[b * words + w] + __popc(bits & below);
            codes[i] = code | (seen == 0 ? FIRST : 0) | (seen + 1 == stored ? LAST : 0);
            ++seen;
            atomicOr((unsigned*)&to.flags[i / ROWS], (stored > 1 ? PASSES : 0) | (meets ? MEETS : 0));
        }
    }
    __syncthreads();
}

// Values of a chunk's channels x `own` taps x FILTERS filters, zero where a channel lacks the tap; behind an odd number
// of taps that do not fill a STEP, zeros.
__device__ __forceinline__ void load_values(
    unsigned at, const T* __restrict__ values, const Step& step, const Conv& g) {
    const int own = class_of(g)->own, rows_of_values = class_of(g)->rows_of_values;
    const int* entries = table(g.entries_at) + step.chunk * g.band_rows * own * ROWS;
#pragma unroll 1
    for (int i = threadIdx.x; i < rows_of_values * PIECES; i += THREADS) {
        const int row = i / PIECES, f = i % PIECES * SLOT, in_band = f >> g.band_shift;
        const int e = row < own * ROWS ? entries[in_band * own * ROWS + row] : -1;
        const T* from = values + (long long)e * g.bk + step.part + f - (in_band << g.band_shift);
        cp_async_or_zeros(shared + at + row * ROW + f * SIZE, e < 0 ? values : from, e >= 0);
    }
}

// acc += what earlier bands of this CTA left, and is left for later ones.
__device__ __forceinline__ void pass_on(float (&acc)[MT][NT][4], const int* codes, const Conv& g) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int code = codes[m * 16 + half * 8 + lane / 4];
            if (code < 0 || (code & (FIRST | LAST)) == (FIRST | LAST)) continue;
            float2* sum = (float2*)(shared + g.sums_at) + ((code >> PLANE) * SUM_PLANE + warp * NT * 8) / 2 + lane % 4;
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                float &even = acc[m][n][half * 2], &odd = acc[m][n][half * 2 + 1];
                if (!(code & FIRST)) even += sum[n * 4].x, odd += sum[n * 4].y;
                if (!(code & LAST)) sum[n * 4] = float2{even, odd};
            }
        }
    }
}

// Which rows of a chunk go to dx now.
struct Finished {
    const int* codes;
    __device__ __forceinline__ int operator[](int i) const {
        const int code = codes[i];
        return code >= 0 && (code & (LAST | ELSEWHERE)) == LAST ? code & CHANNEL : -1;
    }
};

// And which go to the workspace where shares meet.
struct Met {
    const int* codes;
    __device__ __forceinline__ int operator[](int i) const {
        const int code = codes[i];
        return code >= 0 && (code & (LAST | ELSEWHERE)) == (LAST | ELSEWHERE) ? code & CHANNEL : -1;
    }
};

// Zeros for the channels that no CTA has.
__device__ __forceinline__ void store_zeros(const Target<T>& to, int from, int channels, const Conv& g) {
    const unsigned* none = unread_of(g);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, area = g.tile_h * g.tile_w;
    constexpr unsigned OWN = WARPS == 8 ? 0x01010101u : 0x11111111u;  // of 32 channels, a warp's
#pragma unroll 1
    for (int w = 0; w * 32 < channels; ++w) {
#pragma unroll 1
        for (unsigned bits = none[w] & OWN << warp; bits; bits &= bits - 1) {
            T* channel = to.origin + (from + w * 32 + __ffs(bits) - 1) * to.channel;
#pragma unroll 1
            for (int i = lane; i < area * SLOTS; i += 32) {
                const Pixel pixel = pixels_of(g.pixels_at)[i / SLOTS];
                const int image = i % SLOTS * SLOT;
                if (!to.inside(pixel)) continue;
                T* here = channel + pixel.offset + image;
                if (to.whole()) {
                    *(Slot*)here = Slot{{0, 0, 0, 0}};
                } else {
#pragma unroll 1
                    for (int j = 0; j < min(SLOT, to.images - image); ++j) here[j] = 0;
                }
            }
        }
    }
}

// sums [shares], each laid out as dx, and readers, of each channel the shares that have it, as bits: where bands are shared
// out, else null.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
dgrad(const T* __restrict__ dy, const T* __restrict__ values, const int* __restrict__ indptr,
      const int* __restrict__ indices, const int* __restrict__ row_order, T* __restrict__ dx,
      float* __restrict__ sums, int* __restrict__ readers, const Conv g) {
    // Shares run fastest: together they read all of dy, and write neighbours.
    const int columns = min(g.stride_w, g.width), classes = min(g.stride_h, g.height) * columns;
    const int share = blockIdx.x % g.lists;
    const int residue = blockIdx.x / g.lists % classes, a = residue / columns, b = residue % columns;
    const Range range(blockIdx.x / g.lists / classes, g);
    if (range.first == range.last) return;

    list_pixels(g.places_at, g.rows, g.cols, 1, 1, g.y);
    list_pixels(g.pixels_at, g.tile_h, g.tile_w, g.stride_h, g.stride_w, g.x);
    clear_planes(FILTERS, g);
    list_class(share, a, b, g);
    const Pixels pixels(1, 1, g);
    const unsigned loads = Share(g.rows * g.cols * SLOTS).packed();

    // Lists have room for all channels, as a rule; else they are made anew for every tile, in parts.
    int width = g.units;
    for (int tile = range.first, until; tile < range.last; tile = until) {
        for (int from = 0; from < g.channels; from += width) {
            const int channels = min(width, g.channels - from);
            const int chunks = count_chunks(indptr, indices, share * g.bands, from, channels, g);
            if (width > g.part && (width < g.channels || chunks > g.capacity || *Chunks(g).held > g.planes)) {
                width = g.part, from = -width;
                continue;
            }
            until = width < g.channels ? tile + 1 : range.last;
            list_chunks(indptr, indices, readers, share, from, channels, chunks, g);
            const int steps = chunks * g.band_steps;
            const bool resident = steps <= g.held;  // values are loaded once for all tiles
            Place ahead(tile, g), here = ahead;
            int next = 0, left = until - tile, patch = 1, stage = 1;
            const auto load_next = [&] {
                const Step step = steps_of(g)[next];
                if (!resident || left == until - tile) {
                    const int held = resident ? next : stage ^ 1;
                    load_values(g.values_at + held * g.value_stage, values, step, g);
                }
                if (step.flags & TURNS) {
                    const Class from_class = *class_of(g);
                    const Source source(dy, g.y, g.p_size, g.q_size, ahead.p * g.tile_h + from_class.least_h,
                                        ahead.q * g.tile_w + from_class.least_w, ahead.n * IMAGES, g);
                    load_patch(g.stage_at + (patch ^ 1) * g.stage, source, pixels_of(g.places_at), g.rows * g.cols,
                               g.plane, Ordered{row_order, step.filter}, FILTERS, Share::of(loads));
                }
                if (++next == steps) next = 0, --left, ahead.advance(g);
            };
            if (steps) load_next();
#pragma unroll 1
            for (int unfinished = until - tile; unfinished; --unfinished, here.advance(g)) {
#pragma unroll 1
                for (int now = 0; now < steps;) {
                    float acc[MT][NT][4];
                    clear(acc);
                    int chunk;
                    for (bool ends = false; !ends; ++now) {
                        const int2 step = *(const int2*)&steps_of(g)[now].chunk;  // and its flags
                        chunk = step.x, ends = step.y & ENDS;
                        stage ^= 1, patch ^= step.y & TURNS;
                        cp_async_wait();
                        __syncthreads();
                        if (left) load_next();
                        multiply<false, ROW, FILTERS>(acc, g.stage_at + patch * g.stage, pixels,
                                                      g.values_at + (resident ? now : stage) * g.value_stage,
                                                      table(g.items_at), class_of(g)->items);
                    }
                    const int *codes = table(g.channels_at) + chunk * ROWS, flags = Chunks(g).flags[chunk];
                    if (flags & PASSES) pass_on(acc, codes, g);
                    const int h0 = class_of(g)->a + here.p * g.tile_h * g.stride_h;
                    const int w0 = class_of(g)->b + here.q * g.tile_w * g.stride_w;
                    const Target<T> to(dx, g.x, g.height, g.width, h0, w0, here.n * IMAGES, g);
                    if (to.whole()) {
                        store<true>(acc, to, Finished{codes}, g);
                    } else {
                        store<false>(acc, to, Finished{codes}, g);
                    }
                    if (!(flags & MEETS)) continue;
                    float* own_sums = sums + share * (g.channels * g.x.c);
                    const Target<float> met(own_sums, g.x, g.height, g.width, h0, w0, here.n * IMAGES, g);
                    if (met.whole()) {
                        store<true>(acc, met, Met{codes}, g);
                    } else {
                        store<false>(acc, met, Met{codes}, g);
                    }
                }
                if (share == 0) {
                    const int h0 = class_of(g)->a + here.p * g.tile_h * g.stride_h;
                    const int w0 = class_of(g)->b + here.q * g.tile_w * g.stride_w;
                    store_zeros(Target<T>(dx, g.x, g.height, g.width, h0, w0, here.n * IMAGES, g), from, channels, g);
                }
            }
        }
    }
}

// dx of the channels that more than one share has.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
add_shares(const float* __restrict__ sums, const int* __restrict__ readers, T* __restrict__ dx, const Conv g) {
    const int slots = (g.images + SLOT - 1) / SLOT, area = g.height * g.width;
    const int ctas = (area * slots + THREADS - 1) / THREADS, channel = blockIdx.x / ctas;
    const unsigned shares = readers[channel];
    const int i = blockIdx.x % ctas * THREADS + threadIdx.x, pixel = i / slots, image = i % slots * SLOT;
    if (!(shares & (shares - 1)) || i >= area * slots) return;
    const int members = min(SLOT, g.images - image);
    const long long at = channel * g.x.c + pixel / g.width * g.x.h + pixel % g.width * g.x.w + image;
    float total[SLOT] = {};
#pragma unroll 1
    for (int share = 0; share < g.lists; ++share) {
        if (!(shares >> share & 1)) continue;
        const float* from = sums + share * (g.channels * g.x.c) + at;
        if (ALIGNED && members == SLOT) {
#pragma unroll
            for (int j = 0; j < SLOT; j += 4) {
                const float4 four = *(const float4*)(from + j);
                total[j] += four.x, total[j + 1] += four.y, total[j + 2] += four.z, total[j + 3] += four.w;
            }
        } else {
#pragma unroll
            for (int j = 0; j < SLOT; ++j) {
                if (j < members) total[j] += from[j];
            }
        }
    }
    union {
        Slot slot;
        T member[SLOT];
    } out;
#pragma unroll
    for (int j = 0; j < SLOT; ++j) out.member[j] = from_float(total[j]);
    if (ALIGNED && members == SLOT) {
        *(Slot*)(dx + at) = out.slot;
    } else {
#pragma unroll
        for (int j = 0; j < SLOT; ++j) {
            if (j < members) dx[at + j] = out.member[j];
        }
    }
}
