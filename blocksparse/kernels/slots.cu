// What fprop.cu, dgrad.cu and wgrad.cu share: patches of images in shared memory, lists of stored entries, fragments.
// instructions.cu comes before it.
//
// A slot is 16 bytes of shared memory: one pixel of one channel in SLOT images (eight of 2 bytes, four of 4 bytes), or,
// where the batch is small, in SLOT bands of rows of one image (BANDS). Either way its members lie equally far apart.
// A patch is [channels][plane] slots: a region of pixels of some channels, zero outside the tensor. Whatever its tap,
// stride, dilation and border, a stored (tap, channel) is one byte offset into it, and ldmatrix takes one address per
// row: gathering a list of them costs what a dense operand costs. `plane` is odd, so that neighbouring channels of one
// pixel lie in different banks.
//
// Stored entries. A block-row lists them by tap, then by channel block. scan() spreads those of some taps and channel
// blocks into a table; the channels that occur, in units of G = min(bc, 16 bytes), are then taken in chunks whose patch
// and list fit. Nothing here depends on how the blocks are spread but the number of steps.
//
// Specialised by -D: MATH, G (channels of a unit), NT (tiles of 8 in the product's N), MT (tiles of 16 in its M, of one
// warp), WARPS, ITEMS (rows of K, in wgrad of M, that are listed at once) and BANDS (of each image: 1 or SLOT).

constexpr int THREADS = WARPS * 32;
constexpr int SIZE = sizeof(T);
constexpr int IMAGES = SLOT / BANDS;  // of a slot
constexpr int N = NT * 8;
constexpr int POSITIONS = WARPS * MT * 16 / SLOT;  // pixels of a tile, in fprop and dgrad

constexpr int LANES = 32;      // units of a chunk at most
constexpr int MAX_TAPS = 32;   // taps of a group at most
constexpr int MAX_BLOCKS = 512;  // channel blocks that scan() takes at once
constexpr int CELLS = 1024;      // (channel block, tap) that scan() takes at once

struct Slot {
    unsigned part[4];
};

// ---------------------------------------------------------------------- the work

// Elements from one image, channel, row and column to the next.
struct Strides {
    long long n, c, h, w;
};

// x is [images, ., height, width], y is [images, ., p_size, q_size]; the host fills this in (cupy_conv.py).
struct Conv {
    Strides x, y;
    int images, height, width, p_size, q_size, k_blocks, c_blocks, bk, bc, r_size, s_size;
    int log_parts;  // a block's channels are 1 << log_parts units: bc == G << log_parts
    int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
    int channels_last;
    int tile_h, tile_w, tiles_h, tiles_w;  // a tile's pixels, and the number of tiles of a band
    int taps;                              // of a group: all, those of one kernel row, or one
    int step_h, step_w;                    // from one row or column of the patch to the next, in pixels of the tensor
    int rows, cols, plane;                 // of the patch
    int units;                             // of a chunk at most
    int splits, lists;                     // wgrad: of the pixels, and of the chunks
    int filters, range;                    // dgrad: filters of a step, channels of a CTA
};

// ---------------------------------------------------------------------- shared memory

// The tables come first, then the values, then the patch; the host adds up the same sizes (slots.py).
constexpr int ITEMS_AT = 0;                                  // [ITEMS] byte offset into the patch of each row of K
constexpr int ENTRIES_AT = ITEMS_AT + ITEMS * 4;             // [ITEMS / G] entry << log_parts | part
constexpr int CHANNELS_AT = ENTRIES_AT + ITEMS * 4;          // [LANES * G] channel of each plane of the patch
constexpr int DISPLACED_AT = CHANNELS_AT + LANES * SLOT * 4; // [MAX_TAPS] slots from a pixel to the one a tap reads
constexpr int TAPS_AT = DISPLACED_AT + MAX_TAPS * 4;         // [MAX_BLOCKS] taps of a channel block, one bit each
constexpr int USED_AT = TAPS_AT + MAX_BLOCKS * 4;            // [MAX_BLOCKS + 1] those with any, their number last
constexpr int CELLS_AT = USED_AT + MAX_BLOCKS * 4 + 16;      // [CELLS] entry of (channel block, tap)
constexpr int VALUES_AT = CELLS_AT + CELLS * 4;

__device__ __forceinline__ int* table(int at) {
    return (int*)(shared + at);
}

// Bytes of a row of `count` values: an odd number of 16 bytes, so that eight rows lie in different banks.
__host__ __device__ constexpr int row_bytes(int count) {
    return (((count * SIZE + 15) / 16) | 1) * 16;
}

__device__ __forceinline__ Slot zero_slot() {
    return Slot{{0, 0, 0, 0}};
}

// ---------------------------------------------------------------------- global memory -> patch

