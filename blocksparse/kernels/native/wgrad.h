// dvalues from x and dy.

#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "channels_last.h"
#include "copying.h"
#include "lists.h"
#include "narrow.h"
#include "scratch.h"
#include "shares.h"
#include "tiles.h"

namespace {

template <class T>
int wgrad(const Conv& g, const T* x, const T* dy, const Index& index, T* dvalues) {
    using A = wide<T>;
    constexpr int64_t L = LANES<A>;
    if constexpr (std::is_same<T, A>::value)
        if (as_they_stand<T>(g, g.bk)) return wgrad_last(g, x, dy, index, dvalues);
    if (wgrad_in_lanes<T>(g)) return wgrad_narrow(g, x, dy, index, dvalues);
    const bool in_place = pointwise(g) && index.order == nullptr && rows_in_place<T>(g, g.x_strides, g.h, g.w) &&
                          rows_in_place<T>(g, g.y_strides, g.p, g.q);
    const int64_t budget = (transposed(g.x_strides, g.c, g.w) ? 3 : 5) * Layout::BUDGET;
    const Layout lay(g, sizeof(A), L, g.p, in_place, budget);
    if (!fits(g.c, lay.channel)) return 2;
    const Axis whole_rows(g.p, g.p, 1, 1, 0, 1), whole_columns(g.q, g.q, 1, 1, 0, 1);
    const int64_t rows = g.k / g.bk, size_of_block = g.bk * g.bc;
    const Shares shares(g, lay.units, sizeof(A));
    const int64_t dy_plane = in_place ? g.y_strides[1] : lay.plane_of(lay.rows, L);
    const Chunking cut(g, g.bk, rows, g.c / g.bc, g.bc, sizeof(A) * lay.phases * (DOT_VECTORS * L + lay.reach()),
                       g.nnzb * g.bc);
    const bool chunked = cut.count > 1;

    Scratch scratch;
    const size_t items_at = scratch.add<int32_t>(g.nnzb * g.bc), place_at = scratch.add<int32_t>(g.nnzb);
    const size_t sums_at = scratch.add<A>(shares.count * shares.weights + L), rows_at = scratch.add<int32_t>(g.k);
    const size_t counts_at = scratch.add<int32_t>(g.threads * (g.c / g.bc));
    const size_t lists_at = scratch.add<int64_t>(rows * (cut.count + 1));
    const int64_t planes_size = in_place ? 0 : g.c * lay.channel;
    const int64_t size = (planes_size + (in_place ? 0 : g.k * dy_plane) + 31) / 16 * 16;
    const size_t own_at = scratch.add<A>(g.threads * size);
    scratch.make();
    int32_t *const items = scratch.at<int32_t>(items_at), *const place = scratch.at<int32_t>(place_at);
    int32_t *const row_of = scratch.at<int32_t>(rows_at);
    int64_t* const lists = scratch.at<int64_t>(lists_at);
    A* const sums = scratch.at<A>(sums_at);
    for (int64_t row = 0; row < g.k; row++) row_of[index.order ? index.order[row] : row] = row;
    std::vector<int64_t> taps(g.r * g.s);
    for (int64_t tap = 0; tap < g.r * g.s; tap++) taps[tap] = lay.tap(g, tap);

#pragma omp parallel num_threads(g.threads)
    {
        const int64_t thread = THREAD;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < rows; b++)
            list_row<T, A>(g, lay.channel, index, taps.data(), b,
                           scratch.at<int32_t>(counts_at) + thread * (g.c / g.bc), nullptr, items, nullptr, place, cut,
                           lists + b * (cut.count + 1));
        A *const planes = scratch.at<A>(own_at) + thread * size, *const dy_planes = planes + planes_size;
        shares.add_up<A>(g, index, sums, [&](int64_t unit, int64_t b0, int64_t b1, A* sum) {
            const Unit u = lay.unit(unit, g.n);
            const A *from = planes, *other = dy_planes;
            if (in_place) {
                from = (const A*)x + u.image * g.x_strides[0] + u.row * g.x_strides[2];
                other = (const A*)dy + u.image * g.y_strides[0] + u.row * g.y_strides[2];
            } else {
                fill<T, A>(x, g.x_strides, lay.vertical, lay.horizontal, u.row, u.rows + lay.vertical.reach, u,
                           lay, lay.plane, 0, 0, g.c, nullptr, planes);
                if (index.order)
                    fill<T, A>(dy, g.y_strides, whole_rows, whole_columns, u.row, u.rows, u, lay, dy_plane, 0, 0,
                               g.k, row_of, dy_planes);
                else
                    fill<T, A>(dy, g.y_strides, whole_rows, whole_columns, u.row, u.rows, u, lay, dy_plane, 0,
                               b0 * g.bk, b1 * g.bk, nullptr, dy_planes + b0 * g.bk * dy_plane);
            }
            lay.windows(u, g.q, [&](const Unit& some, int64_t start, int64_t run) {
                vec<A> mask;
                for (int64_t j = 0; j < L; j++) mask[j] = j >= L - run % L;
                const auto dot = [&](int64_t b, int64_t at, int64_t end, const Piece& piece) {
                    dot_row(from + start, items + at, end - at, other + start + b * g.bk * dy_plane, dy_plane, g.bk,
                            sum + at * g.bk, piece, mask);
                };
                if (chunked)
                    over_pieces<A>(run, in_place, [&](const Piece& piece) {
                        for (int64_t chunk = 0; chunk < cut.count; chunk++)
                            for (int64_t b = b0; b < b1; b++) {
                                const int64_t* const list = lists + b * (cut.count + 1) + chunk;
                                dot(b, list[0], list[1], piece);
                            }
                    });
                else
                    for (int64_t b = b0; b < b1; b++)
                        over_pieces<A>(run, in_place, [&](const Piece& piece) {
                            dot(b, index.indptr[b] * g.bc, index.indptr[b + 1] * g.bc, piece);
                        });
            });
        });
#pragma omp for schedule(static)
        for (int64_t i = 0; i < g.nnzb; i++)
            block_out(sums + place[i] * size_of_block, g.bk, g.bc, dvalues + i * size_of_block);
    }
    return 0;
}

}  // namespace
