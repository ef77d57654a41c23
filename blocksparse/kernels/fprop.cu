// fprop: y = conv(x) + bias. A CTA owns a slot's images of a tile of pixels x N filters of one block-row: M = pixels,
// N = filters, K = the stored (tap, channel) of the block-row, in chunks of channels that it loads once for all taps.
//
// Budget of a CTA and chunk of c channels with t taps each, 2-byte values, P pixels of the tile, H >= P with its halo:
//   global -> shared  16*c*H bytes of x, 2*c*t*N of values; from L2 in sectors of 32 bytes, so rows of 16 pixels and
//                     more are read nearly once (contiguous) and single channels 16 times (channels_last)
//   issue             95 to 100 instructions for each 32 of c*H slots, 8 loads and a store among them (counts/cupy.json)
//   shared -> mma     per 16 pixels x 16 entries, in wavefronts of 128 bytes: 4 for pixels + 2*NT / MT for values
//   mma               NT of m16n8k16 for those, 1.6 clocks each on sm_90 (mma.sync): shared memory limits NT <= 2
// Loading and multiplying overlap between the CTAs of a multiprocessor.

constexpr bool BY_ITEM = G == 1;  // values of an entry lie by filter; else those of a filter by channel
constexpr int ROW = BY_ITEM ? row_bytes(N) : row_bytes(ITEMS);
constexpr int PATCH_AT = VALUES_AT + (BY_ITEM ? ITEMS : N) * ROW;
constexpr int OUT_PLANE = POSITIONS | 1;  // slots from one filter to the next in the tile of results

// Values of the listed entries x the CTA's filters, zero for items from `count` up to a multiple of STEP.
__device__ __forceinline__ void load_values(const T* __restrict__ values, int filter, int count, const Conv& g) {
    const int* entries = table(ENTRIES_AT);
    const int end = (count + STEP - 1) / STEP * STEP;
    if constexpr (BY_ITEM) {
        constexpr int PIECES = N / SLOT;
        for (int i = threadIdx.x; i < end * PIECES; i += THREADS) {
            const int item = i / PIECES, f = i % PIECES * SLOT;
            unsigned char* to = shared + VALUES_AT + item * ROW + f * SIZE;
            if (item >= count) {
                *(Slot*)to = zero_slot();
            } else if (filter + f < g.bk) {
                cp_async<16>(to, values + (long long)entries[item] * g.bk + filter + f);
            }
        }
    } else {
        const int groups = count / G;
#pragma unroll 1
        for (int i = threadIdx.x; i < groups * N; i += THREADS) {
            const int group = i % groups, f = i / groups;
            const int entry = entries[group] >> g.log_parts, part = entries[group] - (entry << g.log_parts);
            const T* from = values + ((long long)entry * g.bk + filter + f) * g.bc + part * G;
            if (filter + f < g.bk) cp_async<G * SIZE>(shared + VALUES_AT + f * ROW + group * G * SIZE, from);
        }
        for (int i = threadIdx.x; i < (end - count) * N; i += THREADS) {
            *(T*)(shared + VALUES_AT + i % N * ROW + (count + i / N) * SIZE) = T(0);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
fprop(const T* __restrict__ x, const T* __restrict__ values, const int* __restrict__ indptr,
      const int* __restrict__ indices, const T* __restrict__ bias, const int* __restrict__ row_order, T* __restrict__ y,
      const Conv g) {
    // Block-rows run fastest: they share the pixels, which so stay in L2.
    const int parts_n = (g.bk + N - 1) / N;  // CTAs that share a block-row
    const int row = blockIdx.x / parts_n % g.k_blocks, filter = blockIdx.x % parts_n * N;
    int tile = blockIdx.x / parts_n / g.k_blocks;
    const int q0 = tile % g.tiles_w * g.tile_w;
    tile /= g.tiles_w;
    const int p0 = tile % g.tiles_h * g.tile_h, image0 = tile / g.tiles_h * IMAGES, band = g.tiles_h * g.tile_h;

    const Pixels pixels = find_pixels(g.stride_h / g.step_h, g.stride_w / g.step_w, g);
    float acc[MT][NT][4] = {};
    clear_zero_plane(PATCH_AT, g.units * G, g);

    const int blocks_at_once = min(MAX_BLOCKS, CELLS / g.taps);
    for (int first_tap = 0; first_tap < g.r_size * g.s_size; first_tap += g.taps) {
        const int r0 = first_tap / g.s_size, s0 = first_tap % g.s_size;
        for (int t = threadIdx.x; t < g.taps; t += THREADS) {
            const int dr = (first_tap + t) / g.s_size - r0, ds = (first_tap + t) % g.s_size - s0;
            table(DISPLACED_AT)[t] = dr * (g.dilation_h / g.step_h) * g.cols + ds * (g.dilation_w / g.step_w);
        }
        const int h0 = p0 * g.stride_h + r0 * g.dilation_h - g.pad_h;
        const int w0 = q0 * g.stride_w + s0 * g.dilation_w - g.pad_w;

        for (int first_block = 0; first_block < g.c_blocks; first_block += blocks_at_once) {
            const int blocks = min(blocks_at_once, g.c_blocks - first_block);
            const int used = scan(indptr, indices, row, g.c_blocks, first_tap, g.taps, ~0u, first_block, blocks);
            const int end = used << g.log_parts;
            for (int unit = 0; unit < end;) {
                const Chunk chunk = take(unit, end, 0, 1 << g.log_parts, g.units, ITEMS / G, g);
                const int count = list_items(chunk, first_block, g);
                __syncthreads();
                load_values(values, filter, count, g);
                load_patch(PATCH_AT, x, g.x, g.height, g.width, g, image0, band * g.stride_h, h0, w0, g.step_h,
                           g.step_w, g.rows, g.cols, g.plane, table(CHANNELS_AT), chunk.units * G);
                cp_async_wait();
                __syncthreads();
                multiply<BY_ITEM>(acc, PATCH_AT, pixels, VALUES_AT, ROW, count);
                __syncthreads();
                unit += chunk.units;
            }
        }
    }

    // Results go through shared memory, so that neighbouring threads write neighbouring elements.
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncthreads();
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int f = n * 8 + lane % 4 * 2 + j, k = row * g.bk + filter + f;
            const float b = bias && filter + f < g.bk ? to_float(bias[row_order ? row_order[k] : k]) : 0.0f;
#pragma unroll
            for (int m = 0; m < MT; ++m) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int pixel = (warp * MT + m) * 16 + half * 8 + lane / 4;
                    ((T*)shared)[f * OUT_PLANE * SLOT + pixel] = from_float(acc[m][n][half * 2 + j] + b);
                }
            }
        }
    }
    __syncthreads();
    const int filters = min(N, g.bk - filter), area = g.tile_h * g.tile_w;
    for (int i = threadIdx.x; i < filters * area; i += THREADS) {
        const int f = g.channels_last ? i % filters : i / area, position = g.channels_last ? i / filters : i % area;
        const int p = p0 + position / g.tile_w, q = q0 + position % g.tile_w;
        const int k = row * g.bk + filter + f;
        if (p < g.p_size && q < g.q_size) {
            T* to = y + image0 * g.y.n + (row_order ? row_order[k] : k) * g.y.c + p * g.y.h + q * g.y.w;
            const T* from = (const T*)shared + (f * OUT_PLANE + position) * SLOT;
            store_slot(to, g.y, g.images - image0, band, p, g.p_size, from);
        }
    }
}
