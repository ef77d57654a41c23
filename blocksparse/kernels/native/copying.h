// Tensors into planes, with any strides, and results out of them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "numbers.h"
#include "planes.h"
#include "rows.h"

namespace {

template <class A> INLINE void add(const A* from, A* to, int64_t count) {
    int64_t j = 0;
    for (; j + LANES<A> <= count; j += LANES<A>) store(to + j, load(to + j) + load(from + j));
    for (; j < count; j++) to[j] += from[j];
}
INLINE int64_t clamped(int64_t v, int64_t least, int64_t most) { return std::max(least, std::min(v, most)); }
// Whether channels are innermost, so that they are copied across.
bool innermost(const int64_t* strides) { return strides[1] == 1 && strides[3] != 1; }
bool transposed(const int64_t* strides, int64_t channels, int64_t pitch) {
    return channels > 1 && (innermost(strides) || (strides[1] == 1 && pitch == 1));
}
// Behind the last element of a tensor of these sizes.
template <class T> const T* end_of(const T* p, const int64_t* strides, int64_t n, int64_t c, int64_t h, int64_t w) {
    return p + (n - 1) * strides[0] + (c - 1) * strides[1] + (h - 1) * strides[2] + (w - 1) * strides[3] + 1;
}

// One step of a transposition: lanes j of a with j & STEP change places with lanes j - STEP of b.
template <class A, int STEP, size_t... J> INLINE void exchange(vec<A>& a, vec<A>& b, std::index_sequence<J...>) {
    constexpr int L = LANES<A>;
    const vec<A> first = SHUFFLE(a, b, (J & STEP ? L + J - STEP : J), A);
    b = SHUFFLE(a, b, (J & STEP ? L + J : J + STEP), A);
    a = first;
}
template <class A, int STEP = 1> INLINE void transpose(vec<A>* rows) {
    if constexpr (STEP < LANES<A>) {
        UNROLL for (int i = 0; i < LANES<A>; i++)
            if (!(i & STEP)) exchange<A, STEP>(rows[i], rows[i + STEP], std::make_index_sequence<LANES<A>>{});
        transpose<A, 2 * STEP>(rows);
    }
}
template <class T, class A> INLINE vec<A> load_some(const T* from, int64_t count) {
    if (count == LANES<A>) return load_wide(from);
    A lanes[LANES<A>] = {};
    for (int64_t j = 0; j < count; j++) lanes[j] = widen(from[j]);
    return load(lanes);
}
template <class T, class A> INLINE void store_some(vec<A> v, T* to, const int32_t* at, int64_t count) {
    if (at == nullptr && count == LANES<A>) return store_narrow(to, v);
    A lanes[LANES<A>];
    store(lanes, v);
    for (int64_t j = 0; j < count; j++) to[at ? at[j] : j] = narrow<T>(lanes[j]);
}

// `count` pixels of `channels` channels from a pixel-major matrix to channel-major rows: channel c to row place[c], or c.
// Up to a vector behind the pixels of a row is overwritten.
template <class T, class A>
void transpose_in(const T* from, int64_t pixel, int64_t count, int64_t channels, A* to, int64_t channel,
                  const int32_t* place) {
    constexpr int64_t L = LANES<A>;
    for (int64_t j = 0; j < count; j += L)
        for (int64_t c = 0; c < channels; c += L) {
            const int64_t cs = std::min(L, channels - c), js = std::min(L, count - j);
            vec<A> block[L];
            UNROLL for (int64_t a = 0; a < L; a++) {
                __builtin_prefetch(from + (j + L + a) * pixel + c);
                block[a] = a < js ? load_some<T, A>(from + (j + a) * pixel + c, cs) : vec<A>{};
            }
            transpose<A>(block);
            UNROLL for (int64_t b = 0; b < L; b++)
                if (b < cs) store(to + (place ? place[c + b] : c + b) * channel + j, block[b]);
        }
}

// `count` pixels of `images` images each, side by side in memory: pixels of both sides that follow each other are one
// run. Images of a plane beyond those of the tensor become zero, or with `PAD` false stay as they are.
template <bool PAD, class From, class To, class Copy>
INLINE void copy_pixels(const From* from, int64_t from_step, To* to, int64_t to_step, int64_t images, int64_t count,
                        Copy copy) {
    if (from_step == images && to_step == images) return copy(from, to, images * count);
    for (int64_t j = 0; j < count; j++) {
        __builtin_prefetch(from + (j + 16) * from_step);
        if constexpr (!PAD) __builtin_prefetch(to + (j + 16) * to_step, 1);
        copy(from + j * from_step, to + j * to_step, images);
        if constexpr (PAD) zero(to + j * to_step + images, to_step - images);
    }
}

// fill() of planes whose images are innermost, from a tensor in batch_last.
template <class T, class A>
void fill_batch_last(const T* x, const int64_t* strides, const Axis& vertical, const Axis& horizontal, int64_t begin,
                     int64_t rows, const Unit& u, const Layout& lay, int64_t plane, int64_t front,
                     int64_t c0, int64_t c1, const int32_t* place, A* to) {
    const int64_t channel = plane * vertical.phases() * horizontal.phases(), images = lay.images, all = images * lay.pitch;
    const auto copy = [](const T* from, A* to, int64_t count) { copy_in(from, 1, to, count); };
    for (int64_t c = c0; c < c1; c++)
        for (int64_t a = 0; a < vertical.phases(); a++)
            for (int64_t b = 0; b < horizontal.phases(); b++) {
                const int64_t lead = horizontal.lead[b] * images, data = horizontal.data[b];
                A* row = to + (place ? place[c] : c - c0) * channel + (a * horizontal.phases() + b) * plane;
                zero(row, front);
                row += front;
                for (int64_t i = 0; i < rows; i++, row += all) {
                    const int64_t h = (begin + i) * vertical.stride + vertical.residue[a] - vertical.padding;
                    if (h < 0 || h >= vertical.size) {
                        zero(row, all);
                        continue;
                    }
                    zero(row, lead);
                    const T* const from = x + u.image * strides[0] + c * strides[1] + h * strides[2];
                    copy_pixels<true>(from + horizontal.first[b] * strides[3], strides[3] * horizontal.stride, row + lead,
                                      images, u.images, data, copy);
                    zero(row + lead + data * images, all - lead - data * images);
                }
                zero(row, plane - front - rows * all);
            }
}

// Rows [begin, begin + rows) of the planes of channels [c0, c1) of a tensor, for the images of a unit. Row i of phase a
// holds the pixels of input row i * stride + residue - padding. `front` zeros come before the first. Channel c goes to
// the planes of number place[c], or c - c0.
template <class T, class A>
void fill(const T* x, const int64_t* strides, const Axis& vertical, const Axis& horizontal, int64_t begin, int64_t rows,
          const Unit& u, const Layout& lay, int64_t plane, int64_t front, int64_t c0,
          int64_t c1, const int32_t* place, A* to) {
    if (lay.batch_last)
        return fill_batch_last<T, A>(x, strides, vertical, horizontal, begin, rows, u, lay, plane, front, c0, c1,
                                     place, to);
    const int64_t phases = horizontal.phases(), channel = plane * vertical.phases() * phases;
    const int64_t pitch = lay.pitch, images = lay.images, all = images * pitch, row_step = vertical.stride * strides[2];
    const bool across = transposed(strides, c1 - c0, pitch);
    const T* const end = end_of(x, strides, u.image + u.images, c1, vertical.size, horizontal.size);
    const RowsIn<T, A> copy(horizontal, pitch, strides[3], !across, x, end);
    // Whether rows have anything left to write once their pixels are transposed: the last vector of a row ends in zeros,
    // as many as lie between rows or more, but before the first row.
    bool left = !across;
    for (int64_t b = 0; b < phases; b++) {
        const int64_t over = (LANES<A> - horizontal.data[b] % LANES<A>) % LANES<A>;
        left |= pitch - horizontal.data[b] > over;
    }
    const auto row_of = [&](int64_t i, int64_t a) {
        return (begin + i) * vertical.stride + vertical.residue[a] - vertical.padding;
    };
    const auto top_of = [&](int64_t a) { return clamped(vertical.lead[a] - begin, 0, rows); };
    const auto bottom_of = [&](int64_t a) {
        return clamped(vertical.lead[a] + vertical.data[a] - begin, top_of(a), rows);
    };
    for (int64_t a = 0; across && a < vertical.phases(); a++)
        for (int64_t b = 0; b < phases; b++) {
            const T* const image = x + u.image * strides[0] + horizontal.first[b] * strides[3] + c0;
            A* const planes = to + (a * phases + b) * plane + front;
            const int64_t lead = horizontal.lead[b], data = horizontal.data[b];
            for (int64_t i = top_of(a); i < bottom_of(a); i++) {
                const T* const from = image + row_of(i, a) * strides[2];
                if (pitch == 1)  // an image has one pixel: images take the place of pixels
                    transpose_in(from, strides[0], data * u.images, c1 - c0, planes + i * images, channel, place);
                else
                    for (int64_t m = 0; m < u.images; m++)
                        transpose_in(from + m * strides[0], strides[3] * horizontal.stride, data, c1 - c0,
                                     planes + (i * images + m) * pitch + lead, channel, place);
            }
        }
    // An image's channels lie side by side in memory: one image after the other, of as many channels as have their
    // planes in the first cache. Rows of all residues follow each other: each line of memory is read once.
    const int64_t some = std::max<int64_t>(1, 128 / (rows * phases));
    for (int64_t c = c0; c < c1; c += some)
        for (int64_t a = 0; a < vertical.phases(); a++) {
            const int64_t last = std::min(c + some, c1), top = top_of(a), bottom = bottom_of(a);
            const auto plane_of = [&](int64_t d) {
                return to + (place ? place[d] : d - c0) * channel + a * phases * plane + front;
            };
            for (int64_t d = c; d < last; d++)
                for (int64_t b = 0; b < phases; b++) {
                    A* const rows_of = plane_of(d) + b * plane;
                    zero(rows_of - front, front + top * all + (top < bottom ? horizontal.lead[b] : 0));
                    zero(rows_of + bottom * all, plane - front - bottom * all);
                    for (int64_t i = top; i < bottom && u.images < images; i++)
                        zero(rows_of + (i * images + u.images) * pitch,
                             (images - u.images) * pitch + (i + 1 < bottom ? horizontal.lead[b] : 0));
                }
            for (int64_t m = 0; m < u.images && top < bottom && left; m++)
                for (int64_t d = c; d < last; d++)
                    copy(x + (u.image + m) * strides[0] + d * strides[1] + row_of(top, a) * strides[2], row_step,
                         plane_of(d) + (top * images + m) * pitch, all, plane, bottom - top);
        }
}

// `count` pixels of `channels` rows to a pixel-major matrix; row c goes to channel order[c], or c. Up to a vector behind
// the pixels of a row is read.
template <class T, class A>
void transpose_out(const A* from, int64_t channel, int64_t channels, const int32_t* order, int64_t count, T* to,
                   int64_t pixel) {
    constexpr int64_t L = LANES<A>;
    for (int64_t j = 0; j < count; j += L)
        for (int64_t c = 0; c < channels; c += L) {
            const int64_t cs = std::min(L, channels - c), js = std::min(L, count - j);
            vec<A> block[L];
            UNROLL for (int64_t b = 0; b < L; b++) {
                __builtin_prefetch(to + (j + L + b) * pixel + c, 1);
                block[b] = b < cs ? load(from + (c + b) * channel + j) : vec<A>{};
            }
            transpose<A>(block);
            UNROLL for (int64_t a = 0; a < L; a++)
                if (a < js)
                    store_some<T, A>(block[a], to + (j + a) * pixel + (order ? 0 : c), order ? order + c : nullptr, cs);
        }
}

// The weights of a block: [bk][bc] as values hold them, [bc][bk] as items do.
template <class T, class A> void block_in(const T* from, int64_t bk, int64_t bc, A* to) {
    if (bc == 1) return copy_in(from, 1, to, bk);
    if (bc >= LANES<A> && bk % LANES<A> == 0) return transpose_in<T, A>(from, bc, bk, bc, to, bk, nullptr);
    for (int64_t j = 0; j < bc; j++)
        for (int64_t f = 0; f < bk; f++) to[j * bk + f] = widen(from[f * bc + j]);
}
// Up to a vector behind `from` is read.
template <class T, class A> void block_out(const A* from, int64_t bk, int64_t bc, T* to) {
    if (bc == 1) return copy_out(from, to, 1, bk);
    if (bc >= LANES<A> && bk >= LANES<A>) return transpose_out<T, A>(from, bk, bc, nullptr, bk, to, bc);
    for (int64_t j = 0; j < bc; j++)
        for (int64_t f = 0; f < bk; f++) to[f * bc + j] = narrow<T>(from[j * bk + f]);
}

// Runs of `channels` rows to the outputs of a unit: [N, K, P, Q] or the like, with any strides.
template <class T, class A>
void write(const A* runs, int64_t channel, int64_t channels, int64_t first, const int32_t* order, const Unit& u,
           const Layout& lay, int64_t width, T* y, const int64_t* strides) {
    const int64_t images = lay.images, pitch = lay.pitch;
    if (lay.batch_last) {
        const auto copy = [](const A* from, T* to, int64_t count) { copy_out(from, to, 1, count); };
        for (int64_t c = 0; c < channels; c++)
            for (int64_t i = 0; i < u.rows; i++)
                copy_pixels<false>(runs + c * channel + i * images * pitch, images,
                                   y + u.image * strides[0] + (order ? order[first + c] : first + c) * strides[1] +
                                       (u.row + i) * strides[2],
                                   strides[3], u.images, width, copy);
        return;
    }
    const bool across = transposed(strides, channels, pitch);
    const int32_t* const map = order == nullptr ? nullptr : order + first;
    T* const base = across && map == nullptr ? y + first : y;
    if (across && pitch == 1) {
        for (int64_t i = 0; i < u.rows; i++)
            transpose_out(runs + i * images, channel, channels, map, u.images,
                          base + u.image * strides[0] + (u.row + i) * strides[2], strides[0]);
        return;
    }
    for (int64_t m = 0; m < u.images; m++) {
        const A* const from = runs + m * pitch;
        T* const to = base + (u.image + m) * strides[0] + u.row * strides[2];
        for (int64_t i = 0; across && i < u.rows; i++)
            transpose_out(from + i * images * pitch, channel, channels, map, width, to + i * strides[2], strides[3]);
        for (int64_t c = 0; !across && c < channels; c++)
            copy_rows(from + c * channel, images * pitch, to + (map ? map[c] : first + c) * strides[1], strides[2], u.rows,
                      strides[3], width);
    }
}

}  // namespace