// Overlap: on the 3x3 layers of ResNet-50 in eight groups at batch 64 and 90% multiplying takes 2% to 14% of all
// instructions (counts/cupy.json, slots.py), and two CTAs to a multiprocessor hide most of it. A second patch would cost
// the second CTA: there is none. Loading takes 10% to 60%; lists and scans of stored entries, 25% to 75%, are the most.

// Walks the slots of a patch, THREADS at a time, neighbouring threads on neighbouring elements of the tensor: a number
// of three digits whose carries cost less than dividing anew for every slot.
struct Walk {
    int size[3], at[3], step[3];  // the first digit runs fastest

    __device__ __forceinline__ Walk(int first, int second, int third) : size{first, second, third} {
        const int area = first * second;
        split(threadIdx.x, area, at);
        split(THREADS, area, step);
    }
    __device__ __forceinline__ void split(int number, int area, int (&digits)[3]) const {
        digits[2] = number / area;
        digits[1] = (number - digits[2] * area) / size[0];
        digits[0] = number - digits[2] * area - digits[1] * size[0];
    }
    __device__ __forceinline__ bool inside() const {
        return at[2] < size[2];
    }
    __device__ __forceinline__ void advance() {
        at[0] += step[0], at[1] += step[1], at[2] += step[2];
        if (at[0] >= size[0]) at[0] -= size[0], ++at[1];
        if (at[1] >= size[1]) at[1] -= size[1], ++at[2];
    }
};

// Whether a slot has a member j: image j of those left, or the row of band j for `row` of the first. Bands begin `band`
// rows below one another.
__device__ __forceinline__ bool exists(int j, int images, int band, int row, int height) {
    return BANDS == 1 ? j < images : row + j * band >= 0 && row + j * band < height;
}

// Elements from one member to the next.
__device__ __forceinline__ long long apart(const Strides& stride, int band) {
    return BANDS == 1 ? stride.n : band * stride.h;
}

// Rows and columns row0 + i*step_h, col0 + j*step_w of `count` channels of a slot's members, to `at`.
template <bool LAST>
__device__ __forceinline__ void load_patch_as(
    unsigned at, const T* __restrict__ in, const Strides& stride, int height, int width, const Conv& g, int image0,
    int band, int row0, int col0, int step_h, int step_w, int rows, int cols, int plane, const int* channels,
    int count) {
    const T* first = in + image0 * stride.n;
    const long long next = apart(stride, band);
    const int images = g.images - image0;
    Walk walk = LAST ? Walk(count, cols, rows) : Walk(cols, rows, count);
#pragma unroll(BANDS == 1 || MT * NT < 8 ? 2 : 1)  // more loads in flight, where registers are left
    for (; walk.inside(); walk.advance()) {
        const int channel = walk.at[LAST ? 0 : 2], row = walk.at[LAST ? 2 : 1], col = walk.at[LAST ? 1 : 0];
        const int h = row0 + row * step_h, w = col0 + col * step_w;
        union {
            Slot slot;
            T member[SLOT];
        } to;
        to.slot = zero_slot();
        if ((BANDS > 1 || (h >= 0 && h < height)) && w >= 0 && w < width) {
            const T* from = first + channels[channel] * stride.c + h * stride.h + w * stride.w;
#pragma unroll
            for (int j = 0; j < SLOT; ++j, from += next) {
                if (exists(j, images, band, h, height)) to.member[j] = *from;
            }
#if MATH == TF32
#pragma unroll
            for (int j = 0; j < SLOT; ++j) to.slot.part[j] = round_tf32(to.member[j]);
#endif
        }
        *(Slot*)(shared + at + (channel * plane + row * cols + col) * 16) = to.slot;
    }
}

__device__ __forceinline__ void load_patch(
    unsigned at, const T* __restrict__ in, const Strides& stride, int height, int width, const Conv& g, int image0,
    int band, int row0, int col0, int step_h, int step_w, int rows, int cols, int plane, const int* channels,
    int count) {
    if (g.channels_last) {
        load_patch_as<true>(at, in, stride, height, width, g, image0, band, row0, col0, step_h, step_w, rows, cols,
                            plane, channels, count);
    } else {
        load_patch_as<false>(at, in, stride, height, width, g, image0, band, row0, col0, step_h, step_w, rows, cols,
                             plane, channels, count);
    }
}

// ---------------------------------------------------------------------- stored entries -> lists

