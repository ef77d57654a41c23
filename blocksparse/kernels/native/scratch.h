// Scratch memory.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

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

// What body returns, or 1: there is no memory.
template <class Body> int guarded(Body body) {
    try {
        return body();
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace
