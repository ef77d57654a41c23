// The index as lists of items; how units and block-rows become tasks.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "copying.h"
#include "joined.h"

namespace {

// How the channels of x, or of dy, are cut where their pixels are loaded for one or two filters at a time. Such tiles are
// as fast as their loads, and those are twice as fast from the first cache: all rows read a chunk of channels before the
// next one. A 1x1 convolution has too few weights in a chunk.
struct Chunking {
    int64_t size, count;  // channel blocks of a chunk; chunks

    struct Limits {
        int64_t near;  // bytes of pixels that stay in the first cache
        int64_t few;   // items of a row that pay for reading and writing its sums
    };
    static constexpr Limits OF_PLANES{24 << 10, 12};
    static constexpr Limits OF_LANES{32 << 10, 28};  // a tile in lanes reads more for as many pixels

    // `filters` of a row; `blocks` of `width` channels, of each of which a tile reads `bytes`; `items` in all rows.
    Chunking(const Conv& g, int64_t filters, int64_t rows, int64_t blocks, int64_t width, int64_t bytes, int64_t items,
             const Limits& limits = OF_PLANES)
        : size(blocks), count(1) {
        if (filters >= 4 || g.r * g.s == 1 || items == 0) return;
        const int64_t worth = (limits.few * rows * blocks + items - 1) / items;
        size = std::max<int64_t>({1, limits.near / (bytes * width), worth});
        count = (blocks + size - 1) / size;
        size = (blocks + count - 1) / count;
    }
};

// Items and weights of block-row b for fprop and wgrad: an item for each stored (channel, tap), in the order (channel
// block, tap), so that taps of a channel find its pixels in the first cache. Weights [item][bk]. `place` gets the item of each block, `starts` where each of
// several chunks begins, and the end.
template <class T, class A>
void list_row(const Conv& g, int64_t channel, const Index& index, const int64_t* taps, int64_t b, int32_t* counts,
              const T* values, int32_t* items, A* weights, int32_t* place, const Chunking& chunks, int64_t* starts) {
    const bool by_channel = g.r * g.s > 1;
    const int64_t begin = index.indptr[b], end = index.indptr[b + 1], blocks = g.c / g.bc;
    if (by_channel) {
        std::memset(counts, 0, sizeof(int32_t) * blocks);
        for (int64_t i = begin, base = 0; i < end; i++) {
            while (index.indices[i] - base >= blocks) base += blocks;
            counts[index.indices[i] - base]++;
        }
        int32_t before = 0;
        for (int64_t block = 0; block < blocks; block++) {
            const int32_t count = counts[block];
            counts[block] = before;
            before += count;
        }
        for (int64_t chunk = 0; chunk < chunks.count; chunk++)
            starts[chunk] = (begin + (chunk * chunks.size < blocks ? counts[chunk * chunks.size] : before)) * g.bc;
        starts[chunks.count] = end * g.bc;
    }
    const auto each = [&](auto body) {
        for (int64_t i = begin, base = 0, tap = 0; i < end; i++) {
            while (index.indices[i] - base >= blocks) base += blocks, tap++;
            const int64_t block = index.indices[i] - base, at = begin + (by_channel ? counts[block]++ : i - begin);
            place[i] = at;
            body(i, block, at, taps[tap]);
        }
    };
    if (g.bk == 1 && g.bc == 1)  // few instructions for each of many
        return each([&](int64_t i, int64_t block, int64_t at, int64_t tap) {
            items[at] = block * channel + tap;
            if (values != nullptr) weights[at] = widen(values[i]);
        });
    each([&](int64_t i, int64_t block, int64_t at, int64_t tap) {
        int32_t* const item = items + at * g.bc;
        for (int64_t j = 0; j < g.bc; j++) item[j] = (block * g.bc + j) * channel + tap;
        if (values != nullptr) block_in(values + i * g.bk * g.bc, g.bk, g.bc, weights + at * g.bc * g.bk);
    });
}

// Items and weights of a channel block for dgrad: an item for each stored (tap, filter). A list for each phase and chunk of
// filters, from `starts` on, in it the order (tap, filter). Weights [item][bc].
template <class T, class A>
void list_channels(const Conv& g, const Index& index, const int64_t* offsets, const int64_t* list_of, const Chunking& cut,
                   int64_t lists, int64_t block, int64_t plane, const T* values, int32_t* items, A* weights,
                   int64_t* starts) {
    const int64_t taps = g.r * g.s, rows = g.k / g.bk, bk = g.bk, bc = g.bc;
    const int32_t *const indptr = index.t_indptr + block * taps, *const order = index.order;
    std::vector<int64_t> next(lists);
    const auto each = [&](auto body) {
        for (int64_t tap = 0; tap < taps; tap++) {
            const int64_t end = indptr[tap + 1];
            int64_t list = list_of[tap], last = cut.size;
            for (int64_t e = indptr[tap]; e < end; e++) {
                const int64_t row = index.t_indices[e] - tap * rows;
                for (; row >= last; last += cut.size) list++;
                body(e, row * bk, list, offsets[tap]);
            }
        }
    };
    each([&](int64_t, int64_t, int64_t list, int64_t) { next[list] += bk; });
    int64_t begin = indptr[0] * bk;
    for (int64_t list = 0; list < lists; list++) {
        starts[list] = begin;
        begin += next[list];
        next[list] = starts[list];
    }
    if (bk == 1 && bc == 1)  // few instructions for each of many
        return each([&](int64_t e, int64_t row, int64_t list, int64_t offset) {
            const int64_t at = next[list]++;
            items[at] = (order ? order[row] : row) * plane + offset;
            weights[at] = widen(values[index.t_perm[e]]);
        });
    each([&](int64_t e, int64_t row, int64_t list, int64_t offset) {
        const int64_t at = next[list];
        next[list] += bk;
        copy_in(values + index.t_perm[e] * bk * bc, 1, weights + at * bc, bk * bc);
        for (int64_t f = 0; f < bk; f++) items[at + f] = (order ? order[row + f] : row + f) * plane + offset;
    });
}

int64_t parts_of(int64_t units, int64_t threads, int64_t rows) {
    if (units % threads == 0 || units >= 4 * threads) return 1;
    return std::min(threads, rows);
}

// Where part number `part` of so many begins, of `count` things.
int64_t part_begin(int64_t part, int64_t parts, int64_t count) { return (part * count + parts - 1) / parts; }

template <class T> bool rows_in_place(const Conv& g, const int64_t* strides, int64_t height, int64_t width) {
    const int64_t images = g.batch_last ? g.n : 1;  // that lie together
    return std::is_same<T, wide<T>>::value && strides[3] == images && strides[2] == width * images &&
           height * width * images >= 128 && (!g.batch_last || strides[0] == 1);
}
// Whether tiles of `width` filters, or channels, are faster on copies of channels that lie as these do: as fast as their
// loads, of which one that crosses a line of memory takes twice as long.
bool worth_a_copy(const Conv& g, int64_t width, const int64_t* strides, int64_t lanes) {
    return width < 4 && !g.batch_last && strides[1] % lanes != 0;
}
bool fits(int64_t channels, int64_t channel) { return channels * channel < INT32_MAX; }

}  // namespace
