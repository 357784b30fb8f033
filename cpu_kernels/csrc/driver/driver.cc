// Runs every check at every level of this processor: driver [cases of each kind] [first seed].
//
// A failure prints its level, check and seed; `driver 1 <seed>` runs that one again.

#include "driver.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "../dispatch.h"

// Null where the compiler left a level out.
#define QUIRE_DECLARE(level)                                                          \
  namespace quire::level {                                                            \
  __attribute__((weak)) void check_conversions(driver::Case& result, uint64_t seed);  \
  }
QUIRE_DECLARE(amx)
QUIRE_DECLARE(avx512_bf16)
QUIRE_DECLARE(avx512)
QUIRE_DECLARE(avx2)
QUIRE_DECLARE(neon)
QUIRE_DECLARE(portable)

namespace quire::driver {
namespace {

int num_failed_cases = 0;

void (*conversions_of(const std::string& level))(Case&, uint64_t) {
  if (level == "amx") return amx::check_conversions;
  if (level == "avx512_bf16") return avx512_bf16::check_conversions;
  if (level == "avx512") return avx512::check_conversions;
  if (level == "avx2") return avx2::check_conversions;
  if (level == "neon") return neon::check_conversions;
  return portable::check_conversions;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

Threads::Threads(int count) {
  for (int i = 0; i < count; ++i) threads_.emplace_back([this] { serve(); });
}

Threads::~Threads() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_ending_ = true;
  }
  wakes_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Threads::schedule(void (*task)(void*), void* data) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    tasks_.emplace_back(task, data);
  }
  wakes_.notify_one();
}

void Threads::serve() {
  for (;;) {
    std::unique_lock<std::mutex> lock(mutex_);
    wakes_.wait(lock, [this] { return is_ending_ || !tasks_.empty(); });
    if (tasks_.empty()) return;
    const auto [task, data] = tasks_.front();
    tasks_.pop_front();
    lock.unlock();
    task(data);
  }
}

Watchdog::Watchdog(const char* what, int seconds)
    : thread_([this, what, seconds] {
        std::unique_lock<std::mutex> lock(mutex_);
        if (wakes_.wait_for(lock, std::chrono::seconds(seconds), [this] { return is_done_; })) return;
        std::printf("FAILED %s: not done after %d seconds\n", what, seconds);
        std::fflush(stdout);
        std::_Exit(1);
      }) {}

Watchdog::~Watchdog() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_done_ = true;
  }
  wakes_.notify_all();
  thread_.join();
}

Case::~Case() {
  if (!has_failed()) return;
  ++num_failed_cases;
  std::printf("FAILED %s %s, seed %llu: %s\n", level_, check_,
              static_cast<unsigned long long>(seed_), failure_.c_str());
  std::fflush(stdout);
}

void Case::fail(const char* format, ...) {
  if (has_failed()) return;
  char text[300];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  failure_ = text;
}

void Case::expect_near(double is, double should, double tolerance, const char* what, int64_t at) {
  if (std::abs(is - should) <= tolerance) return;  // false of NaN
  fail("%s[%lld] is %.9g and should be %.9g within %.2g", what, static_cast<long long>(at), is, should,
       tolerance);
}

void Case::expect_same(const void* is, const void* should, size_t bytes, const char* what) {
  if (bytes == 0 || std::memcmp(is, should, bytes) == 0) return;
  const auto* a = static_cast<const uint8_t*>(is);
  const auto* b = static_cast<const uint8_t*>(should);
  const auto at = static_cast<size_t>(std::mismatch(a, a + bytes, b).first - a);
  fail("%s differs at byte %zu of %zu", what, at, bytes);
}

int Case::num_failed() { return num_failed_cases; }

int run(int num_cases, uint64_t first_seed) {
  Threads pool(4);
  check_pack(first_seed);
  check_group_sums(first_seed);
  check_teams(first_seed);
  const std::pair<const char*, void (*)(const Kernels&, uint64_t, Threads&)> checks[] = {
      {"linear", check_linear},
      {"mlp", check_mlp},
      {"heads", check_head},
      {"attention", check_attention}};
  for (const Kernels* level : levels()) {
    const auto start = std::chrono::steady_clock::now();
    const Watchdog watchdog(level->name, 600);
    {
      Case result(level->name, "conversions", first_seed);
      conversions_of(level->name)(result, first_seed);
    }
    std::printf("%-12s", level->name);
    for (const auto& [name, check] : checks) {
      for (int i = 0; i < num_cases; ++i) check(*level, first_seed + i, pool);
      std::printf(" %d of %s,", num_cases, name);
    }
    std::printf(" %.1f s\n", seconds_since(start));
    std::fflush(stdout);
  }
  std::printf(Case::num_failed() == 0 ? "all passed\n" : "%d cases failed\n", Case::num_failed());
  return Case::num_failed() == 0 ? 0 : 1;
}

}  // namespace quire::driver

int main(int count, char** arguments) {
  const int num_cases = count > 1 ? std::atoi(arguments[1]) : 100;
  const uint64_t first_seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1;
  return quire::driver::run(num_cases, first_seed);
}
