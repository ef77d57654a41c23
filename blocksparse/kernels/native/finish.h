// What follows a convolution: a residual and a ReLU.

#pragma once

#include <cstdint>
#include <limits>

#include "numbers.h"
#include "planes.h"

namespace {

// What follows a convolution, on outputs that have just been written: y = y + residual, then y = max(y, 0), each rounded
// as an operator of its own would. The residual has y's strides.
template <class T> struct Epilogue {
    const T* residual;
    bool relu;
    bool nothing() const { return residual == nullptr && !relu; }
};
template <class T>
void finish_row(T* y, const T* residual, bool relu, int64_t step, int64_t count) {
    using A = wide<T>;
    int64_t j = 0;
    for (; step == 1 && j + LANES<A> <= count; j += LANES<A>) {
        vec<A> v = load_wide(y + j);
        if (residual) v += load_wide(residual + j);
        if (relu) v = v < 0 ? vec<A>{} : v;
        store_narrow(y + j, v);
    }
    const A least = relu ? A(0) : -std::numeric_limits<A>::infinity();  // NaN stays
    for (; j < count; j++) {
        A v = widen(y[j * step]);
        if (residual) v = widen(narrow<T>(v + widen(residual[j * step])));
        y[j * step] = narrow<T>(v < least ? least : v);
    }
}
template <class T>
void finish(T* y, const Epilogue<T>& last, const int64_t* strides, const Unit& u, int64_t width, int64_t first,
            int64_t channels, const int32_t* order) {
    if (last.nothing()) return;
    if (strides[1] == 1 && order != nullptr) {  // filters lie together, in another order
        for (int64_t m = 0; m < u.images; m++)
            for (int64_t i = 0; i < u.rows * width; i++) {
                const int64_t at = (u.image + m) * strides[0] + (u.row + i / width) * strides[2] + i % width * strides[3];
                for (int64_t j = 0; j < channels; j++) {
                    const int64_t c = at + order[first + j];
                    finish_row(y + c, last.residual ? last.residual + c : nullptr, last.relu, 1, 1);
                }
            }
        return;
    }
    if (strides[0] == 1 && (u.images > 1 || strides[3] > 1)) {  // images lie together
        const bool joined = strides[3] == u.images;
        for (int64_t j = 0; j < channels; j++)
            for (int64_t i = 0; i < u.rows * (joined ? 1 : width); i++) {
                const int64_t at = u.image + (order ? order[first + j] : first + j) * strides[1] +
                                   (joined ? (u.row + i) * strides[2]
                                           : (u.row + i / width) * strides[2] + i % width * strides[3]);
                finish_row(y + at, last.residual ? last.residual + at : nullptr, last.relu, 1,
                           u.images * (joined ? width : 1));
            }
        return;
    }
    const bool across = strides[1] == 1;
    const bool joined = !across && strides[2] == width * strides[3];  // rows follow each other
    const int64_t rows = joined ? 1 : u.rows;
    if (joined) width *= u.rows;
    for (int64_t m = 0; m < u.images; m++)
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < (across ? width : channels); j++) {
                const int64_t c = across ? first : order ? order[first + j] : first + j;
                const int64_t at = (u.image + m) * strides[0] + c * strides[1] + (u.row + i) * strides[2] +
                                   (across ? j * strides[3] : 0);
                finish_row(y + at, last.residual ? last.residual + at : nullptr, last.relu, across ? 1 : strides[3],
                           across ? channels : width);
            }
}

}  // namespace
