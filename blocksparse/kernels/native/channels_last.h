// The three products of tensors in channels_last as they stand: vectors of channels, one pixel beside the other.
//
// Nothing is copied but the weights. Each tap of a result reads one pixel of the source, or zeros: a table of pointers,
// made for the results of a unit, says which. Strides, padding and dilation are in the table alone.
//
//     fprop, dgrad    y[p][f] = sum over (tap, c) of w[tap, c][f] * x[table[tap][p]][c]    P pixels x V vectors of filters
//     wgrad           dv[tap, c][f] += x[p + tap][c] * dy[p][f] of one pixel p after the other, I items x V vectors
//
// A block needs whole vectors: of filters, in dgrad of channels. Others go through planes.

#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "copying.h"
#include "finish.h"
#include "lists.h"
#include "pixel_tiles.h"
#include "scratch.h"
#include "shares.h"
#include "sources.h"

namespace {

// Whether a product takes its tensors as they stand; `width`: the results of a block beside each other. Each product of
// one vector loads a pixel of its own: through planes a convolution of many taps is faster.
template <class T> bool as_they_stand(const Conv& g, int64_t width) {
    constexpr int64_t L = LANES<wide<T>>;
    return std::is_same<T, wide<T>>::value && !g.batch_last && g.x_strides[1] == 1 && g.y_strides[1] == 1 &&
           width % L == 0 && (width > L || g.r * g.s == 1);
}

// fprop and dgrad: results of `width` channels for each of `blocks`, from a source of so many channels.
template <class A> struct Gather {
    const Conv& g;
    const bool backward;
    const int64_t blocks, width, channels, taps;
    const Sources rows, columns;
    std::vector<Pixels> classes;
    int64_t units = 0, own_pointers = 0;
    Scratch scratch;
    size_t items_at, weights_at, ends_at, start_at, zeros_at, own_at, rows_at;
    int32_t *items, *ends;  // [item]: its channel; [block][tap]: where items begin
    A *weights, *start;     // [item][width]; [block][width]: what a result begins with

    static constexpr int64_t TILE = 16;  // pixels of no tile are more

    Gather(const Conv& g, bool backward)
        : g(g), backward(backward), blocks(backward ? g.c / g.bc : g.k / g.bk), width(backward ? g.bc : g.bk),
          channels(backward ? g.k : g.c), taps(g.r * g.s),
          rows(backward, g.h, g.p, g.r, g.stride[0], g.padding[0], g.dilation[0]),
          columns(backward, g.w, g.q, g.s, g.stride[1], g.padding[1], g.dilation[1]) {
        for (const auto& r : rows.classes)
            for (const auto& c : columns.classes) {
                classes.emplace_back(rows, columns, r, c, g, sizeof(A));
                units += classes.back().units;
                own_pointers = std::max<int64_t>(own_pointers, classes.back().most() * (classes.back().taps.size() + 1));
            }
        const int64_t stored = g.nnzb * g.bk * g.bc;
        items_at = scratch.add<int32_t>(stored / width);
        weights_at = scratch.add<A>(stored);
        ends_at = scratch.add<int32_t>(blocks * (taps + 1));
        start_at = scratch.add<A>(blocks * width);
        zeros_at = scratch.add<A>(channels);
        own_at = scratch.add<A*>(g.threads * own_pointers);
        rows_at = scratch.add<A>(g.threads * TILE * width);
        scratch.make();
        items = scratch.at<int32_t>(items_at);
        ends = scratch.at<int32_t>(ends_at);
        weights = scratch.at<A>(weights_at);
        start = scratch.at<A>(start_at);
        std::memset(scratch.at<A>(zeros_at), 0, sizeof(A) * channels);
    }

    // By every thread of a team. finish(results, at, pixels, count, b) when results of block b are done for some pixels:
    // those of pixel k begin at results[k] + at, in the tensor, where pixels[k] is that pixel, or with `aside` elsewhere.
    template <class Finish>
    void run(const A* source, const int64_t* strides, A* result, const int64_t* result_strides, bool aside, Finish finish) {
        const A* const zeros = scratch.at<A>(zeros_at);
        const A** const at = scratch.at<const A*>(own_at) + THREAD * own_pointers;
        A* const place = scratch.at<A>(rows_at) + THREAD * TILE * width;
        const int64_t parts = parts_of(units, g.threads, blocks), tile = most_beside(some_vectors(width / LANES<A>));
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < units * parts; task++) {
            int64_t unit = task / parts, number = 0;
            while (unit >= classes[number].units) unit -= classes[number++].units;
            const Pixels& some = classes[number];
            const int64_t first = some.begin(unit), size = some.begin(unit + 1) - first, count = some.taps.size();
            A** const out = (A**)(at + count * size);
            some.find(first, size, g, source, strides, zeros, result, result_strides, at, out);
            const A** const furthest = count == 0 ? at : at + (backward ? 0 : count - 1) * size;  // read first by this tap
            const int64_t part = task % parts, b0 = part_begin(part, parts, blocks);
            const int64_t b1 = part_begin(part + 1, parts, blocks);
            in_pieces(size, tile, [&](int64_t p, int64_t pixels) {
                const int64_t next = p + pixels, end = std::min(next + pixels, size);
                for (int64_t b = b0; b < b1; b++) {
                    prefetch(furthest + next, count == 0 ? 0 : end - next, channels * (b - b0) / (b1 - b0),
                             channels * (b - b0 + 1) / (b1 - b0), std::false_type());
                    prefetch(out + next, end - next, b * width, b * width + width, std::true_type());
                    A *to[TILE], **const results = aside ? to : out + p;
                    const int64_t at_block = aside ? 0 : b * width;
                    for (int64_t k = 0; aside && k < pixels; k++) to[k] = place + k * width;
                    const Items list{some.taps.data(), ends + b * (taps + 1), items, weights, count, width};
                    for (int64_t f = 0, vectors; f < width; f += vectors * LANES<A>) {
                        vectors = some_vectors((width - f) / LANES<A>);
                        in_pieces(pixels, most_beside(vectors), [&](int64_t q, int64_t few) {
                            gather_pixels(vectors, few)(at + p + q, size, list, f, start + b * width + f,
                                                                          results + q, at_block + f);
                        });
                    }
                    finish(results, at_block, out + p, pixels, b);
                }
            });
        }
    }
    template <class P, bool WRITE>
    static INLINE void prefetch(P* const* pixels, int64_t count, int64_t begin, int64_t end,
                                std::integral_constant<bool, WRITE>) {
        for (int64_t k = 0; k < count; k++)
            for (int64_t c = begin; c < end; c += 64 / sizeof(A)) __builtin_prefetch(pixels[k] + c, WRITE);
    }
};

