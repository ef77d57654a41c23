// What fprop.cu, dgrad.cu and wgrad.cu share: patches of images in shared memory, lists of stored entries, products.
// instructions.cu comes before it.
//
// Tensors are batch-last: the images of one pixel lie side by side. A slot is 16 bytes: SLOT images of one pixel of one
// channel; it moves as it lies, by one asynchronous copy. An octet is 8 images, the N of an mma; a CTA takes two of
// them, IMAGES, so that it uses whole sectors of 32 bytes.
//
// A patch is [channels][plane] slots: a region of pixels of some channels, zero outside the tensor. Whatever its tap,
// stride, dilation and border, a stored (tap, channel) is one byte offset into it (an item), and ldmatrix takes one
// address per row: gathering a list of them costs what a dense operand costs. `plane` is odd, so that neighbouring
// channels of one pixel lie in different banks.
//
// A CTA stays with its block-row and walks tiles of pixels: it lists the row's entries once. Two stages of shared
// memory take turns: while one is multiplied, the copies of the next are on their way. One barrier a step.
//
// More than 400 lines: a patch, the lists of items in it and the product of both are one thing to every kernel.
//
// Specialised by -D: MATH, BC (channels of a block), MT (tiles of 16 in the product's M, of one warp), NT (octets of a
// warp; in wgrad tiles of 8 filters), WARPS, ALIGNED (whether every slot begins at a multiple of 16 bytes), and in dgrad
// FILTERS (of a step).

constexpr int THREADS = WARPS * 32;
constexpr int SIZE = sizeof(T);
constexpr int IMAGES = 16;             // of a tile
constexpr int SLOTS = IMAGES / SLOT;   // of a pixel
constexpr int OCTET = 8 * SIZE;        // bytes

struct Slot {
    unsigned part[4];
};

// Elements from one channel, row and column to the next.
struct Strides {
    long long c, h, w;
};

// x is [images, channels, height, width], y is [images, ., p_size, q_size]; the host fills this in (cupy_conv.py).
struct Conv {
    Strides x, y;
    int images, height, width, p_size, q_size, k_blocks, channels, bk, r_size, s_size;
    int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
    int tile_h, tile_w, tiles_h, tiles_w, tiles_n;  // a tile's pixels, and how many tiles there are of each axis
    int step_h, step_w;      // from one row or column of the patch to the next, in pixels of the tensor
    int rows, cols, plane;   // of the patch; plane in slots
    int units;               // channels of a chunk at most; dgrad: counted at once
    int capacity;            // items that a list holds; dgrad: chunks
    int part;                // channels listed at once where not all fit
    int splits, lists;       // CTAs that share the tiles; wgrad: a block-row's chunks; dgrad: the bands
    int bands, band_rows, band_steps;  // dgrad: bands of a CTA; a band's block-rows, and steps of FILTERS filters
    int band_shift;                    // dgrad: log2(bk) where a band has several block-rows, else 31
    int planes, held;                  // dgrad: channels whose sums, and steps whose values, a CTA holds
    // Bytes from the start of shared memory: cut by the host.
    int bitmap_at, before_at, channels_at, bits_at, starts_at, chunks_at, items_at, entries_at, taps_at, places_at;
    int pixels_at, filters_at, sums_at, stage_at, values_at;  // values_at: within a stage; wgrad: of dy; dgrad: of all
    int stage, value_stage;  // bytes of each; value_stage: dgrad, the values of a step
};

__device__ __forceinline__ int* table(int at) {
    return (int*)(shared + at);
}

// Bytes of a row of `count` values: an odd number of 16 bytes, so that eight rows lie in different banks.
__host__ __device__ constexpr int row_bytes(int count) {
    return (((count * SIZE + 15) / 16) | 1) * 16;
}

__device__ __forceinline__ void clear_slot(unsigned at) {
    *(Slot*)(shared + at) = Slot{{0, 0, 0, 0}};
}

__device__ __forceinline__ float read(unsigned at) {
    return *(const float*)(shared + at);
}

// ---------------------------------------------------------------------- where a tile lies

// Tile number `tile`: image groups run fastest, so that a CTA uses the other half of the lines that it has touched.
struct Place {
    int n, q, p;

    __device__ __forceinline__ Place(int tile, const Conv& g) {
        n = tile % g.tiles_n;
        q = tile / g.tiles_n % g.tiles_w;
        p = tile / g.tiles_n / g.tiles_w;
    }
    __device__ __forceinline__ void advance(const Conv& g) {
        if (++n < g.tiles_n) return;
        n = 0;
        if (++q < g.tiles_w) return;
        q = 0, ++p;
    }
};

// The tiles of this CTA, of those that `splits` CTAs share.
struct Range {
    int first, last;

    __device__ __forceinline__ Range(int split, const Conv& g) {
        const int tiles = g.tiles_n * g.tiles_h * g.tiles_w, each = (tiles + g.splits - 1) / g.splits;
        first = min(split * each, tiles), last = min(first + each, tiles);
    }
};

// ---------------------------------------------------------------------- global memory -> patch

// Which slots of a patch a warp loads: groups of 32, and where there are more warps than groups a share of the channels.
struct Share {
    int group, step, part, parts;

    __device__ __forceinline__ explicit Share(int slots) {
        const int warp = threadIdx.x / 32, groups = (slots + 31) / 32;
        parts = max(1, WARPS / groups);
        step = groups < WARPS ? groups : WARPS;
        group = warp % step, part = warp / step;
    }
    // As one register, where they are rare.
    __device__ __forceinline__ static Share of(unsigned packed) {
        Share share(1);
        share.group = packed & 15, share.step = packed >> 4 & 15, share.part = packed >> 8 & 15, share.parts = packed >> 12;
        return share;
    }
    __device__ __forceinline__ unsigned packed() const { return group | step << 4 | part << 8 | parts << 12; }
};

// The first `members` of the SLOT images of a pixel, zeros behind them, to `at`: what no copy of 16 bytes fits.
__device__ __forceinline__ void copy_members(unsigned at, const T* from, int members) {
    union {
        Slot slot;
        T member[SLOT];
    } to;
    to.slot = Slot{{0, 0, 0, 0}};
#pragma unroll
    for (int j = 0; j < SLOT; ++j) {
        if (j < members) to.member[j] = from[j];
    }
    *(Slot*)(shared + at) = to.slot;
}

// Channels that were listed, or filters first, first + 1, ... in the order of the block-rows.
struct Listed {
    const int* channels;
    __device__ __forceinline__ int operator[](int i) const { return channels[i]; }
};

struct Ordered {
    const int* order;
    int first;
    __device__ __forceinline__ int operator[](int i) const { return order ? order[first + i] : first + i; }
};

// A region of pixels in a tensor, from where a tile begins: rows and columns, and elements, that each pixel is further.
struct Pixel {
    int place;  // rows << 16 | columns
    unsigned offset;
};

__device__ __forceinline__ Pixel* pixels_of(int at) {
    return (Pixel*)(shared + at);
}

__device__ __forceinline__ void list_pixels(int at, int rows, int cols, int step_h, int step_w, const Strides& stride) {
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * cols; i += THREADS) {
        const int row = i / cols * step_h, col = i % cols * step_w;
        pixels_of(at)[i] = Pixel{row << 16 | col, row * (unsigned)stride.h + col * (unsigned)stride.w};
    }
}

// A tensor as a patch is taken from it.
struct Source {
    const T* origin;  // where the patch begins, which may lie outside
    unsigned channel_bytes;
    int height, width, row0, col0, images;  // images: left, from the tile's first on

    __device__ __forceinline__ Source(
        const T* tensor, const Strides& stride, int height, int width, int row0, int col0, int image0, const Conv& g)
        : origin(tensor + row0 * stride.h + col0 * stride.w + image0), channel_bytes((unsigned)(stride.c * SIZE)),
          height(height), width(width), row0(row0), col0(col0), images(g.images - image0) {}
};

