// wgrad: dvalues from x and dy. A CTA owns FILTERS filters of a block-row and a share of its chunks of stored entries,
// and for each walks its share of the tiles: M = entries, N = filters, K = images of a pixel: slots of both operands are
// rows of K as they lie. Where a chunk has few entries, warps share the pixels and are added up in order at its end.
//
// Budget, in instructions of a warp (counts/cupy.json, held by a test):
//   global -> shared  9.5 to 10.5 for each 32 slots that are copied, 66 for each 32 slots of a patch before the first
//   shared -> mma     2.8 (64 filters) to 11.8 (8 filters) an mma in fp16
//   and 100 to 160 a step, 1050 to 1550 once; 8 bytes of workspace per split and value
//
// Splits go through an fp32 workspace that add_splits() adds up in order: no atomics, the same bits on every run. No
// grid depends on which blocks are stored.

constexpr int FILTERS = NT * 8;

// How the warps share a chunk: `across` of them its tiles of 16 entries, the rest its pixels.
struct Cut {
    int across, deep, warp_m, warp_k, mine;  // mine: of the tiles, this warp's

    __device__ __forceinline__ explicit Cut(int stored) {
        const int warp = threadIdx.x / 32;
        const int tiles = (stored + 15) / 16;
        for (across = 1; across * MT < tiles && across < WARPS; across *= 2) {
        }
        deep = WARPS / across, warp_m = warp % across, warp_k = warp / across;
        mine = max(0, (tiles - warp_m + across - 1) / across);
    }
};

// acc[m][n] += x[entries of tile m] x dy[filters of tile n] over this warp's pixels of the tile.
__device__ __forceinline__ void multiply_pixels(
    float (&acc)[MT][NT][4], unsigned patch, const unsigned (&at)[MT][2], unsigned dy_at, int dy_plane, const Cut& cut,
    const Conv& g) {
    const int lane = threadIdx.x % 32, area = g.tile_h * g.tile_w;
    const int* offsets = table(g.sums_at);
#if MATH == FP16 || MATH == BF16
    dy_at += ((NT > 1 ? lane >> 4 : 0) * 8 + (lane & 7)) * dy_plane * 16 + (lane >> 3 & 1) * OCTET;
    const auto one = [&](int k) {
        unsigned b[NT][2];
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
            unsigned two[4];
            ldmatrix4(two, shared + dy_at + n * 8 * dy_plane * 16 + k * SLOTS * 16);
            b[n][0] = two[0], b[n][1] = two[1];
            if (n + 1 < NT) b[n + 1][0] = two[2], b[n + 1][1] = two[3];
        }
        const unsigned pixel = patch + offsets[k];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            if (m > 0 && m >= cut.mine) break;
            unsigned a[4];
            ldmatrix4(a, shared + at[m][0] + pixel);
#pragma unroll
            for (int n = 0; n < NT; ++n) mma(acc[m][n], a, b[n]);
        }
    };
    constexpr int AT_ONCE = MT * NT < 4 ? 4 : 1;
    int k = cut.warp_k;
#pragma unroll 1
    for (; k + (AT_ONCE - 1) * cut.deep < area; k += AT_ONCE * cut.deep) {
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) one(k + i * cut.deep);
    }
    if constexpr (AT_ONCE > 1) {
#pragma unroll 1
        for (; k < area; k += cut.deep) one(k);
    }
