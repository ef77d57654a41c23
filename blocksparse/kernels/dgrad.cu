// dgrad: dx from dy. A CTA owns a range of g.units channels and walks tiles of pixels x IMAGES images, whose sums it
// holds in shared memory in fp32. It takes one block-row after the other, in steps of FILTERS filters whose patch of dy
// it reads once: M = 16 of the channels that the block-row stores (a chunk), N = images of a pixel, K = (tap, filter).
// A warp owns its pixels throughout, so the sums need neither atomics nor barriers and come out the same on every run.
//
// Budget, in instructions of a warp (counts/cupy.json, held by a test):
//   global -> shared  9.5 for each 32 slots that are copied, 73 for each 32 slots of a patch before the first filter
//   shared -> mma     3.5 to 6.2 an mma in fp16
//   results           20 for each 32 slots
//   and 335 to 385 a step, which is the most where a step has few filters; 50 a tile, 1250 once
// dy is read once for every g.units channels, dx is written once.
//
// The pixels of x with (h, w) = (a, b) modulo the stride are tiled apart: only the taps with
// (a + padding - r*dilation) % stride == 0 reach them, and those read neighbours in dy for neighbours in dx.

constexpr int ROW = row_bytes(FILTERS);
constexpr int PIECES = FILTERS / SLOT;
constexpr int SUM_PLANE = WARPS * NT * 8 + 8;  // floats from one channel to the next

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

// Lists the taps that reach the residue class (a, b), and the items of a step: (tap, filter). Returns their number.
__device__ __forceinline__ int list_own(int a, int b, int least_h, int least_w, const Conv& g) {
    const int taps = g.r_size * g.s_size, lane = threadIdx.x % 32;
    int *own = table(g.taps_at), *starts = table(g.starts_at);
    if (threadIdx.x < 32) {
        int total = 0;
#pragma unroll 1
        for (int t = lane; t - lane < taps; t += 32) {
            int dp = 0, dq = 0;
            bool reaches = t < taps && reached(a, g.pad_h, t / g.s_size, g.dilation_h, g.stride_h, &dp);
            reaches = reaches && reached(b, g.pad_w, t % g.s_size, g.dilation_w, g.stride_w, &dq);
            const unsigned vote = __ballot_sync(~0u, reaches);
            if (reaches) {
                const int i = total + __popc(vote & ((1u << lane) - 1));
                own[i] = t;
                starts[i] = ((dp - least_h) * g.cols + dq - least_w) * SLOTS * 16;
            }
            total += __popc(vote);
        }
        if (lane == 0) own[taps] = total;
    }
    __syncthreads();
    const int total = own[taps], items = total * FILTERS;
#pragma unroll 1
    for (int i = threadIdx.x; i < (items + STEP - 1) / STEP * STEP; i += THREADS) {
        const int f = i % FILTERS;
        table(g.items_at)[i] = i < items ? f * g.plane * 16 + starts[i / FILTERS] : FILTERS * g.plane * 16;
    }
    return total;
}

// The number of chunks of block-rows from .. from + rows; how many come before each is listed. All threads call it.
__device__ __forceinline__ int count_chunks(
    const int* __restrict__ indptr, const int* __restrict__ indices, int from, int rows, int first_channel, int channels,
    const Conv& g) {
    unsigned* bitmap = (unsigned*)table(g.bitmap_at);
    int* before = table(g.before_at);
    const int words = (g.units + 31) / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * words; i += THREADS) bitmap[i] = 0;
    __syncthreads();
#pragma unroll 1
    for (int row = warp; row < rows; row += WARPS) {
        const int last = indptr[from + row + 1] * BC;
#pragma unroll 1
        for (int e = indptr[from + row] * BC + lane; e < last; e += 32) {
            const int c = column_of(indices, e) % g.channels - first_channel;
            if (c >= 0 && c < channels) atomicOr(&bitmap[row * words + c / 32], 1u << c % 32);
        }
    }
    __syncthreads();
    if (warp == 0) {
        int total = 0;
#pragma unroll 1
        for (int row = lane; row - lane < rows; row += 32) {
            int own = 0;
#pragma unroll 1
            for (int i = 0; row < rows && i < words; ++i) own += __popc(bitmap[row * words + i]);
            own = (own + 15) / 16;
            int sum = own;
#pragma unroll
            for (int delta = 1; delta < 32; delta *= 2) {
                const int below = __shfl_up_sync(~0u, sum, delta);
                if (lane >= delta) sum += below;
            }
            if (row < rows) before[row] = total + sum - own;
            total += __shfl_sync(~0u, sum, 31);
        }
        if (lane == 0) before[rows] = total;
    }
    __syncthreads();
    return before[rows];
}

// Lists the chunks that count_chunks counted: channels, as numbers within the range, and the entry of each (tap,
// channel), or -1.
__device__ __forceinline__ void list_chunks(
    const int* __restrict__ indptr, const int* __restrict__ indices, int from, int rows, int first_channel, int channels,
    int chunks, const Conv& g) {
    const unsigned* bitmap = (const unsigned*)table(g.bitmap_at);
    const int words = (g.units + 31) / 32, taps = g.r_size * g.s_size;
#pragma unroll 1
    for (int i = threadIdx.x; i < chunks * 16; i += THREADS) table(g.channels_at)[i] = -1;
#pragma unroll 1
    for (int i = threadIdx.x; i < chunks * taps * 16; i += THREADS) table(g.entries_at)[i] = -1;
    __syncthreads();
#pragma unroll 1
    for (int row = threadIdx.x / 32; row < rows; row += WARPS) {
        const int last = indptr[from + row + 1] * BC;
#pragma unroll 1
        for (int e = indptr[from + row] * BC + threadIdx.x % 32; e < last; e += 32) {
            const int column = column_of(indices, e), tap = column / g.channels;
            const int c = column - tap * g.channels - first_channel;
            if (c < 0 || c >= channels) continue;
            int rank = __popc(bitmap[row * words + c / 32] & ((1u << c % 32) - 1));
#pragma unroll 1
            for (int i = 0; i < c / 32; ++i) rank += __popc(bitmap[row * words + i]);
            const int chunk = table(g.before_at)[row] + rank / 16;
            table(g.channels_at)[chunk * 16 + rank % 16] = c;  // of all its taps the same
            table(g.entries_at)[(chunk * taps + tap) * 16 + rank % 16] = e;
        }
    }
    __syncthreads();
}

// The steps of a tile: block-rows that have chunks, their filters, their chunks.
struct Steps {
    int row, filter, chunk;  // chunk: of all listed

    __device__ __forceinline__ void begin(int rows, const Conv& g) {
        row = -1;
        next_row(rows, g);
    }
    __device__ __forceinline__ void next_row(int rows, const Conv& g) {
        const int* before = table(g.before_at);
        for (++row; row < rows && before[row] == before[row + 1]; ++row) {
        }
        filter = 0, chunk = row < rows ? before[row] : 0;
    }
    // Whether there is another step of the tile.
    __device__ __forceinline__ bool advance(int rows, const Conv& g) {
        const int* before = table(g.before_at);
        if (++chunk < before[row + 1]) return true;
        filter += FILTERS;
        chunk = before[row];
        if (filter < g.bk) return true;
        next_row(rows, g);
        return row < rows;
    }
    // Whether the step reads another patch than the one before.
    __device__ __forceinline__ bool turns(const Conv& g) const {
        return chunk == table(g.before_at)[row];
    }
};

// Values of a chunk's channels x `own` taps x FILTERS filters, zero where a channel lacks the tap; behind an odd number
// of taps that do not fill a STEP, zeros.
__device__ __forceinline__ void load_values(
    unsigned at, const T* __restrict__ values, const Steps& step, int own, int rows_of_values, const Conv& g) {
    const int* entries = table(g.entries_at) + step.chunk * (g.r_size * g.s_size) * 16;
#pragma unroll 1
    for (int i = threadIdx.x; i < rows_of_values * PIECES; i += THREADS) {
        const int row = i / PIECES, f = i % PIECES * SLOT, t = row / 16;
        const int e = t < own ? entries[table(g.taps_at)[t] * 16 + row % 16] : -1;
        const unsigned to = at + row * ROW + f * SIZE;
        if (e < 0) {
            clear_slot(to);
        } else {
            cp_async<16>(shared + to, values + (long long)e * g.bk + step.filter + f);
        }
    }
}

