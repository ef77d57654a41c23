// Batch normalisation together with what follows it, and its gradients:
//
//     y = max((x - mean) * invstd * weight + bias + residual, 0)      residual and ReLU where they are asked for
//
// A tensor is [rows, channels, inner]: contiguous [N, C, H*W], batch last [1, C, H*W*N], channels last [N*H*W, C, 1].
//
// Where inner > 1 a channel belongs to one thread, which reads it for the mean, the variance and y one after the other:
// from memory once, then from its cache. Where inner = 1 chunks of rows, cut by sizes alone, are summed each on its own
// and put together in order; y is computed from the last chunk to the first, which are still in the cache. So results are
// the same bits for any number of threads. Squares are those of differences from the mean; sums of a few thousand numbers
// at most are float, those of all are double.

#include <cstdint>

#include "channels.h"
#include "numbers.h"
#include "scratch.h"

namespace {

template <class V> INLINE V cut(V v) { return v < 0 ? V{} : v; }                  // NaN stays
template <class V> INLINE V passed(V dy, V out) { return out <= 0 ? V{} : dy; }  // ReLU's gradient, NaN as PyTorch

// ---------------------------------------------------------------------- one run of numbers

template <class T, bool ACROSS, bool RESIDUAL, bool RELU>
void apply_run(const T* x, const T* residual, T* y, const wide<T>* scales, const wide<T>* shifts, int64_t count) {
    using A = wide<T>;
    const Factors<A, ACROSS> scale{scales}, shift{shifts};
    each<A>(
        count,
        [=](int64_t j) {
            vec<A> v = load_wide(x + j) * scale.at(j) + shift.at(j);
            if (RESIDUAL) v += load_wide(residual + j);
            store_narrow(y + j, RELU ? cut(v) : v);
        },
        [=](int64_t j) {
            A v = widen(x[j]) * scale.one(j) + shift.one(j);
            if (RESIDUAL) v += widen(residual[j]);
            y[j] = narrow<T>(RELU ? cut(v) : v);
        });
}
template <class T, bool ACROSS>
void apply(const T* x, const T* residual, T* y, const wide<T>* scale, const wide<T>* shift, bool relu, int64_t count) {
    if (residual)
        relu ? apply_run<T, ACROSS, true, true>(x, residual, y, scale, shift, count)
             : apply_run<T, ACROSS, true, false>(x, residual, y, scale, shift, count);
    else
        relu ? apply_run<T, ACROSS, false, true>(x, residual, y, scale, shift, count)
             : apply_run<T, ACROSS, false, false>(x, residual, y, scale, shift, count);
}

// What the gradients read: dy where the ReLU let it pass. y is null where it follows from x.
template <class T> struct Seen {
    const T *dy, *x, *y;
    bool relu;
    INLINE Seen at(int64_t j) const { return {dy + j, x + j, y ? y + j : nullptr, relu}; }
};
enum { PLAIN, FROM_Y, FROM_X };  // no ReLU; told by y; told by x * scale + shift, as y was made
template <class T, bool ACROSS, int RELU> struct Reader {
    using A = wide<T>;
    Seen<T> s;
    Factors<A, ACROSS> mean, scale, shift;

    INLINE Reader at(int64_t j) const { return {s.at(j), mean, scale, shift}; }
    INLINE vec<A> gradient(int64_t j, vec<A> x) const {
        const vec<A> dy = load_wide(s.dy + j);
        if (RELU == PLAIN) return dy;
        return passed(dy, RELU == FROM_Y ? load_wide(s.y + j) : x * scale.at(j) + shift.at(j));
    }
    INLINE A gradient_one(int64_t j, A x) const {
        const A dy = widen(s.dy[j]);
        if (RELU == PLAIN) return dy;
        return passed(dy, RELU == FROM_Y ? A(widen(s.y[j])) : x * scale.one(j) + shift.one(j));
    }
};
// body(Reader) for the case at hand
template <class T, bool ACROSS, class Body>
INLINE void read(const Seen<T>& s, const wide<T>* mean, const wide<T>* scale, const wide<T>* shift, Body body) {
    if (!s.relu)
        body(Reader<T, ACROSS, PLAIN>{s, {mean}, {scale}, {shift}});
    else if (s.y)
        body(Reader<T, ACROSS, FROM_Y>{s, {mean}, {scale}, {shift}});
    else
        body(Reader<T, ACROSS, FROM_X>{s, {mean}, {scale}, {shift}});
}

// dx = (g - offset - (x - mean) * slope) * scale and dresidual = g, where they are asked for
template <class T, bool ACROSS, class R>
INLINE void gradients_run(const R& r, const wide<T>* offsets, const wide<T>* slopes, T* dx, T* dresidual, int64_t count) {
    using A = wide<T>;
    const Factors<A, ACROSS> offset{offsets}, slope{slopes};
    each<A>(
        count,
        [=](int64_t j) {
            const vec<A> x = load_wide(r.s.x + j), g = r.gradient(j, x);
            if (dresidual) store_narrow(dresidual + j, g);
            if (dx) store_narrow(dx + j, (g - offset.at(j) - (x - r.mean.at(j)) * slope.at(j)) * r.scale.at(j));
        },
        [=](int64_t j) {
            const A x = widen(r.s.x[j]), g = r.gradient_one(j, x);
            if (dresidual) dresidual[j] = narrow<T>(g);
            if (dx) dx[j] = narrow<T>((g - offset.one(j) - (x - r.mean.one(j)) * slope.one(j)) * r.scale.one(j));
        });
}

// ---------------------------------------------------------------------- forward

template <class T>
int norm_forward(const Norm& g, const T* x, const T* residual, const wide<T>* weight, const wide<T>* bias,
                 wide<T>* running_mean, wide<T>* running_var, wide<T>* mean, wide<T>* invstd, T* y) {
    using A = wide<T>;
    Scratch memory;
    const Chunks chunks(g, sizeof(T));
    const bool across = g.inner == 1, partial = across && g.training;
    const size_t scales = memory.add<A>(g.channels), shifts = memory.add<A>(g.channels);
    const size_t averages = memory.add<A>(partial ? chunks.count * g.channels : 0);
    const size_t squares = memory.add<A>(partial ? chunks.count * g.channels : 0);
    memory.make();
    A *scale = memory.at<A>(scales), *shift = memory.at<A>(shifts);
    A *chunk_mean = memory.at<A>(averages), *chunk_squares = memory.at<A>(squares);
    const Channel<A> channel{weight, bias, running_mean, running_var, mean, invstd, scale, shift};
    if (!across) {
#pragma omp parallel for num_threads(g.threads) schedule(static)
        for (int64_t c = 0; c < g.channels; c++) {
            if (g.training) {
                const double sum = sums_of_channel<T>(
                    g, c, [=](int64_t j) { return Two<vec<A>>{load_wide(x + j), vec<A>{}}; },
                    [=](int64_t j) { return Two<A>{widen(x[j]), 0}; }).first;
                const double average = sum / (double(g.rows) * g.inner);
                const A m = A(average);
                const vec<A> mv = vec<A>{} + m;
                const double squares = sums_of_channel<T>(
                    g, c,
                    [=](int64_t j) {
                        const vec<A> d = load_wide(x + j) - mv;
                        return Two<vec<A>>{d * d, vec<A>{}};
                    },
                    [=](int64_t j) {
                        const A d = widen(x[j]) - m;
                        return Two<A>{d * d, 0};
                    }).first;
                channel.trained(g, c, average, squares);
            } else {
                channel.kept(g, c);
            }
            runs<T>(g, c, [&](int64_t at) {
                apply<T, false>(x + at, residual ? residual + at : nullptr, y + at, scale + c, shift + c, g.relu, g.inner);
            });
        }
        return 0;
    }
    const int64_t width = g.channels, chunk = chunks.rows * width;
    if (g.training) {
#pragma omp parallel for num_threads(g.threads) schedule(static)
        for (int64_t i = 0; i < chunks.count; i++) {
            const T* const from = x + i * chunk;
            A* const m = chunk_mean + i * width;
            const int64_t rows = chunks.size(g, i);
            sums_across<A>(
                width, rows, m, (A*)nullptr,
                [=](int64_t r, int64_t j) { return Two<vec<A>>{load_wide(from + r * width + j), vec<A>{}}; },
                [=](int64_t r, int64_t j) { return Two<A>{widen(from[r * width + j]), 0}; });
            for (int64_t j = 0; j < width; j++) m[j] /= A(rows);
            sums_across<A>(
                width, rows, chunk_squares + i * width, (A*)nullptr,
                [=](int64_t r, int64_t j) {
                    const vec<A> d = load_wide(from + r * width + j) - load(m + j);
                    return Two<vec<A>>{d * d, vec<A>{}};
                },
                [=](int64_t r, int64_t j) {
                    const A d = widen(from[r * width + j]) - m[j];
                    return Two<A>{d * d, 0};
                });
        }
        for (int64_t c = 0; c < width; c++) {
            double sum = 0, square = 0;
            for (int64_t i = 0; i < chunks.count; i++) sum += double(chunk_mean[i * width + c]) * chunks.size(g, i);
            const double average = sum / g.rows;
            for (int64_t i = 0; i < chunks.count; i++) {
                const double d = chunk_mean[i * width + c] - average;
                square += chunk_squares[i * width + c] + d * d * chunks.size(g, i);
            }
            channel.trained(g, c, average, square);
        }
    } else {
        for (int64_t c = 0; c < width; c++) channel.kept(g, c);
    }
#pragma omp parallel for num_threads(g.threads) schedule(static)
    for (int64_t back = 0; back < chunks.count; back++) {
        const int64_t i = chunks.count - 1 - back, rows = chunks.size(g, i);
        for (int64_t r = 0; r < rows; r++) {
            const int64_t at = i * chunk + r * width;
            apply<T, true>(x + at, residual ? residual + at : nullptr, y + at, scale, shift, g.relu, width);
        }
    }
    return 0;
}

// ---------------------------------------------------------------------- backward

// mean and invstd are those of forward. Any of dx, dresidual may be null; dweight and dbias may not.
template <class T>
int norm_backward(const Norm& g, const T* dy, const T* x, const T* y, const wide<T>* weight, const wide<T>* bias,
                  wide<T>* mean, wide<T>* invstd, T* dx, T* dresidual, wide<T>* dweight, wide<T>* dbias) {
    using A = wide<T>;
    Scratch memory;
    const Chunks chunks(g, 2 * sizeof(T));
    const bool across = g.inner == 1;
    const int64_t width = g.channels;
    size_t at[4];
    for (size_t& each : at) each = memory.add<A>(width);
    const size_t first = memory.add<A>(across ? chunks.count * width : 0);
    const size_t second = memory.add<A>(across ? chunks.count * width : 0);
    memory.make();
    A *scale = memory.at<A>(at[0]), *shift = memory.at<A>(at[1]), *offset = memory.at<A>(at[2]), *slope = memory.at<A>(at[3]);
    A *chunk_g = memory.at<A>(first), *chunk_gx = memory.at<A>(second);
    const Channel<A> channel{weight, bias, nullptr, nullptr, mean, invstd, scale, shift};
    const Seen<T> seen{dy, x, y, g.relu != 0};
    const auto finish = [&](int64_t c, double sum, double product) {  // of g, and of g * (x - mean)
        const double m = double(g.rows) * g.inner;
        dbias[c] = A(sum);
        dweight[c] = A(product * invstd[c]);
        offset[c] = g.training ? A(sum / m) : A(0);
        slope[c] = g.training ? A(product / m * invstd[c] * invstd[c]) : A(0);
    };
    for (int64_t c = 0; c < width; c++) channel.refactor(c);
    if (!across) {
#pragma omp parallel for num_threads(g.threads) schedule(static)
        for (int64_t c = 0; c < width; c++) {
            read<T, false>(seen, mean + c, scale + c, shift + c, [&](auto r) {
                const A m = mean[c];
                const vec<A> mv = vec<A>{} + m;
                const Two<double> sums = sums_of_channel<T>(
                    g, c,
                    [=](int64_t j) {
                        const vec<A> v = load_wide(x + j), d = r.gradient(j, v);
                        return Two<vec<A>>{d, d * (v - mv)};
                    },
                    [=](int64_t j) {
                        const A v = widen(x[j]), d = r.gradient_one(j, v);
                        return Two<A>{d, d * (v - m)};
                    });
                finish(c, sums.first, sums.second);
            });
            if (dx == nullptr && dresidual == nullptr) continue;
            runs<T>(g, c, [&](int64_t start) {
                read<T, false>(seen.at(start), mean + c, scale + c, shift + c, [&](auto r) {
                    gradients_run<T, false>(r, offset + c, slope + c, dx ? dx + start : nullptr,
                                            dresidual ? dresidual + start : nullptr, g.inner);
                });
            });
        }
        return 0;
    }
    const int64_t chunk = chunks.rows * width;
#pragma omp parallel for num_threads(g.threads) schedule(static)
    for (int64_t i = 0; i < chunks.count; i++)
        read<T, true>(seen.at(i * chunk), mean, scale, shift, [&](auto whole) {
            sums_across<A>(
                width, chunks.size(g, i), chunk_g + i * width, chunk_gx + i * width,
                [=](int64_t row, int64_t j) {
                    const auto r = whole.at(row * width);
                    const vec<A> v = load_wide(r.s.x + j), d = r.gradient(j, v);
                    return Two<vec<A>>{d, d * (v - load(mean + j))};
                },
                [=](int64_t row, int64_t j) {
                    const auto r = whole.at(row * width);
                    const A v = widen(r.s.x[j]), d = r.gradient_one(j, v);
                    return Two<A>{d, d * (v - mean[j])};
                });
        });
    for (int64_t c = 0; c < width; c++) {
        double sum = 0, product = 0;
        for (int64_t i = 0; i < chunks.count; i++) {
            sum += chunk_g[i * width + c];
            product += chunk_gx[i * width + c];
        }
        finish(c, sum, product);
    }
    if (dx == nullptr && dresidual == nullptr) return 0;
#pragma omp parallel for num_threads(g.threads) schedule(static)
    for (int64_t back = 0; back < chunks.count; back++) {
        const int64_t i = chunks.count - 1 - back, rows = chunks.size(g, i);
        for (int64_t r = 0; r < rows; r++) {
            const int64_t start = i * chunk + r * width;
            read<T, true>(seen.at(start), mean, scale, shift, [&](auto reader) {
                gradients_run<T, true>(reader, offset, slope, dx ? dx + start : nullptr,
                                       dresidual ? dresidual + start : nullptr, width);
            });
        }
    }
    return 0;
}

}  // namespace

// The calls: 0, or 1: no memory.
extern "C" int bsr_norm_forward(const Norm* g, const NUMBER* x, const NUMBER* residual, const Wide* weight,
                                const Wide* bias, Wide* running_mean, Wide* running_var, Wide* mean, Wide* invstd,
                                NUMBER* y) {
    return guarded(
        [&] { return norm_forward(*g, x, residual, weight, bias, running_mean, running_var, mean, invstd, y); });
}
extern "C" int bsr_norm_backward(const Norm* g, const NUMBER* dy, const NUMBER* x, const NUMBER* y, const Wide* weight,
                                 const Wide* bias, Wide* mean, Wide* invstd, NUMBER* dx, NUMBER* dresidual,
                                 Wide* dweight, Wide* dbias) {
    return guarded(
        [&] { return norm_backward(*g, dy, x, y, weight, bias, mean, invstd, dx, dresidual, dweight, dbias); });
}
