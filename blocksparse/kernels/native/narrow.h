// All three products of kernels larger than 1x1 whose blocks have few filters, or channels: on tiles in lanes.
//
// Such a product is as fast as its loads of pixels. In planes most of these cross a line of memory, because a tap shifts
// an image by one pixel; a load that does takes twice as long.

#pragma once

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "finish.h"
#include "lanes.h"
#include "lists.h"
#include "scratch.h"
#include "shares.h"
#include "tiles.h"

namespace {

// A convolution as tiles of x and of y, or the other way round.
template <class T> struct Narrow {
    static constexpr int64_t L = LANES<wide<T>>;
    const Conv& g;
    const bool backward;
    const Axis vertical, horizontal;
    const int64_t phases;
    const LaneTiles cut;       // of the outputs, or of dx
    const InLanes<T> of_x, of_y;
    std::vector<int64_t> taps;  // where each begins in the tiles that are read

    // A weight gradient is cut alike for every number of threads.
    Narrow(const Conv& g, bool backward, int64_t threads, const int32_t* order)
        : g(g), backward(backward), vertical(g.h, g.p, g.r, g.stride[0], g.padding[0], g.dilation[0]),
          horizontal(g.w, g.q, g.s, g.stride[1], g.padding[1], g.dilation[1]),
          phases(vertical.phases() * horizontal.phases()), cut(tiles(threads)),
          of_x(cut, g.x_strides, line(vertical, !backward), line(horizontal, !backward)),
          of_y(cut, g.y_strides, of_outputs(g.p, vertical), of_outputs(g.q, horizontal), order), taps(g.r * g.s) {
        for (int64_t tap = 0; tap < g.r * g.s; tap++) {
            const int64_t i = vertical.shift[tap / g.s], j = horizontal.shift[tap % g.s];
            const int64_t phase = vertical.phase_of[tap / g.s] * horizontal.phases() + horizontal.phase_of[tap % g.s];
            taps[tap] = backward ? of_y.tap(0, vertical.reach - i, horizontal.reach - j) : of_x.tap(phase, i, j);
        }
    }
    bool fits() const { return ::fits(g.c, of_x.channel) && ::fits(g.k, of_y.channel); }

   private:
    static Line line(const Axis& axis, bool read) {
        Line line{axis.size, axis.stride, read ? axis.reach : 0, {}};
        for (const int64_t residue : axis.residue) line.offset.push_back(residue - axis.padding);
        return line;
    }
    Line of_outputs(int64_t size, const Axis& axis) const {
        return backward ? Line{size, 1, axis.reach, {-axis.reach}} : Line{size, 1, 0, {0}};
    }
    LaneTiles tiles(int64_t threads) const {
        const int64_t planes = backward ? g.k : g.c * phases, *const strides = backward ? g.y_strides : g.x_strides;
        const int64_t begin[] = {backward ? g.padding[0] : 0, backward ? g.padding[1] : 0};  // dx: a stride of one
        return LaneTiles(g.n, begin, {begin[0] + (backward ? g.h : g.p), begin[1] + (backward ? g.w : g.q)}, L,
                         double(g.nnzb * g.bk * g.bc) / planes, {vertical.reach, horizontal.reach}, innermost(strides),
                         threads, backward ? g.c / g.bc : g.k / g.bk);
    }
};

// Whether lanes are faster, whatever the number of threads.
template <class T> bool lanes_pay(const Conv& g, bool backward) {
    return g.r * g.s > 1 && !g.batch_last && g.n > 0 && Narrow<T>(g, backward, 1, nullptr).cut.pay;
}
template <class T> bool fprop_in_lanes(const Conv& g) {
    return g.bk == 1 && g.stride[0] == 1 && g.stride[1] == 1 && lanes_pay<T>(g, false);
}
template <class T> bool dgrad_in_lanes(const Conv& g) {
    return g.bc == 1 && g.bk < 4 && g.stride[0] == 1 && g.stride[1] == 1 && lanes_pay<T>(g, true);
}
template <class T> bool wgrad_in_lanes(const Conv& g) { return g.bk < 4 && lanes_pay<T>(g, false); }

// What fprop and dgrad have in common: blocks of one channel of results, from the items of lists.
template <class T> struct GatherInLanes {
    using A = wide<T>;
    const Conv& g;
    const InLanes<T>&of_source, &of_target;
    const LaneTiles& cut;
    const int64_t blocks, channels, parts, planes_size, size;
    const Chunking chunks;
    Scratch scratch;
    const size_t zeros_at, items_at, weights_at, starts_at, own_at;

    GatherInLanes(const Conv& g, const Narrow<T>& narrow, int64_t blocks, int64_t channels, int64_t rows, int64_t width)
        : g(g), of_source(narrow.backward ? narrow.of_y : narrow.of_x),
          of_target(narrow.backward ? narrow.of_x : narrow.of_y), cut(narrow.cut), blocks(blocks), channels(channels),
          parts(parts_of(cut.units, g.threads, blocks)), planes_size(channels * of_source.channel),
          size(planes_size + (blocks + parts - 1) / parts * of_target.channel),
          chunks(g, 1, blocks, rows, width, of_source.bytes(), g.nnzb * width, Chunking::OF_LANES),
          zeros_at(scratch.add<T>(channels)), items_at(scratch.add<int32_t>(g.nnzb * width)),
          weights_at(scratch.add<A>(g.nnzb * width)), starts_at(scratch.add<int64_t>(blocks * (chunks.count + 1))),
          own_at(scratch.add<A>(g.threads * size)) {}

    // By every thread of a team, when lists are done: of block b from starts[b * (chunks + 1)] on. start(b) is where its
    // sums begin; finish(tiles, b0, b1) follows when blocks [b0, b1) of a unit are written.
    template <class Start, class Finish> void run(const T* source, const T* end, Start start, T* result, Finish finish) {
        const T* const zeros = scratch.at<T>(zeros_at);
        const int64_t* const starts = scratch.at<int64_t>(starts_at);
        A *const planes = scratch.at<A>(own_at) + THREAD * size, *const results = planes + planes_size;
        InLanes<T> read = of_source, written = of_target;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < cut.units * parts; task++) {
            const int64_t part = task % parts, b0 = part_begin(part, parts, blocks), b1 = part_begin(part + 1, parts, blocks);
            read.begin(task / parts);
            written.begin(task / parts);
            read.read(source, end, zeros, 0, channels, planes);
            for (int64_t i = 0; i < cut.tile[0]; i++)
                gather_rows(planes + i * read.row, scratch.at<int32_t>(items_at), scratch.at<A>(weights_at), 1, b0, b1,
                            chunks.count,
                            [&](int64_t b, int64_t chunk) {
                                const int64_t* const list = starts + b * (chunks.count + 1) + chunk;
                                return std::pair(list[0], list[1]);
                            },
                            start, [&](int64_t b) { return results + (b - b0) * written.channel + i * written.row; },
                            written.channel, written.row, false);
            written.write(results, b0, b1 - b0, result);
            finish(written, b0, b1);
        }
    }
};

