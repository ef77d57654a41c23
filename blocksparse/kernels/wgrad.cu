// wgrad: dvalues from x and dy. A CTA owns a split of the pixels and walks chunks of a block-row's stored entries:
// M = entries, N = filters, K = (pixel, member): slots of both operands are rows of K as they lie.
//
// Splits go through an fp32 workspace that add_splits() adds up in order: no atomics, the same bits on every run. No
// grid depends on which blocks are stored.
//
// Budget of a CTA, chunk of c channels with t taps each, and tile of P pixels, 2-byte values, H >= P with the halo:
//   global -> shared  16*c*H bytes of x, 16*N*P of dy
//   issue             95 to 100 instructions for each 32 of c*H + N*P slots, 8 loads and a store among them (counts/cupy.json)
//   shared -> mma     per 16 entries x 16 (2 pixels), in wavefronts of 128 bytes: 4 for x, 2*NT/MT for dy
//   mma               NT of m16n8k16 for those
// and 8 bytes of workspace per split and value.

constexpr int MAX_PIXELS = 256;                        // of a tile
constexpr int FILTERS_AT = VALUES_AT;                  // [N] channel of dy of each filter
constexpr int PIXELS_AT = FILTERS_AT + N * 4;          // [MAX_PIXELS + 4] byte offset of a pixel in a plane of x
constexpr int PATCH_AT = PIXELS_AT + (MAX_PIXELS + 4) * 4;

// acc[m][n] += x[items of tile m] x dy[filters of tile n] over the pixels of the tile.
__device__ __forceinline__ void multiply_pixels(
    float (&acc)[MT][NT][4], const unsigned (&at)[MT][2], int tiles, unsigned dy_at, int dy_plane, int count) {
    const int lane = threadIdx.x % 32;
    const int* pixels = table(PIXELS_AT);
#if MATH != FP32
    for (int k = 0; k < count; k += 2) {
        unsigned b[NT][2];
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
            unsigned two[4];
            const int f = (n + (n + 1 < NT ? lane >> 4 : 0)) * 8 + (lane & 7);
            ldmatrix4(two, shared + dy_at + (f * dy_plane + k + (lane >> 3 & 1)) * 16);
            b[n][0] = two[0], b[n][1] = two[1];
            if (n + 1 < NT) b[n + 1][0] = two[2], b[n + 1][1] = two[3];
        }
        const unsigned pixel = pixels[k + (lane >> 4)];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            if (m >= tiles) break;
            unsigned a[4];
            ldmatrix4(a, shared + at[m][0] + pixel);
#pragma unroll
            for (int n = 0; n < NT; ++n) mma(acc[m][n], a, b[n]);
        }
    }
#else
    for (int k = 0; k < count; ++k) {
#pragma unroll
        for (int member = 0; member < SLOT; ++member) {
            float b[NT][2];
#pragma unroll
            for (int n = 0; n < NT; ++n) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    b[n][j] = read(dy_at + ((n * 8 + lane % 4 * 2 + j) * dy_plane + k) * 16 + member * 4);
                }
            }
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                if (m >= tiles) break;
                const unsigned pixel = pixels[k] + member * 4;
                const float upper = read(at[m][0] + pixel), lower = read(at[m][1] + pixel);
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    acc[m][n][0] += upper * b[n][0];
                    acc[m][n][1] += upper * b[n][1];
                    acc[m][n][2] += lower * b[n][0];
                    acc[m][n][3] += lower * b[n][1];
                }
            }
        }
    }
#endif
}

