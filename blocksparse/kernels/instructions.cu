// The type of numbers, T, and one wrapper for each instruction that C++ has no word for. First of all sources.

#define FP16 0
#define BF16 1
#define TF32 2
#define FP32 3

#if MATH == FP16 || MATH == BF16
typedef unsigned short T;
constexpr int SLOT = 8;   // images of a slot
constexpr int STEP = 16;  // of the product's K, in one mma
#else
typedef float T;
constexpr int SLOT = 4;
constexpr int STEP = MATH == TF32 ? 8 : 4;
#endif

#ifdef __CUDACC__  // any other compiler brings its own

extern __shared__ __align__(16) unsigned char shared[];

#define ADDRESS(p) ((unsigned)__cvta_generic_to_shared(p))

__device__ __forceinline__ void ldmatrix4(unsigned (&d)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(ADDRESS(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix4_trans(unsigned (&d)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(ADDRESS(row))
                 : "memory");
}

__device__ __forceinline__ void mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if MATH == FP16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif MATH == BF16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// 16 bytes, or as many zeros. Copies clobber no memory for the compiler: a barrier and the wait part them from what reads
// or writes the same bytes, and loads of tables may so be moved ahead of them (each first copy behind such a load costs
// three instructions that ptxas adds).
__device__ __forceinline__ void cp_async_or_zeros(void* to, const void* from, bool copies) {
    asm volatile(
        "{.reg .pred p; .reg .u32 n; setp.ne.b32 p, %2, 0; selp.u32 n, 16, 0, p;"
        " cp.async.cg.shared.global [%0], [%1], 16, n;}" ::"r"(ADDRESS(to)), "l"(from), "r"((int)copies));
}

template <int BYTES>
__device__ __forceinline__ void cp_async(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(ADDRESS(to)), "l"(from), "n"(BYTES));
}

__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

__device__ __forceinline__ unsigned round_tf32(float v) {
    unsigned bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
    return bits;
}

#if MATH == FP16
__device__ __forceinline__ unsigned pack(float low, float high) {
    unsigned both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

__device__ __forceinline__ float to_float(T v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
    return f;
}

__device__ __forceinline__ T from_float(float f) {
    T v;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f));
    return v;
}
#elif MATH == BF16
__device__ __forceinline__ unsigned pack(float low, float high) {
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

__device__ __forceinline__ float to_float(T v) {
    return __uint_as_float((unsigned)v << 16);
}

__device__ __forceinline__ T from_float(float f) {
    T v;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(f));
    return v;
}
#else
__device__ __forceinline__ float to_float(T v) {
    return v;
}

__device__ __forceinline__ T from_float(float f) {
    return f;
}
#endif

#endif  // __CUDACC__