#else
    constexpr int STEPS = MATH == TF32 ? IMAGES / 8 : IMAGES;
    for (int k = cut.warp_k; k < area; k += cut.deep) {
        const unsigned pixel = patch + table(g.sums_at)[k], dy_pixel = dy_at + k * SLOTS * 16;
#pragma unroll
        for (int image = 0; image < STEPS; ++image) {
#if MATH == TF32
            const int first = image * OCTET + (lane & 3) * SIZE;
            unsigned b[NT][2];
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                const unsigned from = dy_pixel + (n * 8 + (lane >> 2)) * dy_plane * 16 + first;
                b[n][0] = round_tf32(read(from)), b[n][1] = round_tf32(read(from + 4 * SIZE));
            }
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                if (m >= cut.mine) break;
                const unsigned upper = at[m][0] + pixel + first, lower = at[m][1] + pixel + first;
                const unsigned a[4] = {round_tf32(read(upper)), round_tf32(read(lower)),
                                       round_tf32(read(upper + 4 * SIZE)), round_tf32(read(lower + 4 * SIZE))};
#pragma unroll
                for (int n = 0; n < NT; ++n) mma(acc[m][n], a, b[n]);
            }
#else
            float b[NT][2];
#pragma unroll
            for (int n = 0; n < NT; ++n) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    b[n][j] = read(dy_pixel + (n * 8 + (lane & 3) * 2 + j) * dy_plane * 16 + image * SIZE);
                }
            }
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                if (m >= cut.mine) break;
                const float upper = read(at[m][0] + pixel + image * SIZE), lower = read(at[m][1] + pixel + image * SIZE);
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    acc[m][n][0] += upper * b[n][0];
                    acc[m][n][1] += upper * b[n][1];
                    acc[m][n][2] += lower * b[n][0];
                    acc[m][n][3] += lower * b[n][1];
                }
            }
#endif
        }
    }
#endif
}