// The table of a block-row's entries with taps first_tap .. + taps and channel blocks first_block .. + blocks.
// Returns how many of these channel blocks have any of the taps in `own`. All threads call it, and none may still be
// taking units of the last table.
__device__ __forceinline__ int scan(
    const int* __restrict__ indptr, const int* __restrict__ indices, int row, int c_blocks, int first_tap, int taps,
    unsigned own, int first_block, int blocks) {
    unsigned* has = (unsigned*)table(TAPS_AT);
    int *cells = table(CELLS_AT), *used = table(USED_AT);
    for (int i = threadIdx.x; i < blocks; i += THREADS) has[i] = 0;
    __syncthreads();
    const int last = indptr[row + 1];
    for (int e = indptr[row] + threadIdx.x; e < last; e += THREADS) {
        const int tap = indices[e] / c_blocks, block = indices[e] - tap * c_blocks - first_block, t = tap - first_tap;
        if (t >= 0 && t < taps && (own >> t & 1) && block >= 0 && block < blocks) {
            cells[block * taps + t] = e;
            atomicOr(&has[block], 1u << t);
        }
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        int total = 0;
        for (int i = threadIdx.x; i - (int)threadIdx.x < blocks; i += 32) {
            const bool any = i < blocks && has[i];
            const unsigned vote = __ballot_sync(~0u, any);
            if (any) used[total + __popc(vote & ((1u << threadIdx.x) - 1))] = i;
            total += __popc(vote);
        }
        if (threadIdx.x == 0) used[MAX_BLOCKS] = total;
    }
    __syncthreads();
    return used[MAX_BLOCKS];
}

// A chunk of units of the last scan, one a lane; every warp holds the same.
struct Chunk {
    int units;      // how many
    int unit;       // this lane's: channel block (within the scan) << log_parts | part
    unsigned taps;  // which taps it has; none beyond `units`
};

// The units from number `from` on, at most `most` of them and at most `room` entries of theirs. Units are the parts
// first_part .. + parts of each used channel block; `end` is their number.
__device__ __forceinline__ Chunk take(
    int from, int end, int first_part, int parts, int most, int room, const Conv& g) {
    const int lane = threadIdx.x % 32, u = from + lane;
    Chunk chunk = {0, 0, 0};
    if (u < end && lane < most) {
        const int block = table(USED_AT)[u / parts];
        chunk.unit = (block << g.log_parts) + first_part + u % parts;
        chunk.taps = (unsigned)table(TAPS_AT)[block];
    }
    int sum = __popc(chunk.taps);
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
        const int below = __shfl_up_sync(~0u, sum, delta);
        if (lane >= delta) sum += below;
    }
    chunk.units = __popc(__ballot_sync(~0u, chunk.taps != 0 && sum <= room));
    if (lane >= chunk.units) chunk.taps = 0;
    return chunk;
}

// Lists the chunk's entries by tap, then by channel: ENTRIES, ITEMS (offsets into the patch) and CHANNELS. Items
// beyond the last, up to a multiple of STEP, point at the plane of zeros behind `units` planes. Returns their number.
__device__ __forceinline__ int list_items(const Chunk& chunk, int first_block, const Conv& g) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int *items = table(ITEMS_AT), *entries = table(ENTRIES_AT), *channels = table(CHANNELS_AT);
    const int block = chunk.unit >> g.log_parts, part = chunk.unit - (block << g.log_parts);
    int count = 0;
    for (int t = 0; t < g.taps; ++t) {
        const bool has = chunk.taps >> t & 1;
        const unsigned vote = __ballot_sync(~0u, has);
        if (has && t % WARPS == warp) {
            const int i = count + __popc(vote & ((1u << lane) - 1));
            entries[i] = (table(CELLS_AT)[block * g.taps + t] << g.log_parts) + part;
            for (int j = 0; j < G; ++j) items[i * G + j] = ((lane * G + j) * g.plane + table(DISPLACED_AT)[t]) * 16;
        }
        count += __popc(vote);
    }
    if (warp == 0) {
        const int i = count * G + lane;
        if (i < (count * G + STEP - 1) / STEP * STEP) items[i] = g.units * G * g.plane * 16;
        if (lane < chunk.units) {
            for (int j = 0; j < G; ++j) channels[lane * G + j] = first_block * g.bc + chunk.unit * G + j;
        }
    }
    return count * G;
}

// The plane that items beyond the last point at.
__device__ __forceinline__ void clear_zero_plane(unsigned patch, int planes, const Conv& g) {
    patch += planes * g.plane * 16;
    for (int i = threadIdx.x; i < g.plane; i += THREADS) *(Slot*)(shared + patch + i * 16) = zero_slot();
}

// ---------------------------------------------------------------------- pixels x N += gathered patch x values

// Where this lane's pixels of the tile lie in the patch. M is (pixel of the tile, member of the slot).
struct Pixels {
#if MATH == FP16 || MATH == BF16
    unsigned at[MT];  // the pixel whose slot ldmatrix takes from this lane
#else
    unsigned at[MT][2];  // rows lane / 4 and lane / 4 + 8
#endif
};