template <class T>
int fprop_narrow(const Conv& g, const T* x, const T* values, const T* bias, const Epilogue<T>& last, const Index& index,
                 T* y) {
    using A = wide<T>;
    const Narrow<T> narrow(g, false, g.threads, index.order);
    if (!narrow.fits()) return 2;
    GatherInLanes<T> gather(g, narrow, g.k, g.c, g.c / g.bc, g.bc);
    Scratch& scratch = gather.scratch;
    const size_t place_at = scratch.add<int32_t>(g.nnzb), counts_at = scratch.add<int32_t>(g.threads * (g.c / g.bc));
    const size_t start_at = scratch.add<A>(g.k);
    scratch.make();
    std::memset(scratch.at<T>(gather.zeros_at), 0, sizeof(T) * g.c);
    A* const start = scratch.at<A>(start_at);
    for (int64_t row = 0; row < g.k; row++)
        start[row] = bias == nullptr ? A(0) : A(widen(bias[index.order ? index.order[row] : row]));
#pragma omp parallel num_threads(g.threads)
    {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < g.k; b++)
            list_row<T, A>(g, narrow.of_x.channel, index, narrow.taps.data(), b,
                           scratch.at<int32_t>(counts_at) + THREAD * (g.c / g.bc), values,
                           scratch.at<int32_t>(gather.items_at), scratch.at<A>(gather.weights_at),
                           scratch.at<int32_t>(place_at), gather.chunks,
                           scratch.at<int64_t>(gather.starts_at) + b * (gather.chunks.count + 1));
        gather.run(x, end_of(x, g.x_strides, g.n, g.c, g.h, g.w), [&](int64_t b) { return start + b; }, y,
                   [&](const InLanes<T>& tiles, int64_t b0, int64_t b1) {
                       if (last.nothing()) return;
                       tiles.regions([&](int64_t at, int64_t height, int64_t width) {
                           const Epilogue<T> some{last.residual ? last.residual + at : nullptr, last.relu};
                           finish(y + at, some, g.y_strides, Unit{0, 1, 0, height}, width, b0, b1 - b0, index.order);
                       });
                   });
    }
    return 0;
}

