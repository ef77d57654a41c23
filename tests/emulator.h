// Runs the CUDA C++ of blocksparse/kernels on a CPU: given to g++ with -include, in front of the unchanged sources.
//
// A thread is a fibre. Fibres give way only at barriers and warp operations. Which goes next is drawn at random, the
// lanes of one warp at times far ahead of the others': every seed is another order, so that a missing barrier changes a
// result. CTAs run one after the other in random order. What a GPU leaves undefined is poisoned: shared memory starts
// as NaN, a cp.async writes NaN at once and its data at the wait. Every buffer lies against a page that faults, and so
// does shared memory; under -fsanitize=address, between red zones that are exact to the byte. Barriers that not all
// threads reach, operations that not all lanes of a warp reach, and misaligned addresses are reported. One thing stays
// unseen: operations of a warp order its memory here, which on a GPU only __syncwarp does.

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define FP16 0
#define BF16 1
#define TF32 2
#define FP32 3

using std::max;
using std::min;

static unsigned char* shared;  // the CTA's dynamic shared memory

namespace emulator {

// ---------------------------------------------------------------------- faults

static char message[512];
static sigjmp_buf out;  // of the whole launch

[[noreturn]] __attribute__((format(printf, 1, 2))) static void fail(const char* format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    siglongjmp(out, 1);
}

static void on_fault(int, siginfo_t* info, void*) {
    fail("out of bounds: a read or write at %p, outside every buffer", info->si_addr);
}

#if defined(__SANITIZE_ADDRESS__)
// Memory of `bytes` between red zones, poisoned with NaN.
struct Fenced {
    std::vector<unsigned char> bytes_;
    unsigned char* data;

    Fenced(size_t bytes, bool) : bytes_(bytes, 0xff), data(bytes_.data()) {}
};
#else
// Memory of `bytes` that ends (or begins) at a page that faults, poisoned with NaN.
struct Fenced {
    static constexpr size_t PAGE = 4096, ALIGN = 16;
    unsigned char* pages;
    size_t size;
    unsigned char* data;

    Fenced(size_t bytes, bool at_end) {
        const size_t inside = (bytes + PAGE - 1) / PAGE * PAGE;
        size = inside + 2 * PAGE;
        pages = (unsigned char*)mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (inside) mprotect(pages + PAGE, inside, PROT_READ | PROT_WRITE);
        memset(pages + PAGE, 0xff, inside);
        data = pages + PAGE + (at_end ? inside - (bytes + ALIGN - 1) / ALIGN * ALIGN : 0);
    }
    Fenced(Fenced&& other) : pages(other.pages), size(other.size), data(other.data) { other.pages = nullptr; }
    ~Fenced() {
        if (pages) munmap(pages, size);
    }
};
#endif

// ---------------------------------------------------------------------- fibres

static uint64_t state;

static uint32_t draw(uint32_t below) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)((state >> 16) % below);
}

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

struct Copy {  // a cp.async on its way
    void* to;
    const void* from;  // null: zeros
    int bytes;
};

#if defined(__x86_64__)
typedef void* Context;
extern "C" void emulator_switch(void** from, void* to);
asm(".text\n.local emulator_switch\nemulator_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");

static void change(Context& from, Context& to) {
    emulator_switch(&from, to);
}

static void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
    void** top = (void**)((uintptr_t)(stack + size) & ~(uintptr_t)15);
    *--top = nullptr;  // where entry would return to: it never does
    *--top = (void*)entry;
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    context = top;
}
#else
typedef ucontext_t Context;

static void change(Context& from, Context& to) {
    swapcontext(&from, &to);
}

static void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}
#endif

struct Thread {
    Context context;
    char* stack;
    Index index;
    std::vector<Copy> copies;
};

struct Warp {
    std::vector<Thread*> ready;  // neither waiting nor done
    int arrived = 0;             // at one operation of the whole warp
    const void* operation = nullptr;
    int line = 0;  // where the first lane stands that came to it, and at which of a line's unrolled copies
    ptrdiff_t copy = 0;
    void* lanes[32];
};