// The sums of warps that share pixels, in order, to those of warp_k = 0. All threads call it.
__device__ __forceinline__ void add_warps(float (&acc)[MT][NT][4], const Cut& cut, const Conv& g) {
    const int lane = threadIdx.x % 32;
    float4* sums = (float4*)(shared + g.stage_at) + lane;
    __syncthreads();
    if (cut.warp_k > 0) {
        float4* to = sums + ((cut.warp_k - 1) * cut.across + cut.warp_m) * MT * NT * 32;
#pragma unroll
        for (int i = 0; i < MT * NT; ++i) {
            const float(&from)[4] = acc[i / NT][i % NT];
            to[i * 32] = float4{from[0], from[1], from[2], from[3]};
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int k = 1; cut.warp_k == 0 && k < cut.deep; ++k) {
        const float4* from = sums + ((k - 1) * cut.across + cut.warp_m) * MT * NT * 32;
#pragma unroll
        for (int i = 0; i < MT * NT; ++i) {
            float(&to)[4] = acc[i / NT][i % NT];
            const float4 one = from[i * 32];
            to[0] += one.x, to[1] += one.y, to[2] += one.z, to[3] += one.w;
        }
    }
}

// out: the result, where there is one split; else sums: [splits, size], fp32.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
wgrad(const T* __restrict__ x, const T* __restrict__ dy, const int* __restrict__ indptr,
      const int* __restrict__ indices, const int* __restrict__ row_order, T* __restrict__ out,
      float* __restrict__ sums, const long long size, const Conv g) {
    // CTAs of one split run side by side: they share its pixels.
    const int parts = (g.bk + FILTERS - 1) / FILTERS, rows = g.k_blocks * parts;
    const int row = blockIdx.x % rows / parts, filter = blockIdx.x % parts * FILTERS;
    const int filters = min(FILTERS, g.bk - filter), list = blockIdx.x / rows % g.lists;
    const int split = blockIdx.x / rows / g.lists;
    const int first = indptr[row] * BC, last = indptr[row + 1] * BC;
    const Range range(split, g);

    const int lane = threadIdx.x % 32, area = g.tile_h * g.tile_w, dy_plane = area * SLOTS | 1;
    list_taps(g);
    list_pixels(g.places_at, g.rows, g.cols, g.step_h, g.step_w, g.x);
    list_pixels(g.pixels_at, g.tile_h, g.tile_w, 1, 1, g.y);
#pragma unroll 1
    for (int i = threadIdx.x; i < area; i += THREADS) {
        const int h = i / g.tile_w * (g.stride_h / g.step_h), w = i % g.tile_w * (g.stride_w / g.step_w);
        table(g.sums_at)[i] = (h * g.cols + w) * SLOTS * 16;
    }
    const int used = find_channels(indices, first, last, g);
    const int slack = ((used + g.units - 1) / g.units) * (STEP - 1);
    const int listed = last - first + slack <= g.capacity ? max(used, 1) : g.part;
    const Share share(g.rows * g.cols * SLOTS), dy_share(area * SLOTS);
    const Ordered ordered = {row_order, row * g.bk + filter};

    int turn = 0;  // chunks are dealt out to the lists
    for (int from = 0; from < used; from += listed) {
        const int end = min(from + listed, used), chunks = list_items(indices, first, last, from, end, g);
        for (int number = 0; number < chunks; ++number) {
            if (turn++ % g.lists != list) continue;
            const Chunk chunk(number, end - from, g);
            const int* items = table(g.items_at) + chunk.first;
            const Cut cut(chunk.stored);
            unsigned at[MT][2];  // of the entries whose rows this lane reads; those beyond the last are dropped
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                const int tile = (m * cut.across + cut.warp_m) * 16;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
#if MATH == FP16 || MATH == BF16
                    const int item = tile + lane % 16;
                    at[m][half] = (item < chunk.stored ? items[item] : 0) + lane / 16 * OCTET;
#else
                    const int item = tile + half * 8 + lane / 4;
                    at[m][half] = item < chunk.stored ? items[item] : 0;
#endif
                }
            }
            float acc[MT][NT][4];
            clear(acc);
            Place ahead(range.first, g);
            for (int tile = range.first - 1; tile < range.last; ++tile) {
                if (tile >= range.first) {
                    cp_async_wait();
                    __syncthreads();
                }
                if (tile + 1 < range.last) {
                    const unsigned to = g.stage_at + (tile + 1 - range.first) % 2 * g.stage;
                    const int p0 = ahead.p * g.tile_h, q0 = ahead.q * g.tile_w;
                    const Source of_x(x, g.x, g.height, g.width, p0 * g.stride_h - g.pad_h, q0 * g.stride_w - g.pad_w,
                                      ahead.n * IMAGES, g);
                    load_patch(to, of_x, pixels_of(g.places_at), g.rows * g.cols, g.plane,
                               Listed{table(g.channels_at) + chunk.channel}, chunk.channels, share);
                    const Source of_dy(dy, g.y, g.p_size, g.q_size, p0, q0, ahead.n * IMAGES, g);
                    load_patch(to + g.values_at, of_dy, pixels_of(g.pixels_at), area, dy_plane, ordered, filters,
                               dy_share);
                    ahead.advance(g);
                }
                if (tile < range.first) continue;
                const unsigned patch = g.stage_at + (tile - range.first) % 2 * g.stage;
                if (cut.mine > 0) multiply_pixels(acc, patch, at, patch + g.values_at, dy_plane, cut, g);
            }
            if (cut.deep > 1) add_warps(acc, cut, g);
#pragma unroll
            for (int m = 0; m < MT; ++m) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int item = (m * cut.across + cut.warp_m) * 16 + half * 8 + lane / 4;
                    if (item >= chunk.stored || cut.warp_k > 0) continue;
                    const long long to = (long long)table(g.entries_at)[chunk.first + item] * g.bk + filter;
#pragma unroll
                    for (int n = 0; n < NT; ++n) {
                        const int f = n * 8 + lane % 4 * 2;
                        if (f >= filters) continue;
                        const float low = acc[m][n][half * 2], high = acc[m][n][half * 2 + 1];
                        if (sums) {
                            *(float2*)(sums + split * size + to + f) = float2{low, high};
                        } else {
#if MATH == FP16 || MATH == BF16
                            *(unsigned*)(out + to + f) = pack(low, high);
#else
                            *(float2*)(out + to + f) = float2{low, high};
#endif
                        }
                    }
                }
            }
            __syncthreads();  // before the next chunk's copies, and lists
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
