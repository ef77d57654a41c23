// Channels of a tensor [rows, channels, inner]: their sums, and what statistics make of them. norm.cpp says more.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "numbers.h"
#include "scratch.h"

extern "C" struct Norm {  // cpu_norm.py has the same structure
    int64_t rows, channels, inner, threads;
    int64_t training, relu;
    double eps, momentum;
};

namespace {

constexpr int64_t PIECE = 256;            // numbers that one lane of a float sum takes
constexpr int64_t CHUNK_BYTES = 1 << 17;  // of a chunk of rows: half of a small L2 cache holds two of them

// Two sums, as vectors or as numbers.
template <class V> struct Two {
    V first, second;
};

// body.vectors(j) for whole vectors of `count` numbers, body.one(j) for each of the rest.
template <class A, class Vectors, class One> INLINE void each(int64_t count, Vectors vectors, One one) {
    int64_t j = 0;
    for (; j + LANES<A> <= count; j += LANES<A>) vectors(j);
    for (; j < count; j++) one(j);
}

// The factors of one channel, or those of all channels side by side.
template <class A, bool ACROSS> struct Factors {
    const A* p;
    INLINE vec<A> at(int64_t j) const {
        if constexpr (ACROSS) return load(p + j);
        return vec<A>{} + p[0];
    }
    INLINE A one(int64_t j) const { return p[ACROSS ? j : 0]; }
};

// ---------------------------------------------------------------------- a channel of its own

template <class T, class Body> INLINE void runs(const Norm& g, int64_t channel, Body body) {
    for (int64_t r = 0; r < g.rows; r++) body((r * g.channels + channel) * g.inner);
}

// Sums of what `vectors` and `one` give for each number of a channel.
template <class T, class Vectors, class One>
INLINE Two<double> sums_of_channel(const Norm& g, int64_t channel, Vectors vectors, One one) {
    using A = wide<T>;
    constexpr int64_t L = LANES<A>, U = 4;  // additions under way at once
    Two<double> total{};
    vec<A> a[U]{}, b[U]{};
    int64_t taken = 0;
    const auto flush = [&] {
        vec<A> u = (a[0] + a[1]) + (a[2] + a[3]), v = (b[0] + b[1]) + (b[2] + b[3]);
        for (int j = 0; j < L; j++) total.first += double(u[j]), total.second += double(v[j]);
        for (int t = 0; t < U; t++) a[t] = b[t] = vec<A>{};
        taken = 0;
    };
    runs<T>(g, channel, [&](int64_t at) {
        for (int64_t begin = 0; begin < g.inner; begin += U * L * PIECE) {
            const int64_t from = at + begin, count = std::min(U * L * PIECE, g.inner - begin);
            int64_t j = 0;
            for (; j + U * L <= count; j += U * L)
                UNROLL for (int t = 0; t < U; t++) {
                    const Two<vec<A>> v = vectors(from + j + t * L);
                    a[t] += v.first;
                    b[t] += v.second;
                }
            for (; j + L <= count; j += L) {
                const Two<vec<A>> v = vectors(from + j);
                a[0] += v.first;
                b[0] += v.second;
            }
            for (; j < count; j++) {
                const Two<A> v = one(from + j);
                total.first += v.first;
                total.second += v.second;
            }
            if ((taken += count) >= U * L * PIECE) flush();
        }
    });
    flush();
    return total;
}

// ---------------------------------------------------------------------- channels side by side

struct Chunks {
    int64_t rows, count;  // rows of a chunk
    explicit Chunks(const Norm& g, int64_t bytes)
        : rows(std::max<int64_t>(1, CHUNK_BYTES / (g.channels * bytes))), count((g.rows + rows - 1) / rows) {}
    int64_t size(const Norm& g, int64_t i) const { return std::min(rows, g.rows - i * rows); }
};

// Per channel, sums over `rows` rows of what `vectors` and `one` give for channel j of row r.
template <class A, class Vectors, class One>
INLINE void sums_across(int64_t channels, int64_t rows, A* first, A* second, Vectors vectors, One one) {
    constexpr int64_t L = LANES<A>, U = 4;
    int64_t j = 0;
    for (; j + U * L <= channels; j += U * L) {
        vec<A> a[U]{}, b[U]{};
        for (int64_t r = 0; r < rows; r++)
            UNROLL for (int t = 0; t < U; t++) {
                const Two<vec<A>> v = vectors(r, j + t * L);
                a[t] += v.first;
                b[t] += v.second;
            }
        UNROLL for (int t = 0; t < U; t++) {
            store(first + j + t * L, a[t]);
            if (second) store(second + j + t * L, b[t]);
        }
    }
    for (; j < channels; j++) {
        Two<A> sum{};
        for (int64_t r = 0; r < rows; r++) {
            const Two<A> v = one(r, j);
            sum.first += v.first;
            sum.second += v.second;
        }
        first[j] = sum.first;
        if (second) second[j] = sum.second;
    }
}

// ---------------------------------------------------------------------- what sums make of a channel

// What the statistics of a channel make of it: running statistics, and the factors of y = x * scale + shift.
template <class A> struct Channel {
    const A *weight, *bias;
    A *running_mean, *running_var, *mean, *invstd, *scale, *shift;

    void trained(const Norm& g, int64_t c, double average, double squares) const {
        const double m = double(g.rows) * g.inner, var = squares / m;
        if (running_mean) {
            running_mean[c] = A((1 - g.momentum) * running_mean[c] + g.momentum * average);
            running_var[c] = A((1 - g.momentum) * running_var[c] + g.momentum * (squares / (m - 1)));
        }
        factors(c, average, 1 / std::sqrt(var + g.eps));
    }
    void kept(const Norm& g, int64_t c) const {
        factors(c, running_mean[c], 1 / std::sqrt(double(running_var[c]) + g.eps));
    }
    void factors(int64_t c, double average, double inverse) const {
        mean[c] = A(average);
        invstd[c] = A(inverse);
        refactor(c);
    }
    void refactor(int64_t c) const {  // the same bits in both directions
        scale[c] = (weight ? weight[c] : A(1)) * invstd[c];
        shift[c] = (bias ? bias[c] : A(0)) - mean[c] * scale[c];
    }
};

}  // namespace