constexpr size_t STACK = 256 << 10;
static std::vector<Thread> threads;
static std::vector<Warp> warps;
static std::vector<Warp*> order;  // the first that is ready goes on
static Thread* current;
static Context scheduler;
static int waiting, waiting_line, done;  // at the CTA's barrier
static size_t shared_bytes;
static Index block, blocks, block_size;
static void (*body)(void*);
static void* body_argument;

static void wake(int id) {
    warps[id / 32].ready.push_back(&threads[id]);
}

// The sanitizer has to know of every change of stacks.
#if defined(__SANITIZE_ADDRESS__)
static const void* scheduler_stack;
static size_t scheduler_size;

static void resume(Thread* thread) {
    void* fake;
    __sanitizer_start_switch_fiber(&fake, thread->stack, STACK);
    change(scheduler, thread->context);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

static void arrive(void* fake) {
    __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_size);
}

static void give_way() {
    void* fake;
    __sanitizer_start_switch_fiber(&fake, scheduler_stack, scheduler_size);
    change(current->context, scheduler);
    arrive(fake);
}

static void forget_frames(char* stack) {
    __asan_unpoison_memory_region(stack, STACK);
}
#else
static void resume(Thread* thread) {
    change(scheduler, thread->context);
}

static void arrive(void*) {}

static void give_way() {
    change(current->context, scheduler);
}

static void forget_frames(char*) {}
#endif

static void entry() {
    arrive(nullptr);
    body(body_argument);
    ++done;
    give_way();
}

static void barrier(int line) {
    if (waiting && waiting_line != line) {
        fail("line %d: __syncthreads() while others wait at that of line %d", line, waiting_line);
    }
    waiting_line = line;
    if (++waiting < (int)threads.size()) return give_way();
    waiting = 0;
    for (size_t i = 0; i < threads.size(); ++i) {
        if (&threads[i] != current) wake((int)i);
    }
}

// `act` on the 32 lanes' `mine`, once all of the warp have come to this operation. An .aligned one says where it stands:
// it is undefined where lanes come to it by different ways.
template <class Mine>
static void together(Mine& mine, void (*act)(Mine* const*), int line = 0, const void* result = nullptr) {
    const int id = (int)(current - threads.data()), lane = id % 32;
    Warp& warp = warps[id / 32];
    if (warp.arrived && warp.operation != (const void*)act) fail("the lanes of a warp meet at different operations");
#if defined(__SANITIZE_ADDRESS__)
    const ptrdiff_t copy = 0;
#else
    const ptrdiff_t copy = result ? (const char*)result - current->stack : 0;  // all lanes have the same frames
#endif
    if (warp.arrived && (warp.line != line || warp.copy != copy)) {
        fail("line %d: an .aligned operation while lanes of the warp wait at another, that of line %d", line, warp.line);
    }
    warp.operation = (const void*)act, warp.line = line, warp.copy = copy;
    warp.lanes[lane] = &mine;
    if (++warp.arrived < 32) return give_way();
    warp.arrived = 0;
    act((Mine* const*)warp.lanes);
    for (int i = 0; i < 32; ++i) {
        if (i != lane) wake(id - lane + i);
    }
}

// The next fibre, or null. Warps keep their turns for a while, so that one may run on to the next barrier alone.
static Thread* next() {
    if (draw(200) == 0) std::swap(order[draw((uint32_t)order.size())], order[0]);
    const bool any = draw(8) == 0;
    const size_t first = any ? draw((uint32_t)order.size()) : 0;
    for (size_t i = 0; i < order.size(); ++i) {
        std::vector<Thread*>& ready = order[(first + i) % order.size()]->ready;
        if (ready.empty()) continue;
        std::swap(ready[draw((uint32_t)ready.size())], ready.back());
        Thread* thread = ready.back();
        ready.pop_back();
        return thread;
    }
    return nullptr;
}

