// Where each pixel of an image lies in its planes, and how a convolution is cut into units.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "call.h"
#include "joined.h"

namespace {

struct Axis {  // rows or columns of the planes
    int64_t reach = 0, length = 0;            // furthest tap; what a row needs
    int64_t size, stride, padding;            // size: of the tensor
    std::vector<int64_t> phase_of, shift;     // of each tap
    std::vector<int64_t> residue, lead, first, data;  // of each phase: zeros before, first pixel read, pixels

    Axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation)
        : size(in), stride(stride), padding(padding) {
        for (int64_t tap = 0; tap < kernel; tap++) {
            const int64_t at = tap * dilation, b = at % stride;
            size_t phase = std::find(residue.begin(), residue.end(), b) - residue.begin();
            if (phase == residue.size()) {
                residue.push_back(b);
                lead.push_back(b < padding ? (padding - b + stride - 1) / stride : 0);
                first.push_back(lead.back() * stride + b - padding);
                data.push_back(first.back() < in ? (in - 1 - first.back()) / stride + 1 : 0);
            }
            phase_of.push_back(phase);
            shift.push_back(at / stride);
            reach = std::max(reach, at / stride);
            length = std::max({length, out, lead[phase] + data[phase], out + at / stride - lead[phase]});
        }
    }
    int64_t phases() const { return residue.size(); }
};

struct Unit {  // some images, or some rows of one
    int64_t image, images, row, rows;
};

// How a convolution is cut. `to` and `from` are the channels written and read.
struct Layout {
    Axis vertical, horizontal;
    int64_t pitch, images, rows, units_per_image, units;
    int64_t phases, plane, channel;  // x: a plane, the planes of a channel
    int64_t out_rows;                // rows of outputs that are cut into units
    int64_t image_step, pixel_step;  // within a row of a plane: images side by side, or innermost
    int64_t together;                // rows of a unit that all block-rows take before the next ones

    static constexpr int64_t BUDGET = 1 << 19;    // bytes of planes and results of a unit: half of a core's cache
    static constexpr int64_t ACROSS = 1 << 18;    // of a 1x1 kernel in channels_last: few items read what is copied across
    static constexpr int64_t COPIED = 1 << 20;    // of one that is copied as it lies, at least: small images, short runs
    static constexpr int64_t FAR = 4;             // budgets that the next cache holds
    static constexpr int64_t RUN = 448;           // pixels of a run that are enough

    bool in_place;                   // the tensors are planes as they stand
    bool batch_last;

    Layout(const Conv& g, int64_t item, int64_t lanes, int64_t all_rows, bool in_place, int64_t budget = BUDGET)
        : vertical(g.h, g.p, g.r, g.stride[0], g.padding[0], g.dilation[0]),
          horizontal(g.w, g.q, g.s, g.stride[1], g.padding[1], g.dilation[1]),
          in_place(in_place), batch_last(g.batch_last != 0) {
        if (pointwise(g) && !in_place && !batch_last)
            budget = g.x_strides[1] == 1 && g.c > 1 ? ACROSS : std::max(budget, COPIED);
        out_rows = all_rows;
        pitch = std::max(horizontal.length, (g.w - 1 + g.padding[1]) / g.stride[1] + 1);
        phases = vertical.phases() * horizontal.phases();
        const int64_t row = item * pitch * (g.c * phases + g.k);
        const int64_t image = row * out_rows + item * pitch * g.c * phases * vertical.reach;
        const int64_t enough = in_place ? 1 : (RUN + pitch * out_rows - 1) / (pitch * out_rows);
        images = std::max<int64_t>(1, std::min({g.n, budget / image, enough}));
        if (batch_last) {  // in place all of them; else whole vectors: to copy pieces of one takes four times as long
            const int64_t some = std::max(lanes, budget / image / lanes * lanes);
            images = in_place ? g.n : std::min(g.n, some);
        } else {
            images = (g.n + (g.n + images - 1) / images - 1) / ((g.n + images - 1) / images);  // alike in every unit
        }
        image_step = batch_last ? 1 : pitch;
        pixel_step = batch_last ? images : 1;
        units_per_image = 1;
        // Rows of batch_last are long. A unit holds more than the cache of a core, of which a window of rows at a time.
        const int64_t side = batch_last ? images : 1, room = batch_last && !in_place ? FAR * budget : budget;
        const int64_t least = (RUN / 2 + pitch * side - 1) / (pitch * side);
        if (image * side > room) {
            const int64_t fit = std::max(room / (row * side) - vertical.reach, least);
            units_per_image = (out_rows + fit - 1) / fit;
        }
        const bool windowed = batch_last && !in_place;
        const int64_t even = lanes / std::gcd(lanes, images * pitch);  // rows that are whole vectors
        together = windowed ? (std::max(budget / (row * side) - vertical.reach, least) + even - 1) / even * even
                            : std::numeric_limits<int64_t>::max();
        rows = (out_rows + units_per_image - 1) / units_per_image;
        units = (g.n + images - 1) / images * units_per_image;
        plane = plane_of(rows + vertical.reach, lanes);
        channel = in_place ? g.x_strides[1] : plane * phases;
    }

    // Elements of a plane of so many rows: reads beyond the last row, and an odd number of cache lines.
    int64_t plane_of(int64_t plane_rows, int64_t lanes) const {
        const int64_t cells = plane_rows * images * pitch + horizontal.reach * pixel_step + lanes;
        return (cells + 15) / 16 * 16 + ((cells + 15) / 16 % 2 ? 0 : 16);
    }
    Unit unit(int64_t i, int64_t n) const {
        // Units of batch_last that follow each other share lines of memory: their images are neighbours.
        const int64_t chunks = units / units_per_image;
        const int64_t image = (batch_last ? i % chunks : i / units_per_image) * images;
        const int64_t j = batch_last ? i / chunks : i % units_per_image;
        const int64_t row = out_rows * j / units_per_image, end = out_rows * (j + 1) / units_per_image;
        return {image, std::min(images, n - image), row, end - row};
    }
    // Calls body(rows of a unit, how far into its planes they begin, their run) for rows that stay in a core's cache
    // together. A run that is not the last is whole vectors: what follows it is no zeros but the next one.
    template <class Body> void windows(const Unit& u, int64_t width, Body body) const {
        for (int64_t row = 0; row < u.rows; row += together) {
            const bool all = u.rows - row <= together;
            const Unit some{u.image, u.images, u.row + row, all ? u.rows - row : together};
            body(some, row * images * pitch, all ? run(some.rows, some.images, width) : some.rows * images * pitch);
            if (all) break;
        }
    }
    int64_t run(int64_t of_rows, int64_t of_images, int64_t width) const {
        return (of_rows - 1) * images * pitch + (of_images - 1) * image_step + (width - 1) * pixel_step + 1;
    }
    // How far the furthest tap lies from the nearest in a plane.
    int64_t reach() const { return vertical.reach * images * pitch + horizontal.reach * pixel_step; }
    int64_t phase(const Conv& g, int64_t tap) const {
        return vertical.phase_of[tap / g.s] * horizontal.phases() + horizontal.phase_of[tap % g.s];
    }
    int64_t tap(const Conv& g, int64_t tap) const {  // offset of a tap within the planes of a channel
        const int64_t r = tap / g.s, s = tap % g.s;
        return phase(g, tap) * plane + vertical.shift[r] * images * pitch + horizontal.shift[s] * pixel_step;
    }
};

}  // namespace
