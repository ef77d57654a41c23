// The pixels of a 1x1 convolution as rows that are whole vectors.

#pragma once

#include <algorithm>
#include <cstdint>

#include "call.h"

namespace {

bool pointwise(const Conv& g) {
    return g.r == 1 && g.s == 1 && g.stride[0] == 1 && g.stride[1] == 1 && g.padding[0] == 0 && g.padding[1] == 0;
}

// Whether the pixels of an image follow each other in memory.
bool follow(const Conv& g, const int64_t* strides) { return strides[3] == 1 && strides[2] == g.w; }

// The same convolution of one image in channels_last, or of images whose rows are a vector long: units begin at one. An
// axis of one element has any stride; that of the next one is made to fit.
Conv joined(const Conv& g, int64_t item, int64_t lanes) {
    constexpr int64_t ROW_BYTES = 1 << 19, LONG = 512;  // of a row of both tensors; pixels of one that are enough
    const int64_t pixels = g.n * g.h * g.w, image = g.h * g.w;
    if (!pointwise(g) || g.batch_last || pixels == 0) return g;
    Conv one = g;
    if (follow(g, g.x_strides) && follow(g, g.y_strides)) {  // an image's pixels: rows of one vector
        if (image % lanes != 0) return g;
        one.h = one.p = image / lanes;
        one.w = one.q = lanes;
        one.x_strides[2] = one.y_strides[2] = lanes;
        return one;
    }
    int64_t steps[2];  // from a pixel to the next one, in x and in y
    for (int64_t i = 0; i < 2; i++) {
        const int64_t *const strides = i ? g.y_strides : g.x_strides, sizes[] = {g.n, 0, g.h, g.w};
        int64_t step = 0, count = 1;
        for (const int64_t axis : {3, 2, 0}) {
            if (sizes[axis] == 1) continue;
            if (step == 0) step = strides[axis];
            if (strides[axis] != step * count) return g;
            count *= sizes[axis];
        }
        steps[i] = step;
        if (strides[1] != 1 || (step < (i ? g.k : g.c) && pixels > 1)) return g;
    }
    const auto whole = [&](int64_t width) { return double(width) / ((width + lanes - 1) / lanes * lanes); };
    const int64_t most = std::max(4 * lanes, std::min(LONG, ROW_BYTES / (item * (g.c + g.k))));
    int64_t width = g.w;
    for (int64_t some = std::min(most, pixels); some > 0 && (width > most || whole(width) < 1); some--)
        if (pixels % some == 0 && (width > most || whole(some) > whole(width))) width = some;
    one.n = 1;
    one.h = one.p = pixels / width;
    one.w = one.q = width;
    for (int64_t i = 0; i < 2; i++) {
        int64_t* const strides = i ? one.y_strides : one.x_strides;
        strides[0] = pixels * steps[i];
        strides[2] = width * steps[i];
        strides[3] = steps[i];
    }
    return one;
}

}  // namespace