static void run_block(char* stacks) {
    if (shared_bytes) memset(shared, 0xff, shared_bytes);
    waiting = done = 0;
    order.clear();
    for (Warp& warp : warps) {
        warp.arrived = 0;
        warp.ready.clear();
        order.push_back(&warp);
        std::swap(order[draw((uint32_t)order.size())], order.back());
    }
    for (size_t i = 0; i < threads.size(); ++i) {
        threads[i].copies.clear();
        threads[i].stack = stacks + i * STACK;
        forget_frames(threads[i].stack);
        prepare(threads[i].context, threads[i].stack, STACK, entry);
        wake((int)i);
    }
    while ((current = next())) resume(current);
    if (done < (int)threads.size()) {
        int lanes = 0;
        for (const Warp& warp : warps) lanes += warp.arrived;
        fail("deadlock: %d threads wait at __syncthreads(), %d at an operation of their warp, %d have left", waiting,
             lanes, done);
    }
}

// ---------------------------------------------------------------------- a launch

template <class... Args, size_t... I>
static void unpack(void (*kernel)(Args...), void** args, std::index_sequence<I...>) {
    kernel(*(std::remove_reference_t<Args>*)args[I]...);
}

// Every CTA of a launch. args[i] points at argument i; where bytes[i] > 0 it is a pointer to that many bytes.
// Returns what went wrong, or null.
template <class... Args>
static const char* launch(
    void (*kernel)(Args...), unsigned grid, unsigned cta, size_t shared_size, uint64_t seed, int count, void** args,
    const size_t* bytes) {
    if (count != (int)sizeof...(Args)) return "the kernel has another number of arguments";
    if (cta % 32) return "the CTA is no whole number of warps";
    state = seed * 0x9e3779b97f4a7c15u + 1;
    draw(2);
    const bool at_end = seed % 2 == 0;
    std::vector<Fenced> buffers;
    std::vector<void*> pointers(count), given(args, args + count);
    for (int i = 0; i < count; ++i) {
        buffers.emplace_back(bytes[i], at_end);
        if (!bytes[i]) continue;
        memcpy(buffers[i].data, *(void**)args[i], bytes[i]);
        pointers[i] = buffers[i].data;
        given[i] = &pointers[i];
    }
    Fenced memory(shared_size, at_end);
    shared = memory.data;
    shared_bytes = shared_size;
    threads.assign(cta, Thread());
    warps.assign(cta / 32, Warp());
    for (unsigned i = 0; i < cta; ++i) threads[i].index.x = i;
    block_size.x = cta, blocks.x = grid;
    auto call = [&] { unpack(kernel, given.data(), std::index_sequence_for<Args...>()); };
    body = [](void* f) { (*(decltype(call)*)f)(); };
    body_argument = &call;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    char* stacks = (char*)mmap(nullptr, cta * STACK, PROT_READ | PROT_WRITE, flags, -1, 0);
    struct sigaction action = {}, old_segv, old_bus;
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, &old_segv);
    sigaction(SIGBUS, &action, &old_bus);
    volatile bool failed = true;
    if (!sigsetjmp(out, 1)) {
        std::vector<unsigned> order(grid);
        std::iota(order.begin(), order.end(), 0u);
        for (unsigned i = grid; i > 1; --i) std::swap(order[i - 1], order[draw(i)]);
        for (unsigned b : order) {
            block.x = b;
            run_block(stacks);
        }
        failed = false;
    }
    sigaction(SIGSEGV, &old_segv, nullptr);
    sigaction(SIGBUS, &old_bus, nullptr);
    munmap(stacks, cta * STACK);
    for (int i = 0; i < count; ++i) {
        if (bytes[i]) memcpy(*(void**)args[i], buffers[i].data, bytes[i]);
    }
    return failed ? message : nullptr;
}

static const unsigned char* in_shared(const void* p, size_t bytes, const char* what) {
    const unsigned char* at = (const unsigned char*)p;
    if (at < shared || at + bytes > shared + shared_bytes) fail("%s: an address outside shared memory", what);
    if ((at - shared) % bytes) fail("%s: an address of shared memory that is no multiple of %zu", what, bytes);
    return at;
}

}  // namespace emulator

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::block)
#define gridDim (emulator::blocks)
#define blockDim (emulator::block_size)