__device__ __forceinline__ unsigned pixel_at(int position, int step_h, int step_w, const Conv& g) {
    if (position >= g.tile_h * g.tile_w) return 0;  // beyond the tile: computed and dropped
    return (position / g.tile_w * step_h * g.cols + position % g.tile_w * step_w) * 16;
}

// step_h, step_w: rows and columns of the patch from one pixel of the tile to the next.
__device__ __forceinline__ Pixels find_pixels(int step_h, int step_w, const Conv& g) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Pixels pixels;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
        const int first = (warp * MT + m) * 16 / SLOT;
#if MATH == FP16 || MATH == BF16
        pixels.at[m] = pixel_at(first + (lane >> 3 & 1), step_h, step_w, g);
#else
        pixels.at[m][0] = pixel_at(first + (lane >> 4), step_h, step_w, g) + (lane >> 2 & 3) * 4;
        pixels.at[m][1] = pixel_at(first + 2 + (lane >> 4), step_h, step_w, g) + (lane >> 2 & 3) * 4;
#endif
    }
    return pixels;
}

__device__ __forceinline__ float read(unsigned at) {
    return *(const float*)(shared + at);
}

// acc += patch[items] x values over `count` items, rounded up to STEP. The values lie as [item][n] (BY_ITEM) or
// [n][item], in rows of `row` bytes.
template <bool BY_ITEM>
__device__ __forceinline__ void multiply(
    float (&acc)[MT][NT][4], unsigned patch, const Pixels& pixels, unsigned values, int row, int count) {
    const int lane = threadIdx.x % 32;
    const int* items = table(ITEMS_AT);
    for (int k = 0; k < count; k += STEP) {
#if MATH == FP16 || MATH == BF16
        unsigned b[NT][2];
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
            unsigned two[4];
            const int pair = n + 1 < NT ? lane >> 4 : 0, upper = lane >> 3 & 1;
            if (BY_ITEM) {
                ldmatrix4_trans(two, shared + values + (k + upper * 8 + (lane & 7)) * row + (n + pair) * 16);
            } else {
                ldmatrix4(two, shared + values + ((n + pair) * 8 + (lane & 7)) * row + (k + upper * 8) * 2);
            }
            b[n][0] = two[0], b[n][1] = two[1];
            if (n + 1 < NT) b[n + 1][0] = two[2], b[n + 1][1] = two[3];
        }
        const unsigned item = patch + items[k + (lane >> 4) * 8 + (lane & 7)];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            unsigned a[4];
            ldmatrix4_trans(a, shared + item + pixels.at[m]);
#pragma unroll
            for (int n = 0; n < NT; ++n) mma(acc[m][n], a, b[n]);
        }
#elif MATH == TF32
        unsigned b[NT][2];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int item = k + i * 4 + (lane & 3), column = n * 8 + (lane >> 2);
                b[n][i] = round_tf32(read(values + (BY_ITEM ? item * row + column * 4 : column * row + item * 4)));
            }
        }
        const unsigned lower = patch + items[k + (lane & 3)], upper = patch + items[k + 4 + (lane & 3)];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            const unsigned a[4] = {
                __float_as_uint(read(lower + pixels.at[m][0])), __float_as_uint(read(lower + pixels.at[m][1])),
                __float_as_uint(read(upper + pixels.at[m][0])), __float_as_uint(read(upper + pixels.at[m][1]))};
#pragma unroll
            for (int n = 0; n < NT; ++n) mma(acc[m][n], a, b[n]);
        }
#else
#pragma unroll
        for (int i = k; i < k + STEP; ++i) {
            float b[NT][2];
#pragma unroll
            for (int n = 0; n < NT; ++n) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int column = n * 8 + (lane & 3) * 2 + j;
                    b[n][j] = read(values + (BY_ITEM ? i * row + column * 4 : column * row + i * 4));
                }
            }
            const unsigned item = patch + items[i];
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                const float upper = read(item + pixels.at[m][0]), lower = read(item + pixels.at[m][1]);
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    acc[m][n][0] += upper * b[n][0];
                    acc[m][n][1] += upper * b[n][1];
                    acc[m][n][2] += lower * b[n][0];
                    acc[m][n][3] += lower * b[n][1];
                }
            }
        }
#endif
    }
}

// ---------------------------------------------------------------------- results

// The members of one pixel, `row` of the first being inside the tensor, from consecutive elements.
__device__ __forceinline__ void store_slot(
    T* to, const Strides& stride, int images, int band, int row, int height, const T* from) {
    const long long next = apart(stride, band);
#pragma unroll
    for (int j = 0; j < SLOT; ++j, to += next) {
        if (exists(j, images, band, row, height)) *to = from[j];
    }
}
