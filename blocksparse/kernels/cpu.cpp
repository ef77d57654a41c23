// fprop, dgrad and wgrad on a CPU: loops over stored weights as offsets into planes of an image.
//
// An image is copied into planes, one for each channel and residue of the stride. Zeros separate its rows, so that a tap
// of a channel is one constant offset and a whole image one run of pixels:
//
//     position of padded pixel (i, j) of image m in a plane:  (i * images + m) * pitch + j
//
// Rows of several small images interleave. The pixels between two rows of an output are computed and dropped. `pitch`
// leaves as many zeros as the widest tap needs; the zeros right of a row are those left of the next one.
//
//     fprop    out[f][l]  = sum over items of w[item][f] * x[item + l]        registers hold F filters x V vectors
//     dgrad    the same on dy, over the transposed index; or, where blocks have few channels, each block-row adds
//              w[item][f] * dy[f][l] to dx[item + l] from F x V vectors of dy in registers
//     wgrad    dv[item][f] = sum over l of dy[f][l] * x[item + l]             F filters x I items of dot products
//
// A task is some images, or some rows of one, times some block-rows; tasks share nothing, and every sum has one order,
// so that results are the same bits for any number of threads. Nothing is kept between calls but scratch memory.
// A NaN or infinity in x may show in the weight gradient at other taps of its channel, too: it meets the dropped pixels.
//
// Vectors are GCC's and Clang's; their length and the size of a tile follow from the target.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define REGISTERS 32
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#define REGISTERS 16
#elif defined(__aarch64__)
#define VECTOR_BYTES 16
#define REGISTERS 32
#else
#define VECTOR_BYTES 16
#define REGISTERS 16
#endif

// Keeps a vector in a register, where a compiler would read it from memory again for every product.
#if defined(__x86_64__)
#define HOLD(v) __asm__ volatile("" : "+v"(v))
#elif defined(__aarch64__)
#define HOLD(v) __asm__ volatile("" : "+w"(v))
#else
#define HOLD(v)
#endif

// Tiles live in registers: their loops disappear, whatever the level of optimisation.
#define UNROLL _Pragma("GCC unroll 64")
#define INLINE inline __attribute__((always_inline))

namespace {

// ---------------------------------------------------------------------- numbers

template <class A> struct Vector;
template <> struct Vector<float> {
    typedef float type __attribute__((vector_size(VECTOR_BYTES)));
    typedef float anywhere __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
    typedef int32_t indices __attribute__((vector_size(VECTOR_BYTES)));
};
template <> struct Vector<double> {
    typedef double type __attribute__((vector_size(VECTOR_BYTES)));
    typedef double anywhere __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
    typedef int64_t indices __attribute__((vector_size(VECTOR_BYTES)));
};
template <class A> using vec = typename Vector<A>::type;
template <class A> constexpr int LANES = VECTOR_BYTES / sizeof(A);

template <class A> INLINE vec<A> load(const A* p) { return *(const typename Vector<A>::anywhere*)p; }
template <class A> INLINE void store(A* p, vec<A> v) { *(typename Vector<A>::anywhere*)p = v; }

// Lane J of the result is lane LANE, an expression of J, of a followed by b.
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(A, a, b, LANE) __builtin_shufflevector(a, b, int(LANE)...)
#else
#define SHUFFLE(A, a, b, LANE) __builtin_shuffle(a, b, typename Vector<A>::indices{int(LANE)...})
#endif

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

INLINE float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
INLINE uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

INLINE float widen(float v) { return v; }
INLINE double widen(double v) { return v; }
INLINE float widen(bfloat16 v) { return bits_to_float(uint32_t(v.bits) << 16); }
INLINE float widen(float16 v) {
    // The exponent moves from bias 15 to 127 by a product that also normalises; infinity and NaN keep theirs.
    const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, rest = uint32_t(v.bits & 0x7fff) << 13;
    const float scaled = bits_to_float(rest) * bits_to_float(0x77800000);  // 2^112
    const uint32_t infinite = (v.bits & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
    return bits_to_float(float_to_bits(scaled) | sign | infinite);
}

template <class T> INLINE T narrow(typename std::conditional<std::is_same<T, double>::value, double, float>::type v);
template <> INLINE float narrow<float>(float v) { return v; }
template <> INLINE double narrow<double>(double v) { return v; }
template <> INLINE bfloat16 narrow<bfloat16>(float v) {
    const uint32_t bits = float_to_bits(v);
    if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t((bits >> 16) | 0x40)};  // NaN stays one
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};                 // to nearest, ties to even
}
template <> INLINE float16 narrow<float16>(float v) {
    const uint32_t bits = float_to_bits(v), sign = (bits >> 16) & 0x8000;
    const uint32_t size = bits & 0x7fffffff;
    if (size > 0x7f800000) return {uint16_t(sign | 0x7e00)};                       // NaN
    if (size >= 0x477ff000) return {uint16_t(sign | 0x7c00)};                      // rounds to infinity
    if (size < 0x38800000) {                                                       // subnormal: the sum rounds
        const float rounded = bits_to_float(size) + 0.5f;
        return {uint16_t(sign | (float_to_bits(rounded) - 0x3f000000))};
    }
    return {uint16_t(sign | ((size - 0x38000000 + 0x0fff + ((size >> 13) & 1)) >> 13))};
}

template <class T> using wide = typename std::conditional<std::is_same<T, double>::value, double, float>::type;

}  // namespace

// ---------------------------------------------------------------------- what the caller passes

extern "C" struct Conv {  // sizes and strides in elements; x is [N, C, H, W], y [N, K, P, Q], any strides
    int64_t n, c, h, w, k, p, q, r, s;
    int64_t stride[2], padding[2], dilation[2];
    int64_t bk, bc, nnzb;
    int64_t x_strides[4], y_strides[4];
    int64_t threads;
    int64_t indptr, indices, t_indptr, t_indices, t_perm, row_order;  // where in the packed index; no row_order: -1
};

namespace {

// ---------------------------------------------------------------------- planes

struct Axis {  // rows or columns of the planes
    int64_t reach = 0, length = 0;            // furthest tap; what a row needs
    int64_t stride, padding;
    std::vector<int64_t> phase_of, shift;     // of each tap
    std::vector<int64_t> residue, lead, first, data;  // of each phase: zeros before, first pixel read, pixels

    Axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation)
        : stride(stride), padding(padding) {
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

    static constexpr int64_t BUDGET = 1 << 20;    // bytes of planes and results of a unit: they stay in a core's cache
    static constexpr int64_t RUN = 448;           // pixels of a run that are enough

    bool in_place;                   // the tensors are planes as they stand

    Layout(const Conv& g, int64_t item, int64_t lanes, int64_t all_rows, bool in_place, int64_t budget = BUDGET)
        : vertical(g.h, g.p, g.r, g.stride[0], g.padding[0], g.dilation[0]),
          horizontal(g.w, g.q, g.s, g.stride[1], g.padding[1], g.dilation[1]),
          in_place(in_place) {
        out_rows = all_rows;
        pitch = std::max(horizontal.length, (g.w - 1 + g.padding[1]) / g.stride[1] + 1);
        phases = vertical.phases() * horizontal.phases();
        const int64_t row = item * pitch * (g.c * phases + g.k);
        const int64_t image = row * out_rows + item * pitch * g.c * phases * vertical.reach;
        const int64_t enough = in_place ? 1 : (RUN + pitch * out_rows - 1) / (pitch * out_rows);
        images = std::max<int64_t>(1, std::min({g.n, budget / image, enough}));
        images = (g.n + (g.n + images - 1) / images - 1) / ((g.n + images - 1) / images);  // alike in every unit
        units_per_image = 1;
        if (image > budget) {
            const int64_t fit = std::max(budget / row - vertical.reach, (RUN / 2 + pitch - 1) / pitch);
            units_per_image = (out_rows + fit - 1) / fit;
        }
        rows = (out_rows + units_per_image - 1) / units_per_image;
        units = (g.n + images - 1) / images * units_per_image;
        plane = plane_of(rows + vertical.reach, lanes);
        channel = in_place ? g.x_strides[1] : plane * phases;
    }

    // Elements of a plane of so many rows: reads beyond the last row, and an odd number of cache lines.
    int64_t plane_of(int64_t plane_rows, int64_t lanes) const {
        const int64_t cells = plane_rows * images * pitch + horizontal.reach + lanes;
        return (cells + 15) / 16 * 16 + ((cells + 15) / 16 % 2 ? 0 : 16);
    }
    Unit unit(int64_t i, int64_t n) const {
        const int64_t image = i / units_per_image * images, j = i % units_per_image;
        const int64_t row = out_rows * j / units_per_image, end = out_rows * (j + 1) / units_per_image;
        return {image, std::min(images, n - image), row, end - row};
    }
    int64_t run(int64_t of_rows, int64_t of_images, int64_t width) const {
        return ((of_rows - 1) * images + of_images - 1) * pitch + width;
    }
    int64_t tap(const Conv& g, int64_t tap) const {  // offset of a tap within the planes of a channel
        const int64_t r = tap / g.s, s = tap % g.s;
        const int64_t phase = vertical.phase_of[r] * horizontal.phases() + horizontal.phase_of[s];
        return phase * plane + vertical.shift[r] * images * pitch + horizontal.shift[s];
    }
};

// ---------------------------------------------------------------------- scratch memory

// One piece of memory for a call, all its threads. A thread that calls keeps a small one for its next call: new pages
// cost more than many a convolution.
class Scratch {
    struct Kept {
        void* data = nullptr;
        size_t bytes = 0;
        bool lent = false;
        ~Kept() { std::free(data); }
    };
    static Kept& kept() {
        static thread_local Kept memory;
        return memory;
    }
    static constexpr size_t MOST_KEPT = size_t(64) << 20;
    char* data = nullptr;
    size_t used = 0;
    bool own = false;

