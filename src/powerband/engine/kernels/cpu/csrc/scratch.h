// Memory that a thread keeps between calls: it grows to the largest need and is kept until the thread ends.
#pragma once

#include <cstdlib>
#include <memory>

#include "simd.h"

namespace powerband {

// Declare one as `thread_local` per purpose. T is plain data; what `get` returns is uninitialised, aligned to 64 bytes
// and valid until the next `get`.
template <class T>
class Scratch {
   public:
    T* get(int64_t size) {
        if (size > size_) {
            const size_t bytes = (static_cast<size_t>(size) * sizeof(T) + 63) / 64 * 64;
            memory_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
            if (!memory_) std::abort();
            size_ = size;
        }
        return memory_.get();
    }

   private:
    struct Free {
        void operator()(T* p) const { std::free(p); }
    };
    std::unique_ptr<T, Free> memory_;
    int64_t size_ = 0;
};

}  // namespace powerband