// `count` channels of a patch of `pixels` pixels, to `at`.
template <class Channels>
__device__ __forceinline__ void load_patch(
    unsigned at, const Source& source, const Pixel* pixel, int pixels, int plane, const Channels& channels, int count,
    const Share& share) {
    const int part = share.part, parts = share.parts;
    if (part >= parts) return;
    const unsigned channel_bytes = source.channel_bytes, next = parts * plane * 16;
#pragma unroll 1
    for (int first = share.group * 32; first < pixels * SLOTS; first += share.step * 32) {
        const int i = first + threadIdx.x % 32;
        if (i >= pixels * SLOTS) break;
        const Pixel own = pixel[i / SLOTS];
        const unsigned h = source.row0 + (own.place >> 16), w = source.col0 + (own.place & 0xffff);
        const int left = source.images - i % SLOTS * SLOT;
        const int members = h < (unsigned)source.height && w < (unsigned)source.width ? max(0, min(SLOT, left)) : 0;
        const char* from = (const char*)(source.origin + i % SLOTS * SLOT) + (unsigned long long)own.offset * SIZE;
        unsigned to = at + i * 16 + part * plane * 16;
        int c = part;
        if (ALIGNED && (members == 0 || members == SLOT)) {
            for (; c + 3 * parts < count; c += 4 * parts, to += 4 * next) {
                unsigned long long further[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    further[j] = (unsigned long long)(unsigned)channels[c + j * parts] * channel_bytes;
                }
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    cp_async_or_zeros(shared + to + j * next, from + further[j], members);
                }
            }
#pragma unroll 1
            for (; c < count; c += parts, to += next) {
                cp_async_or_zeros(shared + to, from + (unsigned long long)(unsigned)channels[c] * channel_bytes, members);
            }
        } else {
#pragma unroll 1
            for (; c < count; c += parts, to += next) {
                copy_members(to, (const T*)(from + (unsigned long long)(unsigned)channels[c] * channel_bytes), members);
            }
        }
    }
}

// ---------------------------------------------------------------------- stored entries -> lists

// A block is BC entries of one channel each: entry e is part e % BC of block e / BC, and its column in the filter bank's
// matrix, tap * channels + channel, is this.
__device__ __forceinline__ int column_of(const int* __restrict__ indices, int e) {
    return indices[e / BC] * BC + e % BC;
}

// Lists which channels entries first .. last have, as bits and as how many there are before each 32. Returns their
// number. All threads call it.
__device__ __forceinline__ int find_channels(const int* __restrict__ indices, int first, int last, const Conv& g) {
    unsigned* bitmap = (unsigned*)table(g.bitmap_at);
    int* before = table(g.before_at);
    const int words = (g.channels + 31) / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int i = threadIdx.x; i < words; i += THREADS) bitmap[i] = 0;
    __syncthreads();
#pragma unroll 1
    for (int e = first + threadIdx.x; e < last; e += THREADS) {
        const int c = column_of(indices, e) % g.channels;
        atomicOr(&bitmap[c / 32], 1u << c % 32);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        int total = 0;
#pragma unroll 1
        for (int i = lane; i - lane < words; i += 32) {
            const int own = i < words ? __popc(bitmap[i]) : 0;
            int sum = own;
#pragma unroll
            for (int delta = 1; delta < 32; delta *= 2) {
                const int below = __shfl_up_sync(~0u, sum, delta);
                if (lane >= delta) sum += below;
            }
            if (i < words) before[i] = total + sum - own;
            total += __shfl_sync(~0u, sum, 31);
        }
        if (lane == 0) before[words] = total;
    }
    __syncthreads();
    return before[words];
}

// How many of the channels found come before c.
__device__ __forceinline__ int rank_of(int c, const Conv& g) {
    const unsigned below = (unsigned)table(g.bitmap_at)[c / 32] & ((1u << c % 32) - 1);
    return table(g.before_at)[c / 32] + __popc(below);
}

// A chunk's items and channels, as list_items lists them.
struct Chunk {
    int first, items;  // up to a multiple of STEP
    int stored;        // of them
    int channel, channels;

    __device__ __forceinline__ Chunk(int number, int listed, const Conv& g) {
        const int* chunks = table(g.chunks_at) + number * 2;
        first = chunks[0], items = chunks[2] - chunks[0], stored = chunks[1];
        channel = number * g.units, channels = min(g.units, listed - channel);
    }
};

