// fprop: y = conv(x) + bias. A CTA owns FILTERS filters of a block-row and walks tiles of pixels x IMAGES images:
// M = filters, N = images of a pixel, K = the stored (tap, channel) of the block-row, in chunks of channels that are
// loaded once for all taps and all filters.
//
// Budget, in instructions of a warp (counts/cupy.json, held by a test):
//   global -> shared  10 for each 32 slots that are copied, 58 for each 32 slots of a patch before the first channel
//   shared -> mma     2.4 to 3.6 an mma in fp16; in wavefronts of 128 bytes, per 16 items, 4*MT for values, 2*NT for x
//   results           33 to 45 for each 32 slots
//   and 145 to 175 a step, 32 to 74 a tile, 900 to 1100 once

constexpr int FILTERS = MT * 16;  // of a CTA
constexpr int PIECES = FILTERS / SLOT;
constexpr int ROW = row_bytes(FILTERS);

// Values of a chunk's items x the CTA's filters; those of items that are not stored are zero.
__device__ __forceinline__ void load_values(
    unsigned at, const T* __restrict__ values, const Chunk& chunk, int filter, const Conv& g) {
    const int* entries = table(g.entries_at) + chunk.first;
#pragma unroll 1
    for (int i = threadIdx.x; i < chunk.items * PIECES; i += THREADS) {
        const int item = i / PIECES, f = i % PIECES * SLOT;
        const unsigned to = at + item * ROW + f * SIZE;
        if (item >= chunk.stored) {
            clear_slot(to);
        } else if (filter + f < g.bk) {
            cp_async<16>(shared + to, values + (long long)entries[item] * g.bk + filter + f);
        }
    }
}

// acc starts as the bias of each filter.
__device__ __forceinline__ void begin(float (&acc)[MT][NT][4], const Conv& g) {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float b = read(g.filters_at + (FILTERS + m * 16 + half * 8 + threadIdx.x % 32 / 4) * 4);
#pragma unroll
            for (int n = 0; n < NT; ++n) acc[m][n][half * 2] = acc[m][n][half * 2 + 1] = b;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
fprop(const T* __restrict__ x, const T* __restrict__ values, const int* __restrict__ indptr,
      const int* __restrict__ indices, const T* __restrict__ bias, const int* __restrict__ row_order, T* __restrict__ y,
      const Conv g) {
    // Block-rows run fastest: they share the pixels, which so stay in L2.
    const int parts = (g.bk + FILTERS - 1) / FILTERS, rows = g.k_blocks * parts;
    const int row = blockIdx.x % rows / parts, filter = blockIdx.x % parts * FILTERS;
    const int first = indptr[row] * BC, last = indptr[row + 1] * BC;
    const Range range(blockIdx.x / rows, g);

    list_taps(g);
    list_pixels(g.places_at, g.rows, g.cols, g.step_h, g.step_w, g.x);
    list_pixels(g.pixels_at, g.tile_h, g.tile_w, 1, 1, g.y);
    clear_planes(g.units, g);
#pragma unroll 1
    for (int i = threadIdx.x; i < FILTERS; i += THREADS) {  // channel of y and bias of each filter
        const int k = row * g.bk + filter + i, channel = filter + i >= g.bk ? -1 : row_order ? row_order[k] : k;
        table(g.filters_at)[i] = channel;
        ((float*)table(g.filters_at))[FILTERS + i] = bias && channel >= 0 ? to_float(bias[channel]) : 0.0f;
    }
    const int used = find_channels(indices, first, last, g);
    // Lists have room for all of the row's entries, as a rule; else they are made anew for every tile, in parts.
    const int slack = ((used + g.units - 1) / g.units) * (STEP - 1);
    const int listed = last - first + slack <= g.capacity ? max(used, 1) : g.part;
    const Pixels pixels(g.stride_h / g.step_h, g.stride_w / g.step_w, g);
    const Share share(g.rows * g.cols * SLOTS);

    float acc[MT][NT][4];
    begin(acc, g);
    for (int tile = range.first; tile < range.last;) {
        const int until = listed >= used ? range.last : tile + 1;
        for (int from = 0;;) {
            const int end = min(from + listed, used), chunks = list_items(indices, first, last, from, end, g);
            const int steps = (until - tile) * chunks;
            int held = -1, held_other = -1;  // whose values the next stage and the other one hold
            Place ahead(tile, g), here = ahead;
            int chunk_ahead = 0, chunk_here = 0;
            for (int step = -1; step < steps; ++step) {
                if (step >= 0) {
                    cp_async_wait();
                    __syncthreads();
                }
                if (step + 1 < steps) {
                    const int stage = (step + 1) & 1;
                    const unsigned at = g.stage_at + stage * g.stage;
                    const Chunk chunk(chunk_ahead, end - from, g);
                    if (held != chunk_ahead) load_values(at + g.values_at, values, chunk, filter, g);
                    held = held_other, held_other = chunk_ahead;
                    const Source source(x, g.x, g.height, g.width, ahead.p * g.tile_h * g.stride_h - g.pad_h,
                                        ahead.q * g.tile_w * g.stride_w - g.pad_w, ahead.n * IMAGES, g);
                    load_patch(at, source, pixels_of(g.places_at), g.rows * g.cols, g.plane,
                               Listed{table(g.channels_at) + chunk.channel}, chunk.channels, share);
                    if (++chunk_ahead == chunks) chunk_ahead = 0, ahead.advance(g);
                }
                if (step < 0) continue;
                const unsigned at = g.stage_at + (step & 1) * g.stage;
                const Chunk chunk(chunk_here, end - from, g);
                multiply<true, ROW, 1>(acc, at, pixels, at + g.values_at, table(g.items_at) + chunk.first, chunk.items);
                if (++chunk_here < chunks) continue;
                chunk_here = 0;
                if (end == used) {
                    const Target<T> to(y, g.y, g.p_size, g.q_size, here.p * g.tile_h, here.q * g.tile_w, here.n * IMAGES, g);
                    const Listed channels = {table(g.filters_at)};
                    if (to.whole()) {
                        store<true>(acc, to, channels, g);
                    } else {
                        store<false>(acc, to, channels, g);
                    }
                    begin(acc, g);
                }
                here.advance(g);
            }
            if (end == used) break;
            from = end;
        }
        tile = until;
    }
}