// ---------------------------------------------------------------------- CUDA's own functions

#define __syncthreads() emulator::barrier(__LINE__)

static inline int __popc(unsigned v) {
    return __builtin_popcount(v);
}

template <class To, class From>
static inline To bits_of(From from) {
    To to;
    static_assert(sizeof to == sizeof from, "");
    memcpy(&to, &from, sizeof to);
    return to;
}

static inline unsigned __float_as_uint(float v) {
    return bits_of<unsigned>(v);
}

static inline float __uint_as_float(unsigned v) {
    return bits_of<float>(v);
}

static inline unsigned atomicOr(unsigned* to, unsigned v) {
    const unsigned old = *to;
    *to |= v;
    return old;
}

static inline int atomicAdd(int* to, int v) {
    const int old = *to;
    *to += v;
    return old;
}

static inline int __ffs(unsigned v) {
    return __builtin_ffs((int)v);
}

struct int2 {
    int x, y;
};
struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace emulator {
template <class V>
struct Shuffle {
    V value;
    int from;
    V result;
};

template <class V>
static V shuffle(V value, int from) {
    Shuffle<V> mine = {value, from, value};
    together<Shuffle<V>>(mine, [](Shuffle<V>* const* lanes) {
        for (int i = 0; i < 32; ++i) {
            const int from = lanes[i]->from;
            if (from >= 0 && from < 32) lanes[i]->result = lanes[from]->value;
        }
    });
    return mine.result;
}

struct Meeting {};

struct Vote {
    bool value;
    unsigned result;
};
}  // namespace emulator

// The kernels call these with whole warps.
template <class V>
static V __shfl_sync(unsigned, V v, int from) {
    return emulator::shuffle(v, from & 31);
}

template <class V>
static V __shfl_up_sync(unsigned, V v, int delta) {
    return emulator::shuffle(v, (int)threadIdx.x % 32 - delta);
}

template <class V>
static V __shfl_xor_sync(unsigned, V v, int mask) {
    return emulator::shuffle(v, ((int)threadIdx.x % 32) ^ mask);
}

static inline unsigned __ballot_sync(unsigned, bool v) {
    emulator::Vote mine = {v, 0};
    emulator::together<emulator::Vote>(mine, [](emulator::Vote* const* lanes) {
        unsigned votes = 0;
        for (int i = 0; i < 32; ++i) votes |= (unsigned)lanes[i]->value << i;
        for (int i = 0; i < 32; ++i) lanes[i]->result = votes;
    });
    return mine.result;
}

static inline void __syncwarp() {
    emulator::Meeting mine;
    emulator::together<emulator::Meeting>(mine, [](emulator::Meeting* const*) {});
}

// ---------------------------------------------------------------------- instructions.cu's wrappers

namespace emulator {
struct Rows {
    const void* row;
    unsigned (*to)[4];
};

// Matrix i has its eight rows of 16 bytes at the addresses of lanes 8i .. 8i + 7.
template <bool TRANS>
static void ldmatrix(Rows* const* lanes) {
    uint16_t rows[32][8];
    for (int i = 0; i < 32; ++i) memcpy(rows[i], in_shared(lanes[i]->row, 16, "ldmatrix"), 16);
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
            const int r = lane / 4, c = lane % 4 * 2;
            const uint16_t low = TRANS ? rows[i * 8 + c][r] : rows[i * 8 + r][c];
            const uint16_t high = TRANS ? rows[i * 8 + c + 1][r] : rows[i * 8 + r][c + 1];
            (*lanes[lane]->to)[i] = low | (unsigned)high << 16;
        }
    }
}

template <int MATH_>
static float widen(uint16_t v) {
    return MATH_ == FP16 ? (float)bits_of<_Float16>(v) : __uint_as_float((unsigned)v << 16);
}

struct Fragments {
    float (*c)[4];
    const unsigned (*a)[4];
    const unsigned (*b)[2];
};

