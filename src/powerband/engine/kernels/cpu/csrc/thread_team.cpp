#include "thread_team.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <system_error>
#include <thread>

#include "simd.h"

namespace powerband {
namespace {

constexpr auto kSpinTime = std::chrono::microseconds(300);  // a thread that found nothing to do so long falls asleep
constexpr int64_t kMaxThreads = 256;
constexpr int kSpinsPerLook = 64;                           // between two looks at the clock, some microseconds

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// The loop that is open, and how many threads are in it, in one word, so that to enter is one exchange:
//
//     generation << 32 | open << 31 | threads inside
//
// Fields of the loop are written while it is closed and no thread is inside.
class Team {
   public:
    static Team& instance() {
        static Team* team = [] {
            auto* made = new Team;  // lives as long as the process: so do its threads
            pthread_atfork(nullptr, nullptr, [] { instance().forget_threads(); });
            return made;
        }();
        return *team;
    }

    void run(int64_t count, int64_t threads, void (*task)(const void*, int64_t), const void* context) {
        if (busy_.exchange(true, std::memory_order_acquire)) {
            for (int64_t i = 0; i < count; ++i) task(context, i);
            return;
        }
        while (helpers_ < std::min(threads, kMaxThreads) - 1 && start_helper()) continue;
        seats_ = std::min(threads, helpers_ + 1);
        task_ = task, context_ = context;
        for (int64_t seat = 0; seat < seats_; ++seat) {
            shares_[seat].next.store(count * seat / seats_, std::memory_order_relaxed);
            shares_[seat].end = count * (seat + 1) / seats_;
        }
        state_.store(++generation_ << 32 | kOpen, std::memory_order_release);
        state_.notify_all();
        take_tasks(0);
        uint64_t state = state_.fetch_and(~kOpen, std::memory_order_acq_rel) & kInside;
        for (int spins = 1; state != 0; ++spins) {
            // Long waiting means that a thread has lost its core in a task: this one may be what it needs.
            spins % 4096 ? pause() : static_cast<void>(sched_yield());
            state = state_.load(std::memory_order_acquire) & kInside;
        }
        busy_.store(false, std::memory_order_release);
    }

   private:
    static constexpr uint64_t kOpen = 1ull << 31, kInside = kOpen - 1;

    // A thread's part of the tasks, each taken by the thread that counts it.
    struct alignas(64) Share {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };

    void take_tasks(int64_t seat) {
        const int64_t seats = seats_;
        for (int64_t k = 0; k < seats; ++k) {
            Share& share = shares_[(seat + k) % seats];
            for (int64_t i = share.next.fetch_add(1, std::memory_order_relaxed); i < share.end;
                 i = share.next.fetch_add(1, std::memory_order_relaxed))
                task_(context_, i);
        }
    }

    // False: the system has no thread to give, so that fewer compute.
    bool start_helper() {
        try {
            std::thread([this] { help(); }).detach();
        } catch (const std::system_error&) {
            return false;
        }
        ++helpers_;
        return true;
    }

    void help() {
        uint64_t seen = 0;  // the state when this thread last found nothing to do
        for (;;) {
            uint64_t state = wait_for_change(seen);
            seen = state;
            // Seats change only between loops: were these another loop's, the exchange would fail.
            const auto seat = static_cast<int64_t>(state & kInside) + 1;
            if ((state & kOpen) == 0 || seat >= seats_.load(std::memory_order_relaxed)) continue;
            if (!state_.compare_exchange_strong(state, state + 1, std::memory_order_acq_rel)) continue;
            take_tasks(seat);
            seen = state_.fetch_sub(1, std::memory_order_release) - 1;
        }
    }

    uint64_t wait_for_change(uint64_t seen) {
        const auto start = std::chrono::steady_clock::now();
        do {
            for (int i = 0; i < kSpinsPerLook; ++i) {
                const uint64_t state = state_.load(std::memory_order_acquire);
                if (state != seen) return state;
                pause();
            }
        } while (std::chrono::steady_clock::now() - start < kSpinTime);
        state_.wait(seen, std::memory_order_acquire);
        return state_.load(std::memory_order_acquire);
    }

    // In a process that was forked no thread but the caller exists.
    void forget_threads() {
        helpers_ = 0;
        state_.store(++generation_ << 32, std::memory_order_relaxed);
        busy_.store(false, std::memory_order_relaxed);
    }

    alignas(64) std::atomic<uint64_t> state_{0};
    alignas(64) void (*task_)(const void*, int64_t) = nullptr;
    const void* context_ = nullptr;
    std::atomic<int64_t> seats_{0};
    std::atomic<bool> busy_{false};
    uint64_t generation_ = 0;
    int64_t helpers_ = 0;
    Share shares_[kMaxThreads];
};

}  // namespace

void run_on_team(int64_t count, int64_t threads, void (*task)(const void* context, int64_t index), const void* context) {
    Team::instance().run(count, threads, task, context);
}

}  // namespace powerband
