// Tensors into planes, with any strides, and results out of them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "numbers.h"
#include "planes.h"

namespace {

template <class T, class A> INLINE void copy_in(const T* from, int64_t step, A* to, int64_t count) {
    if (step == 1)
        for (int64_t j = 0; j < count; j++) to[j] = widen(from[j]);
    else
        for (int64_t j = 0; j < count; j++) to[j] = widen(from[j * step]);
}
template <int BYTES> struct Bytes { typedef char type __attribute__((vector_size(BYTES), aligned(1), may_alias)); };
// Two loads and stores that overlap, of the largest power of two of bytes that fits.
template <int BYTES> INLINE bool copy_ends(const float* from, float* to, int64_t count) {
    typedef typename Bytes<BYTES>::type part;
    if (count * 4 < BYTES) return false;
    const part first = *(const part*)from, last = *(const part*)((const char*)(from + count) - BYTES);
    *(part*)to = first;
    *(part*)((char*)(to + count) - BYTES) = last;
    return true;
}
template <> INLINE void copy_in<float, float>(const float* from, int64_t step, float* to, int64_t count) {
    constexpr int L = LANES<float>;
    if (step != 1) {
        for (int64_t j = 0; j < count; j++) to[j] = from[j * step];
    } else if (count >= L) {
        for (int64_t j = 0; j + L <= count; j += L) store(to + j, load(from + j));
        store(to + count - L, load(from + count - L));
    } else if (!(copy_ends<32>(from, to, count) || copy_ends<16>(from, to, count) || copy_ends<8>(from, to, count))) {
        if (count) to[0] = from[0];
    }
}
template <class T, class A> INLINE void copy_out(const A* from, T* to, int64_t step, int64_t count) {
    if (step == 1)
        for (int64_t j = 0; j < count; j++) to[j] = narrow<T>(from[j]);
    else
        for (int64_t j = 0; j < count; j++) to[j * step] = narrow<T>(from[j]);
}
template <> INLINE void copy_out<float, float>(const float* from, float* to, int64_t step, int64_t count) {
    if (step == 1)
        copy_in<float, float>(from, 1, to, count);
    else
        for (int64_t j = 0; j < count; j++) to[j * step] = from[j];
}

// Rows of `count` elements, less than a vector and at least half of BYTES.
template <int BYTES>
__attribute__((noinline)) void copy_short(const float* from, int64_t from_step, float* to, int64_t to_step, int64_t rows,
                                          int64_t count) {
    for (; rows > 0; rows--, from += from_step, to += to_step) copy_ends<BYTES / 2>(from, to, count);
}
// Rows of `count` results to pixels that are `step` apart.
template <class T, class A>
INLINE void copy_rows(const A* from, int64_t from_step, T* to, int64_t to_step, int64_t rows, int64_t step, int64_t count) {
    if constexpr (std::is_same<T, float>::value)
        if (step == 1 && count >= 4 && count < LANES<float>)
            return count >= 8 ? copy_short<64>(from, from_step, to, to_step, rows, count)
                              : copy_short<32>(from, from_step, to, to_step, rows, count);
    for (; rows > 0; rows--, from += from_step, to += to_step) copy_out<T, A>(from, to, step, count);
}
// Rows of `pitch` elements, at most two vectors: `lead` zeros, `data` elements, zeros.
template <class A> struct Masked {
    static constexpr int64_t L = LANES<A>;
    typedef typename Vector<A>::indices mask;
    mask first, second;
    bool two;

    Masked(int64_t lead, int64_t data, int64_t pitch) : two(pitch > L) {
        A lanes[2 * L];
        for (int64_t j = 0; j < 2 * L; j++) lanes[j] = 0;
        std::memset(lanes + lead, 0xff, sizeof(A) * data);
        first = (mask)load(lanes), second = (mask)load(lanes + L);
    }
    int64_t reach() const { return two ? 2 * L : L; }
    __attribute__((noinline)) void copy(const A* from, int64_t from_step, A* to, int64_t to_step, int64_t rows) const {
        const mask a = first, b = second;
        if (two)
            for (; rows > 0; rows--, from += from_step, to += to_step) {
                store(to, (vec<A>)((mask)load(from) & a));
                store(to + L, (vec<A>)((mask)load(from + L) & b));
            }
        else
            for (; rows > 0; rows--, from += from_step, to += to_step) store(to, (vec<A>)((mask)load(from) & a));
    }
};
// N of every second pixel: lanes FIRST, FIRST + 2, ... of 2 N that are read.
template <int N> struct Part {};
template <int N> struct Vector<Part<N>> {
    typedef float anywhere __attribute__((vector_size(4 * N), aligned(4), may_alias));
    typedef int32_t indices __attribute__((vector_size(4 * N)));
};
template <int N, int FIRST, size_t... J> INLINE void copy_part(const float* from, float* to, std::index_sequence<J...>) {
    typedef typename Vector<Part<N>>::anywhere part;
    const part a = *(const part*)from, b = *(const part*)(from + N);
    *(part*)to = SHUFFLE(Part<N>, a, b, 2 * J + FIRST);
}
// Rows of every second pixel: `lead` zeros, `count` pixels, `tail` zeros. Nothing but the pixels from the first to the
// last is read, and one before them where there is one (`before`), or behind them (where count is N and not `before`).
template <int N>
__attribute__((noinline)) void copy_strided(const float* from, int64_t from_step, float* to, int64_t to_step, int64_t rows,
                                            int64_t lead, int64_t count, int64_t tail, bool before) {
    constexpr auto lanes = std::make_index_sequence<N>{};
    for (; rows > 0; rows--, from += from_step, to += to_step) {
        for (int64_t j = 0; j < lead; j++) to[j] = 0;
        float* const row = to + lead;
        int64_t j = 0;
        for (; before && j + N < count; j += N) copy_part<N, 1>(from + 2 * j - 1, row + j, lanes);
        for (; j + N < count; j += N) copy_part<N, 0>(from + 2 * j, row + j, lanes);
        if (before || count > N)
            copy_part<N, 1>(from + 2 * (count - N) - 1, row + count - N, lanes);
        else
            copy_part<N, 0>(from, row, lanes);
        for (j = count; j < count + tail; j++) row[j] = 0;
    }
}
// The same with the largest part that fits; false, and nothing is done, where none does. `width`: pixels from the first
// to the end of the tensor's row.
template <int N = 16>
bool copy_strided_rows(const float* from, int64_t from_step, float* to, int64_t to_step, int64_t rows, int64_t lead,
                       int64_t count, int64_t tail, bool before, int64_t width) {
    if constexpr (N >= 2) {
        if (N * 4 > VECTOR_BYTES || count < N || (count == N && !before && 2 * count > width))
            return copy_strided_rows<N / 2>(from, from_step, to, to_step, rows, lead, count, tail, before, width);
        copy_strided<N>(from, from_step, to, to_step, rows, lead, count, tail, before);
    }
    return N >= 2;
}
template <class A> INLINE void add(const A* from, A* to, int64_t count) {
    int64_t j = 0;
    for (; j + LANES<A> <= count; j += LANES<A>) store(to + j, load(to + j) + load(from + j));
    for (; j < count; j++) to[j] += from[j];
}
INLINE int64_t clamped(int64_t v, int64_t least, int64_t most) { return std::max(least, std::min(v, most)); }
template <class A> INLINE void zero(A* to, int64_t count) {
    if (count > 8)
        std::memset(to, 0, sizeof(A) * count);
    else
        for (int64_t j = 0; j < count; j++) to[j] = 0;
}

// Whether channels are innermost, so that they are copied across.
bool transposed(const int64_t* strides, int64_t channels, int64_t pitch) {
    return strides[1] == 1 && channels > 1 && (strides[3] != 1 || pitch == 1);
}

// One step of a transposition: lanes j of a with j & STEP change places with lanes j - STEP of b.
template <class A, int STEP, size_t... J> INLINE void exchange(vec<A>& a, vec<A>& b, std::index_sequence<J...>) {
    constexpr int L = LANES<A>;
    const vec<A> first = SHUFFLE(A, a, b, (J & STEP ? L + J - STEP : J));
    b = SHUFFLE(A, a, b, (J & STEP ? L + J : J + STEP));
    a = first;
}
template <class A, int STEP = 1> INLINE void transpose(vec<A>* rows) {
    if constexpr (STEP < LANES<A>) {
        UNROLL for (int i = 0; i < LANES<A>; i++)
            if (!(i & STEP)) exchange<A, STEP>(rows[i], rows[i + STEP], std::make_index_sequence<LANES<A>>{});
        transpose<A, 2 * STEP>(rows);
    }
}
template <class T, class A> INLINE vec<A> load_wide(const T* from, int64_t count) {
    if constexpr (std::is_same<T, A>::value)
        if (count == LANES<A>) return load(from);
    A lanes[LANES<A>] = {};
    for (int64_t j = 0; j < count; j++) lanes[j] = widen(from[j]);
    return load(lanes);
}
template <class T, class A> INLINE void store_narrow(vec<A> v, T* to, const int32_t* at, int64_t count) {
    if constexpr (std::is_same<T, A>::value)
        if (at == nullptr && count == LANES<A>) return store(to, v);
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
                block[a] = a < js ? load_wide<T, A>(from + (j + a) * pixel + c, cs) : vec<A>{};
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
    const int64_t channel = plane * vertical.phases() * horizontal.phases(), pitch = lay.pitch, images = lay.images;
    const bool across = transposed(strides, c1 - c0, pitch);
    for (int64_t a = 0; a < vertical.phases(); a++)
        for (int64_t b = 0; b < horizontal.phases(); b++) {
            A* const planes = to + (a * horizontal.phases() + b) * plane + front;
            const int64_t lead = horizontal.lead[b], data = horizontal.data[b], step = strides[3] * horizontal.stride;
            const auto row_of = [&](int64_t i) {
                return (begin + i) * vertical.stride + vertical.residue[a] - vertical.padding;
            };
            const T* const image = x + u.image * strides[0] + horizontal.first[b] * strides[3];
            const int64_t all = images * pitch;
            const int64_t top = clamped(vertical.lead[a] - begin, 0, rows);
            const int64_t bottom = clamped(vertical.lead[a] + vertical.data[a] - begin, top, rows);
            for (int64_t i = top; across && i < bottom; i++) {
                const T* const from = image + row_of(i) * strides[2] + c0;
                if (pitch == 1)  // an image has one pixel: images take the place of pixels
                    transpose_in(from, strides[0], data * u.images, c1 - c0, planes + i * images, channel, place);
                else
                    for (int64_t m = 0; m < u.images; m++)
                        transpose_in(from + m * strides[0], step, data, c1 - c0,
                                     planes + (i * images + m) * pitch + lead, channel, place);
            }
            const bool narrow = std::is_same<T, A>::value && !across && step == 1 && pitch <= 2 * LANES<A>;
            const Masked<A> vectors(narrow ? lead : 0, narrow ? data : 0, pitch);
            // What lies before an image's last pixel can be read.
            const T* const last = image + (c1 - 1) * strides[1] + (vertical.size - 1) * strides[2] + data;
            // An image's channels lie side by side in memory: one image after the other, of as many channels as have
            // their planes in the first cache.
            const int64_t some = std::max<int64_t>(1, 128 / rows), row_step = vertical.stride * strides[2];
            const auto plane_of = [&](int64_t c) { return planes + (place ? place[c] : c - c0) * channel; };
            for (int64_t c = c0; c < c1; c += some) {
                const int64_t end = std::min(c + some, c1);
                for (int64_t d = c; d < end; d++) {
                    A* const to = plane_of(d);
                    zero(to - front, front);
                    zero(to, top * all);
                    zero(to + bottom * all, plane - front - bottom * all);
                    for (int64_t i = top; i < bottom && u.images < images; i++)
                        zero(to + (i * images + u.images) * pitch, (images - u.images) * pitch);
                }
                for (int64_t m = 0; m < u.images; m++)
                    for (int64_t d = c; d < end && top < bottom; d++) {
                        const T* from = image + m * strides[0] + d * strides[1] + row_of(top) * strides[2];
                        A* row = plane_of(d) + (top * images + m) * pitch;
                        // Vectors reach into the rows of later images, which are still to come.
                        if (narrow && m * pitch + vectors.reach() <= u.images * pitch && from - x >= lead &&
                            from + (bottom - 1 - top) * row_step - lead + vectors.reach() <= last + m * strides[0]) {
                            vectors.copy((const A*)from - lead, row_step, row, all, bottom - top);
                            continue;
                        }
                        if constexpr (std::is_same<T, float>::value)
                            if (!across && horizontal.stride == 2 && strides[3] == 1 &&
                                copy_strided_rows(from, row_step, row, all, bottom - top, lead, data, pitch - lead - data,
                                                  horizontal.first[b] > 0, horizontal.size - horizontal.first[b]))
                                continue;
                        for (int64_t i = top; i < bottom; i++, from += row_step, row += all) {
                            zero(row, lead);
                            if (!across) {
                                const T* const next = from + strides[1];
                                for (int64_t j = 0; j < data * step; j += 64 / int64_t(sizeof(T)))
                                    __builtin_prefetch(next + j);
                                copy_in(from, step, row + lead, data);
                            }
                            zero(row + lead + data, pitch - lead - data);
                        }
                    }
            }
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
            UNROLL for (int64_t b = 0; b < L; b++)
                block[b] = b < cs ? load(from + (c + b) * channel + j) : vec<A>{};
            transpose<A>(block);
            UNROLL for (int64_t a = 0; a < L; a++)
                if (a < js)
                    store_narrow<T, A>(block[a], to + (j + a) * pixel + (order ? 0 : c), order ? order + c : nullptr, cs);
        }
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
