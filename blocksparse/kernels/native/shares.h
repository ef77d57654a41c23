// The units of a weight gradient are added up in shares, and these in one order.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "copying.h"
#include "lists.h"

namespace {

// How many shares the sizes alone decide, so that every number of threads adds alike.
struct Shares {
    int64_t weights, units, count, parts;  // parts: of the block-rows

    static constexpr int64_t BYTES = 4 << 20;           // of all shares, if there are more than two
    static constexpr int64_t MOST = 16;
    static constexpr int64_t TOGETHER = int64_t(1) << 12;  // sums that stay in the first cache

    Shares(const Conv& g, int64_t units, int64_t item) : weights(g.nnzb * g.bk * g.bc), units(units) {
        const int64_t room = std::max<int64_t>(2, BYTES / std::max<int64_t>(1, weights * item));
        count = std::max<int64_t>(1, std::min({units, room, MOST}));
        parts = parts_of(count, g.threads, g.k / g.bk);
    }
    // By every thread of a team: body(unit, b0, b1, sum) adds what a unit gives block-rows [b0, b1). The first share, of
    // [count][weights] in `sums`, ends as their total.
    template <class A, class Body> void add_up(const Conv& g, const Index& index, A* sums, Body body) const {
        const int64_t rows = g.k / g.bk, size_of_block = g.bk * g.bc;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < count * parts; task++) {
            const int64_t share = task / parts, part = task % parts;
            const int64_t b0 = part_begin(part, parts, rows), b1 = part_begin(part + 1, parts, rows);
            A* const sum = sums + share * weights;
            const int64_t first = index.indptr[b0] * size_of_block;
            std::memset(sum + first, 0, sizeof(A) * (index.indptr[b1] * size_of_block - first));
            for (int64_t unit = part_begin(share, count, units); unit < part_begin(share + 1, count, units); unit++)
                body(unit, b0, b1, sum);
        }
#pragma omp for schedule(static)
        for (int64_t at = 0; at < weights; at += TOGETHER)
            for (int64_t share = 1; share < count; share++)
                add(sums + share * weights + at, sums + at, std::min(TOGETHER, weights - at));
    }
};

}  // namespace
