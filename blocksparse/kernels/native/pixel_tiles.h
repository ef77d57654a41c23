// Tiles of pixels, or items, x vectors of channels for channels_last, whose loops are in tiles.cpp.

#pragma once

#include <cstdint>

#include "numbers.h"

// The items of a tile's channels: those of taps[t], for t of `count`, are numbers [ends[tap], ends[tap + 1]) of `items`
// and `weights`, [item][width].
struct Items {
    const int32_t *taps, *ends, *items;
    const Wide* weights;
    int64_t count, width;
};

// Pixels in the order of a tensor, of two tensors: how many, and how far each lies from the one before it.
struct Walk {
    int64_t count[3], x[3], y[3];  // images, rows, columns
};

// Tiles of so many vectors (4, 2, 1) and pixels, or items:
//     gather    y[p][at + f] = start[f] + sum over items of w[item][f] * x[tap][p][item], of filters from number `first`
//               of a block on; x holds a pointer for each tap and pixel, the taps `pixels` apart
//     outer     dv[item][f] += sum over pixels of x[pixel][item] * dy[pixel][f]
using GatherPixels = void (*)(const Wide* const* x, int64_t pixels, const Items& list, int64_t first, const Wide* start,
                              Wide* const* y, int64_t at);
using OuterTile = void (*)(const Wide* x, const int32_t* items, const Wide* dy, const Walk& walk, Wide* dv,
                           int64_t width);
INTERNAL GatherPixels gather_pixels(int64_t vectors, int64_t pixels);
INTERNAL OuterTile outer_tile(int64_t vectors, int64_t items);

namespace {

// Most pixels, or items, beside 4, 2 and 1 vectors, so that sums, and of one vector pointers to pixels, stay in registers.
constexpr int most_beside(int vectors) {
    return vectors == 4 ? (REGISTERS == 32 ? 6 : 2) : vectors == 2 ? (REGISTERS == 32 ? 12 : 6) : 8;
}
// The vectors of the next tile, of so many that are left.
INLINE int64_t some_vectors(int64_t left) { return left >= 4 && REGISTERS == 32 ? 4 : left >= 2 ? 2 : 1; }

}  // namespace