template <class A>
int fprop_last(const Conv& g, const A* x, const A* values, const A* bias, const Epilogue<A>& last, const Index& index,
               A* y) {
    Gather<A> gather(g, false);
    const int64_t rows = g.k / g.bk, blocks = g.c / g.bc, bk = g.bk;
    const int32_t* const order = index.order;
    for (int64_t row = 0; row < g.k; row++) gather.start[row] = bias == nullptr ? A(0) : bias[order ? order[row] : row];
#pragma omp parallel num_threads(g.threads)
    {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < rows; b++) {
            int32_t* const ends = gather.ends + b * (gather.taps + 1);
            int64_t tap = 0;
            for (int64_t i = index.indptr[b]; i < index.indptr[b + 1]; i++) {
                while (index.indices[i] >= tap * blocks) ends[tap++] = i * g.bc;
                const int64_t block = index.indices[i] - (tap - 1) * blocks;
                for (int64_t j = 0; j < g.bc; j++) gather.items[i * g.bc + j] = block * g.bc + j;
                block_in(values + i * bk * g.bc, bk, g.bc, gather.weights + i * bk * g.bc);
            }
            for (; tap <= gather.taps; tap++) ends[tap] = index.indptr[b + 1] * g.bc;
        }
        gather.run(x, g.x_strides, y, g.y_strides, order != nullptr,
                   [&](A* const* results, int64_t at, A* const* pixels, int64_t count, int64_t b) {
                       if (order == nullptr && last.nothing()) return;
                       for (int64_t k = 0; k < count; k++) {
                           const A* const residual = last.residual ? last.residual + (pixels[k] - y) : nullptr;
                           if (order == nullptr)
                               finish_row(pixels[k] + b * bk, residual ? residual + b * bk : nullptr, last.relu, 1, bk);
                           for (int64_t f = 0; order != nullptr && f < bk; f++) {
                               const int64_t c = order[b * bk + f];
                               pixels[k][c] = results[k][at + f];
                               if (!last.nothing())
                                   finish_row(pixels[k] + c, residual ? residual + c : nullptr, last.relu, 1, 1);
                           }
                       }
                   });
    }
    return 0;
}

