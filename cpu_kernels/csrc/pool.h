// Work shared by the calling thread and whichever helpers start in time.
//
// A handler must never wait for a task that has not started: XLA runs handlers on the very pool
// that would have to start it. So chunks are claimed from a counter, the caller claims as well, and
// waits only for chunks that a running thread has claimed.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace quire {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Where helpers come from: XLA's pool, or a test's own threads.
class Scheduler {
 public:
  virtual ~Scheduler() = default;
  virtual void schedule(void (*task)(void*), void* data) = 0;
};

// One loop over chunks. Outlives the call that made it: a helper that comes late finds no chunk left.
class Loop {
 public:
  Loop(int64_t num_chunks, void (*run)(void*, int64_t), void* context)
      : num_chunks_(num_chunks), run_(run), context_(context) {}

  void work() {
    for (;;) {
      const int64_t chunk = next_.fetch_add(1, std::memory_order_relaxed);
      if (chunk >= num_chunks_) return;
      run_(context_, chunk);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  void wait() const {
    for (int spins = 0; done_.load(std::memory_order_acquire) < num_chunks_; ++spins) {
      relax();
      // A helper that the system has put aside needs a processor to finish its chunk.
      if (spins > kSpinsBeforeYield) std::this_thread::yield();
    }
  }

 private:
  static constexpr int kSpinsBeforeYield = 2000;

  const int64_t num_chunks_;
  std::atomic<int64_t> next_{0};
  std::atomic<int64_t> done_{0};
  void (*const run_)(void*, int64_t);
  void* const context_;
};

// The helpers of this process. One that has finished looks out for the next loop for a moment before
// it returns to its pool: to wake a sleeping thread takes as long as a small product. The moment is
// longer than the host and the sampler take between two steps.
class Crew {
 public:
  static Crew& instance() {
    static Crew* crew = new Crew;  // never destroyed: helpers may outlive static objects
    return *crew;
  }

  // Offers a loop to those who look out, and asks the scheduler for the others that are wanted.
  void post(Scheduler& scheduler, const std::shared_ptr<Loop>& loop, int64_t helpers) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      posted_ = loop;
      epoch_.fetch_add(1, std::memory_order_release);
    }
    for (int64_t missing = helpers - here_.load(std::memory_order_relaxed); missing > 0; --missing) {
      here_.fetch_add(1, std::memory_order_relaxed);
      scheduler.schedule([](void* crew) { static_cast<Crew*>(crew)->help(); }, this);
    }
  }

  void withdraw(const std::shared_ptr<Loop>& loop) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (posted_ == loop) posted_ = nullptr;
  }

 private:
  static constexpr std::chrono::microseconds kLookout{1000};

  void help() {
    uint64_t seen = 0;
    auto idle_since = std::chrono::steady_clock::now();
    for (int spins = 0;; ++spins) {
      const uint64_t now = epoch_.load(std::memory_order_acquire);
      if (now != seen) {
        seen = now;
        std::shared_ptr<Loop> loop;
        {
          const std::lock_guard<std::mutex> lock(mutex_);
          loop = posted_;
        }
        if (loop) loop->work();
        idle_since = std::chrono::steady_clock::now();
      }
      relax();
      if (spins % 16 == 0 && std::chrono::steady_clock::now() - idle_since > kLookout) break;
    }
    here_.fetch_sub(1, std::memory_order_relaxed);
  }

  std::mutex mutex_;
  std::shared_ptr<Loop> posted_;
  std::atomic<uint64_t> epoch_{1};
  std::atomic<int64_t> here_{0};  // helpers that work, look out, or were asked for
};

// Runs loops over chunks on the caller and up to num_threads - 1 helpers.
class Team {
 public:
  Team(Scheduler& scheduler, int num_threads) : scheduler_(scheduler), num_threads_(num_threads) {}

  int num_threads() const { return num_threads_; }

  // body(chunk) for each chunk in [0, num_chunks), in any order and at once; returns when all ran.
  template <typename Body>
  void run(int64_t num_chunks, const Body& body) {
    const int64_t helpers = std::min<int64_t>(num_threads_, num_chunks) - 1;
    if (helpers <= 0) {
      for (int64_t chunk = 0; chunk < num_chunks; ++chunk) body(chunk);
      return;
    }
    const auto loop = std::make_shared<Loop>(
        num_chunks, [](void* context, int64_t chunk) { (*static_cast<const Body*>(context))(chunk); },
        const_cast<Body*>(&body));
    Crew::instance().post(scheduler_, loop, helpers);
    loop->work();
    Crew::instance().withdraw(loop);
    loop->wait();
  }

  // body(begin, end) over pieces of [0, count), each a multiple of `grain` long but the last.
  template <typename Body>
  void split(int64_t count, int64_t grain, int64_t pieces_per_thread, const Body& body) {
    const int64_t grains = (count + grain - 1) / grain;
    const int64_t wanted = num_threads_ == 1 ? 1 : num_threads_ * pieces_per_thread;
    const int64_t pieces = std::min(grains, wanted);
    run(pieces, [&](int64_t piece) {
      const int64_t begin = piece * grains / pieces * grain;
      const int64_t end = std::min(count, (piece + 1) * grains / pieces * grain);
      body(begin, end);
    });
  }

 private:
  Scheduler& scheduler_;
  const int num_threads_;
};

}  // namespace quire
