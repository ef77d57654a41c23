// The innermost loops: tiles of filters x vectors of pixels, or x items, in registers. tiles.h and pixel_tiles.h say what
// each computes.

#include "pixel_tiles.h"
#include "tiles.h"

#include <algorithm>
#include <utility>

namespace {

using A = Wide;
constexpr int L = LANES<A>;

// Items whose products are added up by themselves: sums of sums round less than one long sum.
constexpr int64_t PARTIAL = 64;

template <int F, int V>
void gather_loop(const A* x, const int32_t* items, const A* w, int64_t n, int64_t bk, const A* start, A* out,
                 int64_t channel) {
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

template <int F, int V>
void scatter_loop(A* dx, const int32_t* items, const A* w, int64_t n, int64_t bk, const A* dy, int64_t channel) {
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
template <size_t... J> INLINE vec<A> pairs(vec<A> a, vec<A> b, std::index_sequence<J...>) {
    return SHUFFLE(a, b, 2 * J, A) + SHUFFLE(a, b, 2 * J + 1, A);
}
// A vector whose lane i is the sum of vector i, of N vectors, a power of two; LEFT lanes are still to be added up.
template <int N, int LEFT = L> INLINE vec<A> lane_sums(const vec<A>* v) {
    if constexpr (LEFT == 1) {
        return v[0];
    } else if constexpr (N == 1) {
        const vec<A> half = pairs(v[0], v[0], std::make_index_sequence<L>{});
        return lane_sums<1, LEFT / 2>(&half);
    } else {
        vec<A> half[N / 2];
        UNROLL for (int i = 0; i < N / 2; i++)
            half[i] = pairs(v[2 * i], v[2 * i + 1], std::make_index_sequence<L>{});
        return lane_sums<N / 2, LEFT / 2>(half);
    }
}
constexpr int power_of_two(int n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }

// to[i] = the sum of the lanes of vector i, of N vectors; `to` has room for a whole number of vectors.
template <int N> INLINE void add_lanes(const vec<A>* v, A* to) {
    constexpr int COUNT = N < L ? N : L, WIDTH = power_of_two(COUNT);
    vec<A> part[WIDTH];
    UNROLL for (int i = 0; i < WIDTH; i++) part[i] = i < COUNT ? v[i] : vec<A>{};
    store(to, lane_sums<WIDTH>(part));
    if constexpr (N > COUNT) add_lanes<N - COUNT>(v + COUNT, to + COUNT);
}
// to[0..N) += from[0..N), as one vector.
template <int N> INLINE void add_some(const A* from, A* to) {
    if constexpr (N == 1) {
        *to += *from;
    } else {
        typedef A some __attribute__((vector_size(N * sizeof(A)), aligned(alignof(A)), may_alias));
        *(some*)to += *(const some*)from;
    }
}

template <int F, int I>
void dot_loop(const A* x, const int32_t* items, const A* dy, int64_t channel, const Piece& piece, const vec<A>* mask, A* dv,
              int64_t bk) {
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
    add_lanes<I * F>(sum, total);
    UNROLL for (int i = 0; i < I; i++) add_some<F>(total + i * F, dv + i * bk);
}

template <int V, int P>
void pixels_loop(const A* const* x, int64_t pixels, const Items& list, int64_t first, const A* start, A* const* y,
                   int64_t at) {
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

template <int V, int I>
void outer_loop(const A* x, const int32_t* items, const A* dy, const Walk& walk, A* dv, int64_t width) {
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

// The loops of 1 to most vectors, or items: that of `count`.
template <int F, int... I> GatherTile gather_of(int64_t count, std::integer_sequence<int, I...>) {
    static constexpr GatherTile loops[] = {gather_loop<F, I + 1>...};
    return loops[count - 1];
}
template <int F, int... I> ScatterTile scatter_of(int64_t count, std::integer_sequence<int, I...>) {
    static constexpr ScatterTile loops[] = {scatter_loop<F, I + 1>...};
    return loops[count - 1];
}
template <int F, int... I> DotTile dot_of(int64_t count, std::integer_sequence<int, I...>) {
    static constexpr DotTile loops[] = {dot_loop<F, I + 1>...};
    return loops[count - 1];
}
template <int V, int... I> GatherPixels pixels_of(int64_t count, std::integer_sequence<int, I...>) {
    static constexpr GatherPixels loops[] = {pixels_loop<V, I + 1>...};
    return loops[count - 1];
}
template <int V, int... I> OuterTile outer_of(int64_t count, std::integer_sequence<int, I...>) {
    static constexpr OuterTile loops[] = {outer_loop<V, I + 1>...};
    return loops[count - 1];
}
#define OF(loops, size, most, count) loops<size>(count, std::make_integer_sequence<int, most(size)>{})
#define OF_FILTERS(loops, filters, count)                     \
    ((filters) == 8   ? OF(loops, MOST_FILTERS, most, count) \
     : (filters) == 4 ? OF(loops, 4, most, count)             \
     : (filters) == 2 ? OF(loops, 2, most, count)             \
                      : OF(loops, 1, most, count))
#define OF_VECTORS(loops, vectors, count)               \
    ((vectors) == 4   ? OF(loops, 4, most_beside, count) \
     : (vectors) == 2 ? OF(loops, 2, most_beside, count) \
                      : OF(loops, 1, most_beside, count))

}  // namespace

GatherTile gather_tile(int64_t filters, int64_t vectors) { return OF_FILTERS(gather_of, filters, vectors); }
ScatterTile scatter_tile(int64_t filters, int64_t vectors) { return OF_FILTERS(scatter_of, filters, vectors); }
DotTile dot_tile(int64_t filters, int64_t items) { return OF_FILTERS(dot_of, filters, items); }
GatherPixels gather_pixels(int64_t vectors, int64_t pixels) { return OF_VECTORS(pixels_of, vectors, pixels); }
OuterTile outer_tile(int64_t vectors, int64_t items) { return OF_VECTORS(outer_of, vectors, items); }