template <class A> int dgrad_last(const Conv& g, const A* dy, const A* values, const Index& index, A* dx) {
    Gather<A> gather(g, true);
    const int64_t rows = g.k / g.bk, taps = gather.taps, size = g.bk * g.bc;
    std::memset(gather.start, 0, sizeof(A) * g.c);
#pragma omp parallel num_threads(g.threads)
    {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < gather.blocks; b++) {
            const int32_t* const indptr = index.t_indptr + b * taps;
            for (int64_t tap = 0; tap <= taps; tap++) gather.ends[b * (taps + 1) + tap] = indptr[tap] * g.bk;
            for (int64_t tap = 0; tap < taps; tap++)
                for (int64_t e = indptr[tap]; e < indptr[tap + 1]; e++) {
                    const int64_t row = (index.t_indices[e] - tap * rows) * g.bk;
                    for (int64_t f = 0; f < g.bk; f++)
                        gather.items[e * g.bk + f] = index.order ? index.order[row + f] : row + f;
                    copy_in(values + index.t_perm[e] * size, 1, gather.weights + e * size, size);
                }
        }
        gather.run(dy, g.y_strides, dx, g.x_strides, false, [](A* const*, int64_t, A* const*, int64_t, int64_t) {});
    }
    return 0;
}

// The outputs of a weight gradient in pieces: some columns of a row, some rows of an image, or some images.
struct Pieces {
    int64_t of[3], some[3], pieces[3], count = 1;  // images, rows, columns: all of them, those of a piece; how many pieces

    static constexpr int64_t BUDGET = 1 << 17;  // bytes of a piece of x and dy
    static constexpr int64_t LEAST = 48;        // pixels of one

    Pieces(const Conv& g, int64_t item) : of{g.n, g.p, g.q} {
        const int64_t per_pixel = item * (g.c * g.stride[0] * g.stride[1] + g.k);
        int64_t left = std::max(LEAST, BUDGET / per_pixel);
        for (const int axis : {2, 1, 0}) {
            pieces[axis] = (of[axis] + left - 1) / left;
            some[axis] = pieces[axis] ? (of[axis] + pieces[axis] - 1) / pieces[axis] : 0;
            left = std::max<int64_t>(1, left / std::max<int64_t>(1, of[axis]));
            count *= pieces[axis];
        }
    }
    // Where a piece begins and ends.
    void find(int64_t piece, int64_t* begin, int64_t* end) const {
        for (const int axis : {2, 1, 0}) {
            begin[axis] = piece % pieces[axis] * some[axis];
            end[axis] = std::min(of[axis], begin[axis] + some[axis]);
            piece /= pieces[axis];
        }
    }
};