template <class T> int dgrad_narrow(const Conv& g, const T* dy, const T* values, const Index& index, T* dx) {
    using A = wide<T>;
    const Narrow<T> narrow(g, true, g.threads, nullptr);
    if (!narrow.fits()) return 2;
    GatherInLanes<T> gather(g, narrow, g.c, g.k, g.k / g.bk, g.bk);
    Scratch& scratch = gather.scratch;
    const size_t start_at = scratch.add<A>(1);
    scratch.make();
    std::memset(scratch.at<T>(gather.zeros_at), 0, sizeof(T) * g.k);
    A* const start = scratch.at<A>(start_at);
    *start = 0;
    const int64_t lists = gather.chunks.count;
    const std::vector<int64_t> first(g.r * g.s);
#pragma omp parallel num_threads(g.threads)
    {
#pragma omp for schedule(static)
        for (int64_t c = 0; c < g.c; c++) {
            int64_t* const starts = scratch.at<int64_t>(gather.starts_at) + c * (lists + 1);
            list_channels<T, A>(g, index, narrow.taps.data(), first.data(), gather.chunks, lists, c, narrow.of_y.channel,
                                values, scratch.at<int32_t>(gather.items_at), scratch.at<A>(gather.weights_at), starts);
            starts[lists] = index.t_indptr[(c + 1) * g.r * g.s] * g.bk;
        }
        gather.run(dy, end_of(dy, g.y_strides, g.n, g.k, g.p, g.q), [&](int64_t) { return start; }, dx,
                   [](const InLanes<T>&, int64_t, int64_t) {});
    }
    return 0;
}

template <class T> int wgrad_narrow(const Conv& g, const T* x, const T* dy, const Index& index, T* dvalues) {
    using A = wide<T>;
    constexpr int64_t TOGETHER = 2;  // rows of a tile
    const Narrow<T> narrow(g, false, 1, index.order);
    if (!narrow.fits()) return 2;
    const LaneTiles& cut = narrow.cut;
    const int64_t rows = g.k / g.bk, size_of_block = g.bk * g.bc, most_channels = std::max(g.c, g.k);
    const Shares shares(g, cut.units, sizeof(A));
    const Chunking chunks(g, g.bk, rows, g.c / g.bc, g.bc, narrow.of_x.bytes(), g.nnzb * g.bc, Chunking::OF_LANES);
    Scratch scratch;
    const size_t zeros_at = scratch.add<T>(most_channels), items_at = scratch.add<int32_t>(g.nnzb * g.bc);
    const size_t place_at = scratch.add<int32_t>(g.nnzb), counts_at = scratch.add<int32_t>(g.threads * (g.c / g.bc));
    const size_t starts_at = scratch.add<int64_t>(rows * (chunks.count + 1));
    const size_t sums_at = scratch.add<A>(shares.count * shares.weights + LANES<A>);
    const int64_t planes_size = g.c * narrow.of_x.channel, size = planes_size + g.k * narrow.of_y.channel;
    const size_t own_at = scratch.add<A>(g.threads * size);
    scratch.make();
    int32_t *const items = scratch.at<int32_t>(items_at), *const place = scratch.at<int32_t>(place_at);
    int64_t* const starts = scratch.at<int64_t>(starts_at);
    A* const sums = scratch.at<A>(sums_at);
    T* const zeros = scratch.at<T>(zeros_at);
    std::memset(zeros, 0, sizeof(T) * most_channels);
    const T* const end = end_of(x, g.x_strides, g.n, g.c, g.h, g.w);
    const T* const end_of_dy = end_of(dy, g.y_strides, g.n, g.k, g.p, g.q);
#pragma omp parallel num_threads(g.threads)
    {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < rows; b++)
            list_row<T, A>(g, narrow.of_x.channel, index, narrow.taps.data(), b,
                           scratch.at<int32_t>(counts_at) + THREAD * (g.c / g.bc), nullptr, items, nullptr, place, chunks,
                           starts + b * (chunks.count + 1));
        A *const planes = scratch.at<A>(own_at) + THREAD * size, *const dy_planes = planes + planes_size;
        InLanes<T> of_x = narrow.of_x, of_dy = narrow.of_y;
        shares.add_up<A>(g, index, sums, [&](int64_t unit, int64_t b0, int64_t b1, A* sum) {
            of_x.begin(unit);
            of_dy.begin(unit);
            of_x.read(x, end, zeros, 0, g.c, planes);
            of_dy.read(dy, end_of_dy, zeros, b0 * g.bk, (b1 - b0) * g.bk, dy_planes);
            for (int64_t i = 0; i < cut.tile[0]; i += TOGETHER) {
                const Piece piece{0, of_dy.row, INT64_MIN, std::min(TOGETHER, cut.tile[0] - i), of_x.row, of_dy.row};
                for (int64_t chunk = 0; chunk < chunks.count; chunk++)
                    for (int64_t b = b0; b < b1; b++) {
                        const int64_t* const list = starts + b * (chunks.count + 1) + chunk;
                        dot_row(planes + i * of_x.row, items + list[0], list[1] - list[0],
                                dy_planes + (b - b0) * g.bk * of_dy.channel + i * of_dy.row, of_dy.channel, g.bk,
                                sum + list[0] * g.bk, piece, vec<A>{});
                    }
            }
        });
#pragma omp for schedule(static)
        for (int64_t i = 0; i < g.nnzb; i++)
            block_out(sums + place[i] * size_of_block, g.bk, g.bc, dvalues + i * size_of_block);
    }
    return 0;
}

}  // namespace
