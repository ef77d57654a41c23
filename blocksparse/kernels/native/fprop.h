// y from x and values.

#pragma once

#include <vector>

#include "channels_last.h"
#include "copying.h"
#include "finish.h"
#include "lists.h"
#include "narrow.h"
#include "scratch.h"
#include "tiles.h"

namespace {

template <class T>
int fprop(const Conv& g, const T* x, const T* values, const T* bias, const Epilogue<T>& last, const Index& index, T* y) {
    using A = wide<T>;
    constexpr int64_t L = LANES<A>;
    if constexpr (std::is_same<T, A>::value)
        if (as_they_stand<T>(g, g.bk)) return fprop_last(g, x, values, bias, last, index, y);
    if (fprop_in_lanes<T>(g)) return fprop_narrow(g, x, values, bias, last, index, y);
    const bool in_place =
        pointwise(g) && rows_in_place<T>(g, g.x_strides, g.h, g.w) && !worth_a_copy(g, g.bk, g.x_strides, L);
    const bool direct = in_place && index.order == nullptr && rows_in_place<T>(g, g.y_strides, g.p, g.q);
    const Layout lay(g, sizeof(A), L, g.p, in_place);
    if (!fits(g.c, lay.channel)) return 2;
    const int64_t rows = g.k / g.bk, parts = parts_of(lay.units, g.threads, rows);
    const bool across = transposed(g.y_strides, g.bk * ((rows + parts - 1) / parts), lay.pitch);
    const int64_t channel = (lay.rows * lay.images * lay.pitch + L - 1) / L * L;  // of the results
    const Chunking cut(g, g.bk, rows, g.c / g.bc, g.bc,
                       sizeof(A) * lay.phases * (most(some_filters(g.bk)) * L + lay.reach()), g.nnzb * g.bc);
    const bool chunked = cut.count > 1, together = across || chunked;  // all rows are done before one is written
    const int64_t held = direct ? 0 : together ? (rows + parts - 1) / parts * g.bk : g.bk;

    Scratch scratch;
    const size_t items_at = scratch.add<int32_t>(g.nnzb * g.bc), weights_at = scratch.add<A>(g.nnzb * g.bc * g.bk);
    const size_t place_at = scratch.add<int32_t>(g.nnzb), start_at = scratch.add<A>(g.k);
    const size_t counts_at = scratch.add<int32_t>(g.threads * (g.c / g.bc));
    const size_t lists_at = scratch.add<int64_t>(rows * (cut.count + 1));
    const int64_t planes_size = in_place ? 0 : g.c * lay.channel, size = (planes_size + held * channel + 31) / 16 * 16;
    const size_t own_at = scratch.add<A>(g.threads * size);
    scratch.make();
    int32_t *const items = scratch.at<int32_t>(items_at);
    int64_t* const lists = scratch.at<int64_t>(lists_at);
    A *const weights = scratch.at<A>(weights_at), *const start = scratch.at<A>(start_at);
    std::vector<int64_t> taps(g.r * g.s);
    for (int64_t tap = 0; tap < g.r * g.s; tap++) taps[tap] = lay.tap(g, tap);
    for (int64_t row = 0; row < g.k; row++)
        start[row] = bias == nullptr ? A(0) : A(widen(bias[index.order ? index.order[row] : row]));

#pragma omp parallel num_threads(g.threads)
    {
        const int64_t thread = THREAD;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < rows; b++)
            list_row<T, A>(g, lay.channel, index, taps.data(), b,
                           scratch.at<int32_t>(counts_at) + thread * (g.c / g.bc), values, items, weights,
                           scratch.at<int32_t>(place_at), cut, lists + b * (cut.count + 1));
        A *const planes = scratch.at<A>(own_at) + thread * size, *const results = planes + planes_size;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < lay.units * parts; task++) {
            const Unit u = lay.unit(task / parts, g.n);
            const int64_t part = task % parts, b0 = part_begin(part, parts, rows);
            const int64_t b1 = part_begin(part + 1, parts, rows);
            const A* from = planes;
            if (in_place)
                from = (const A*)x + u.image * g.x_strides[0] + u.row * g.x_strides[2];
            else
                fill<T, A>(x, g.x_strides, lay.vertical, lay.horizontal, u.row, u.rows + lay.vertical.reach, u, lay,
                           lay.plane, 0, 0, g.c, nullptr, planes);
            lay.windows(u, g.q, [&](const Unit& some, int64_t at, int64_t run) {
                const auto out_of = [&](int64_t b) {
                    return direct ? (A*)y + some.image * g.y_strides[0] + b * g.bk * g.y_strides[1] +
                                        some.row * g.y_strides[2]
                                  : results + (together ? (b - b0) * g.bk * channel : 0);
                };
                const int64_t step = direct ? g.y_strides[1] : channel;
                const auto list = [&](int64_t b, int64_t chunk) {
                    const int64_t* const of_row = lists + b * (cut.count + 1);
                    return std::pair<int64_t, int64_t>(of_row[chunk], of_row[chunk + 1]);
                };
                if (chunked)
                    gather_rows(from + at, items, weights, g.bk, b0, b1, cut.count, list,
                                [&](int64_t b) { return start + b * g.bk; }, out_of, step, run, in_place);
                for (int64_t b = b0; b < b1; b++) {
                    const int64_t first = b * g.bk, item = index.indptr[b] * g.bc, n = index.indptr[b + 1] * g.bc - item;
                    A* const out = out_of(b);
                    if (!chunked)
                        gather_row(from + at, items + item, weights + item * g.bk, n, g.bk, start + first, out, step, run,
                                   in_place);
                    if (!direct && !across) write(out, channel, g.bk, first, index.order, some, lay, g.q, y, g.y_strides);
                    if (!across) finish(y, last, g.y_strides, some, g.q, first, g.bk, index.order);
                }
            });
            if (across) {
                write(results, channel, (b1 - b0) * g.bk, b0 * g.bk, index.order, u, lay, g.q, y,
                      g.y_strides);
                finish(y, last, g.y_strides, u, g.q, b0 * g.bk, (b1 - b0) * g.bk, index.order);
            }
        }
    }
    return 0;
}

}  // namespace