   public:
    template <class E> size_t add(int64_t count) {  // room for so many elements, before `make`
        const size_t at = used;
        used += (size_t(count) * sizeof(E) + 127) / 64 * 64;
        return at;
    }
    void make() {
        Kept& memory = kept();
        used = (used + 4095) / 4096 * 4096;
        own = used > MOST_KEPT || memory.lent;
        if (own || memory.bytes < used) {
            if (!own) {
                std::free(memory.data);
                memory.data = nullptr;
                memory.bytes = 0;
            }
            data = (char*)std::aligned_alloc(4096, std::max<size_t>(used, 4096));
            if (data == nullptr) throw std::bad_alloc();
            if (!own) memory.data = data, memory.bytes = used;
        }
        data = own ? data : (char*)memory.data;
#ifdef POISON  // what is read before it is written shows
        std::memset(data, 0xff, used);
#endif
        memory.lent = memory.lent || !own;
    }
    template <class E> E* at(size_t offset) const { return (E*)(data + offset); }
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    ~Scratch() {
        if (own)
            std::free(data);
        else if (data != nullptr)
            kept().lent = false;
    }
};

// ---------------------------------------------------------------------- copying in and out

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
template <class A, size_t... J> INLINE vec<A> every_second(vec<A> a, vec<A> b, std::index_sequence<J...>) {
    return SHUFFLE(A, a, b, 2 * J);
}
template <> INLINE void copy_in<float, float>(const float* from, int64_t step, float* to, int64_t count) {
    constexpr int L = LANES<float>;
    if (step != 1) {
        int64_t j = 0;
        for (; step == 2 && j + L < count; j += L)
            store(to + j, every_second<float>(load(from + 2 * j), load(from + 2 * j + L), std::make_index_sequence<L>{}));
        for (; j < count; j++) to[j] = from[j * step];
    } else if (count >= L) {
        for (int64_t j = 0; j + L <= count; j += L) store(to + j, load(from + j));
        store(to + count - L, load(from + count - L));
    } else if (!(copy_ends<32>(from, to, count) || copy_ends<16>(from, to, count) || copy_ends<8>(from, to, count))) {
        if (count) to[0] = from[0];
    }
}
template <class A> INLINE void add(const A* from, A* to, int64_t count) {
    int64_t j = 0;
    for (; j + LANES<A> <= count; j += LANES<A>) store(to + j, load(to + j) + load(from + j));
    for (; j < count; j++) to[j] += from[j];
}
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

// Rows [begin, begin + rows) of the planes of channels [c0, c1) of a tensor, for the images of a unit. Row i of phase a
// holds the pixels of input row i * stride + residue - padding. `front` zeros come before the first. Channel c goes to
// the planes of number place[c], or c - c0.
template <class T, class A>
void fill(const T* x, const int64_t* strides, int64_t height, const Axis& vertical, const Axis& horizontal,
          int64_t begin, int64_t rows, const Unit& u, const Layout& lay, int64_t plane, int64_t front, int64_t c0,
          int64_t c1, const int32_t* place, A* to) {
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
            for (int64_t i = 0; across && i < rows; i++) {
                const int64_t h = row_of(i);
                if (h < 0 || h >= height) continue;
                const T* const from = image + h * strides[2] + c0;
                if (pitch == 1)  // an image has one pixel: images take the place of pixels
                    transpose_in(from, strides[0], data * u.images, c1 - c0, planes + i * images, channel, place);
                else
                    for (int64_t m = 0; m < u.images; m++)
                        transpose_in(from + m * strides[0], step, data, c1 - c0,
                                     planes + (i * images + m) * pitch + lead, channel, place);
            }
            for (int64_t c = c0; c < c1; c++) {
                A* row = planes + (place ? place[c] : c - c0) * channel;
                zero(row - front, front);
                for (int64_t i = 0; i < rows; i++) {
                    const int64_t h = row_of(i);
                    if (h < 0 || h >= height) {
                        zero(row, images * pitch);
                        row += images * pitch;
                        continue;
                    }
                    const T* const from = image + h * strides[2] + c * strides[1];
                    for (int64_t m = 0; m < u.images; m++, row += pitch) {
                        zero(row, lead);
                        if (!across) {
                            const T* const next = from + m * strides[0] + strides[1];
                            for (int64_t j = 0; j < data * step; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(next + j);
                            copy_in(from + m * strides[0], step, row + lead, data);
                        }
                        zero(row + lead + data, pitch - lead - data);
                    }
                    zero(row, (images - u.images) * pitch);
                    row += (images - u.images) * pitch;
                }
                zero(row, plane - front - rows * images * pitch);
            }
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
           int64_t images, int64_t pitch, int64_t width, T* y, const int64_t* strides) {
    const bool across = transposed(strides, channels, pitch);
    const int32_t* const map = order == nullptr ? nullptr : order + first;
    T* const base = across && map == nullptr ? y + first : y;
    if (across && pitch == 1) {
        for (int64_t i = 0; i < u.rows; i++)
            transpose_out(runs + i * images, channel, channels, map, u.images,
                          base + u.image * strides[0] + (u.row + i) * strides[2], strides[0]);
        return;
    }
    for (int64_t c = 0; c < (across ? 1 : channels); c++)
        for (int64_t i = 0; i < u.rows; i++)
            for (int64_t m = 0; m < u.images; m++) {
                T* const to = base + (u.image + m) * strides[0] + (u.row + i) * strides[2];
                const A* const from = runs + (i * images + m) * pitch;
                if (across)
                    transpose_out(from, channel, channels, map, width, to, strides[3]);
                else
                    copy_out(from + c * channel, to + (map ? map[c] : first + c) * strides[1], strides[3], width);
            }
}

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
    if constexpr (std::is_same<T, A>::value)
        for (; step == 1 && j + LANES<A> <= count; j += LANES<A>) {
            vec<A> v = load(y + j);
            if (residual) v += load(residual + j);
            if (relu) v = v < 0 ? vec<A>{} : v;
            store(y + j, v);
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

// ---------------------------------------------------------------------- tiles of registers

// Items whose products are added up by themselves: sums of sums round less than one long sum.
constexpr int64_t PARTIAL = 64;

// out[f][l] = start[f] + sum over items of w[item][f] * x[item + l], for F filters and V vectors of pixels.
template <class A, int F, int V>
void gather_tile(const A* x, const int32_t* items, const A* w, int64_t n, int64_t bk, const A* start, A* out,
                 int64_t channel) {
    constexpr int L = LANES<A>;
    vec<A> sum[F][V];
    UNROLL for (int f = 0; f < F; f++)
        UNROLL for (int v = 0; v < V; v++) sum[f][v] = vec<A>{} + start[f];
    for (int64_t i = 0; i < n; i++, w += bk) {
        if (i % PARTIAL == 0 && i > 0) {
            UNROLL for (int f = 0; f < F; f++)
                UNROLL for (int v = 0; v < V; v++) {
                    A* const to = out + f * channel + v * L;
                    store(to, i == PARTIAL ? sum[f][v] : load(to) + sum[f][v]);
                    sum[f][v] = vec<A>{};
                }
        }
        const A* const p = x + items[i];
        if constexpr (F > 4) {
            vec<A> pixels[V];
            UNROLL for (int v = 0; v < V; v++) pixels[v] = load(p + v * L);
            UNROLL for (int f = 0; f < F; f++)
                UNROLL for (int v = 0; v < V; v++) sum[f][v] += pixels[v] * w[f];
        } else {
            UNROLL for (int v = 0; v < V; v++) {
                vec<A> pixels = load(p + v * L);
                if constexpr (F > 1) HOLD(pixels);
                UNROLL for (int f = 0; f < F; f++) sum[f][v] += pixels * w[f];
            }
        }
    }
    UNROLL for (int f = 0; f < F; f++)
        UNROLL for (int v = 0; v < V; v++) {
            A* const to = out + f * channel + v * L;
            store(to, n > PARTIAL ? load(to) + sum[f][v] : sum[f][v]);
        }
}

// dx[item + l] += sum over f of w[item][f] * dy[f][l].
template <class A, int F, int V>
void scatter_tile(A* dx, const int32_t* items, const A* w, int64_t n, int64_t bk, const A* dy, int64_t channel) {
    constexpr int L = LANES<A>;
    vec<A> pixels[F][V];
    UNROLL for (int f = 0; f < F; f++)
        UNROLL for (int v = 0; v < V; v++) pixels[f][v] = load(dy + f * channel + v * L);
    for (int64_t i = 0; i < n; i++, w += bk) {
        A* const p = dx + items[i];
        vec<A> sum[V];
        UNROLL for (int v = 0; v < V; v++) sum[v] = pixels[0][v] * w[0];
        UNROLL for (int f = 1; f < F; f++)
            UNROLL for (int v = 0; v < V; v++) sum[v] += pixels[f][v] * w[f];
        UNROLL for (int v = 0; v < V; v++) store(p + v * L, load(p + v * L) + sum[v]);
    }
}

// The sums of pairs of neighbouring lanes: those of a, then those of b.
template <class A, size_t... J> INLINE vec<A> pairs(vec<A> a, vec<A> b, std::index_sequence<J...>) {
    return SHUFFLE(A, a, b, 2 * J) + SHUFFLE(A, a, b, 2 * J + 1);
}
// A vector whose lane i is the sum of vector i, of N vectors, a power of two; LEFT lanes are still to be added up.
template <class A, int N, int LEFT = LANES<A>> INLINE vec<A> lane_sums(const vec<A>* v) {
    if constexpr (LEFT == 1) {
        return v[0];
    } else if constexpr (N == 1) {
        const vec<A> half = pairs<A>(v[0], v[0], std::make_index_sequence<LANES<A>>{});
        return lane_sums<A, 1, LEFT / 2>(&half);
    } else {
        vec<A> half[N / 2];
        UNROLL for (int i = 0; i < N / 2; i++)
            half[i] = pairs<A>(v[2 * i], v[2 * i + 1], std::make_index_sequence<LANES<A>>{});
        return lane_sums<A, N / 2, LEFT / 2>(half);
    }
}
constexpr int power_of_two(int n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }

// to[i] = the sum of the lanes of vector i, of N vectors; `to` has room for a whole number of vectors.
template <class A, int N> INLINE void add_lanes(const vec<A>* v, A* to) {
    constexpr int COUNT = N < LANES<A> ? N : LANES<A>, WIDTH = power_of_two(COUNT);
    vec<A> part[WIDTH];
    UNROLL for (int i = 0; i < WIDTH; i++) part[i] = i < COUNT ? v[i] : vec<A>{};
    store(to, lane_sums<A, WIDTH>(part));
    if constexpr (N > COUNT) add_lanes<A, N - COUNT>(v + COUNT, to + COUNT);
}
// to[0..N) += from[0..N), as one vector.
template <class A, int N> INLINE void add_some(const A* from, A* to) {
    if constexpr (N == 1) {
        *to += *from;
    } else {
        typedef A some __attribute__((vector_size(N * sizeof(A)), aligned(alignof(A)), may_alias));
        *(some*)to += *(const some*)from;
    }
}

// dv[item][f] += sum over l of dy[f][l] * x[item + l], for F filters and I items. Of the vector at
// `masked`, unless that is INT64_MIN, only the lanes of `mask` count.
template <class A, int F, int I>
void dot_tile(const A* x, const int32_t* items, const A* dy, int64_t channel, int64_t length, int64_t masked,
              const vec<A>* mask, A* dv, int64_t bk) {
    constexpr int L = LANES<A>;
    vec<A> sum[I * F];
    UNROLL for (int i = 0; i < I * F; i++) sum[i] = vec<A>{};
    const A* p[I];
    UNROLL for (int i = 0; i < I; i++) p[i] = x + items[i];
    for (int64_t l = 0; l < length; l += L) {
        if constexpr (F >= I) {
            vec<A> pixels[I];
            UNROLL for (int i = 0; i < I; i++) pixels[i] = load(p[i] + l);
            UNROLL for (int f = 0; f < F; f++) {
                vec<A> d = load(dy + f * channel + l);
                HOLD(d);
                UNROLL for (int i = 0; i < I; i++) sum[i * F + f] += d * pixels[i];
            }
        } else {
            vec<A> d[F];
            UNROLL for (int f = 0; f < F; f++) d[f] = load(dy + f * channel + l);
            UNROLL for (int i = 0; i < I; i++) {
                vec<A> pixels = load(p[i] + l);
                if constexpr (F > 1) HOLD(pixels);
                UNROLL for (int f = 0; f < F; f++) sum[i * F + f] += d[f] * pixels;
            }
        }
    }
    if (masked != INT64_MIN)
        UNROLL for (int f = 0; f < F; f++)
            UNROLL for (int i = 0; i < I; i++) sum[i * F + f] += load(dy + f * channel + masked) * *mask * load(p[i] + masked);
    A total[(I * F + L - 1) / L * L];
    add_lanes<A, I * F>(sum, total);
    UNROLL for (int i = 0; i < I; i++) add_some<A, F>(total + i * F, dv + i * bk);
}

// The tiles that leave registers enough: most vectors, or items, of a tile of 8, 4, 2, 1 filters.
constexpr int MOST_FILTERS = REGISTERS == 32 ? 8 : 4;
constexpr int most(int filters) {
    return REGISTERS == 32 ? (filters == 8 ? 3 : filters == 4 ? 6 : filters == 2 ? 10 : 16)
                           : (filters == 4 ? 3 : filters == 2 ? 5 : 8);
}
template <class A> using GatherTile = void (*)(const A*, const int32_t*, const A*, int64_t, int64_t, const A*, A*, int64_t);
template <class A> using ScatterTile = void (*)(A*, const int32_t*, const A*, int64_t, int64_t, const A*, int64_t);
template <class A>
using DotTile = void (*)(const A*, const int32_t*, const A*, int64_t, int64_t, int64_t, const vec<A>*, A*, int64_t);

template <class A, int F, int... I> GatherTile<A> gather_of(int v, std::integer_sequence<int, I...>) {
    static constexpr GatherTile<A> tiles[] = {gather_tile<A, F, I + 1>...};
    return tiles[v - 1];
}
template <class A, int F, int... I> ScatterTile<A> scatter_of(int v, std::integer_sequence<int, I...>) {
    static constexpr ScatterTile<A> tiles[] = {scatter_tile<A, F, I + 1>...};
    return tiles[v - 1];
}
template <class A, int F, int... I> DotTile<A> dot_of(int v, std::integer_sequence<int, I...>) {
    static constexpr DotTile<A> tiles[] = {dot_tile<A, F, I + 1>...};
    return tiles[v - 1];
}
#define TILE(OF, A, filters, v)                                                                ((filters) == 8   ? OF<A, MOST_FILTERS>(v, std::make_integer_sequence<int, most(MOST_FILTERS)>{})      : (filters) == 4 ? OF<A, 4>(v, std::make_integer_sequence<int, most(4)>{})                 : (filters) == 2 ? OF<A, 2>(v, std::make_integer_sequence<int, most(2)>{})                                  : OF<A, 1>(v, std::make_integer_sequence<int, most(1)>{}))

// The next filters of a block-row of which `left` are left.
INLINE int64_t some_filters(int64_t left) {
    return left >= MOST_FILTERS ? MOST_FILTERS : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// Calls body(start, vectors) for tiles of at most `most` vectors that cover `run` pixels. Where nothing may be touched
// beyond them, the last vector overlaps the one before it.
template <class A, class Body> INLINE void over_run(int64_t run, int64_t most, bool exact, Body body) {
    constexpr int64_t L = LANES<A>;
    const int64_t vectors = exact ? run / L : (run + L - 1) / L, tiles = (vectors + most - 1) / most;
    for (int64_t tile = 0, v = 0; tile < tiles; tile++) {
        const int64_t count = vectors / tiles + (tile < vectors % tiles);
        body(v * L, count);
        v += count;
    }
    if (exact && run % L) body(run - L, 1);
}

// One block-row: bk filters on its items.
template <class A>
void gather_row(const A* x, const int32_t* items, const A* w, int64_t n, int64_t bk, const A* start, A* out,
                int64_t channel, int64_t run, bool exact) {
    over_run<A>(run, most(some_filters(bk)), exact, [&](int64_t l, int64_t v) {
        for (int64_t f = 0, count; f < bk; f += count) {
            count = some_filters(bk - f);
            TILE(gather_of, A, count, v)(x + l, items, w + f, n, bk, start + f, out + f * channel + l, channel);
        }
    });
}
template <class A>
void scatter_row(A* dx, const int32_t* items, const A* w, int64_t n, int64_t bk, const A* dy, int64_t channel,
                 int64_t run, bool exact) {
    constexpr int64_t L = LANES<A>;
    over_run<A>(exact ? run / L * L : run, most(some_filters(bk)), false, [&](int64_t l, int64_t v) {
        for (int64_t f = 0, count; f < bk; f += count) {
            count = some_filters(bk - f);
            TILE(scatter_of, A, count, v)(dx + l, items, w + f, n, bk, dy + f * channel + l, channel);
        }
    });
    if (!exact || run % L == 0) return;
    for (int64_t f = 0, count; f < bk; f += count) {  // the last vector again, with zeros where it has been added
        count = some_filters(bk - f);
        A last[MOST_FILTERS * L];
        for (int64_t i = 0; i < count; i++)
            for (int64_t j = 0; j < L; j++) last[i * L + j] = j < L - run % L ? A(0) : dy[(f + i) * channel + run - L + j];
        TILE(scatter_of, A, count, 1)(dx + run - L, items, w + f, n, bk, last, L);
    }
}
template <class A>
void dot_row(const A* x, const int32_t* items, int64_t n, const A* dy, int64_t channel, int64_t bk, A* dv, int64_t run,
             bool exact) {
    constexpr int64_t L = LANES<A>, BLOCK = 32 * L;  // filters of a tile stay in the first cache from item to item
    vec<A> mask;
    for (int64_t j = 0; j < L; j++) mask[j] = j >= L - run % L;
    const int64_t whole = exact ? run / L * L : (run + L - 1) / L * L;
    for (int64_t begin = 0; begin < std::max<int64_t>(whole, 1); begin += BLOCK) {
        const int64_t length = std::min(BLOCK, whole - begin);
        const int64_t masked = exact && run % L && begin + length == whole ? run - L - begin : INT64_MIN;
        for (int64_t f = 0, count; f < bk; f += count) {
            count = some_filters(bk - f);
            const int64_t widest = most(count), tiles = (n + widest - 1) / widest;
            for (int64_t tile = 0, i = 0; tile < tiles; tile++) {
                const int64_t some = n / tiles + (tile < n % tiles);
                TILE(dot_of, A, count, some)(x + begin, items + i, dy + f * channel + begin, channel, length, masked,
                                             &mask, dv + i * bk + f, bk);
                i += some;
            }
        }
    }
}

// ---------------------------------------------------------------------- the index as lists of items

struct Index {  // as BSRPattern packs it
    const int32_t *indptr, *indices, *t_indptr, *t_indices, *t_perm, *order;

    Index(const Conv& g, const int32_t* packed)
        : indptr(packed + g.indptr), indices(packed + g.indices), t_indptr(packed + g.t_indptr),
          t_indices(packed + g.t_indices), t_perm(packed + g.t_perm),
          order(g.row_order < 0 ? nullptr : packed + g.row_order) {}
};

// Items and weights of block-row b for fprop and wgrad: an item for each stored (tap, channel). `by_channel`: in the
// order (channel block, tap), so that taps of a channel find its pixels in the first cache; else (tap, channel block).
// Weights [item][bk]. `place` gets the item of each block.
template <class T, class A>
void list_row(const Conv& g, const Layout& lay, const Index& index, const int64_t* taps, int64_t b, bool by_channel,
              int32_t* counts, const T* values, int32_t* items, A* weights, int32_t* place) {
    const int64_t begin = index.indptr[b], end = index.indptr[b + 1], blocks = g.c / g.bc;
    if (by_channel) {
        std::memset(counts, 0, sizeof(int32_t) * blocks);
        for (int64_t i = begin, base = 0; i < end; i++) {
            while (index.indices[i] - base >= blocks) base += blocks;
            counts[index.indices[i] - base]++;
        }
        int32_t before = 0;
        for (int64_t block = 0; block < blocks; block++) {
            const int32_t count = counts[block];
            counts[block] = before;
            before += count;
        }
    }
    for (int64_t i = begin, base = 0, tap = 0; i < end; i++) {
        while (index.indices[i] - base >= blocks) base += blocks, tap++;
        const int64_t block = index.indices[i] - base, at = begin + (by_channel ? counts[block]++ : i - begin);
        place[i] = at;
        int32_t* const item = items + at * g.bc;
        for (int64_t j = 0; j < g.bc; j++) item[j] = (block * g.bc + j) * lay.channel + taps[tap];
        if (values != nullptr) {
            const T* const from = values + i * g.bk * g.bc;
            A* const to = weights + at * g.bc * g.bk;
            if (g.bc == 1)
                copy_in(from, 1, to, g.bk);
            else if (g.bc >= LANES<A> && g.bk % LANES<A> == 0)
                transpose_in<T, A>(from, g.bc, g.bk, g.bc, to, g.bk, nullptr);
            else
                for (int64_t j = 0; j < g.bc; j++)
                    for (int64_t f = 0; f < g.bk; f++) to[j * g.bk + f] = widen(from[f * g.bc + j]);
        }
    }
}

int64_t parts_of(int64_t units, int64_t threads, int64_t rows) {
    if (units % threads == 0 || units >= 4 * threads) return 1;
    return std::min(threads, rows);
}

// Where part number `part` of so many begins, of `count` things.
int64_t part_begin(int64_t part, int64_t parts, int64_t count) { return (part * count + parts - 1) / parts; }

constexpr int64_t MOST_SUMS = 4 << 20;  // bytes of the partial sums of a weight gradient, if there are more than two

template <class T> bool rows_in_place(const int64_t* strides, int64_t height, int64_t width) {
    return std::is_same<T, wide<T>>::value && strides[3] == 1 && strides[2] == width && height * width >= 128;
}
bool pointwise(const Conv& g) {
    return g.r == 1 && g.s == 1 && g.stride[0] == 1 && g.stride[1] == 1 && g.padding[0] == 0 && g.padding[1] == 0;
}
bool fits(int64_t channels, int64_t channel) { return channels * channel < INT32_MAX; }

// ---------------------------------------------------------------------- the three products

template <class T>
int fprop(const Conv& g, const T* x, const T* values, const T* bias, const Epilogue<T>& last, const Index& index, T* y) {
    using A = wide<T>;
    constexpr int64_t L = LANES<A>;
    const bool in_place = pointwise(g) && rows_in_place<T>(g.x_strides, g.h, g.w);
    const bool direct = in_place && index.order == nullptr && rows_in_place<T>(g.y_strides, g.p, g.q);
    const Layout lay(g, sizeof(A), L, g.p, in_place);
    if (!fits(g.c, lay.channel)) return 2;
    const int64_t rows = g.k / g.bk, parts = parts_of(lay.units, g.threads, rows);
    const bool across = transposed(g.y_strides, g.bk * ((rows + parts - 1) / parts), lay.pitch);
    const int64_t channel = (lay.rows * lay.images * lay.pitch + L - 1) / L * L;  // of the results
    const int64_t held = direct ? 0 : across ? (rows + parts - 1) / parts * g.bk : g.bk;

    Scratch scratch;
    const size_t items_at = scratch.add<int32_t>(g.nnzb * g.bc), weights_at = scratch.add<A>(g.nnzb * g.bc * g.bk);
    const size_t place_at = scratch.add<int32_t>(g.nnzb), start_at = scratch.add<A>(g.k);
    const size_t counts_at = scratch.add<int32_t>(g.threads * (g.c / g.bc));
    const int64_t planes_size = in_place ? 0 : g.c * lay.channel, size = (planes_size + held * channel + 31) / 16 * 16;
    const size_t own_at = scratch.add<A>(g.threads * size);
    scratch.make();
    int32_t* const items = scratch.at<int32_t>(items_at);
    A *const weights = scratch.at<A>(weights_at), *const start = scratch.at<A>(start_at);
    std::vector<int64_t> taps(g.r * g.s);
    for (int64_t tap = 0; tap < g.r * g.s; tap++) taps[tap] = lay.tap(g, tap);
    for (int64_t row = 0; row < g.k; row++)
        start[row] = bias == nullptr ? A(0) : A(widen(bias[index.order ? index.order[row] : row]));

#pragma omp parallel num_threads(g.threads)
    {
        const int64_t thread = THREAD;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < rows; b++)
            list_row<T, A>(g, lay, index, taps.data(), b, g.bk >= 4 && g.r * g.s > 1,
                           scratch.at<int32_t>(counts_at) + thread * (g.c / g.bc), values, items, weights,
                           scratch.at<int32_t>(place_at));
        A *const planes = scratch.at<A>(own_at) + thread * size, *const results = planes + planes_size;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < lay.units * parts; task++) {
            const Unit u = lay.unit(task / parts, g.n);
            const int64_t part = task % parts, b0 = part_begin(part, parts, rows);
            const int64_t b1 = part_begin(part + 1, parts, rows);
            const A* from = planes;
            if (in_place)
                from = (const A*)x + u.image * g.x_strides[0] + u.row * g.w;
            else
                fill<T, A>(x, g.x_strides, g.h, lay.vertical, lay.horizontal, u.row, u.rows + lay.vertical.reach, u, lay,
                           lay.plane, 0, 0, g.c, nullptr, planes);
            const int64_t run = lay.run(u.rows, u.images, g.q);
            for (int64_t b = b0; b < b1; b++) {
                const int64_t first = b * g.bk, item = index.indptr[b] * g.bc, n = index.indptr[b + 1] * g.bc - item;
                A* const out = direct ? (A*)y + u.image * g.y_strides[0] + first * g.y_strides[1] + u.row * g.q
                                      : results + (across ? (b - b0) * g.bk * channel : 0);
                gather_row(from, items + item, weights + item * g.bk, n, g.bk, start + first, out,
                           direct ? g.y_strides[1] : channel, run, in_place);
                if (!direct && !across)
                    write(out, channel, g.bk, first, index.order, u, lay.images, lay.pitch, g.q, y, g.y_strides);
                if (!across) finish(y, last, g.y_strides, u, g.q, first, g.bk, index.order);
            }
            if (across) {
                write(results, channel, (b1 - b0) * g.bk, b0 * g.bk, index.order, u, lay.images, lay.pitch, g.q, y,
                      g.y_strides);
                finish(y, last, g.y_strides, u, g.q, b0 * g.bk, (b1 - b0) * g.bk, index.order);
            }
        }
    }
    return 0;
}

template <class A, int FIRST, size_t... J> INLINE vec<A> woven(vec<A> a, vec<A> b, std::index_sequence<J...>) {
    return SHUFFLE(A, a, b, FIRST + int64_t(J) / 2 + (J % 2) * LANES<A>);
}
// to[2j] = even[j] and to[2j + 1] = odd[j], of `count` in all; zero where there is none.
template <class T, class A> void weave(const A* even, const A* odd, T* to, int64_t count) {
    constexpr int64_t L = LANES<A>;
    int64_t j = 0;
    if constexpr (std::is_same<T, A>::value)
        for (; 2 * (j + L) <= count; j += L) {
            const vec<A> a = even ? load(even + j) : vec<A>{}, b = odd ? load(odd + j) : vec<A>{};
            store(to + 2 * j, woven<A, 0>(a, b, std::make_index_sequence<L>{}));
            store(to + 2 * j + L, woven<A, L / 2>(a, b, std::make_index_sequence<L>{}));
        }
    for (; 2 * j < count; j++) {
        to[2 * j] = even ? narrow<T>(even[j]) : T{};
        if (2 * j + 1 < count) to[2 * j + 1] = odd ? narrow<T>(odd[j]) : T{};
    }
}

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
    const auto source = [&](int64_t i, int64_t a, int64_t b) {
        const int64_t pa = phase(vertical, a), pb = phase(horizontal, b);
        const bool read = pa < vertical.phases() && pb < horizontal.phases();
        return read ? runs + (pa * horizontal.phases() + pb) * channel + i * lay.images * lay.pitch - left : nullptr;
    };
    const auto lead_of = [&](int64_t b) {
        return b < g.padding[1] ? (g.padding[1] - b + g.stride[1] - 1) / g.stride[1] : 0;
    };
    if (!across && strides[3] == 1 && g.stride[1] == 2) {  // columns in turn from one phase and the other
        const int64_t b = g.padding[1] % 2, odd = (g.padding[1] + 1) / 2;
        for (int64_t c = 0; c < channels; c++)
            for (int64_t i = 0; i < u.rows; i++)
                for (int64_t a = 0; a < g.stride[0]; a++) {
                    const int64_t h = row_of(i, a);
                    if (h < 0 || h >= g.h) continue;
                    const A *const from = source(i, a, b), *const other = source(i, a, 1 - b);
                    for (int64_t m = 0; m < u.images; m++) {
                        const int64_t at = c * all + m * lay.pitch;
                        weave<T, A>(from ? from + at + g.padding[1] / 2 : nullptr, other ? other + at + odd : nullptr,
                                    dx + (u.image + m) * strides[0] + (c0 + c) * strides[1] + h * strides[2], g.w);
                    }
                }
        return;
    }
    for (int64_t c = 0; c < (across ? 1 : channels); c++)
        for (int64_t i = 0; i < u.rows; i++)
            for (int64_t a = 0; a < g.stride[0]; a++) {
                const int64_t h = row_of(i, a);
                if (h < 0 || h >= g.h) continue;
                for (int64_t b = 0; b < g.stride[1]; b++) {
                    const int64_t lead = lead_of(b), first = lead * g.stride[1] + b - g.padding[1];
                    const int64_t data = first < g.w ? (g.w - 1 - first) / g.stride[1] + 1 : 0;
                    const int64_t step = strides[3] * g.stride[1];
                    const A* const from = source(i, a, b);
                    T* const to = dx + u.image * strides[0] + (c0 + c) * strides[1] + h * strides[2] + first * strides[3];
                    if (from != nullptr && across && lay.pitch == 1) {
                        transpose_out<T, A>(from + lead, all, channels, nullptr, data * u.images, to, strides[0]);
                        continue;
                    }
                    for (int64_t m = 0; m < u.images; m++) {
                        T* const pixels = to + m * strides[0];
                        if (from != nullptr && across)
                            transpose_out<T, A>(from + lead + m * lay.pitch, all, channels, nullptr, data, pixels, step);
                        else if (from != nullptr)
                            copy_out<T, A>(from + lead + c * all + m * lay.pitch, pixels, step, data);
                        else
                            for (int64_t j = 0; j < data; j++)
                                std::memset(pixels + j * step, 0, sizeof(T) * (across ? channels : 1));
                    }
                }
            }
}

template <class T>
int dgrad(const Conv& g, const T* dy, const T* values, const Index& index, T* dx) {
    using A = wide<T>;
    constexpr int64_t L = LANES<A>;
    // The rows and columns of the planes in which dx has pixels.
    const int64_t top = g.padding[0] / g.stride[0], bottom = (g.h - 1 + g.padding[0]) / g.stride[0] + 1;
    const int64_t left = g.padding[1] / g.stride[1], right = (g.w - 1 + g.padding[1]) / g.stride[1] + 1;
    const bool scatter = g.bc < 4 && g.bk >= 4;
    const bool alike = pointwise(g) && rows_in_place<T>(g.y_strides, g.p, g.q);
    const bool direct = alike && rows_in_place<T>(g.x_strides, g.h, g.w) && !(scatter && index.order);
    const bool in_place = scatter ? direct : alike;
    Layout lay(g, sizeof(A), L, bottom - top, in_place);
    const Axis &vertical = lay.vertical, &horizontal = lay.horizontal;
    const Axis whole_rows(g.p, g.p, 1, 1, 0, 1), whole_columns(g.q, g.q, 1, 1, 0, 1);
    const int64_t reach = vertical.reach, blocks = g.c / g.bc, rows = g.k / g.bk, taps = g.r * g.s;
    const int64_t parts = parts_of(lay.units, g.threads, blocks);
    const int64_t dy_plane = in_place ? g.y_strides[1] : lay.plane_of(lay.rows + reach, L);
    // Of a scatter: those that dy reaches, and those of dx beyond them, which nothing reads.
    const int64_t dx_rows = std::max(std::min(lay.rows + reach, g.p), lay.rows) + reach;
    lay.plane = lay.plane_of(dx_rows, L);
    lay.channel = in_place ? g.x_strides[1] : lay.plane * lay.phases;
    if (!fits(g.k, dy_plane) || !fits(g.c, lay.channel)) return 2;
    const int64_t part_channels = (blocks + parts - 1) / parts * g.bc;
    const bool across = transposed(g.x_strides, part_channels, lay.pitch);
    const int64_t channel = scatter ? lay.plane : (lay.rows * lay.images * lay.pitch + L - 1) / L * L;
    const int64_t held = direct ? 0 : lay.phases * (scatter || across ? part_channels : g.bc);

    Scratch scratch;
    const int64_t width = scatter ? g.bk : g.bc;  // weights of an item
    const size_t items_at = scratch.add<int32_t>(g.nnzb * g.bk * g.bc / width);
    const size_t weights_at = scratch.add<A>(g.nnzb * g.bc * g.bk);
    const size_t starts_at = scratch.add<int64_t>(scatter ? parts * rows + 1 : blocks * lay.phases + 1);
    const size_t zeros_at = scratch.add<A>(g.bc), place_at = scratch.add<int32_t>(g.k);
    const int64_t planes_size = in_place ? 0 : g.k * dy_plane, size = (planes_size + held * channel + 63) / 16 * 16;
    const size_t own_at = scratch.add<A>(g.threads * size);
    scratch.make();
    int32_t *const items = scratch.at<int32_t>(items_at), *const place = scratch.at<int32_t>(place_at);
    int64_t* const starts = scratch.at<int64_t>(starts_at);
    A *const weights = scratch.at<A>(weights_at), *const zeros = scratch.at<A>(zeros_at);
    std::memset(zeros, 0, sizeof(A) * g.bc);
    for (int64_t row = 0; row < g.k; row++) place[index.order ? index.order[row] : row] = row;
    std::vector<int64_t> offsets(taps);
    for (int64_t tap = 0; tap < taps; tap++) {
        const int64_t r = tap / g.s, s = tap % g.s;
        offsets[tap] = scatter ? lay.tap(g, tap)
                               : horizontal.reach + left + (reach - vertical.shift[r]) * lay.images * lay.pitch -
                                     horizontal.shift[s];
        if (in_place) offsets[tap] = 0;
    }
    if (scatter) {  // how many items each part has of each block-row
        std::fill(starts, starts + parts * rows + 1, 0);
        for (int64_t b = 0; b < rows; b++)
            for (int64_t i = index.indptr[b]; i < index.indptr[b + 1]; i++)
                starts[index.indices[i] % blocks * parts / blocks * rows + b + 1] += g.bc;
        for (int64_t i = 0; i < parts * rows; i++) starts[i + 1] += starts[i];
    }

#pragma omp parallel num_threads(g.threads)
    {
        const int64_t thread = THREAD;
        if (scatter) {
#pragma omp for schedule(static)
            for (int64_t b = 0; b < rows; b++) {
                std::vector<int64_t> next(parts);
                for (int64_t part = 0; part < parts; part++) next[part] = starts[part * rows + b];
                for (int64_t i = index.indptr[b]; i < index.indptr[b + 1]; i++) {
                    const int64_t block = index.indices[i] % blocks, tap = index.indices[i] / blocks;
                    const int64_t part = block * parts / blocks, c0 = part_begin(part, parts, blocks) * g.bc;
                    const T* const from = values + i * g.bk * g.bc;
                    for (int64_t j = 0; j < g.bc; j++) {
                        const int64_t at = next[part]++;
                        items[at] = (block * g.bc + j - c0) * lay.channel + offsets[tap];
                        for (int64_t f = 0; f < g.bk; f++) weights[at * g.bk + f] = widen(from[f * g.bc + j]);
                    }
                }
            }
        } else {
#pragma omp for schedule(static)
            for (int64_t block = 0; block < blocks; block++) {
                int64_t at = index.t_indptr[block * taps] * g.bk;
                for (int64_t phase = 0; phase < lay.phases; phase++) {
                    starts[block * lay.phases + phase] = at;
                    for (int64_t tap = 0; tap < taps; tap++) {
                        if (vertical.phase_of[tap / g.s] * horizontal.phases() + horizontal.phase_of[tap % g.s] != phase)
                            continue;
                        const int64_t end = index.t_indptr[block * taps + tap + 1];
                        for (int64_t e = index.t_indptr[block * taps + tap]; e < end; e++) {
                            const int64_t row = (index.t_indices[e] - tap * rows) * g.bk;
                            const T* from = values + index.t_perm[e] * g.bk * g.bc;
                            for (int64_t f = 0; f < g.bk; f++, at++) {
                                items[at] = (index.order ? index.order[row + f] : row + f) * dy_plane + offsets[tap];
                                for (int64_t j = 0; j < g.bc; j++) weights[at * g.bc + j] = widen(*from++);
                            }
                        }
                    }
                }
                if (block == blocks - 1) starts[blocks * lay.phases] = at;
            }
        }
        A *const planes = scratch.at<A>(own_at) + thread * size, *const results = planes + planes_size;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < lay.units * parts; task++) {
            const Unit u = lay.unit(task / parts, g.n);
            const int64_t part = task % parts, b0 = part_begin(part, parts, blocks);
            const int64_t b1 = part_begin(part + 1, parts, blocks), c0 = b0 * g.bc, channels = (b1 - b0) * g.bc;
            if (scatter) {
                const int64_t first = std::max<int64_t>(0, top + u.row - reach);
                const int64_t dy_rows = std::min(g.p, top + u.row + u.rows) - first;
                if (direct) {
                    A* const out = (A*)dx + u.image * g.x_strides[0] + c0 * g.x_strides[1] + u.row * g.w;
                    const A* const rows_of_dy = (const A*)dy + u.image * g.y_strides[0] + u.row * g.q;
                    for (int64_t c = 0; c < channels; c++)
                        std::memset(out + c * lay.channel, 0, sizeof(A) * u.rows * g.w);
                    for (int64_t b = 0; b < rows; b++) {
                        const int64_t at = starts[part * rows + b];
                        scatter_row(out, items + at, weights + at * g.bk, starts[part * rows + b + 1] - at, g.bk,
                                    rows_of_dy + b * g.bk * dy_plane, dy_plane, u.rows * g.w, true);
                    }
                    continue;
                }
                std::memset(results, 0, sizeof(A) * channels * lay.channel);
                if (dy_rows > 0) {
                    fill<T, A>(dy, g.y_strides, g.p, whole_rows, whole_columns, first, dy_rows, u, lay, dy_plane, 0, 0,
                               g.k, index.order ? place : nullptr, planes);
                    const int64_t run = lay.run(dy_rows, u.images, g.q);
                    for (int64_t b = 0; b < rows; b++) {
                        const int64_t at = starts[part * rows + b];
                        scatter_row(results, items + at, weights + at * g.bk, starts[part * rows + b + 1] - at, g.bk,
                                    planes + b * g.bk * dy_plane, dy_plane, run, false);
                    }
                }
                // Row i of the planes is row first + i: where the unit's rows begin.
                write_phases<T, A>(g, lay, results + (top + u.row - first) * lay.images * lay.pitch, lay.plane, channels,
                                   c0, top + u.row, u, 0, dx);
                continue;
            }
            const A* from = planes;
            if (in_place)
                from = (const A*)dy + u.image * g.y_strides[0] + u.row * g.q;
            else
                fill<T, A>(dy, g.y_strides, g.p, whole_rows, whole_columns, top + u.row - reach, u.rows + reach, u, lay,
                           dy_plane, horizontal.reach, 0, g.k, nullptr, planes);
            const int64_t run = lay.run(u.rows, u.images, right - left);
            for (int64_t block = b0; block < b1; block++) {
                A* const out = direct ? (A*)dx + u.image * g.x_strides[0] + block * g.bc * g.x_strides[1] + u.row * g.w
                                      : results + (across ? (block - b0) * g.bc * lay.phases * channel : 0);
                for (int64_t phase = 0; phase < lay.phases; phase++) {
                    const int64_t at = starts[block * lay.phases + phase];
                    gather_row(from, items + at, weights + at * g.bc, starts[block * lay.phases + phase + 1] - at, g.bc,
                               zeros, out + phase * channel, direct ? g.x_strides[1] : lay.phases * channel, run,
                               in_place);
                }
                if (!direct && !across)
                    write_phases<T, A>(g, lay, out, channel, g.bc, block * g.bc, top + u.row, u, left, dx);
            }
            if (!direct && across)
                write_phases<T, A>(g, lay, results, channel, channels, c0, top + u.row, u, left, dx);
        }
    }
    return 0;
}

