// Rows of results in tiles of filters x vectors of pixels, or x items, whose loops are in tiles.cpp.

#pragma once

#include <algorithm>
#include <cstdint>

#include "numbers.h"

// A piece of a run for which filters of a tile stay in the first cache from item to item; or some rows of a tile.
struct Piece {
    int64_t begin, length;
    int64_t masked = INT64_MIN;                 // a vector of which only the lanes of a mask count
    int64_t rows = 1, x_step = 0, dy_step = 0;  // from row to row
};

// Tiles of so many filters (8, 4, 2, 1) and vectors, or items:
//     gather     out[f][l] = start[f] + sum over items of w[item][f] * x[item + l]; `start` of nullptr is what out holds
//     scatter    dx[item + l] += sum over f of w[item][f] * dy[f][l]
//     dot        dv[item][f] += sum over l of dy[f][l] * x[item + l]
// bk is the distance from item to item in w and dv, channel that from filter to filter in out and dy.
using GatherTile = void (*)(const Wide* x, const int32_t* items, const Wide* w, int64_t n, int64_t bk, const Wide* start,
                            Wide* out, int64_t channel);
using ScatterTile = void (*)(Wide* dx, const int32_t* items, const Wide* w, int64_t n, int64_t bk, const Wide* dy,
                             int64_t channel);
using DotTile = void (*)(const Wide* x, const int32_t* items, const Wide* dy, int64_t channel, const Piece& piece,
                         const vec<Wide>* mask, Wide* dv, int64_t bk);
INTERNAL GatherTile gather_tile(int64_t filters, int64_t vectors);
INTERNAL ScatterTile scatter_tile(int64_t filters, int64_t vectors);
INTERNAL DotTile dot_tile(int64_t filters, int64_t items);

namespace {

// The tiles that leave registers enough: most vectors, or items, of a tile of 8, 4, 2, 1 filters.
constexpr int MOST_FILTERS = REGISTERS == 32 ? 8 : 4;
constexpr int most(int filters) {
    return REGISTERS == 32 ? (filters == 8 ? 3 : filters == 4 ? 6 : filters == 2 ? 10 : 16)
                           : (filters == 4 ? 3 : filters == 2 ? 5 : 8);
}

// The next filters of a block-row of which `left` are left.
INLINE int64_t some_filters(int64_t left) {
    return left >= MOST_FILTERS ? MOST_FILTERS : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// Calls body(begin, size) for `count` things in the fewest pieces of at most `most`, alike in size.
template <class Body> INLINE void in_pieces(int64_t count, int64_t most, Body body) {
    const int64_t pieces = (count + most - 1) / most;
    for (int64_t piece = 0, at = 0; piece < pieces; piece++) {
        const int64_t size = count / pieces + (piece < count % pieces);
        body(at, size);
        at += size;
    }
}

// Calls body(start, vectors) for tiles of at most `most` vectors that cover `run` pixels. Where nothing may be touched
// beyond them, the last vector overlaps the one before it.
template <class A, class Body> INLINE void over_run(int64_t run, int64_t most, bool exact, Body body) {
    constexpr int64_t L = LANES<A>;
    in_pieces(exact ? run / L : (run + L - 1) / L, most, [&](int64_t v, int64_t count) { body(v * L, count); });
    if (exact && run % L) body(run - L, 1);
}

// One block-row: bk filters on its items.
template <class A>
void gather_row(const A* x, const int32_t* items, const A* w, int64_t n, int64_t bk, const A* start, A* out,
                int64_t channel, int64_t run, bool exact) {
    over_run<A>(run, most(some_filters(bk)), exact, [&](int64_t l, int64_t v) {
        for (int64_t f = 0, count; f < bk; f += count) {
            count = some_filters(bk - f);
            for (int64_t i = count; exact && i < 2 * count; i++)  // where the next filters go: straight into a tensor
                for (int64_t j = 0; j < v; j++) __builtin_prefetch(out + (f + i) * channel + l + j * LANES<A>, 1);
            gather_tile(count, v)(x + l, items, w + f, n, bk, start + f, out + f * channel + l, channel);
        }
    });
}
// Rows [b0, b1) whose items lie in chunks of channels, so that the pixels of a chunk stay in the first cache while all
// rows read them. list(b, chunk) is where items begin and end, start(b) and out(b) are as in gather_row.
template <class A, class List, class Start, class Out>
void gather_rows(const A* x, const int32_t* items, const A* w, int64_t bk, int64_t b0, int64_t b1, int64_t chunks,
                 List list, Start start, Out out, int64_t channel, int64_t run, bool exact) {
    over_run<A>(run, most(some_filters(bk)), exact, [&](int64_t l, int64_t v) {
        for (int64_t chunk = 0; chunk < chunks; chunk++)
            for (int64_t b = b0; b < b1; b++) {
                const auto [at, end] = list(b, chunk);
                if (chunk > 0 && at == end) continue;
                for (int64_t f = 0, count; f < bk; f += count) {
                    count = some_filters(bk - f);
                    gather_tile(count, v)(x + l, items + at, w + at * bk + f, end - at, bk,
                                                 chunk ? nullptr : start(b) + f, out(b) + f * channel + l, channel);
                }
            }
    });
}
template <class A>
void scatter_row(A* dx, const int32_t* items, const A* w, int64_t n, int64_t bk, const A* dy, int64_t channel,
                 int64_t run, bool exact) {
    constexpr int64_t L = LANES<A>;
    over_run<A>(exact ? run / L * L : run, most(some_filters(bk)), false, [&](int64_t l, int64_t v) {
        for (int64_t f = 0, count; f < bk; f += count) {
            count = some_filters(bk - f);
            scatter_tile(count, v)(dx + l, items, w + f, n, bk, dy + f * channel + l, channel);
        }
    });
    if (!exact || run % L == 0) return;
    for (int64_t f = 0, count; f < bk; f += count) {  // the last vector again, with zeros where it has been added
        count = some_filters(bk - f);
        A last[MOST_FILTERS * L];
        for (int64_t i = 0; i < count; i++)
            for (int64_t j = 0; j < L; j++) last[i * L + j] = j < L - run % L ? A(0) : dy[(f + i) * channel + run - L + j];
        scatter_tile(count, 1)(dx + run - L, items, w + f, n, bk, last, L);
    }
}
constexpr int64_t DOT_VECTORS = 40;

// Calls body(piece) for the pieces of a run.
template <class A, class Body> INLINE void over_pieces(int64_t run, bool exact, Body body) {
    constexpr int64_t L = LANES<A>;
    const int64_t vectors = exact ? run / L : (run + L - 1) / L, masked = exact && run % L ? run - L : INT64_MIN;
    if (vectors == 0) return body(Piece{0, 0, masked});
    in_pieces(vectors, DOT_VECTORS, [&](int64_t begin, int64_t some) {
        const bool last = begin + some == vectors && masked != INT64_MIN;
        body(Piece{begin * L, some * L, last ? masked - begin * L : INT64_MIN});
    });
}
// bk filters on n items in a piece of a run; `mask`: of its last vector.
template <class A>
void dot_row(const A* x, const int32_t* items, int64_t n, const A* dy, int64_t channel, int64_t bk, A* dv,
             const Piece& piece, const vec<A>& mask) {
    for (int64_t f = 0, count; f < bk; f += count) {
        count = some_filters(bk - f);
        in_pieces(n, most(count), [&](int64_t i, int64_t some) {
            dot_tile(count, some)(x + piece.begin, items + i, dy + f * channel + piece.begin, channel, piece, &mask,
                                         dv + i * bk + f, bk);
        });
    }
}

}  // namespace
