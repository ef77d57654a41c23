// The innermost loops: tiles of filters x vectors of pixels, or x items, in registers.

#pragma once

#include <algorithm>
#include <cstdint>

#include "numbers.h"

namespace {

// Items whose products are added up by themselves: sums of sums round less than one long sum.
constexpr int64_t PARTIAL = 64;

// out[f][l] = start[f] + sum over items of w[item][f] * x[item + l], for F filters and V vectors of pixels; `start` of
// nullptr is what out holds.
template <class A, int F, int V>
void gather_tile(const A* x, const int32_t* items, const A* w, int64_t n, int64_t bk, const A* start, A* out,
                 int64_t channel) {
    constexpr int L = LANES<A>;
    vec<A> sum[F][V];
    UNROLL for (int f = 0; f < F; f++)
        UNROLL for (int v = 0; v < V; v++) sum[f][v] = vec<A>{} + (start ? start[f] : A(0));
    bool held = start == nullptr;  // whether out has a part of the sum
    for (int64_t i = 0; i < n; i++, w += bk) {
        if (i % PARTIAL == 0 && i > 0) {
            UNROLL for (int f = 0; f < F; f++)
                UNROLL for (int v = 0; v < V; v++) {
                    A* const to = out + f * channel + v * L;
                    store(to, held ? load(to) + sum[f][v] : sum[f][v]);
                    sum[f][v] = vec<A>{};
                }
            held = true;
        }
        const A* const p = x + items[i];
        if constexpr (F > 4) {
            vec<A> pixels[V];
            UNROLL for (int v = 0; v < V; v++) pixels[v] = load(p + v * L);
            UNROLL for (int f = 0; f < F; f++)
                UNROLL for (int v = 0; v < V; v++) sum[f][v] += pixels[v] * w[f];
        } else {
            UNROLL for (int v = 0; v < V; v++) {
                vec<A> pixels = load(p + v * L);
                if constexpr (F > 1) HOLD(pixels);
                UNROLL for (int f = 0; f < F; f++) sum[f][v] += pixels * w[f];
            }
        }
    }
    UNROLL for (int f = 0; f < F; f++)
        UNROLL for (int v = 0; v < V; v++) {
            A* const to = out + f * channel + v * L;
            store(to, held ? load(to) + sum[f][v] : sum[f][v]);
        }
}

// dx[item + l] += sum over f of w[item][f] * dy[f][l].
template <class A, int F, int V>
void scatter_tile(A* dx, const int32_t* items, const A* w, int64_t n, int64_t bk, const A* dy, int64_t channel) {
    constexpr int L = LANES<A>;
    vec<A> pixels[F][V];
    UNROLL for (int f = 0; f < F; f++)
        UNROLL for (int v = 0; v < V; v++) pixels[f][v] = load(dy + f * channel + v * L);
    for (int64_t i = 0; i < n; i++, w += bk) {
        A* const p = dx + items[i];
        vec<A> sum[V];
        UNROLL for (int v = 0; v < V; v++) sum[v] = pixels[0][v] * w[0];
        UNROLL for (int f = 1; f < F; f++)
            UNROLL for (int v = 0; v < V; v++) sum[v] += pixels[f][v] * w[f];
        UNROLL for (int v = 0; v < V; v++) store(p + v * L, load(p + v * L) + sum[v]);
    }
}

// The sums of pairs of neighbouring lanes: those of a, then those of b.
template <class A, size_t... J> INLINE vec<A> pairs(vec<A> a, vec<A> b, std::index_sequence<J...>) {
    return SHUFFLE(a, b, 2 * J, A) + SHUFFLE(a, b, 2 * J + 1, A);
}
// A vector whose lane i is the sum of vector i, of N vectors, a power of two; LEFT lanes are still to be added up.
template <class A, int N, int LEFT = LANES<A>> INLINE vec<A> lane_sums(const vec<A>* v) {
    if constexpr (LEFT == 1) {
        return v[0];
    } else if constexpr (N == 1) {
        const vec<A> half = pairs<A>(v[0], v[0], std::make_index_sequence<LANES<A>>{});
        return lane_sums<A, 1, LEFT / 2>(&half);
    } else {
        vec<A> half[N / 2];
        UNROLL for (int i = 0; i < N / 2; i++)
            half[i] = pairs<A>(v[2 * i], v[2 * i + 1], std::make_index_sequence<LANES<A>>{});
        return lane_sums<A, N / 2, LEFT / 2>(half);
    }
}
constexpr int power_of_two(int n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }

// to[i] = the sum of the lanes of vector i, of N vectors; `to` has room for a whole number of vectors.
template <class A, int N> INLINE void add_lanes(const vec<A>* v, A* to) {
    constexpr int COUNT = N < LANES<A> ? N : LANES<A>, WIDTH = power_of_two(COUNT);
    vec<A> part[WIDTH];
    UNROLL for (int i = 0; i < WIDTH; i++) part[i] = i < COUNT ? v[i] : vec<A>{};
    store(to, lane_sums<A, WIDTH>(part));
    if constexpr (N > COUNT) add_lanes<A, N - COUNT>(v + COUNT, to + COUNT);
}
// to[0..N) += from[0..N), as one vector.
template <class A, int N> INLINE void add_some(const A* from, A* to) {
    if constexpr (N == 1) {
        *to += *from;
    } else {
        typedef A some __attribute__((vector_size(N * sizeof(A)), aligned(alignof(A)), may_alias));
        *(some*)to += *(const some*)from;
    }
}

// A piece of a run for which filters of a tile stay in the first cache from item to item; or some rows of a tile.
struct Piece {
    int64_t begin, length;
    int64_t masked = INT64_MIN;                 // a vector of which only the lanes of a mask count
    int64_t rows = 1, x_step = 0, dy_step = 0;  // from row to row
};

// dv[item][f] += sum over l of dy[f][l] * x[item + l], for F filters and I items.
template <class A, int F, int I>
void dot_tile(const A* x, const int32_t* items, const A* dy, int64_t channel, const Piece& piece, const vec<A>* mask, A* dv,
              int64_t bk) {
    constexpr int L = LANES<A>;
    vec<A> sum[I * F];
    UNROLL for (int i = 0; i < I * F; i++) sum[i] = vec<A>{};
    const A* p[I];
    UNROLL for (int i = 0; i < I; i++) p[i] = x + items[i];
    for (int64_t row = 0; row < piece.rows; row++) {
        for (int64_t l = 0; l < piece.length; l += L) {
            if constexpr (F >= I) {
                vec<A> pixels[I];
                UNROLL for (int i = 0; i < I; i++) pixels[i] = load(p[i] + l);
                UNROLL for (int f = 0; f < F; f++) {
                    vec<A> d = load(dy + f * channel + l);
                    HOLD(d);
                    UNROLL for (int i = 0; i < I; i++) sum[i * F + f] += d * pixels[i];
                }
            } else {
                vec<A> d[F];
                UNROLL for (int f = 0; f < F; f++) d[f] = load(dy + f * channel + l);
                UNROLL for (int i = 0; i < I; i++) {
                    vec<A> pixels = load(p[i] + l);
                    if constexpr (F > 1) HOLD(pixels);
                    UNROLL for (int f = 0; f < F; f++) sum[i * F + f] += d[f] * pixels;
                }
            }
        }
        UNROLL for (int i = 0; i < I; i++) p[i] += piece.x_step;
        dy += piece.dy_step;
    }
    if (const int64_t masked = piece.masked; masked != INT64_MIN)
        UNROLL for (int f = 0; f < F; f++)
            UNROLL for (int i = 0; i < I; i++) sum[i * F + f] += load(dy + f * channel + masked) * *mask * load(p[i] + masked);
    A total[(I * F + L - 1) / L * L];
    add_lanes<A, I * F>(sum, total);
    UNROLL for (int i = 0; i < I; i++) add_some<A, F>(total + i * F, dv + i * bk);
}

// The tiles that leave registers enough: most vectors, or items, of a tile of 8, 4, 2, 1 filters.
constexpr int MOST_FILTERS = REGISTERS == 32 ? 8 : 4;
constexpr int most(int filters) {
    return REGISTERS == 32 ? (filters == 8 ? 3 : filters == 4 ? 6 : filters == 2 ? 10 : 16)
                           : (filters == 4 ? 3 : filters == 2 ? 5 : 8);
}
template <class A> using GatherTile = void (*)(const A*, const int32_t*, const A*, int64_t, int64_t, const A*, A*, int64_t);
template <class A> using ScatterTile = void (*)(A*, const int32_t*, const A*, int64_t, int64_t, const A*, int64_t);
template <class A>
using DotTile = void (*)(const A*, const int32_t*, const A*, int64_t, const Piece&, const vec<A>*, A*, int64_t);

template <class A, int F, int... I> GatherTile<A> gather_of(int v, std::integer_sequence<int, I...>) {
    static constexpr GatherTile<A> tiles[] = {gather_tile<A, F, I + 1>...};
    return tiles[v - 1];
}
template <class A, int F, int... I> ScatterTile<A> scatter_of(int v, std::integer_sequence<int, I...>) {
    static constexpr ScatterTile<A> tiles[] = {scatter_tile<A, F, I + 1>...};
    return tiles[v - 1];
}
template <class A, int F, int... I> DotTile<A> dot_of(int v, std::integer_sequence<int, I...>) {
    static constexpr DotTile<A> tiles[] = {dot_tile<A, F, I + 1>...};
    return tiles[v - 1];
}
#define TILE(OF, A, filters, v)                                                                      \
    ((filters) == 8   ? OF<A, MOST_FILTERS>(v, std::make_integer_sequence<int, most(MOST_FILTERS)>{}) \
     : (filters) == 4 ? OF<A, 4>(v, std::make_integer_sequence<int, most(4)>{})                       \
     : (filters) == 2 ? OF<A, 2>(v, std::make_integer_sequence<int, most(2)>{})                       \
                      : OF<A, 1>(v, std::make_integer_sequence<int, most(1)>{}))

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
            TILE(gather_of, A, count, v)(x + l, items, w + f, n, bk, start + f, out + f * channel + l, channel);
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
                    TILE(gather_of, A, count, v)(x + l, items + at, w + at * bk + f, end - at, bk,
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
            TILE(scatter_of, A, count, v)(dx + l, items, w + f, n, bk, dy + f * channel + l, channel);
        }
    });
    if (!exact || run % L == 0) return;
    for (int64_t f = 0, count; f < bk; f += count) {  // the last vector again, with zeros where it has been added
        count = some_filters(bk - f);
        A last[MOST_FILTERS * L];
        for (int64_t i = 0; i < count; i++)
            for (int64_t j = 0; j < L; j++) last[i * L + j] = j < L - run % L ? A(0) : dy[(f + i) * channel + run - L + j];
        TILE(scatter_of, A, count, 1)(dx + run - L, items, w + f, n, bk, last, L);
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
            TILE(dot_of, A, count, some)(x + piece.begin, items + i, dy + f * channel + piece.begin, channel, piece, &mask,
                                         dv + i * bk + f, bk);
        });
    }
}

}  // namespace