// Lists the entries of the channels found whose ranks are from .. end: in chunks of g.units channels, each by tap, then
// channel. Items up to a multiple of STEP point at the plane of zeros behind the chunk's. Returns the number of chunks.
// All threads call it; behind its first barrier none reads the last lists any more.
__device__ __forceinline__ int list_items(
    const int* __restrict__ indices, int first, int last, int from, int end, const Conv& g) {
    unsigned* bits = (unsigned*)table(g.bits_at);
    int *starts = table(g.starts_at), *ends = table(g.chunks_at), *items = table(g.items_at);
    const int taps = g.r_size * g.s_size, count = end - from, chunks = max(1, (count + g.units - 1) / g.units);
#pragma unroll 1
    for (int i = threadIdx.x; i < chunks * taps; i += THREADS) bits[i] = 0;
    __syncthreads();
#pragma unroll 1
    for (int e = first + threadIdx.x; e < last; e += THREADS) {
        const int column = column_of(indices, e), tap = column / g.channels, c = column - tap * g.channels;
        const int rank = rank_of(c, g) - from;
        if (rank < 0 || rank >= count) continue;
        const int chunk = rank / g.units;
        atomicOr(&bits[chunk * taps + tap], 1u << (rank - chunk * g.units));
        table(g.channels_at)[rank] = c;  // of all its taps the same
    }
    __syncthreads();
#pragma unroll 1
    for (int chunk = threadIdx.x; chunk < chunks; chunk += THREADS) {
        int stored = 0;
#pragma unroll 1
        for (int t = 0; t < taps; ++t) stored += __popc(bits[chunk * taps + t]);
        ends[chunk * 2 + 1] = stored;
    }
    __syncthreads();
#pragma unroll 1
    for (int chunk = threadIdx.x; chunk <= chunks; chunk += THREADS) {
        int at = 0;
#pragma unroll 1
        for (int i = 0; i < chunk; ++i) at += (ends[i * 2 + 1] + STEP - 1) / STEP * STEP;
        ends[chunk * 2] = at;
        if (chunk == chunks) continue;
#pragma unroll 1
        for (int t = 0; t < taps; ++t) {
            starts[chunk * taps + t] = at;
            at += __popc(bits[chunk * taps + t]);
        }
        for (; at % STEP; ++at) items[at] = g.units * g.plane * 16, table(g.entries_at)[at] = -1;
    }
    __syncthreads();
#pragma unroll 1
    for (int e = first + threadIdx.x; e < last; e += THREADS) {
        const int column = column_of(indices, e), tap = column / g.channels, c = column - tap * g.channels;
        const int rank = rank_of(c, g) - from;
        if (rank < 0 || rank >= count) continue;
        const int chunk = rank / g.units, unit = rank - chunk * g.units, cell = chunk * taps + tap;
        const int at = starts[cell] + __popc(bits[cell] & ((1u << unit) - 1));
        items[at] = unit * g.plane * 16 + table(g.taps_at)[tap];
        table(g.entries_at)[at] = e;
    }
    __syncthreads();
    return chunks;
}

// The planes of zeros behind the `planes` of each stage.
__device__ __forceinline__ void clear_planes(int planes, const Conv& g) {
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * g.plane; i += THREADS) {
        clear_slot(g.stage_at + i / g.plane * g.stage + (planes * g.plane + i % g.plane) * 16);
    }
}

// fprop and wgrad: how far each tap is from a pixel, in bytes of the patch.
__device__ __forceinline__ void list_taps(const Conv& g) {
#pragma unroll 1
    for (int t = threadIdx.x; t < g.r_size * g.s_size; t += THREADS) {
        const int row = t / g.s_size * (g.dilation_h / g.step_h), col = t % g.s_size * (g.dilation_w / g.step_w);
        table(g.taps_at)[t] = (row * g.cols + col) * SLOTS * 16;
    }
}

// ---------------------------------------------------------------------- M x octets += values x gathered patch

#if !defined(WGRAD)
// Byte offset in the patch of each pixel of this warp; those beyond the tile are computed and dropped.
struct Pixels {
    unsigned at[NT / 2];

