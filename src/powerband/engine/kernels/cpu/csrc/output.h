// The tensors that operators return. Large ones come from a pool: memory fresh from the system is cleared page by page,
// which for the intermediate values of a long prefill costs more than computing them.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <vector>

#include "common.h"

namespace powerband {

// Blocks of memory in huge pages, reused when they are given back. There are never more than were in use
// at once, and as larger ones are asked for, they replace the smaller ones.
class OutputPool {
   public:
    struct Block {
        void* data;
        size_t bytes;
    };

    static OutputPool& instance() {
        static OutputPool* pool = new OutputPool;  // lives as long as the process: tensors may outlast everything else
        return *pool;
    }

    Block take(size_t bytes) {
        const std::lock_guard guard(mutex_);
        const auto fits = std::lower_bound(free_.begin(), free_.end(), bytes, [](const Block& block, size_t wanted) {
            return block.bytes < wanted;
        });
        if (fits != free_.end()) {
            const Block block = *fits;
            free_.erase(fits);
            return block;
        }
        for (const Block& small : free_) munmap(small.data, small.bytes);
        free_.clear();
        return fresh((bytes + kHugePage - 1) / kHugePage * kHugePage);
    }

    void give_back(Block block) {
        const std::lock_guard guard(mutex_);
        const auto place = std::upper_bound(free_.begin(), free_.end(), block.bytes, [](size_t bytes, const Block& other) {
            return bytes < other.bytes;
        });
        free_.insert(place, block);
    }

   private:
    static constexpr size_t kHugePage = 2 << 20;

    static Block fresh(size_t bytes) {
        void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        check(data != MAP_FAILED, "out of memory");
#ifdef MADV_HUGEPAGE
        madvise(data, bytes, MADV_HUGEPAGE);
#endif
        return {data, bytes};
    }

    std::mutex mutex_;
    std::vector<Block> free_;  // by size
};

// An uninitialised contiguous tensor of `like`'s type.
inline Tensor new_output(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
    constexpr size_t kLarge = 1 << 20;
    size_t bytes = like.element_size();
    for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
    if (bytes < kLarge) return torch::stable::new_empty(like, sizes);
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
    const OutputPool::Block block = OutputPool::instance().take(bytes);
    return torch::stable::from_blob(block.data, sizes, strides, like.device(), like.scalar_type(),
                                    [block](void*) { OutputPool::instance().give_back(block); });
}

}  // namespace powerband