// sums += acc, for the chunk's channels and this warp's octets.
__device__ __forceinline__ void add(const float (&acc)[MT][NT][4], int chunk, const Conv& g) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int c = table(g.channels_at)[chunk * 16 + half * 8 + lane / 4];
        if (c < 0) continue;
        float2* to = (float2*)(shared + g.sums_at) + (c * SUM_PLANE + warp * NT * 8) / 2 + lane % 4;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            float2 sum = to[n * 4];
            sum.x += acc[0][n][half * 2], sum.y += acc[0][n][half * 2 + 1];
            to[n * 4] = sum;
        }
    }
}

// Writes this warp's pixels of a tile, and zeros where their sums were. A lane takes one octet of every 32 / NT-th channel.
// WHOLE: all images of the tile exist, and lie where they can be written together.
template <bool WHOLE>
__device__ __forceinline__ void store(
    T* __restrict__ dx, const Place& place, int a, int b, int first_channel, int channels, const Conv& g) {
    const int lane = threadIdx.x % 32, octet = threadIdx.x / 32 * NT + lane % NT, i = octet / 2;
    const Pixel pixel = i < g.tile_h * g.tile_w ? pixels_of(g.pixels_at)[i] : Pixel{-1, 0};
    const int h0 = a + place.p * g.tile_h * g.stride_h, w0 = b + place.q * g.tile_w * g.stride_w;
    const int image = place.n * IMAGES + octet % 2 * 8, images = g.images - image;
    const bool inside =
        pixel.place >= 0 && h0 + (pixel.place >> 16) < g.height && w0 + (pixel.place & 0xffff) < g.width;
    int c = lane / NT;
    T* to = dx + h0 * g.x.h + w0 * g.x.w + image + pixel.offset + (first_channel + c) * g.x.c;
    float4* sum = (float4*)(shared + g.sums_at) + (c * SUM_PLANE + octet * 8) / 4;
    __syncwarp();
#pragma unroll 1
    for (; c < channels; c += 32 / NT, to += 32 / NT * g.x.c, sum += 32 / NT * SUM_PLANE / 4) {
        const float4 low = sum[0], high = sum[1];
        sum[0] = sum[1] = float4{0.0f, 0.0f, 0.0f, 0.0f};
        if (!inside) continue;
        if (WHOLE) {
#if MATH == FP16 || MATH == BF16
            *(uint4*)to = uint4{pack(low.x, low.y), pack(low.z, low.w), pack(high.x, high.y), pack(high.z, high.w)};
#else
            *(float4*)to = low;
            *(float4*)(to + 4) = high;
#endif
        } else {
            const float all[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                if (j < images) to[j] = from_float(all[j]);
            }
        }
    }
    __syncwarp();
}

