// Rows of a tensor into rows of planes and back, in vectors: the last of them ends where the row ends, so that nothing
// beside the row is written. Of a stride of two, both phases from one reading.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "numbers.h"
#include "planes.h"

namespace {

template <class A, int S> INLINE part_mask<A, S> mask_at(const A* lanes) {
    return *(const typename Vector<Part<A, S>>::indices_anywhere*)lanes;
}
template <class A, int S> INLINE part<A, S> masked(part<A, S> v, part_mask<A, S> mask) {
    return (part<A, S>)((part_mask<A, S>)v & mask);
}
// Lanes FIRST, FIRST + 2, ... of a followed by b.
template <class A, int S, int FIRST, size_t... J>
INLINE part<A, S> every_second(part<A, S> a, part<A, S> b, std::index_sequence<J...>) {
    return SHUFFLE(a, b, 2 * J + FIRST, Part<A, S>);
}
// Lanes of a and b in turn.
template <class A, int S, size_t... J> INLINE part<A, S> in_turn(part<A, S> a, part<A, S> b, std::index_sequence<J...>) {
    return SHUFFLE(a, b, J / 2 + (J % 2) * S, Part<A, S>);
}

// Calls body with the most lanes that such a row has, as a constant; false where it has one element or none.
template <class A, int S = LANES<A>, class Body> INLINE bool with_part(int64_t count, Body body) {
    if constexpr (S >= 2) {
        if (count < S) return with_part<A, S / 2>(count, body);
        body(std::integral_constant<int, S>{});
        return true;
    }
    return false;
}

template <int S, class From, class To> INLINE void copy_row(const From* from, To* to, int64_t count) {
    for (int64_t j = 0; j < count - S; j += S) store_part<S>(to + j, load_part<S>(from + j));
    store_part<S>(to + count - S, load_part<S>(from + count - S));
}
// `count` numbers that are `step` apart in a tensor.
template <class T, class A> INLINE void copy_in(const T* from, int64_t step, A* to, int64_t count) {
    if (step == 1 && with_part<A>(count, [&](auto lanes) { copy_row<lanes>(from, to, count); })) return;
    for (int64_t j = 0; j < count; j++) to[j] = widen(from[j * step]);
}
template <class T, class A> INLINE void copy_out(const A* from, T* to, int64_t step, int64_t count) {
    if (step == 1 && with_part<A>(count, [&](auto lanes) { copy_row<lanes>(from, to, count); })) return;
    for (int64_t j = 0; j < count; j++) to[j * step] = narrow<T>(from[j]);
}
template <class A> INLINE void zero(A* to, int64_t count) {
    if (count > 8)
        std::memset(to, 0, sizeof(A) * count);
    else
        for (int64_t j = 0; j < count; j++) to[j] = 0;
}

// ---------------------------------------------------------------------- a tensor's rows into planes

// Which lanes of the first and of the last vector of a row hold pixels, as masks.
template <class A> struct Ends {
    A first[LANES<A>], last[LANES<A>];

    Ends() = default;
    Ends(int64_t lead, int64_t data, int64_t pitch, int64_t lanes) {
        for (int64_t j = 0; j < lanes; j++) {
            const auto holds = [=](int64_t at) { return at >= lead && at < lead + data; };
            std::memset(first + j, holds(j) ? 0xff : 0, sizeof(A));
            std::memset(last + j, holds(pitch - lanes + j) ? 0xff : 0, sizeof(A));
        }
    }
};

// One vector of rows_in.
template <class A, int S, int STRIDE, bool PAIR, class T>
INLINE void part_in(const T* from, A* to, int64_t plane, part_mask<A, S> mask, part_mask<A, S> mask_of_pair) {
    constexpr auto lanes = std::make_index_sequence<S>{};
    if constexpr (STRIDE == 1) {
        store_part<S>(to, masked<A, S>(load_part<S>(from), mask));
    } else {
        const part<A, S> a = load_part<S>(from), b = load_part<S>(from + S);
        store_part<S>(to, masked<A, S>(every_second<A, S, 0>(a, b, lanes), mask));
        if constexpr (PAIR) store_part<S>(to + plane, masked<A, S>(every_second<A, S, 1>(a, b, lanes), mask_of_pair));
    }
}
// Rows of `pitch` elements: element j is from[STRIDE * j] where that is a pixel, otherwise zero. With PAIR also those of
// from[STRIDE * j + 1], `plane` further on, which have the second ends.
template <class T, class A, int S, int STRIDE, bool PAIR>
__attribute__((noinline)) void rows_in(const T* from, int64_t from_step, A* to, int64_t to_step, int64_t plane,
                                       int64_t rows, int64_t pitch, const Ends<A>* ends) {
    const auto first = mask_at<A, S>(ends[0].first), last = mask_at<A, S>(ends[0].last), all = ~part_mask<A, S>{};
    const auto first_of_pair = mask_at<A, S>(ends[PAIR].first), last_of_pair = mask_at<A, S>(ends[PAIR].last);
    for (; rows > 0; rows--, from += from_step, to += to_step) {
        part_in<A, S, STRIDE, PAIR>(from, to, plane, first, first_of_pair);
        for (int64_t j = S; j < pitch - S; j += S) part_in<A, S, STRIDE, PAIR>(from + STRIDE * j, to + j, plane, all, all);
        const int64_t j = pitch - S;
        if (j > 0) part_in<A, S, STRIDE, PAIR>(from + STRIDE * j, to + j, plane, last, last_of_pair);
    }
}

// Rows of a tensor, all columns, into the planes of a channel for each residue of the stride: `lead` zeros, the pixels,
// zeros.
template <class T, class A> class RowsIn {
    typedef void Copy(const T*, int64_t, A*, int64_t, int64_t, int64_t, int64_t, const Ends<A>*);
    const Axis& axis;
    const int64_t pitch, element;
    const bool pixels;            // whether these are copied, too, or the zeros beside them alone
    const T *const begin, *const end;  // of the tensor: what lies between is memory, whatever its strides
    int64_t offset, reach;        // where a row of vectors begins to read, from its first pixel, and how much it reads
    Copy* copy = nullptr;         // of whole vectors, where that can be done
    Ends<A> ends[2];

    template <int STRIDE, bool PAIR> void in_vectors() {
        with_part<A>(pitch, [&](auto lanes) {
            constexpr int S = lanes;
            const int64_t middle = (pitch - 1) / S * S;  // the vectors that end here have pixels alone, but the first
            for (int64_t b = 0; b < axis.phases(); b++) {
                const int64_t lead = axis.lead[b], after = lead + axis.data[b];
                if (middle > S && (lead > S || after < middle)) return;
                ends[b] = Ends<A>(lead, axis.data[b], pitch, S);
            }
            copy = rows_in<T, A, S, STRIDE, PAIR>;
        });
    }
    void one_by_one(const T* from, A* to, int64_t plane) const {
        const int64_t step = element * axis.stride;
        for (int64_t b = 0; b < axis.phases(); b++, to += plane) {
            const int64_t lead = axis.lead[b], data = axis.data[b];
            zero(to, lead);
            if (pixels) copy_in(from + axis.first[b] * element, step, to + lead, data);
            zero(to + lead + data, pitch - lead - data);
        }
    }

   public:
    RowsIn(const Axis& axis, int64_t pitch, int64_t element, bool pixels, const T* begin, const T* end)
        : axis(axis), pitch(pitch), element(element), pixels(pixels), begin(begin), end(end),
          offset(axis.residue[0] - axis.padding), reach(axis.stride * pitch) {
        if (!pixels || element != 1) return;
        if (axis.stride == 1) in_vectors<1, false>();
        if (axis.stride == 2) axis.phases() == 2 ? in_vectors<2, true>() : in_vectors<2, false>();
    }
    // `from`: the first pixel of a row.
    void operator()(const T* from, int64_t from_step, A* to, int64_t to_step, int64_t plane, int64_t rows) const {
        if (copy) {  // all but the rows at the tensor's ends
            for (; rows > 0 && from - begin + offset < 0; rows--, from += from_step, to += to_step)
                one_by_one(from, to, plane);
            int64_t inside = rows;
            while (inside > 0 && end - from < (inside - 1) * from_step + offset + reach) inside--;
            copy(from + offset, from_step, to, to_step, plane, inside, pitch, ends);
            from += inside * from_step, to += inside * to_step, rows -= inside;
        }
        for (; rows > 0; rows--, from += from_step, to += to_step) one_by_one(from, to, plane);
    }
};

// ---------------------------------------------------------------------- rows of planes into a tensor

// Rows of `count` elements.
template <class T, class A, int S>
__attribute__((noinline)) void rows_out(const A* from, int64_t from_step, T* to, int64_t to_step, int64_t rows,
                                        int64_t count) {
    for (; rows > 0; rows--, from += from_step, to += to_step) copy_row<S>(from, to, count);
}
// Rows of `count` results to pixels that are `step` apart.
template <class T, class A>
INLINE void copy_rows(const A* from, int64_t from_step, T* to, int64_t to_step, int64_t rows, int64_t step, int64_t count) {
    if (step == 1 && with_part<A>(count, [&](auto lanes) {
            rows_out<T, A, lanes>(from, from_step, to, to_step, rows, count);
        }))
        return;
    for (; rows > 0; rows--, from += from_step, to += to_step) copy_out<T, A>(from, to, step, count);
}

// Rows of `count` elements: to[2 j] = even[j] and to[2 j + 1] = odd[j]; zero where there is none. Up to a vector behind
// them is read.
template <class T, class A, int S>
__attribute__((noinline)) void rows_woven(const A* even, const A* odd, int64_t from_step, T* to, int64_t to_step,
                                          int64_t rows, int64_t count) {
    constexpr auto lanes = std::make_index_sequence<S>{};
    const auto from_even = even ? ~part_mask<A, S>{} : part_mask<A, S>{};
    const auto from_odd = odd ? ~part_mask<A, S>{} : part_mask<A, S>{};
    if (even == nullptr) even = odd;
    if (odd == nullptr) odd = even;
    const int64_t last = count - S, half = last / 2;
    for (; rows > 0; rows--, even += from_step, odd += from_step, to += to_step) {
        for (int64_t j = 0; j < last; j += S)
            store_part<S>(to + j, in_turn<A, S>(masked<A, S>(load_part<S>(even + j / 2), from_even),
                                                masked<A, S>(load_part<S>(odd + j / 2), from_odd), lanes));
        if (last % 2 == 0)
            store_part<S>(to + last, in_turn<A, S>(masked<A, S>(load_part<S>(even + half), from_even),
                                                   masked<A, S>(load_part<S>(odd + half), from_odd), lanes));
        else
            store_part<S>(to + last, in_turn<A, S>(masked<A, S>(load_part<S>(odd + half), from_odd),
                                                   masked<A, S>(load_part<S>(even + half + 1), from_even), lanes));
    }
}
// The same into a tensor. Not both of even and odd are null.
template <class T, class A>
void weave(const A* even, const A* odd, int64_t from_step, T* to, int64_t to_step, int64_t rows, int64_t count) {
    if (with_part<A>(count, [&](auto lanes) { rows_woven<T, A, lanes>(even, odd, from_step, to, to_step, rows, count); }))
        return;
    for (; rows > 0; rows--, to += to_step) {
        for (int64_t j = 0; j < count; j++) {
            const A* const from = j % 2 ? odd : even;
            to[j] = from ? narrow<T>(from[j / 2]) : T{};
        }
        if (even) even += from_step;
        if (odd) odd += from_step;
    }
}

}  // namespace
