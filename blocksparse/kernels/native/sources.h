// Which pixel of its source each tap of a result reads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "lists.h"

namespace {

// Of one axis. fprop: output o reads input o * stride + tap * dilation - padding; dgrad, the other way round: input o is
// read by output (o + padding - tap * dilation) / stride.
struct Sources {
    struct Class {  // results that have the same taps
        std::vector<int64_t> results, taps;
    };
    int64_t results;
    std::vector<int64_t> of;  // [tap][result]: the source, or -1
    std::vector<Class> classes;

    Sources(bool backward, int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation)
        : results(backward ? in : out), of(kernel * results, -1) {
        const int64_t step = backward ? stride : 1;
        for (int64_t first = 0; first < std::min(step, results); first++) {
            Class some;
            for (int64_t o = first; o < results; o += step) some.results.push_back(o);
            for (int64_t tap = 0; tap < kernel; tap++) {
                if (backward && (first + padding - tap * dilation) % stride != 0) continue;
                some.taps.push_back(tap);
                for (const int64_t o : some.results) {
                    const int64_t at = backward ? o + padding - tap * dilation : o * stride + tap * dilation - padding;
                    const int64_t source = backward ? at / stride : at;
                    if (at >= 0 && source < (backward ? out : in)) of[tap * results + o] = source;
                }
            }
            classes.push_back(some);
        }
    }
};

// The results of a class of rows and a class of columns, numbered in the order of a tensor, and cut into units.
struct Pixels {
    const Sources *rows, *columns;
    const Sources::Class *of_rows, *of_columns;
    std::vector<int32_t> taps;
    int64_t count, units;

    static constexpr int64_t BUDGET = 1 << 18;  // bytes of sources, results and table of a unit
    static constexpr int64_t LEAST = 48;        // pixels of one

    Pixels(const Sources& rows, const Sources& columns, const Sources::Class& of_rows, const Sources::Class& of_columns,
           const Conv& g, int64_t item)
        : rows(&rows), columns(&columns), of_rows(&of_rows), of_columns(&of_columns),
          count(g.n * of_rows.results.size() * of_columns.results.size()) {
        for (const int64_t r : of_rows.taps)
            for (const int64_t s : of_columns.taps) taps.push_back(r * g.s + s);
        const int64_t of_pixel = item * (g.c + g.k) + int64_t(sizeof(void*) * (taps.size() + 1));  // and its table
        const int64_t most = std::max(LEAST, BUDGET / of_pixel);
        units = std::min(count, ((count + most - 1) / most + g.threads - 1) / g.threads * g.threads);
    }
    int64_t begin(int64_t unit) const { return part_begin(unit, units, count); }
    int64_t most() const { return units ? (count + units - 1) / units : 0; }  // pixels of a unit

    // For pixels [first, first + size): where each lies in the result, and at[tap][pixel], where its source does: in
    // `zeros` beyond the tensor.
    template <class A>
    void find(int64_t first, int64_t size, const Conv& g, const A* source, const int64_t* strides, const A* zeros,
              A* result, const int64_t* result_strides, const A** at, A** out) const {
        const int64_t width = of_columns->results.size(), height = of_rows->results.size();
        int64_t column = first % width, row = first / width % height, image = first / width / height;
        for (int64_t pixel = 0; pixel < size;) {  // as many as are left of a row
            const int64_t run = std::min(size - pixel, width - column), i = of_rows->results[row];
            const int64_t* const j = of_columns->results.data() + column;
            A* const of_row = result + image * result_strides[0] + i * result_strides[2];
            for (int64_t p = 0; p < run; p++) out[pixel + p] = of_row + j[p] * result_strides[3];
            for (size_t t = 0; t < taps.size(); t++) {
                const int64_t from_row = rows->of[taps[t] / g.s * rows->results + i];
                const int64_t* const from = columns->of.data() + taps[t] % g.s * columns->results;
                const A* const base = source + image * strides[0] + from_row * strides[2];
                const A** const to = at + t * size + pixel;
                for (int64_t p = 0; p < run; p++)
                    to[p] = from_row < 0 || from[j[p]] < 0 ? zeros : base + from[j[p]] * strides[3];
            }
            pixel += run;
            column = 0;
            if (++row == height) row = 0, image++;
        }
    }
};

}  // namespace