__device__ __forceinline__ void store_sums(
    T* __restrict__ dx, const Place& place, int a, int b, int first_channel, int channels, const Conv& g) {
    if (ALIGNED && (place.n + 1) * IMAGES <= g.images) {
        store<true>(dx, place, a, b, first_channel, channels, g);
    } else {
        store<false>(dx, place, a, b, first_channel, channels, g);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
dgrad(const T* __restrict__ dy, const T* __restrict__ values, const int* __restrict__ indptr,
      const int* __restrict__ indices, const int* __restrict__ row_order, T* __restrict__ dx, const Conv g) {
    // Ranges of channels run fastest: they share the pixels of dy, which so stay in L2.
    const int ranges = (g.channels + g.units - 1) / g.units, columns = min(g.stride_w, g.width);
    const int classes = min(g.stride_h, g.height) * columns;
    const int first_channel = blockIdx.x % ranges * g.units, channels = min(g.units, g.channels - first_channel);
    const int residue = blockIdx.x / ranges % classes, a = residue / columns, b = residue % columns;
    const Range range(blockIdx.x / ranges / classes, g);
    if (range.first == range.last) return;

    const int least_h = least_reached(a, g.pad_h, g.r_size, g.dilation_h, g.stride_h);
    const int least_w = least_reached(b, g.pad_w, g.s_size, g.dilation_w, g.stride_w);
    list_pixels(g.places_at, g.rows, g.cols, 1, 1, g.y);
    list_pixels(g.pixels_at, g.tile_h, g.tile_w, g.stride_h, g.stride_w, g.x);
    clear_planes(FILTERS, g);
#pragma unroll 1
    for (int i = threadIdx.x; i < g.units * SUM_PLANE / 4; i += THREADS) clear_slot(g.sums_at + i * 16);
    const int own = list_own(a, b, least_h, least_w, g);
    const int items = (own * FILTERS + STEP - 1) / STEP * STEP, rows_of_values = (items + FILTERS - 1) / FILTERS * 16;
    const Pixels pixels(1, 1, g);
    const Share share(g.rows * g.cols * SLOTS);

    // Lists have room for all block-rows, as a rule; else they are made anew for every tile, in parts.
    int at_once = own ? min(g.k_blocks, g.lists) : 0;
    if (own && count_chunks(indptr, indices, 0, at_once, first_channel, channels, g) > g.capacity) at_once = g.part;
    for (int tile = range.first; tile < range.last;) {
        const int until = at_once >= g.k_blocks || !own ? range.last : tile + 1;
        for (int from = 0;;) {
            const int rows = min(at_once, g.k_blocks - from);
            const int chunks = own ? count_chunks(indptr, indices, from, rows, first_channel, channels, g) : 0;
            if (chunks) list_chunks(indptr, indices, from, rows, first_channel, channels, chunks, g);
            const bool ends = !own || from + rows == g.k_blocks;  // the tile
            Place ahead(tile, g), here = ahead;
            if (!chunks) {
                for (; ends && tile < until; ++tile, here.advance(g)) {
                    store_sums(dx, here, a, b, first_channel, channels, g);
                }
            } else {
                Steps next, now;
                next.begin(rows, g), now.begin(rows, g);
                int stage_ahead = 0, stage = 0, patch_ahead = 0, patch = 0, left = until - tile, unfinished = left;
                for (bool first = true; unfinished; first = false) {
                    if (!first) {
                        cp_async_wait();
                        __syncthreads();
                    }
                    if (left) {
                        load_values(g.stage_at + stage_ahead * g.stage + g.values_at, values, next, own, rows_of_values, g);
                        stage_ahead ^= 1;
                        if (next.turns(g)) {
                            patch_ahead ^= 1;
                            const Ordered filters = {row_order, (from + next.row) * g.bk + next.filter};
                            const Source source(dy, g.y, g.p_size, g.q_size, ahead.p * g.tile_h + least_h,
                                                ahead.q * g.tile_w + least_w, ahead.n * IMAGES, g);
                            load_patch(g.stage_at + patch_ahead * g.stage, source, pixels_of(g.places_at),
                                       g.rows * g.cols, g.plane, filters, FILTERS, share);
                        }
                        if (!next.advance(rows, g)) {
                            next.begin(rows, g);
                            ahead.advance(g);
                            --left;
                        }
                    }
                    if (first) continue;
                    if (now.turns(g)) patch ^= 1;
                    float acc[MT][NT][4];
                    clear(acc);
                    multiply<false, ROW, FILTERS>(acc, g.stage_at + patch * g.stage, pixels,
                                                  g.stage_at + stage * g.stage + g.values_at, table(g.items_at), items);
                    stage ^= 1;
                    add(acc, now.chunk, g);
                    if (now.advance(rows, g)) continue;
                    if (ends) store_sums(dx, here, a, b, first_channel, channels, g);
                    now.begin(rows, g);
                    here.advance(g);
                    --unfinished;
                }
            }
            if (ends) break;
            from += rows;
        }
        tile = until;
    }
}