    __device__ __forceinline__ Pixels(int step_h, int step_w, const Conv& g) {
#pragma unroll
        for (int j = 0; j < NT / 2; ++j) {
            const int i = threadIdx.x / 32 * (NT / 2) + j;
            const int row = i / g.tile_w, col = i - row * g.tile_w;
            at[j] = row < g.tile_h ? (row * step_h * g.cols + col * step_w) * SLOTS * 16 : 0;
        }
    }
};

// Where the value of row `row` and item `k` lies: by item, or by tap, row and filter.
template <bool BY_ITEM, int ROW, int LISTED>
__device__ __forceinline__ unsigned value_at(unsigned values, int row, int k) {
    return values + (BY_ITEM ? k * ROW + row * SIZE : (k / LISTED * (MT * 16) + row) * ROW + k % LISTED * SIZE);
}

// acc += values x patch[items] over `count` items, a multiple of STEP.
template <bool BY_ITEM, int ROW, int LISTED>
__device__ __forceinline__ void multiply(
    float (&acc)[MT][NT][4], unsigned patch, const Pixels& pixels, unsigned values, const int* items, int count) {
    const int lane = threadIdx.x % 32;
#if MATH == FP16 || MATH == BF16
    items += lane & 15;
    patch += (lane >> 4) * OCTET;
#pragma unroll 1
    for (int k = 0; k < count; k += STEP) {
        unsigned a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            if (BY_ITEM) {
                const int row = m * 16 + (lane >> 3 & 1) * 8, item = k + (lane & 7) + (lane >> 4) * 8;
                ldmatrix4_trans(a[m], shared + value_at<BY_ITEM, ROW, LISTED>(values, row, item));
            } else {
                const int row = m * 16 + (lane & 15), item = k + (lane >> 4) * 8;
                ldmatrix4(a[m], shared + value_at<BY_ITEM, ROW, LISTED>(values, row, item));
            }
        }
        const unsigned item = patch + items[k];
#pragma unroll
        for (int j = 0; j < NT / 2; ++j) {
            unsigned b[4];
            ldmatrix4_trans(b, shared + item + pixels.at[j]);
            const unsigned first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                mma(acc[m][2 * j], a[m], first);
                mma(acc[m][2 * j + 1], a[m], second);
            }
        }
    }
#elif MATH == TF32
    items += lane & 3;
    patch += (lane >> 2) * SIZE;
#pragma unroll 1
    for (int k = 0; k < count; k += STEP) {
        unsigned a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = m * 16 + i % 2 * 8 + (lane >> 2), item = k + i / 2 * 4 + (lane & 3);
                a[m][i] = round_tf32(read(value_at<BY_ITEM, ROW, LISTED>(values, row, item)));
            }
        }
        const unsigned lower = patch + items[k], upper = patch + items[k + 4];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const unsigned at = pixels.at[n / 2] + n % 2 * OCTET;
            const unsigned b[2] = {round_tf32(read(lower + at)), round_tf32(read(upper + at))};
#pragma unroll
            for (int m = 0; m < MT; ++m) mma(acc[m][n], a[m], b);
        }
    }
#else
    patch += (lane & 3) * 2 * SIZE;
#pragma unroll 1
    for (int k = 0; k < count; ++k) {
        float a[MT][2];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                a[m][i] = read(value_at<BY_ITEM, ROW, LISTED>(values, m * 16 + i * 8 + (lane >> 2), k));
            }
        }
        const unsigned item = patch + items[k];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const unsigned at = item + pixels.at[n / 2] + n % 2 * OCTET;
            const float even = read(at), odd = read(at + SIZE);
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                acc[m][n][0] += a[m][0] * even;
                acc[m][n][1] += a[m][0] * odd;
                acc[m][n][2] += a[m][1] * even;
                acc[m][n][3] += a[m][1] * odd;
            }
        }
    }
#endif
}

// ---------------------------------------------------------------------- results -> global memory

// A tensor as a tile of results goes to it: its pixels are listed at pixels_at.
template <class V>
struct Target {
    V* origin;  // the tile's first pixel and image, in channel 0
    long long channel;
    int height, width, row0, col0, images;  // images: left, from the tile's first on

