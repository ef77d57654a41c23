// Each lane of a vector has a tile of pixels of its own, so that whatever a tap reads is a vector that is aligned.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "copying.h"
#include "lists.h"

namespace {

// An axis of a tensor in tiles: position i of phase a is pixel i * step + offset[a], if the tensor has that pixel. Tiles
// hold `reach` positions more than they are long.
struct Line {
    int64_t size, step, reach;
    std::vector<int64_t> offset;  // of each phase
    int64_t phases() const { return offset.size(); }
};

// Positions [begin, end) of two axes and some images as tiles of which a unit has one in each lane. Tiles that follow each
// other are neighbours.
struct LaneTiles {
    int64_t begin[2], tile[2], tiles[2], total, units;
    bool pay;  // whether products on them are estimated to be faster than in planes

    static constexpr int64_t WIDEST = 16, TALLEST = 8;  // columns, rows of a tile
    static constexpr double COPY = 5;                   // products of a vector that its copy costs
    static constexpr double IN_PLANES = 1.5, COPY_IN_PLANES = 3;  // of what products and copies cost here

    // `work`: products of a position in each plane that is read. Tiles are copied with so many positions beyond them; with
    // `across` position by position, else in whole vectors of columns. Their width does not depend on the threads.
    LaneTiles(int64_t images, const int64_t (&begin)[2], const int64_t (&end)[2], int64_t lanes, double work,
              const int64_t (&reach)[2], bool across, int64_t threads, int64_t blocks)
        : begin{begin[0], begin[1]} {
        const int64_t height = end[0] - begin[0], width = end[1] - begin[1];
        tiles[1] = (width + WIDEST - 1) / WIDEST;
        tile[1] = (width + tiles[1] - 1) / tiles[1];
        const int64_t wide = tile[1] + reach[1], copied = across ? wide : (wide + lanes - 1) / lanes * lanes;
        const auto choose = [&](int64_t team) {
            double least = std::numeric_limits<double>::infinity();
            for (int64_t most = std::min(TALLEST, height); most > 0; most--) {
                const int64_t down = (height + most - 1) / most, rows = (height + down - 1) / down;
                const int64_t all = images * down * tiles[1], some = (all + lanes - 1) / lanes;
                const int64_t parts = parts_of(some, team, blocks);
                const double products = work * rows * (tile[1] + 2);  // each row of them loads two numbers more
                const double time = (some * parts + team - 1) / team *
                                    (products / parts + COPY * (rows + reach[0]) * copied);
                if (time >= least) continue;
                least = time;
                tile[0] = rows, tiles[0] = down, total = all, units = some;
            }
            return least;
        };
        const double in_planes = double(images * height) * (width + reach[1] / 2) / lanes;
        pay = choose(1) <= in_planes * (IN_PLANES * work + (across ? COPY : COPY_IN_PLANES));
        if (threads > 1) choose(threads);
    }
    struct Lane {  // where its tile begins; image of -1: there is none
        int64_t image, at[2];
    };
    Lane lane(int64_t unit, int64_t lanes, int64_t number) const {
        const int64_t i = unit * lanes + number;
        if (i >= total) return {-1, {0, 0}};
        const int64_t j = i % (tiles[0] * tiles[1]);
        return {i / (tiles[0] * tiles[1]), {begin[0] + j / tiles[1] * tile[0], begin[1] + j % tiles[1] * tile[1]}};
    }
};

// A tensor and its tiles, those of one unit at a time: planes of a channel [phase][row][column][lane].
template <class T> class InLanes {
    using A = wide<T>;
    static constexpr int64_t L = LANES<A>;
    const LaneTiles& cut;
    const int64_t* const strides;
    const Line lines[2];
    const int32_t* const order;  // channel c of the tiles is channel order[c] of the tensor, or c
    const bool across;           // channels are innermost in memory

   public:
    const int64_t rows, columns;        // of a tile
    const int64_t row, plane, channel;  // elements of a row, a phase, a channel

   private:
    struct Run {  // columns [skip, skip + count) of a vector of columns are pixels
        int64_t begin;  // where the pixel of its first column would be
        int32_t skip, count;
    };
    struct Block {  // such vectors of all lanes: what they read, and whether all of it is pixels
        int64_t least, most;
        bool any, all;
    };
    std::vector<int64_t> at;     // [phase][row][column][lane]: where that pixel of an image is; -1: there is none
    std::vector<A> held;         // the same: whether there is a pixel, as bits
    std::vector<Run> runs;       // [phase][row][vector of columns][lane]
    std::vector<Block> blocks;   // [phase][row][vector of columns]

    int64_t vectors() const { return (columns + L - 1) / L; }
    int64_t channel_of(int64_t c) const { return (order ? order[c] : c) * strides[1]; }
    // Calls body(position of the first column, columns, number) for each vector of columns.
    template <class Body> INLINE void over_vectors(Body body) const {
        const int64_t all = lines[0].phases() * lines[1].phases() * rows;
        for (int64_t i = 0, number = 0; i < all; i++)
            for (int64_t j = 0; j < columns; j += L, number++) body(i * columns + j, std::min(L, columns - j), number);
    }

   public:
    InLanes(const LaneTiles& cut, const int64_t* strides, const Line& vertical, const Line& horizontal,
            const int32_t* order = nullptr)
        : cut(cut), strides(strides), lines{vertical, horizontal}, order(order), across(innermost(strides)),
          rows(cut.tile[0] + vertical.reach), columns(cut.tile[1] + horizontal.reach), row(columns * L), plane(rows * row),
          channel((vertical.phases() * horizontal.phases() * rows * columns | 1) * L) {}

    // Bytes that the taps of a channel read for one row of a tile.
    int64_t bytes() const { return sizeof(A) * lines[0].phases() * lines[1].phases() * (lines[0].reach + 1) * row; }
    int64_t tap(int64_t phase, int64_t i, int64_t j) const { return phase * plane + i * row + j * L; }

    void begin(int64_t unit) {
        const int64_t phases[] = {lines[0].phases(), lines[1].phases()};
        at.resize(phases[0] * phases[1] * plane);
        for (int64_t l = 0; l < L; l++) {
            const LaneTiles::Lane lane = cut.lane(unit, L, l);
            int64_t* to = at.data() + l;
            for (int64_t a = 0; a < phases[0]; a++)
                for (int64_t b = 0; b < phases[1]; b++)
                    for (int64_t i = 0; i < rows; i++) {
                        const int64_t h = (lane.at[0] + i) * lines[0].step + lines[0].offset[a];
                        const bool is = lane.image >= 0 && h >= 0 && h < lines[0].size;
                        const int64_t in_row = lane.image * strides[0] + h * strides[2];
                        int64_t w = lane.at[1] * lines[1].step + lines[1].offset[b];
                        for (int64_t j = 0; j < columns; j++, w += lines[1].step, to += L)
                            *to = is && w >= 0 && w < lines[1].size ? in_row + w * strides[3] : -1;
                    }
        }
        if (across) return;
        const int64_t step = lines[1].step * strides[3];
        blocks.resize(phases[0] * phases[1] * rows * vectors());
        runs.resize(blocks.size() * L);
        over_vectors([&](int64_t position, int64_t count, int64_t number) {
            Block block{INT64_MAX, INT64_MIN, false, true};
            Run* const to = &runs[number * L];
            for (int64_t l = 0; l < L; l++) {
                int64_t skip = 0, end = count;
                while (skip < end && at[(position + skip) * L + l] < 0) skip++;
                while (skip < end && at[(position + end - 1) * L + l] < 0) end--;
                const bool some = skip < end;
                to[l] = {some ? at[(position + skip) * L + l] - skip * step : 0, int32_t(skip), int32_t(end - skip)};
                block.any |= some;
                block.all &= skip == 0 && end == count;
                if (some) block.least = std::min(block.least, to[l].begin), block.most = std::max(block.most, to[l].begin);
            }
            for (int64_t l = 0; l < L; l++)
                if (to[l].count == 0) to[l].begin = block.any ? block.least : 0;  // is read, and dropped
            blocks[number] = block;
        });
    }
    // Channels [c, c + count) of a tensor that ends at `end`; as many `zeros` as it has channels.
    void read(const T* x, const T* end, const T* zeros, int64_t c, int64_t count, A* to) {
        if (across) return read_across(x, zeros, c, count, to);
        held.resize(at.size());
        for (size_t i = 0; i < at.size(); i++) std::memset(&held[i], at[i] < 0 ? 0 : 0xff, sizeof(A));
        const int64_t step = lines[1].step * strides[3];
        if (step == 1) return read_rows<1>(x, end, c, count, to);
        if (step == 2) return read_rows<2>(x, end, c, count, to);
        read_rows<0>(x, end, c, count, to);
    }
    void write(const A* from, int64_t c, int64_t count, T* y) const {
        across ? write_across(from, c, count, y) : write_rows(from, c, count, y);
    }
    // Calls body(where it begins, rows, columns) for the part of the tensor that each tile of one phase is.
    template <class Body> void regions(Body body) const {
        for (int64_t l = 0; l < L; l++) {
            int64_t height = 0, width = 0;
            while (height < rows && at[height * row + l] >= 0) height++;
            while (width < columns && at[width * L + l] >= 0) width++;
            if (height > 0) body(at[l], height, width);
        }
    }

   private:
    // Each vector of columns of each lane is one vector of memory, or every second element of two.
    template <int STEP> void read_rows(const T* x, const T* end, int64_t c, int64_t count, A* to) const {
        constexpr int64_t READ = STEP * L;
        for (int64_t k = 0; k < count; k++, to += channel) {
            const T* const image = x + channel_of(c + k);
            over_vectors([&](int64_t position, int64_t some, int64_t number) {
                A* const out = to + position * L;
                if (!blocks[number].any) return zero(out, some * L);
                if constexpr (STEP > 0)
                    if (image + blocks[number].least >= x && image + blocks[number].most + READ <= end) {
                        const Run* const from = &runs[number * L];
                        vec<A> block[L];
                        UNROLL for (int64_t l = 0; l < L; l++)
                            if constexpr (STEP == 1)
                                block[l] = load_wide(image + from[l].begin);
                            else
                                block[l] = every_second<A, L, 0>(load_wide(image + from[l].begin),
                                                                 load_wide(image + from[l].begin + L),
                                                                 std::make_index_sequence<L>{});
                        transpose<A>(block);
                        UNROLL for (int64_t j = 0; j < L; j++)
                            if (j < some)
                                store(out + j * L, masked<A, L>(block[j], mask_at<A, L>(&held[(position + j) * L])));
                        return;
                    }
                for (int64_t i = 0; i < some * L; i++) {
                    const int64_t pixel = at[position * L + i];
                    out[i] = pixel < 0 ? A(0) : A(widen(image[pixel]));
                }
            });
        }
    }
    void read_across(const T* x, const T* zeros, int64_t c, int64_t count, A* to) const {
        const T* from[L];
        for (size_t i = 0; i < at.size(); i += L) {
            for (int64_t l = 0; l < L; l++) from[l] = (at[i + l] < 0 ? zeros : x + at[i + l]) + (order ? 0 : c);
            for (int64_t k = 0; k < count; k += L) {
                const int64_t some = std::min(L, count - k);
                vec<A> block[L];
                UNROLL for (int64_t l = 0; l < L; l++)
                    if (order == nullptr) {
                        block[l] = load_some<T, A>(from[l] + k, some);
                    } else {
                        A lanes[L] = {};
                        for (int64_t j = 0; j < some; j++) lanes[j] = widen(from[l][order[c + k + j]]);
                        block[l] = load(lanes);
                    }
                transpose<A>(block);
                UNROLL for (int64_t j = 0; j < L; j++)
                    if (j < some) store(to + (k + j) * channel + i, block[j]);
            }
        }
    }
    void write_rows(const A* from, int64_t c, int64_t count, T* y) const {
        const int64_t step = lines[1].step * strides[3];
        A numbers[L * L];
        for (int64_t k = 0; k < count; k++, from += channel) {
            T* const image = y + channel_of(c + k);
            over_vectors([&](int64_t position, int64_t some, int64_t number) {
                vec<A> block[L];
                UNROLL for (int64_t j = 0; j < L; j++) block[j] = j < some ? load(from + (position + j) * L) : vec<A>{};
                transpose<A>(block);
                UNROLL for (int64_t l = 0; l < L; l++) store(numbers + l * L, block[l]);
                const Run* const to = &runs[number * L];
                if (step == 1 && blocks[number].all && with_part<A>(some, [&](auto lanes) {
                        for (int64_t l = 0; l < L; l++) copy_row<lanes>(numbers + l * L, image + to[l].begin, some);
                    }))
                    return;
                for (int64_t l = 0; l < L; l++)
                    copy_out(numbers + l * L + to[l].skip, image + to[l].begin + to[l].skip * step, step, to[l].count);
            });
        }
    }
    void write_across(const A* from, int64_t c, int64_t count, T* y) const {
        for (size_t i = 0; i < at.size(); i += L)
            for (int64_t k = 0; k < count; k += L) {
                const int64_t some = std::min(L, count - k);
                vec<A> block[L];
                UNROLL for (int64_t j = 0; j < L; j++)
                    block[j] = j < some ? load(from + (k + j) * channel + i) : vec<A>{};
                transpose<A>(block);
                UNROLL for (int64_t l = 0; l < L; l++)
                    if (at[i + l] >= 0)
                        store_some<T, A>(block[l], y + at[i + l] + (order ? 0 : c + k), order ? order + c + k : nullptr,
                                           some);
            }
    }
};

}  // namespace
