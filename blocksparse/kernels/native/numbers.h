// Vectors, and the numbers that tensors hold: 16-bit ones are computed in float.
//
// Vectors are GCC's and Clang's; their length and the size of a tile follow from the target.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

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
// Of the library's units of compilation among themselves: no library that a process loads has any part in it.
#define INTERNAL __attribute__((visibility("hidden")))

// A library is for numbers of one type, given as -DNUMBER=float, double, bfloat16 or float16.
#ifndef NUMBER
#define NUMBER float
#endif

namespace {

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

// Lane J of the result is lane LANE, an expression of J, of a followed by b: vectors of the type that comes last.
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, LANE, ...) __builtin_shufflevector(a, b, int(LANE)...)
#else
#define SHUFFLE(a, b, LANE, ...) __builtin_shuffle(a, b, typename Vector<__VA_ARGS__>::indices{int(LANE)...})
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
using Wide = wide<NUMBER>;

// Vectors of S lanes, S a power of two up to that of a whole one.
template <class A, int S> struct Part {};
template <int S> struct Vector<Part<float, S>> {
    typedef float anywhere __attribute__((vector_size(4 * S), aligned(4), may_alias));
    typedef int32_t indices __attribute__((vector_size(4 * S)));
    typedef int32_t indices_anywhere __attribute__((vector_size(4 * S), aligned(4), may_alias));
    typedef uint32_t bits __attribute__((vector_size(4 * S)));
    typedef uint16_t halves __attribute__((vector_size(2 * S), aligned(2), may_alias));
};
template <int S> struct Vector<Part<double, S>> {
    typedef double anywhere __attribute__((vector_size(8 * S), aligned(8), may_alias));
    typedef int64_t indices __attribute__((vector_size(8 * S)));
    typedef int64_t indices_anywhere __attribute__((vector_size(8 * S), aligned(8), may_alias));
};
template <class A, int S> using part = typename Vector<Part<A, S>>::anywhere;
template <class A, int S> using part_mask = typename Vector<Part<A, S>>::indices;
template <int S> using part_bits = typename Vector<Part<float, S>>::bits;
template <int S> using half_part = typename Vector<Part<float, S>>::halves;

// S numbers, 16-bit ones as floats: the same as widen() and narrow() make of each.
template <int S> INLINE part<float, S> load_part(const float* p) { return *(const part<float, S>*)p; }
template <int S> INLINE part<double, S> load_part(const double* p) { return *(const part<double, S>*)p; }
template <int S> INLINE part<float, S> load_part(const bfloat16* p) {
    return (part<float, S>)(__builtin_convertvector(*(const half_part<S>*)p, part_bits<S>) << 16);
}
template <int S> INLINE part<float, S> load_part(const float16* p) {
    typedef part_bits<S> bits;
    const bits half = __builtin_convertvector(*(const half_part<S>*)p, bits);
    const part<float, S> scaled = (part<float, S>)((half & 0x7fff) << 13) * bits_to_float(0x77800000);
    const bits infinite = (bits)((half & 0x7c00) == 0x7c00) & 0x7f800000;
    return (part<float, S>)((bits)scaled | (half & 0x8000) << 16 | infinite);
}
template <int S> INLINE void store_part(float* p, part<float, S> v) { *(part<float, S>*)p = v; }
template <int S> INLINE void store_part(double* p, part<double, S> v) { *(part<double, S>*)p = v; }
template <int S> INLINE void store_part(bfloat16* p, part<float, S> v) {
    typedef part_bits<S> Bits;
    const Bits bits = (Bits)v, nan = (Bits)((bits & 0x7fffffff) > 0x7f800000);
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *(half_part<S>*)p = __builtin_convertvector((nan & ((bits >> 16) | 0x40)) | (~nan & rounded), half_part<S>);
}
template <int S> INLINE void store_part(float16* p, part<float, S> v) {
    typedef part_bits<S> Bits;
    const Bits bits = (Bits)v, size = bits & 0x7fffffff;
    const Bits nan = (Bits)(size > 0x7f800000), infinite = (Bits)(size >= 0x477ff000), small = (Bits)(size < 0x38800000);
    const Bits subnormal = (Bits)((part<float, S>)size + 0.5f) - 0x3f000000;
    const Bits normal = (size - 0x38000000 + 0x0fff + ((size >> 13) & 1)) >> 13;
    const Bits finite = (small & subnormal) | (~small & normal);
    const Bits all = (nan & 0x7e00) | (~nan & ((infinite & 0x7c00) | (~infinite & finite)));
    *(half_part<S>*)p = __builtin_convertvector(all | (bits >> 16 & 0x8000), half_part<S>);
}
template <class T> INLINE vec<wide<T>> load_wide(const T* p) { return (vec<wide<T>>)load_part<LANES<wide<T>>>(p); }
template <class T> INLINE void store_narrow(T* p, vec<wide<T>> v) { store_part<LANES<wide<T>>>(p, v); }

}  // namespace
