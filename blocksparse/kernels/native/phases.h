// dx from the phases of its planes.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "copying.h"

namespace {

// dx of rows [first, first + rows) of the planes, the rows of a unit: from `runs`, of which each begins at column
// `left`, [channels][phases][channel]. Pixels of no phase are zero.
template <class T, class A>
void write_phases(const Conv& g, const Layout& lay, const A* runs, int64_t channel, int64_t channels, int64_t c0,
                  int64_t row, const Unit& u, int64_t left, T* dx) {
    const int64_t *const strides = g.x_strides, all = lay.phases * channel;
    const bool across = transposed(strides, channels, lay.pitch);
    const Axis &vertical = lay.vertical, &horizontal = lay.horizontal;
    const auto phase = [](const Axis& axis, int64_t residue) {
        return std::find(axis.residue.begin(), axis.residue.end(), residue) - axis.residue.begin();
    };
    // Row h of dx and where its pixels of column residue b come from: nullptr of no phase.
    const auto row_of = [&](int64_t i, int64_t a) { return (row + i) * g.stride[0] + a - g.padding[0]; };
    const auto rows_of = [&](int64_t a) {  // [first, end) of the rows of the unit that dx has
        int64_t i0 = 0, i1 = u.rows;
        while (i0 < i1 && row_of(i0, a) < 0) i0++;
        while (i0 < i1 && row_of(i1 - 1, a) >= g.h) i1--;
        return std::pair(i0, i1);
    };
    const auto source = [&](int64_t i, int64_t a, int64_t b) {
        const int64_t pa = phase(vertical, a), pb = phase(horizontal, b);
        const bool read = pa < vertical.phases() && pb < horizontal.phases();
        const int64_t at = (pa * horizontal.phases() + pb) * channel + i * lay.images * lay.pitch;
        return read ? runs + at - left * lay.pixel_step : nullptr;
    };
    const auto lead_of = [&](int64_t b) {
        return b < g.padding[1] ? (g.padding[1] - b + g.stride[1] - 1) / g.stride[1] : 0;
    };
    if (lay.batch_last) {
        const auto copy = [](const A* from, T* to, int64_t count) { copy_out(from, to, 1, count); };
        const auto clear = [](const A*, T* to, int64_t count) { std::memset(to, 0, sizeof(T) * count); };
        for (int64_t c = 0; c < channels; c++)
            for (int64_t i = 0; i < u.rows; i++)
                for (int64_t a = 0; a < g.stride[0]; a++)
                    for (int64_t b = 0; b < g.stride[1]; b++) {
                        const int64_t h = row_of(i, a), lead = lead_of(b), first = lead * g.stride[1] + b - g.padding[1];
                        if (h < 0 || h >= g.h || first >= g.w) continue;
                        const int64_t data = (g.w - 1 - first) / g.stride[1] + 1, step = strides[3] * g.stride[1];
                        const A* const from = source(i, a, b);
                        T* const to = dx + u.image * strides[0] + (c0 + c) * strides[1] + h * strides[2] + first * strides[3];
                        if (from == nullptr)
                            copy_pixels<false>(runs, step, to, step, u.images, data, clear);
                        else
                            copy_pixels<false>(from + c * all + lead * lay.images, lay.images, to, step, u.images, data,
                                               copy);
                    }
        return;
    }
    if (!across && strides[3] == 1 && g.stride[1] == 2) {  // columns in turn from one phase and the other
        const int64_t b = g.padding[1] % 2;
        for (int64_t a = 0; a < g.stride[0]; a++) {
            const A *even = source(0, a, b), *odd = source(0, a, 1 - b);
            if (even) even += g.padding[1] / 2;
            if (odd) odd += (g.padding[1] + 1) / 2;
            const auto [i0, i1] = rows_of(a);
            const int64_t step = lay.images * lay.pitch, to_step = g.stride[0] * strides[2];
            for (int64_t m = 0; m < u.images; m++)
                for (int64_t c = 0; c < channels; c++) {
                    T* to = dx + (u.image + m) * strides[0] + (c0 + c) * strides[1] + row_of(i0, a) * strides[2];
                    const int64_t at = c * all + i0 * step + m * lay.pitch;
                    if (even || odd)
                        weave<T, A>(even ? even + at : nullptr, odd ? odd + at : nullptr, step, to, to_step, i1 - i0, g.w);
                    else
                        for (int64_t i = i0; i < i1; i++, to += to_step) std::memset(to, 0, sizeof(T) * g.w);
                }
        }
        return;
    }
    const int64_t row_step = lay.images * lay.pitch, step = strides[3] * g.stride[1];
    for (int64_t a = 0; a < g.stride[0]; a++)
        for (int64_t b = 0; b < g.stride[1]; b++) {
            const int64_t lead = lead_of(b), first = lead * g.stride[1] + b - g.padding[1];
            const int64_t data = first < g.w ? (g.w - 1 - first) / g.stride[1] + 1 : 0;
            const auto [i0, i1] = rows_of(a);
            const A* const from = source(i0, a, b);
            T* const to = dx + u.image * strides[0] + c0 * strides[1] + row_of(i0, a) * strides[2] + first * strides[3];
            const int64_t to_step = g.stride[0] * strides[2];
            if (from != nullptr && !across) {
                for (int64_t m = 0; m < u.images; m++)
                    for (int64_t c = 0; c < channels; c++)
                        copy_rows(from + lead + c * all + m * lay.pitch, row_step, to + m * strides[0] + c * strides[1],
                                  to_step, i1 - i0, step, data);
                continue;
            }
            for (int64_t i = 0; i < i1 - i0; i++)
                if (from != nullptr && lay.pitch == 1)  // an image has one pixel: images take the place of pixels
                    transpose_out<T, A>(from + lead + i * row_step, all, channels, nullptr, data * u.images, to + i * to_step,
                                        strides[0]);
                else
                    for (int64_t m = 0; m < u.images; m++) {
                        T* const pixels = to + i * to_step + m * strides[0];
                        if (from != nullptr)
                            transpose_out<T, A>(from + lead + m * lay.pitch + i * row_step, all, channels, nullptr, data,
                                                pixels, step);
                        else
                            for (int64_t c = 0; c < (across ? 1 : channels); c++)
                                for (int64_t j = 0; j < data; j++)
                                    std::memset(pixels + c * strides[1] + j * step, 0, sizeof(T) * (across ? channels : 1));
                    }
        }
}

}  // namespace
