// The innermost loops for channels_last: tiles of pixels, or items, x vectors of channels in registers.

#pragma once

#include <algorithm>
#include <cstdint>

#include "numbers.h"
#include "tiles.h"

namespace {

// The items of a tile's channels: those of taps[t], for t of `count`, are numbers [ends[tap], ends[tap + 1]) of `items`
// and `weights`, [item][width].
template <class A> struct Items {
    const int32_t *taps, *ends, *items;
    const A* weights;
    int64_t count, width;
};

// y[p][at + f] = start[f] + sum over items of w[item][f] * x[tap][p][item], for P pixels and V vectors of filters from
// number `first` of a block on. x holds a pointer for each tap and pixel, the taps `pixels` apart.
template <class A, int V, int P>
void gather_pixels(const A* const* x, int64_t pixels, const Items<A>& list, int64_t first, const A* start, A* const* y,
                   int64_t at) {
    constexpr int L = LANES<A>;
    vec<A> sum[P][V];
    UNROLL for (int v = 0; v < V; v++)
        UNROLL for (int p = 0; p < P; p++) sum[p][v] = load(start + v * L);
    int64_t t = 0, i = list.count ? list.ends[list.taps[0]] : 0;
    for (bool held = false;; held = true) {  // whether y has a part of the sum
        for (int64_t left = PARTIAL; left > 0 && t < list.count;) {
            const int64_t end = list.ends[list.taps[t] + 1], stop = std::min(end, i + left);
            const A *from[P], *w = list.weights + i * list.width + first;
            UNROLL for (int p = 0; p < P; p++) from[p] = x[p];
            left -= stop - i;
            for (; i < stop; i++, w += list.width) {
                const int64_t item = list.items[i];
                vec<A> weights[V];
                UNROLL for (int v = 0; v < V; v++) weights[v] = load(w + v * L);
                UNROLL for (int p = 0; p < P; p++) {
                    vec<A> pixel = from[p][item] - vec<A>{};
                    if constexpr (V > 1) HOLD(pixel);
                    UNROLL for (int v = 0; v < V; v++) sum[p][v] += pixel * weights[v];
                }
            }
            if (i < end) continue;
            x += pixels;
            if (++t < list.count) i = list.ends[list.taps[t]];
        }
        UNROLL for (int p = 0; p < P; p++)
            UNROLL for (int v = 0; v < V; v++) {
                A* const to = y[p] + at + v * L;
                store(to, held ? load(to) + sum[p][v] : sum[p][v]);
                sum[p][v] = vec<A>{};
            }
        if (t == list.count) break;
    }
}

// Pixels in the order of a tensor, of two tensors: how many, and how far each lies from the one before it.
struct Walk {
    int64_t count[3], x[3], y[3];  // images, rows, columns
};

// dv[item][f] += sum over pixels of x[pixel][item] * dy[pixel][f], for I items and V vectors of filters.
template <class A, int V, int I>
void outer_tile(const A* x, const int32_t* items, const A* dy, const Walk& walk, A* dv, int64_t width) {
    constexpr int L = LANES<A>;
    vec<A> sum[I][V];
    int64_t at[I];
    UNROLL for (int i = 0; i < I; i++) {
        at[i] = items[i];
        UNROLL for (int v = 0; v < V; v++) sum[i][v] = vec<A>{};
    }
    const auto add = [&](const A* p, const A* q) {
        vec<A> d[V];
        UNROLL for (int v = 0; v < V; v++) d[v] = load(q + v * L);
        UNROLL for (int i = 0; i < I; i++) {
            vec<A> pixel = p[at[i]] - vec<A>{};
            if constexpr (V > 1) HOLD(pixel);
            UNROLL for (int v = 0; v < V; v++) sum[i][v] += pixel * d[v];
        }
    };
    const int64_t step = walk.x[2], y_step = walk.y[2], columns = walk.count[2];
    for (int64_t m = 0; m < walk.count[0]; m++, x += walk.x[0], dy += walk.y[0])
        for (int64_t r = 0; r < walk.count[1]; r++) {
            const A *p = x + r * walk.x[1], *q = dy + r * walk.y[1];
            int64_t j = 0;
            for (; j + 2 <= columns; j += 2, p += 2 * step, q += 2 * y_step) {
                add(p, q);
                add(p + step, q + y_step);
            }
            if (j < columns) add(p, q);
        }
    UNROLL for (int i = 0; i < I; i++)
        UNROLL for (int v = 0; v < V; v++) {
            A* const to = dv + i * width + v * L;
            store(to, load(to) + sum[i][v]);
        }
}

// Most pixels, or items, beside 4, 2 and 1 vectors, so that sums, and of one vector pointers to pixels, stay in registers.
constexpr int most_beside(int vectors) {
    return vectors == 4 ? (REGISTERS == 32 ? 6 : 2) : vectors == 2 ? (REGISTERS == 32 ? 12 : 6) : 8;
}
// The vectors of the next tile, of so many that are left.
INLINE int64_t some_vectors(int64_t left) { return left >= 4 && REGISTERS == 32 ? 4 : left >= 2 ? 2 : 1; }

template <class A>
using GatherPixels = void (*)(const A* const*, int64_t, const Items<A>&, int64_t, const A*, A* const*, int64_t);
template <class A> using OuterTile = void (*)(const A*, const int32_t*, const A*, const Walk&, A*, int64_t);

template <class A, int V, int... I>
GatherPixels<A> gather_pixels_of(int64_t count, std::integer_sequence<int, I...>) {
    static constexpr GatherPixels<A> tiles[] = {gather_pixels<A, V, I + 1>...};
    return tiles[count - 1];
}
template <class A, int V, int... I>
OuterTile<A> outer_of(int64_t count, std::integer_sequence<int, I...>) {
    static constexpr OuterTile<A> tiles[] = {outer_tile<A, V, I + 1>...};
    return tiles[count - 1];
}
#define PIXEL_TILE(OF, A, vectors, count)                                                   \
    ((vectors) == 4   ? OF<A, 4>(count, std::make_integer_sequence<int, most_beside(4)>{}) \
     : (vectors) == 2 ? OF<A, 2>(count, std::make_integer_sequence<int, most_beside(2)>{}) \
                      : OF<A, 1>(count, std::make_integer_sequence<int, most_beside(1)>{}))

}  // namespace