template <class A> int wgrad_last(const Conv& g, const A* x, const A* dy, const Index& index, A* dvalues) {
    const int64_t blocks = g.c / g.bc, size_of_block = g.bk * g.bc;
    const Pieces pieces(g, sizeof(A));
    const Shares shares(g, pieces.count, sizeof(A));
    const int64_t steps[3] = {g.x_strides[0], g.x_strides[2] * g.stride[0], g.x_strides[3] * g.stride[1]};
    const int64_t own = index.order ? pieces.some[0] * pieces.some[1] * pieces.some[2] * g.k : 0;
    Scratch scratch;
    const size_t items_at = scratch.add<int32_t>(g.nnzb * g.bc), own_at = scratch.add<A>(g.threads * own);
    const size_t sums_at = scratch.add<A>(shares.count * shares.weights + LANES<A>);
    scratch.make();
    int32_t* const items = scratch.at<int32_t>(items_at);
    A* const sums = scratch.at<A>(sums_at);
#pragma omp parallel num_threads(g.threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < g.nnzb; i++)
            for (int64_t j = 0; j < g.bc; j++) items[i * g.bc + j] = index.indices[i] % blocks * g.bc + j;
        A* const in_order = scratch.at<A>(own_at) + THREAD * own;
        // Items [i0, i1) of block-row b, all of one tap, in a piece whose dy begins at `d`.
        const auto outer = [&](const int64_t* begin, const int64_t* end, int64_t b, int64_t i0, int64_t i1, int64_t tap,
                               const A* d, const int64_t* d_steps, A* sum) {
            Walk walk{{end[0] - begin[0], 0, 0}, {steps[0], steps[1], steps[2]}, {d_steps[0], d_steps[1], d_steps[2]}};
            const A* from = x + begin[0] * steps[0];
            for (const int axis : {1, 2}) {  // the outputs whose tap lies in x
                const int64_t stride = g.stride[axis - 1], in = axis == 1 ? g.h : g.w;
                const int64_t shift = (axis == 1 ? tap / g.s : tap % g.s) * g.dilation[axis - 1] - g.padding[axis - 1];
                const int64_t first = std::max(begin[axis], shift < 0 ? (-shift + stride - 1) / stride : 0);
                const int64_t last = std::min(end[axis], shift < in ? (in - shift + stride - 1) / stride : 0);
                walk.count[axis] = last - first;
                if (last <= first) return;
                from += first * steps[axis] + shift * g.x_strides[axis + 1];
                d += (first - begin[axis]) * d_steps[axis];
            }
            for (int64_t f = 0, vectors; f < g.bk; f += vectors * LANES<A>) {
                vectors = some_vectors((g.bk - f) / LANES<A>);
                in_pieces((i1 - i0) * g.bc, most_beside(vectors), [&](int64_t i, int64_t few) {
                    i += i0 * g.bc;
                    outer_tile(vectors, few)(from, items + i, d + b * g.bk + f, walk, sum + i * g.bk + f, g.bk);
                });
            }
        };
        shares.add_up<A>(g, index, sums, [&](int64_t piece, int64_t b0, int64_t b1, A* sum) {
            int64_t begin[3], end[3];
            pieces.find(piece, begin, end);
            const int64_t* const y_strides = g.y_strides;
            int64_t d_steps[3] = {y_strides[0], y_strides[2], y_strides[3]};
            const A* d = dy + begin[0] * d_steps[0] + begin[1] * d_steps[1] + begin[2] * d_steps[2];
            if (index.order) {
                const int64_t height = end[1] - begin[1], width = end[2] - begin[2];
                A* to = in_order;
                for (int64_t m = 0; m < end[0] - begin[0]; m++)
                    for (int64_t i = 0; i < height; i++)
                        for (int64_t j = 0; j < width; j++, to += g.k) {
                            const A* const from = d + m * d_steps[0] + i * d_steps[1] + j * d_steps[2];
                            for (int64_t f = b0 * g.bk; f < b1 * g.bk; f++) to[f] = from[index.order[f]];
                        }
                d = in_order;
                d_steps[0] = height * width * g.k, d_steps[1] = width * g.k, d_steps[2] = g.k;
            }
            for (int64_t b = b0; b < b1; b++)
                for (int64_t i = index.indptr[b], stop; i < index.indptr[b + 1]; i = stop) {
                    const int64_t tap = index.indices[i] / blocks;
                    for (stop = i + 1; stop < index.indptr[b + 1] && index.indices[stop] < (tap + 1) * blocks;) stop++;
                    outer(begin, end, b, i, stop, tap, d, d_steps, sum);
                }
        });
#pragma omp for schedule(static)
        for (int64_t i = 0; i < g.nnzb; i++)
            block_out(sums + i * size_of_block, g.bk, g.bc, dvalues + i * size_of_block);
    }
    return 0;
}

}  // namespace