// out: the result, where there is one split; else sums: [splits, size], fp32.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
wgrad(const T* __restrict__ x, const T* __restrict__ dy, const int* __restrict__ indptr,
      const int* __restrict__ indices, const int* __restrict__ row_order, T* __restrict__ out,
      float* __restrict__ sums, const long long size, const Conv g) {
    // CTAs of one split run side by side: they share its pixels.
    const int parts_n = (g.bk + N - 1) / N, parts = g.k_blocks * parts_n;
    const int row = blockIdx.x % parts / parts_n, filter = blockIdx.x % parts_n * N, filters = min(N, g.bk - filter);
    const int list = blockIdx.x / parts % g.lists, split = blockIdx.x / parts / g.lists;
    const int tiles = (g.images + IMAGES - 1) / IMAGES * g.tiles_h * g.tiles_w, band = g.tiles_h * g.tile_h;
    const int tiles_each = (tiles + g.splits - 1) / g.splits;
    const int first_tile = split * tiles_each, last_tile = min(first_tile + tiles_each, tiles);

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int area = g.tile_h * g.tile_w, dy_plane = (area + 1) | 1;
    const unsigned dy_at = PATCH_AT + g.units * G * g.plane * 16;
    for (int i = threadIdx.x; i < N; i += THREADS) {
        const int k = row * g.bk + min(filter + i, g.bk - 1);
        table(FILTERS_AT)[i] = row_order ? row_order[k] : k;
    }
    for (int i = threadIdx.x; i <= area; i += THREADS) {
        const int h = i / g.tile_w * (g.stride_h / g.step_h), w = i % g.tile_w * (g.stride_w / g.step_w);
        table(PIXELS_AT)[i] = i < area ? (h * g.cols + w) * 16 : 0;
    }
    // K comes in twos: behind an odd number of pixels there is one of zeros.
    for (int i = threadIdx.x; i < N * dy_plane; i += THREADS) *(Slot*)(shared + dy_at + i * 16) = zero_slot();

    const int blocks_at_once = min(MAX_BLOCKS, CELLS / g.taps);
    int turn = 0;  // chunks are dealt out to the lists
    for (int first_tap = 0; first_tap < g.r_size * g.s_size; first_tap += g.taps) {
        const int r0 = first_tap / g.s_size, s0 = first_tap % g.s_size;
        for (int t = threadIdx.x; t < g.taps; t += THREADS) {
            const int dr = (first_tap + t) / g.s_size - r0, ds = (first_tap + t) % g.s_size - s0;
            table(DISPLACED_AT)[t] = dr * (g.dilation_h / g.step_h) * g.cols + ds * (g.dilation_w / g.step_w);
        }
        for (int first_block = 0; first_block < g.c_blocks; first_block += blocks_at_once) {
            const int blocks = min(blocks_at_once, g.c_blocks - first_block);
            const int used = scan(indptr, indices, row, g.c_blocks, first_tap, g.taps, ~0u, first_block, blocks);
            const int end = used << g.log_parts;
            for (int unit = 0; unit < end;) {
                const Chunk chunk = take(unit, end, 0, 1 << g.log_parts, g.units, ITEMS / G, g);
                unit += chunk.units;
                if (turn++ % g.lists != list) continue;
                const int count = list_items(chunk, first_block, g);
                __syncthreads();
                // Tiles of 16 items go round the warps.
                unsigned at[MT][2];
                int item_tiles = 0;
#pragma unroll
                for (int m = 0; m < MT; ++m) {
                    const int first = (m * WARPS + warp) * 16;
                    if (first < count) item_tiles = m + 1;
#if MATH != FP32
                    const int item = first + lane % 16;
                    at[m][0] = PATCH_AT + (item < count ? table(ITEMS_AT)[item] : 0);
#else
                    for (int half = 0; half < 2; ++half) {
                        const int item = first + half * 8 + lane / 4;
                        at[m][half] = PATCH_AT + (item < count ? table(ITEMS_AT)[item] : 0);
                    }
#endif
                }
                float acc[MT][NT][4] = {};
                for (int tile = first_tile; tile < last_tile; ++tile) {
                    const int q0 = tile % g.tiles_w * g.tile_w, p0 = tile / g.tiles_w % g.tiles_h * g.tile_h;
                    const int image0 = tile / g.tiles_w / g.tiles_h * IMAGES;
                    const int h0 = p0 * g.stride_h + r0 * g.dilation_h - g.pad_h;
                    const int w0 = q0 * g.stride_w + s0 * g.dilation_w - g.pad_w;
                    load_patch(PATCH_AT, x, g.x, g.height, g.width, g, image0, band * g.stride_h, h0, w0, g.step_h,
                               g.step_w, g.rows, g.cols, g.plane, table(CHANNELS_AT), chunk.units * G);
                    load_patch(dy_at, dy, g.y, g.p_size, g.q_size, g, image0, band, p0, q0, 1, 1, g.tile_h, g.tile_w,
                               dy_plane, table(FILTERS_AT), filters);
                    __syncthreads();
                    multiply_pixels(acc, at, item_tiles, dy_at, dy_plane, area);
                    __syncthreads();
                }
#pragma unroll
                for (int m = 0; m < MT; ++m) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int item = (m * WARPS + warp) * 16 + half * 8 + lane / 4;
                        if (item >= count) continue;
                        const int packed = table(ENTRIES_AT)[item / G], entry = packed >> g.log_parts;
                        const int channel = (packed - (entry << g.log_parts)) * G + item % G;
                        const long long to = ((long long)entry * g.bk + filter) * g.bc + channel;
#pragma unroll
                        for (int n = 0; n < NT; ++n) {
#pragma unroll
                            for (int j = 0; j < 2; ++j) {
                                const int f = n * 8 + lane % 4 * 2 + j;
                                if (f >= filters) continue;
                                if (sums) {
                                    sums[split * size + to + f * g.bc] = acc[m][n][half * 2 + j];
                                } else {
                                    out[to + f * g.bc] = from_float(acc[m][n][half * 2 + j]);
                                }
                            }
                        }
                    }
                }
                __syncthreads();
            }
            __syncthreads();
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
add_splits(const float* __restrict__ sums, T* __restrict__ out, const long long size, const int splits) {
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i >= size) return;
    float total = 0.0f;
    for (int split = 0; split < splits; ++split) total += sums[split * size + i];
    out[i] = from_float(total);
}