template <class T>
int wgrad(const Conv& g, const T* x, const T* dy, const Index& index, T* dvalues) {
    using A = wide<T>;
    constexpr int64_t L = LANES<A>;
    const bool in_place = pointwise(g) && index.order == nullptr && rows_in_place<T>(g.x_strides, g.h, g.w) &&
                          rows_in_place<T>(g.y_strides, g.p, g.q);
    const Layout lay(g, sizeof(A), L, g.p, in_place, 5 * Layout::BUDGET / 2);
    if (!fits(g.c, lay.channel)) return 2;
    const Axis whole_rows(g.p, g.p, 1, 1, 0, 1), whole_columns(g.q, g.q, 1, 1, 0, 1);
    const int64_t rows = g.k / g.bk, size_of_block = g.bk * g.bc, weights = g.nnzb * size_of_block;
    // Units are added up in so many sums, which the sizes alone decide, so that every number of threads adds alike.
    const int64_t room = std::max<int64_t>(2, MOST_SUMS / std::max<int64_t>(1, weights * sizeof(A)));
    const int64_t chunks = std::min({lay.units, room, int64_t(16)}), parts = parts_of(chunks, g.threads, rows);
    const int64_t dy_plane = in_place ? g.y_strides[1] : lay.plane_of(lay.rows, L);

    Scratch scratch;
    const size_t items_at = scratch.add<int32_t>(g.nnzb * g.bc), place_at = scratch.add<int32_t>(g.nnzb);
    const size_t sums_at = scratch.add<A>(chunks * weights + L), rows_at = scratch.add<int32_t>(g.k);
    const size_t counts_at = scratch.add<int32_t>(g.threads * (g.c / g.bc));
    const int64_t planes_size = in_place ? 0 : g.c * lay.channel;
    const int64_t size = (planes_size + (in_place ? 0 : g.k * dy_plane) + 31) / 16 * 16;
    const size_t own_at = scratch.add<A>(g.threads * size);
    scratch.make();
    int32_t *const items = scratch.at<int32_t>(items_at), *const place = scratch.at<int32_t>(place_at);
    int32_t* const row_of = scratch.at<int32_t>(rows_at);
    A* const sums = scratch.at<A>(sums_at);
    for (int64_t row = 0; row < g.k; row++) row_of[index.order ? index.order[row] : row] = row;
    std::vector<int64_t> taps(g.r * g.s);
    for (int64_t tap = 0; tap < g.r * g.s; tap++) taps[tap] = lay.tap(g, tap);

#pragma omp parallel num_threads(g.threads)
    {
        const int64_t thread = THREAD;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < rows; b++)
            list_row<T, A>(g, lay, index, taps.data(), b, g.bk >= 4 && g.r * g.s > 1,
                           scratch.at<int32_t>(counts_at) + thread * (g.c / g.bc), nullptr, items, nullptr, place);
        A *const planes = scratch.at<A>(own_at) + thread * size, *const dy_planes = planes + planes_size;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < chunks * parts; task++) {
            const int64_t chunk = task / parts, part = task % parts;
            const int64_t b0 = part_begin(part, parts, rows), b1 = part_begin(part + 1, parts, rows);
            A* const sum = sums + chunk * weights;
            const int64_t first = index.indptr[b0] * size_of_block;
            std::memset(sum + first, 0, sizeof(A) * (index.indptr[b1] * size_of_block - first));
            for (int64_t i = part_begin(chunk, chunks, lay.units); i < part_begin(chunk + 1, chunks, lay.units); i++) {
                const Unit u = lay.unit(i, g.n);
                const A *from = planes, *other = dy_planes;
                if (in_place) {
                    from = (const A*)x + u.image * g.x_strides[0] + u.row * g.w;
                    other = (const A*)dy + u.image * g.y_strides[0] + u.row * g.q;
                } else {
                    fill<T, A>(x, g.x_strides, g.h, lay.vertical, lay.horizontal, u.row, u.rows + lay.vertical.reach, u,
                               lay, lay.plane, 0, 0, g.c, nullptr, planes);
                    if (index.order)
                        fill<T, A>(dy, g.y_strides, g.p, whole_rows, whole_columns, u.row, u.rows, u, lay, dy_plane, 0, 0,
                                   g.k, row_of, dy_planes);
                    else
                        fill<T, A>(dy, g.y_strides, g.p, whole_rows, whole_columns, u.row, u.rows, u, lay, dy_plane, 0,
                                   b0 * g.bk, b1 * g.bk, nullptr, dy_planes + b0 * g.bk * dy_plane);
                }
                const int64_t run = lay.run(u.rows, u.images, g.q);
                for (int64_t b = b0; b < b1; b++) {
                    const int64_t at = index.indptr[b] * g.bc;
                    dot_row(from, items + at, index.indptr[b + 1] * g.bc - at, other + b * g.bk * dy_plane, dy_plane,
                            g.bk, sum + at * g.bk, run, in_place);
                }
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < g.nnzb; i++) {
            A* const total = sums + place[i] * size_of_block;
            for (int64_t chunk = 1; chunk < chunks; chunk++) add(sums + chunk * weights + place[i] * size_of_block, total, size_of_block);
            T* const to = dvalues + i * size_of_block;
            if (g.bc == 1)
                copy_out(total, to, 1, g.bk);
            else if (g.bc >= L && g.bk >= L)
                transpose_out<T, A>(total, g.bk, g.bc, nullptr, g.bk, to, g.bc);
            else
                for (int64_t j = 0; j < g.bc; j++)
                    for (int64_t f = 0; f < g.bk; f++) to[f * g.bc + j] = narrow<T>(total[j * g.bk + f]);
        }
    }
    return 0;
}

