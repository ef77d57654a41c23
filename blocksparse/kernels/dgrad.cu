// dgrad: dx from dy. A CTA owns a slot's images of a tile of pixels x g.range channels of dx, held in fp32 in shared
// memory, and adds one block-row after the other in order: M = pixels, N = the channels that the block-row stores,
// K = its stored (tap, filter). A warp owns its pixels throughout, so the sum needs neither atomics nor barriers and
// comes out the same on every run.
//
// The pixels of x with (h, w) = (a, b) modulo the stride are tiled apart: only the taps with
// (a + padding - r*dilation) % stride == 0 reach them, and those read neighbours in dy for neighbours in dx.
//
// Budget of a CTA and step of f filters with t taps, 2-byte values, P pixels of the tile, H >= P with its halo:
//   global -> shared  16*f*H bytes of dy, 2*f*t*c of values for the c channels of the range that the block-row stores
//   issue             95 to 100 instructions for each 32 of f*H slots, 8 loads and a store among them (counts/cupy.json)
//   shared -> mma     per 16 pixels x 16 (tap, filter), in wavefronts of 128 bytes: 4 for pixels + 2*NT / MT for values
//   shared -> sum     8 wavefronts per 16 pixels x 8 channels and step: the floor where f*t is small
//   mma               NT of m16n8k16 per 16 x 16; channels whose taps differ meet zeros in the others' taps
// dy is read once for every g.range channels, dx is written once.

constexpr bool BY_ITEM = G != 1;
constexpr int ROW = BY_ITEM ? row_bytes(N) : row_bytes(ITEMS);
constexpr int PATCH_AT = VALUES_AT + (BY_ITEM ? ITEMS : N) * ROW;
constexpr int SUM_PLANE = POSITIONS * SLOT + 4;  // floats from one channel of the sum to the next: other banks

// Along one axis: dy row of tap r is this much further than the tile's own, for taps that the residue class owns.
__device__ __forceinline__ bool reached(int residue, int pad, int tap, int dilation, int stride, int* further) {
    const int reach = residue + pad - tap * dilation;
    *further = reach / stride;
    return reach % stride == 0;
}

__device__ __forceinline__ int least_reached(int residue, int pad, int first, int taps, int dilation, int stride) {
    int least = 0, further;
    for (int tap = first; tap < first + taps; ++tap) {
        if (reached(residue, pad, tap, dilation, stride, &further)) least = further;  // falls from tap to tap
    }
    return least;
}

// Lists (tap, filter) for the taps that any unit of the chunk has, and loads the values, zero where a unit lacks the
// tap. Returns the number of items.
__device__ __forceinline__ int load_values(
    const T* __restrict__ values, const Chunk& chunk, int filter, int filters, const Conv& g) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int* items = table(ITEMS_AT);
    unsigned any = chunk.taps;
#pragma unroll
    for (int delta = 16; delta; delta /= 2) any |= __shfl_xor_sync(~0u, any, delta);
    // A piece is 16 bytes of filters of one channel, or the G channels of a unit of one filter.
    constexpr int ALONG = BY_ITEM ? 1 : SLOT;
    const int pieces = filters / ALONG * chunk.units;
    int item = 0;
    for (int t = 0; t < g.taps; ++t) {
        if (!(any >> t & 1)) continue;
        if (t % WARPS == warp) {
            for (int f = lane; f < filters; f += 32) items[item + f] = (f * g.plane + table(DISPLACED_AT)[t]) * 16;
#pragma unroll 1
            for (int first = 0; first < pieces; first += 32) {
                const int i = first + lane;
                const int u = BY_ITEM ? i % chunk.units : i / (filters / ALONG);
                const int f = BY_ITEM ? i / chunk.units : i % (filters / ALONG) * ALONG;
                const int unit = __shfl_sync(~0u, chunk.unit, u % 32);
                const bool has = __shfl_sync(~0u, chunk.taps, u % 32) >> t & 1;
                if (i >= pieces) continue;
                const int at = BY_ITEM ? (item + f) * ROW + u * G * SIZE : u * ROW + (item + f) * SIZE;
                unsigned char* to = shared + VALUES_AT + at;
                if (has) {
                    const int block = unit >> g.log_parts, part = unit - (block << g.log_parts);
                    const long long entry = table(CELLS_AT)[block * g.taps + t];
                    const T* from = values + (entry * g.bk + filter + f) * g.bc + part * G;
                    cp_async<BY_ITEM ? G * SIZE : 16>(to, from);
                } else {
                    constexpr int WORDS = (BY_ITEM ? G * SIZE : 16) / 4;
                    for (int j = 0; j < WORDS; ++j) ((unsigned*)to)[j] = 0;
                }
            }
        }
        item += filters;
    }
    const int pad = (item + STEP - 1) / STEP * STEP - item;
    if ((int)threadIdx.x < pad) items[item + threadIdx.x] = g.filters * g.plane * 16;
    for (int i = threadIdx.x; i < pad * N; i += THREADS) {
        const int k = item + i / N, n = i % N;
        *(T*)(shared + VALUES_AT + (BY_ITEM ? k * ROW + n * SIZE : n * ROW + k * SIZE)) = T(0);
    }
    return item;
}

extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
dgrad(const T* __restrict__ dy, const T* __restrict__ values, const int* __restrict__ indptr,
      const int* __restrict__ indices, const int* __restrict__ row_order, T* __restrict__ dx, const Conv g) {
    // Ranges of channels run fastest: they share the pixels of dy, which so stay in L2.
    const int ranges = (g.c_blocks * g.bc + g.range - 1) / g.range;
    const int first_channel = blockIdx.x % ranges * g.range;
    int tile = blockIdx.x / ranges;
    const int columns = min(g.stride_w, g.width), classes = min(g.stride_h, g.height) * columns;
    const int a = tile % classes / columns, b = tile % classes % columns;
    tile /= classes;
    const int j0 = tile % g.tiles_w * g.tile_w;
    tile /= g.tiles_w;
    const int i0 = tile % g.tiles_h * g.tile_h, image0 = tile / g.tiles_h * IMAGES, band = g.tiles_h * g.tile_h;
    if (a + (long long)i0 * g.stride_h >= g.height || b + (long long)j0 * g.stride_w >= g.width) return;

    const int first_block = first_channel / g.bc, first_part = first_channel % g.bc / G;
    const int blocks = min(max(g.range / g.bc, 1), g.c_blocks - first_block);
    const int parts = min(g.range / G, 1 << g.log_parts);  // of a block, in the range
    const unsigned sum_at = PATCH_AT + (g.filters + 1) * g.plane * 16;
    float* sum = (float*)(shared + sum_at);
    for (int i = threadIdx.x; i < g.range * SUM_PLANE; i += THREADS) sum[i] = 0.0f;
    clear_zero_plane(PATCH_AT, g.filters, g);
    const Pixels pixels = find_pixels(1, 1, g);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int taps_h = g.taps == g.r_size * g.s_size ? g.r_size : 1, taps_w = g.taps / taps_h;

    for (int first_tap = 0; first_tap < g.r_size * g.s_size; first_tap += g.taps) {
        const int r0 = first_tap / g.s_size, s0 = first_tap % g.s_size;
        const int least_h = least_reached(a, g.pad_h, r0, taps_h, g.dilation_h, g.stride_h);
        const int least_w = least_reached(b, g.pad_w, s0, taps_w, g.dilation_w, g.stride_w);
        unsigned own = 0;
        for (int t = 0; t < g.taps; ++t) {
            int dp, dq;
            const bool rows = reached(a, g.pad_h, (first_tap + t) / g.s_size, g.dilation_h, g.stride_h, &dp);
            const bool cols = reached(b, g.pad_w, (first_tap + t) % g.s_size, g.dilation_w, g.stride_w, &dq);
            if (rows && cols) {
                own |= 1u << t;
                if ((int)threadIdx.x == t) table(DISPLACED_AT)[t] = (dp - least_h) * g.cols + dq - least_w;
            }
        }
        if (!own) continue;
        for (int row = 0; row < g.k_blocks; ++row) {
            const int end = parts * scan(indptr, indices, row, g.c_blocks, first_tap, g.taps, own, first_block, blocks);
            for (int filter = 0; end && filter < g.bk; filter += g.filters) {
                const int filters = min(g.filters, g.bk - filter);
                for (int i = threadIdx.x; i < filters; i += THREADS) {
                    const int k = row * g.bk + filter + i;
                    table(CHANNELS_AT)[i] = row_order ? row_order[k] : k;
                }
                __syncthreads();
                load_patch(PATCH_AT, dy, g.y, g.p_size, g.q_size, g, image0, band, i0 + least_h, j0 + least_w, 1, 1,
                           g.rows, g.cols, g.plane, table(CHANNELS_AT), filters);
                for (int unit = 0; unit < end;) {
                    const Chunk chunk = take(unit, end, first_part, parts, N / G, 32 * MAX_TAPS, g);
                    const int count = load_values(values, chunk, filter, filters, g);
                    cp_async_wait();
                    __syncthreads();
                    float acc[MT][NT][4] = {};
                    multiply<BY_ITEM>(acc, PATCH_AT, pixels, VALUES_AT, ROW, count);
#pragma unroll
                    for (int n = 0; n < NT; ++n) {
#pragma unroll
                        for (int j = 0; j < 2; ++j) {
                            const int column = n * 8 + lane % 4 * 2 + j, u = column / G;
                            const int of = __shfl_sync(~0u, chunk.unit, u);
                            if (u >= chunk.units) continue;
                            const int block = of >> g.log_parts, part = of - (block << g.log_parts);
                            const int c = block * g.bc + (part - first_part) * G + column % G;
#pragma unroll
                            for (int m = 0; m < MT; ++m) {
                                float* to = sum + c * SUM_PLANE + (warp * MT + m) * 16 + lane / 4;
                                to[0] += acc[m][n][j];
                                to[8] += acc[m][n][j + 2];
                            }
                        }
                    }
                    __syncthreads();
                    unit += chunk.units;
                }
            }
        }
    }

    __syncthreads();
    const int channels = min(g.range, g.c_blocks * g.bc - first_channel), area = g.tile_h * g.tile_w;
    for (int i = threadIdx.x; i < channels * area; i += THREADS) {
        const int c = g.channels_last ? i % channels : i / area, position = g.channels_last ? i / channels : i % area;
        const int h = a + (i0 + position / g.tile_w) * g.stride_h, w = b + (j0 + position % g.tile_w) * g.stride_w;
        if (h < g.height && w < g.width) {
            T result[SLOT];
#pragma unroll
            for (int j = 0; j < SLOT; ++j) result[j] = from_float(sum[c * SUM_PLANE + position * SLOT + j]);
            T* to = dx + image0 * g.x.n + (first_channel + c) * g.x.c + h * g.x.h + w * g.x.w;
            store_slot(to, g.x, g.images - image0, band * g.stride_h, h, g.height, result);
        }
    }
}