    __device__ __forceinline__ Target(
        V* tensor, const Strides& stride, int height, int width, int row0, int col0, int image0, const Conv& g)
        : origin(tensor + row0 * stride.h + col0 * stride.w + image0), channel(stride.c), height(height), width(width),
          row0(row0), col0(col0), images(g.images - image0) {}
    // Whether all images of the tile exist, and lie where they can be written together.
    __device__ __forceinline__ bool whole() const { return ALIGNED && images >= IMAGES; }
    __device__ __forceinline__ bool inside(const Pixel& pixel) const {
        return row0 + (pixel.place >> 16) < height && col0 + (pixel.place & 0xffff) < width;
    }
};

// Writes a tile: of each row's channel (-1: of none) this lane's images of the warp's pixels. Rows lane / 4 and
// lane / 4 + 8 of each tile of M are the lane's. WHOLE: to.whole().
template <bool WHOLE, class V, class Channels>
__device__ __forceinline__ void store(
    const float (&acc)[MT][NT][4], const Target<V>& to, const Channels& channels, const Conv& g) {
    const int lane = threadIdx.x % 32, quarter = lane % 4;
    // The first of four; in fp32 the first of two, in each octet.
    const int image = sizeof(V) == 2 ? (quarter & 1) * 8 + quarter / 2 * 4 : quarter * 2;
    const int images = to.images - image;
    unsigned at[NT / 2], valid = 0;  // elements from the tile's first pixel; which pixels are inside
#pragma unroll
    for (int j = 0; j < NT / 2; ++j) {
        const int i = threadIdx.x / 32 * (NT / 2) + j;
        if (i >= g.tile_h * g.tile_w) continue;
        const Pixel pixel = pixels_of(g.pixels_at)[i];
        at[j] = pixel.offset;  // of many pixels read again below: there are no registers for them
        if (to.inside(pixel)) valid |= 1u << j;
    }
    char* origin = (char*)(to.origin + image);
    const unsigned channel_bytes = (unsigned)(to.channel * sizeof(V));
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int channel = channels[m * 16 + half * 8 + lane / 4];
            const unsigned inside = channel >= 0 ? valid : 0;
            char* from = origin + (unsigned long long)(unsigned)channel * channel_bytes;
#pragma unroll
            for (int j = 0; j < NT / 2; ++j) {
                const float(&first)[4] = acc[m][2 * j], (&second)[4] = acc[m][2 * j + 1];
                const int i = threadIdx.x / 32 * (NT / 2) + j;
                const unsigned pixel = NT > 8 ? pixels_of(g.pixels_at)[i].offset : at[j];
                V* here = (V*)(from + (unsigned long long)pixel * sizeof(V));
#if MATH == FP16 || MATH == BF16
                if constexpr (sizeof(V) == 2) {
                // Lanes swap pairs of images with their neighbours, so that each writes four in a row.
                const unsigned low = pack(first[half * 2], first[half * 2 + 1]);
                const unsigned high = pack(second[half * 2], second[half * 2 + 1]);
                const unsigned other = __shfl_xor_sync(~0u, quarter & 1 ? low : high, 1);
                const uint2 four = quarter & 1 ? uint2{other, high} : uint2{low, other};
                if (!(inside >> j & 1)) continue;
                if (WHOLE) {
                    *(uint2*)here = four;
                } else {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        if (i < images) here[i] = (V)((i < 2 ? four.x : four.y) >> i % 2 * 16);
                    }
                }
                continue;
                }
#endif
                if (!(inside >> j & 1)) continue;
#pragma unroll
                for (int octet = 0; octet < 2; ++octet) {
                    const float(&two)[4] = octet ? second : first;
                    if (WHOLE) {
                        *(float2*)(here + octet * 8) = float2{two[half * 2], two[half * 2 + 1]};
                    } else {
                        if (octet * 8 < images) here[octet * 8] = two[half * 2];
                        if (octet * 8 + 1 < images) here[octet * 8 + 1] = two[half * 2 + 1];
                    }
                }
            }
        }
    }
}
#endif

template <int M, int N>
__device__ __forceinline__ void clear(float (&acc)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.0f;
        }
    }
}
