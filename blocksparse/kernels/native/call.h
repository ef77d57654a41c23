// What the caller passes. cpu.py has the same structure.

#pragma once

#include <cstdint>

extern "C" struct Conv {  // sizes and strides in elements; x is [N, C, H, W], y [N, K, P, Q], any strides
    int64_t n, c, h, w, k, p, q, r, s;
    int64_t stride[2], padding[2], dilation[2];
    int64_t bk, bc, nnzb;
    int64_t x_strides[4], y_strides[4];
    int64_t threads, batch_last;  // whether images are innermost in x and y
    int64_t indptr, indices, t_indptr, t_indices, t_perm, row_order;  // where in the packed index; no row_order: -1
};

namespace {

struct Index {  // as BSRPattern packs it
    const int32_t *indptr, *indices, *t_indptr, *t_indices, *t_perm, *order;

    Index(const Conv& g, const int32_t* packed)
        : indptr(packed + g.indptr), indices(packed + g.indices), t_indptr(packed + g.t_indptr),
          t_indices(packed + g.t_indices), t_perm(packed + g.t_perm),
          order(g.row_order < 0 ? nullptr : packed + g.row_order) {}
};

}  // namespace
