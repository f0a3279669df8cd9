// The threads that share out an operator's tasks. They are our own, because torch's wait for each other at the end of
// every loop: where another process takes a core, each of the hundreds of loops of a step waits until that thread has
// its turn. Here a late thread finds the work done, and no other waits for it:
//
//     caller   ├ task 0 ┼ task 1 ┼ task 2 ┼ task 5 ┤ closed: waits only for those that are in a task
//     thread 1 ├ task 3 ┼ task 4 ───────────────┤
//     thread 2                                        ├ comes, finds it closed, waits for the next loop
//
// Each has a share of consecutive tasks and, after it, takes what is left of the others'. So what a thread reads mostly
// lies together, and a task may fetch what the next one begins with.
#pragma once

#include <cstdint>

namespace powerband {

// Runs task(context, 0) … task(context, count - 1), each once, on at most `threads` threads (and at most 256), the caller
// among them.
// Within a task, or while another caller has the team, everything runs in the caller. Tasks must not throw.
void run_on_team(int64_t count, int64_t threads, void (*task)(const void* context, int64_t index), const void* context);

}  // namespace powerband