template <class Body> int guarded(Body body) {
    try {
        return body();
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace

// ---------------------------------------------------------------------- the calls: 0, or 1: no memory, 2: too large

// A library is for numbers of one type, given as -DNUMBER=float, double, bfloat16 or float16.
#ifndef NUMBER
#define NUMBER float
#endif

// Fused multiplications and additions a second, twice counted, of so many threads that do nothing else.
extern "C" double bsr_peak_flops(int64_t threads) {
    using A = wide<NUMBER>;
    constexpr int64_t N = 12, STEPS = 1 << 20;  // products under way at once: more than a core starts before one ends
    double best = 0;
    for (int round = 0; round < 5; round++) {
        const auto begin = std::chrono::steady_clock::now();
#pragma omp parallel num_threads(threads)
        {
            vec<A> sum[N], a = vec<A>{} + A(1e-9), b = vec<A>{} + A(0.5);
            UNROLL for (int64_t j = 0; j < N; j++) sum[j] = vec<A>{} + A(j);
            for (int64_t i = 0; i < STEPS; i++)
                UNROLL for (int64_t j = 0; j < N; j++) {
                    sum[j] = sum[j] * b + a;
                    HOLD(sum[j]);
                }
        }
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
        best = std::max(best, 2.0 * N * STEPS * LANES<A> * threads / seconds.count());
    }
    return best;
}

extern "C" int bsr_fprop(const Conv* g, const NUMBER* x, const NUMBER* values, const NUMBER* bias,
                         const NUMBER* residual, int64_t relu, const int32_t* packed, NUMBER* y) {
    const Epilogue<NUMBER> last{residual, relu != 0};
    return guarded([&] { return fprop<NUMBER>(*g, x, values, bias, last, Index(*g, packed), y); });
}
extern "C" int bsr_dgrad(const Conv* g, const NUMBER* dy, const NUMBER* values, const int32_t* packed, NUMBER* dx) {
    return guarded([&] { return dgrad<NUMBER>(*g, dy, values, Index(*g, packed), dx); });
}
extern "C" int bsr_wgrad(const Conv* g, const NUMBER* x, const NUMBER* dy, const int32_t* packed, NUMBER* dvalues) {
    return guarded([&] { return wgrad<NUMBER>(*g, x, dy, Index(*g, packed), dvalues); });
}
// Both gradients: dx has the strides of x.
extern "C" int bsr_gradients(const Conv* g, const NUMBER* x, const NUMBER* dy, const NUMBER* values, const int32_t* packed,
                             NUMBER* dx, NUMBER* dvalues) {
    const int failed = bsr_dgrad(g, dy, values, packed, dx);
    return failed ? failed : bsr_wgrad(g, x, dy, packed, dvalues);
}
