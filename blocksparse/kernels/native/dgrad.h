// dx from dy and values.

#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "channels_last.h"
#include "copying.h"
#include "lists.h"
#include "narrow.h"
#include "phases.h"
#include "scratch.h"
#include "tiles.h"

namespace {

template <class T>
int dgrad(const Conv& g, const T* dy, const T* values, const Index& index, T* dx) {
    using A = wide<T>;
    constexpr int64_t L = LANES<A>;
    if constexpr (std::is_same<T, A>::value)
        if (as_they_stand<T>(g, g.bc)) return dgrad_last(g, dy, values, index, dx);
    if (dgrad_in_lanes<T>(g)) return dgrad_narrow(g, dy, values, index, dx);
    // The rows and columns of the planes in which dx has pixels.
    const int64_t top = g.padding[0] / g.stride[0], bottom = (g.h - 1 + g.padding[0]) / g.stride[0] + 1;
    const int64_t left = g.padding[1] / g.stride[1], right = (g.w - 1 + g.padding[1]) / g.stride[1] + 1;
    const bool scatter = g.bc < 4 && g.bk >= 4;
    const bool alike = pointwise(g) && rows_in_place<T>(g, g.y_strides, g.p, g.q) &&
                       (scatter || !worth_a_copy(g, g.bc, g.y_strides, L));
    const bool direct = alike && rows_in_place<T>(g, g.x_strides, g.h, g.w) && !(scatter && index.order);
    const bool in_place = scatter ? direct : alike;
    const int64_t budget = (scatter && g.batch_last ? 2 : 1) * Layout::BUDGET;  // windows of a scatter: long ones
    Layout lay(g, sizeof(A), L, bottom - top, in_place, budget);
    const Axis &vertical = lay.vertical, &horizontal = lay.horizontal;
    const Axis whole_rows(g.p, g.p, 1, 1, 0, 1), whole_columns(g.q, g.q, 1, 1, 0, 1);
    const int64_t reach = vertical.reach, blocks = g.c / g.bc, rows = g.k / g.bk, taps = g.r * g.s;
    const int64_t parts = parts_of(lay.units, g.threads, blocks);
    const int64_t dy_plane = in_place ? g.y_strides[1] : lay.plane_of(lay.rows + reach, L);
    // Of a scatter: those that dy reaches, and those of dx beyond them, which nothing reads.
    const int64_t dx_rows = std::max(std::min(lay.rows + reach, g.p), lay.rows) + reach;
    lay.plane = lay.plane_of(dx_rows, L);
    lay.channel = in_place ? g.x_strides[1] : lay.plane * lay.phases;
    if (!fits(g.k, dy_plane) || !fits(g.c, lay.channel)) return 2;
    const int64_t part_channels = (blocks + parts - 1) / parts * g.bc;
    const bool across = transposed(g.x_strides, part_channels, lay.pitch);
    const int64_t channel = scatter ? lay.plane : (lay.rows * lay.images * lay.pitch + L - 1) / L * L;
    const Chunking cut(g, scatter ? g.bk : g.bc, blocks * lay.phases, rows, g.bk,
                       sizeof(A) * (most(some_filters(g.bc)) * L + lay.reach()), g.nnzb * g.bk);
    const bool chunked = cut.count > 1, together = across || chunked;  // all channels are done before one is written
    const int64_t held = direct ? 0 : lay.phases * (scatter || together ? part_channels : g.bc);

    Scratch scratch;
    const int64_t width = scatter ? g.bk : g.bc;  // weights of an item
    const size_t items_at = scratch.add<int32_t>(g.nnzb * g.bk * g.bc / width);
    const size_t weights_at = scratch.add<A>(g.nnzb * g.bc * g.bk);
    const size_t starts_at = scratch.add<int64_t>(scatter ? parts * rows + 1 : blocks * lay.phases * cut.count + 1);
    const size_t zeros_at = scratch.add<A>(g.bc), place_at = scratch.add<int32_t>(g.k);
    const int64_t planes_size = in_place ? 0 : g.k * dy_plane, size = (planes_size + held * channel + 63) / 16 * 16;
    const size_t own_at = scratch.add<A>(g.threads * size);
    scratch.make();
    int32_t *const items = scratch.at<int32_t>(items_at), *const place = scratch.at<int32_t>(place_at);
    int64_t* const starts = scratch.at<int64_t>(starts_at);
    A *const weights = scratch.at<A>(weights_at), *const zeros = scratch.at<A>(zeros_at);
    std::memset(zeros, 0, sizeof(A) * g.bc);
    for (int64_t row = 0; row < g.k; row++) place[index.order ? index.order[row] : row] = row;
    std::vector<int64_t> offsets(taps);
    for (int64_t tap = 0; tap < taps; tap++) {
        const int64_t r = tap / g.s, s = tap % g.s;
        offsets[tap] = scatter ? lay.tap(g, tap)
                               : (horizontal.reach + left - horizontal.shift[s]) * lay.pixel_step +
                                     (reach - vertical.shift[r]) * lay.images * lay.pitch;
        if (in_place) offsets[tap] = 0;
    }
    const int64_t lists = lay.phases * cut.count;  // of a channel block
    std::vector<int64_t> list_of(taps);            // the first of each tap's
    for (int64_t tap = 0; tap < taps; tap++) list_of[tap] = lay.phase(g, tap) * cut.count;
    if (!scatter) starts[blocks * lists] = g.nnzb * g.bk;
    if (scatter) {  // how many items each part has of each block-row
        std::fill(starts, starts + parts * rows + 1, 0);
        for (int64_t b = 0; b < rows; b++)
            for (int64_t i = index.indptr[b]; i < index.indptr[b + 1]; i++)
                starts[index.indices[i] % blocks * parts / blocks * rows + b + 1] += g.bc;
        for (int64_t i = 0; i < parts * rows; i++) starts[i + 1] += starts[i];
    }

#pragma omp parallel num_threads(g.threads)
    {
        const int64_t thread = THREAD;
        if (scatter) {
#pragma omp for schedule(static)
            for (int64_t b = 0; b < rows; b++) {
                std::vector<int64_t> next(parts);
                for (int64_t part = 0; part < parts; part++) next[part] = starts[part * rows + b];
                for (int64_t i = index.indptr[b]; i < index.indptr[b + 1]; i++) {
                    const int64_t block = index.indices[i] % blocks, tap = index.indices[i] / blocks;
                    const int64_t part = block * parts / blocks, c0 = part_begin(part, parts, blocks) * g.bc;
                    const T* const from = values + i * g.bk * g.bc;
                    for (int64_t j = 0; j < g.bc; j++) {
                        const int64_t at = next[part]++;
                        items[at] = (block * g.bc + j - c0) * lay.channel + offsets[tap];
                        copy_in(from + j, g.bc, weights + at * g.bk, g.bk);
                    }
                }
            }
        } else {
#pragma omp for schedule(static)
            for (int64_t block = 0; block < blocks; block++)
                list_channels<T, A>(g, index, offsets.data(), list_of.data(), cut, lists, block, dy_plane, values, items,
                                    weights, starts + block * lists);
        }
        A *const planes = scratch.at<A>(own_at) + thread * size, *const results = planes + planes_size;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < lay.units * parts; task++) {
            const Unit u = lay.unit(task / parts, g.n);
            const int64_t part = task % parts, b0 = part_begin(part, parts, blocks);
            const int64_t b1 = part_begin(part + 1, parts, blocks), c0 = b0 * g.bc, channels = (b1 - b0) * g.bc;
            if (scatter) {
                const int64_t first = std::max<int64_t>(0, top + u.row - reach);
                const int64_t dy_rows = std::min(g.p, top + u.row + u.rows) - first;
                if (direct) {
                    A* const out = (A*)dx + u.image * g.x_strides[0] + c0 * g.x_strides[1] + u.row * g.x_strides[2];
                    const A* const rows_of_dy = (const A*)dy + u.image * g.y_strides[0] + u.row * g.y_strides[2];
                    for (int64_t c = 0; c < channels; c++)
                        std::memset(out + c * lay.channel, 0, sizeof(A) * u.rows * g.x_strides[2]);
                    for (int64_t b = 0; b < rows; b++) {
                        const int64_t at = starts[part * rows + b];
                        scatter_row(out, items + at, weights + at * g.bk, starts[part * rows + b + 1] - at, g.bk,
                                    rows_of_dy + b * g.bk * dy_plane, dy_plane, u.rows * g.x_strides[2], true);
                    }
                    continue;
                }
                std::memset(results, 0, sizeof(A) * channels * lay.channel);
                if (dy_rows > 0) {
                    fill<T, A>(dy, g.y_strides, whole_rows, whole_columns, first, dy_rows, u, lay, dy_plane, 0, 0,
                               g.k, index.order ? place : nullptr, planes);
                    const Unit of_dy{u.image, u.images, first, dy_rows};
                    lay.windows(of_dy, g.q, [&](const Unit&, int64_t start, int64_t run) {
                        for (int64_t b = 0; b < rows; b++) {
                            const int64_t at = starts[part * rows + b];
                            scatter_row(results + start, items + at, weights + at * g.bk,
                                        starts[part * rows + b + 1] - at, g.bk, planes + b * g.bk * dy_plane + start,
                                        dy_plane, run, false);
                        }
                    });
                }
                // Row i of the planes is row first + i: where the unit's rows begin.
                write_phases<T, A>(g, lay, results + (top + u.row - first) * lay.images * lay.pitch, lay.plane, channels,
                                   c0, top + u.row, u, 0, dx);
                continue;
            }
            const A* from = planes;
            if (in_place)
                from = (const A*)dy + u.image * g.y_strides[0] + u.row * g.y_strides[2];
            else
                fill<T, A>(dy, g.y_strides, whole_rows, whole_columns, top + u.row - reach, u.rows + reach, u, lay,
                           dy_plane, horizontal.reach * lay.pixel_step, 0, g.k, nullptr, planes);
            lay.windows(u, right - left, [&](const Unit& some, int64_t start, int64_t run) {
                const int64_t phases = lay.phases, step = direct ? g.x_strides[1] : phases * channel;
                const auto out_of = [&](int64_t block) {
                    return direct ? (A*)dx + some.image * g.x_strides[0] + block * g.bc * g.x_strides[1] +
                                        some.row * g.x_strides[2]
                                  : results + (together ? (block - b0) * g.bc * phases * channel : 0);
                };
                if (chunked)
                    gather_rows(from + start, items, weights, g.bc, b0 * phases, b1 * phases, cut.count,
                                [&](int64_t b, int64_t chunk) {
                                    const int64_t* const list = starts + b * cut.count + chunk;
                                    return std::pair(list[0], list[1]);
                                },
                                [&](int64_t) { return zeros; },
                                [&](int64_t b) { return out_of(b / phases) + b % phases * channel; }, step, run, in_place);
                for (int64_t block = b0; block < b1; block++) {
                    A* const out = out_of(block);
                    for (int64_t phase = 0; phase < phases && !chunked; phase++) {
                        const int64_t at = starts[block * phases + phase];
                        gather_row(from + start, items + at, weights + at * g.bc, starts[block * phases + phase + 1] - at,
                                   g.bc, zeros, out + phase * channel, step, run, in_place);
                    }
                    if (!direct && !across)
                        write_phases<T, A>(g, lay, out, channel, g.bc, block * g.bc, top + some.row, some, left, dx);
                }
            });
            if (!direct && across)
                write_phases<T, A>(g, lay, results, channel, channels, c0, top + u.row, u, left, dx);
        }
    }
    return 0;
}

}  // namespace