template <int MATH_>
static void multiply_add(Fragments* const* lanes) {
    constexpr int K = MATH_ == TF32 ? 8 : 16;
    float a[16][K], b[8][K];
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) {
            const unsigned v = (*lanes[lane]->a)[i];
            if (MATH_ == TF32) {  // the tensor core does not see the lower 13 bits
                a[g + i % 2 * 8][t + i / 2 * 4] = __uint_as_float(v & ~0x1fffu);
            } else {
                a[g + i % 2 * 8][(t * 2 + i / 2 * 8) % K] = widen<MATH_>(v & 0xffff);
                a[g + i % 2 * 8][(t * 2 + 1 + i / 2 * 8) % K] = widen<MATH_>(v >> 16);
            }
        }
        for (int i = 0; i < 2; ++i) {
            const unsigned v = (*lanes[lane]->b)[i];
            if (MATH_ == TF32) {
                b[g][t + i * 4] = __uint_as_float(v & ~0x1fffu);
            } else {
                b[g][(t * 2 + i * 8) % K] = widen<MATH_>(v & 0xffff);
                b[g][(t * 2 + 1 + i * 8) % K] = widen<MATH_>(v >> 16);
            }
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
            const float *row = a[lane / 4 + i / 2 * 8], *column = b[lane % 4 * 2 + i % 2];
            float sum = 0;
            for (int k = 0; k < K; ++k) sum += row[k] * column[k];
            (*lanes[lane]->c)[i] += sum;
        }
    }
}
}  // namespace emulator

namespace emulator {
template <bool TRANS>
static void load_matrices(unsigned (&d)[4], const void* row, int line) {
    Rows mine = {row, &d};
    together<Rows>(mine, ldmatrix<TRANS>, line, &d);
}

template <int MATH_>
static void mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], int line) {
    Fragments mine = {&c, &a, &b};
    together<Fragments>(mine, multiply_add<MATH_>, line, &c);
}

template <int MATH_, class V>
static float to_float(V v) {
    if constexpr (sizeof v == 4) return v;
    else return widen<MATH_>(v);
}

template <int MATH_>
static auto from_float(float f) {
    if constexpr (MATH_ == FP16) {
        return bits_of<unsigned short>((_Float16)f);
    } else if constexpr (MATH_ == BF16) {  // to nearest, ties to even
        const unsigned bits = __float_as_uint(f);
        return (unsigned short)(f != f ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    } else {
        return f;
    }
}
}  // namespace emulator

static inline void cp_async_or_zeros(void* to, const void* from, bool copies) {
    emulator::in_shared(to, 16, "cp.async");
    if ((uintptr_t)from % 16) emulator::fail("cp.async: a global address that is no multiple of 16");
    memset(to, 0xff, 16);
    emulator::current->copies.push_back({to, copies ? from : nullptr, 16});
}

template <int BYTES>
static void cp_async(void* to, const void* from) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
    emulator::in_shared(to, BYTES, "cp.async");
    if ((uintptr_t)from % BYTES) emulator::fail("cp.async: a global address that is no multiple of %d", BYTES);
    memset(to, 0xff, BYTES);
    emulator::current->copies.push_back({to, from, BYTES});
}

static inline void cp_async_wait() {
    for (const emulator::Copy& copy : emulator::current->copies) {
        if (copy.from) memcpy(copy.to, copy.from, copy.bytes);
        else memset(copy.to, 0, copy.bytes);
    }
    emulator::current->copies.clear();
}

static inline unsigned round_tf32(float v) {  // to nearest, ties away from zero
    return (__float_as_uint(v) + 0x1000u) & ~0x1fffu;
}

// What depends on -D comes in through macros, so that one precompiled header serves every specialisation.
#define ldmatrix4(d, ...) emulator::load_matrices<false>(d, (__VA_ARGS__), __LINE__)
#define ldmatrix4_trans(d, ...) emulator::load_matrices<true>(d, (__VA_ARGS__), __LINE__)
#define mma(c, a, b) emulator::mma<MATH>(c, a, b, __LINE__)
#define to_float(v) emulator::to_float<MATH>(v)
#define from_float(v) emulator::from_float<MATH>(v)
#define pack(low, high) ((unsigned)from_float(low) | (unsigned)from_float(high) << 16)
