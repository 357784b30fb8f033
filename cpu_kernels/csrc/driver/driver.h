// What the checks of the driver share: drawn numbers, threads of their own, and how one fails.
//
// The driver runs the kernels without XLA and Python, so that a sanitizer sees nothing else.

#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <initializer_list>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../kernels.h"

namespace quire::driver {

// The same numbers of a seed everywhere (splitmix64).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  int64_t between(int64_t first, int64_t last) {
    return first + static_cast<int64_t>(bits() % static_cast<uint64_t>(last - first + 1));
  }
  bool chance(int percent) { return between(0, 99) < percent; }
  float number() { return static_cast<float>(static_cast<int64_t>(bits() >> 40) - (1 << 23)) / (1 << 23); }

  template <typename T>
  T one_of(std::initializer_list<T> choices) {
    return choices.begin()[between(0, static_cast<int64_t>(choices.size()) - 1)];
  }

 private:
  uint64_t state_;
};

// A pool as XLA's: tasks wait in a queue for one of its threads. Runs what is left before it ends.
class Threads : public Scheduler {
 public:
  explicit Threads(int count);
  ~Threads() override;
  void schedule(void (*task)(void*), void* data) override;

 private:
  void serve();

  std::mutex mutex_;
  std::condition_variable wakes_;
  std::deque<std::pair<void (*)(void*), void*>> tasks_;
  bool is_ending_ = false;
  std::vector<std::thread> threads_;
};

// Ends the process with an error if it lives too long.
class Watchdog {
 public:
  Watchdog(const char* what, int seconds);
  ~Watchdog();

 private:
  std::mutex mutex_;
  std::condition_variable wakes_;
  bool is_done_ = false;
  std::thread thread_;
};

// Of one check of one seed at one level. Its destructor prints the first failure.
class Case {
 public:
  Case(const char* level, const char* check, uint64_t seed)
      : level_(level), check_(check), seed_(seed) {}
  ~Case();

  // printf's arguments; the first failure alone is kept.
  void fail(const char* format, ...) __attribute__((format(printf, 2, 3)));
  void expect_near(double is, double should, double tolerance, const char* what, int64_t at);
  // Bit for bit.
  void expect_same(const void* is, const void* should, size_t bytes, const char* what);
  bool has_failed() const { return !failure_.empty(); }
  void describe(const std::string& shapes) { failure_ += " (" + shapes + ")"; }

  static int num_failed();

 private:
  const char* const level_;
  const char* const check_;
  const uint64_t seed_;
  std::string failure_;
};

void* allocate_guarded(size_t bytes);
void free_guarded(void* p, size_t bytes);

// Memory that ends where a page ends, with nothing behind it: an access past the end is fatal, also
// by instructions that no sanitizer watches. With 16 bits to an element it is not aligned to more.
template <typename T>
struct Guarded {
  using value_type = T;

  Guarded() = default;
  template <typename U>
  explicit Guarded(const Guarded<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(allocate_guarded(count * sizeof(T))); }
  void deallocate(T* p, size_t count) { free_guarded(p, count * sizeof(T)); }
  friend bool operator==(const Guarded&, const Guarded&) { return true; }
  friend bool operator!=(const Guarded&, const Guarded&) { return false; }
};

#if defined(__SANITIZE_ADDRESS__)
template <typename T>
using Memory = std::vector<T>;
#else
template <typename T>
using Memory = std::vector<T, Guarded<T>>;
#endif

// Numbers in any dtype, each with the value it really has.
struct Numbers {
  Dtype dtype = Dtype::kF32;
  Memory<uint8_t> bytes;

  Numbers() = default;
  Numbers(Dtype dtype, int64_t count) : dtype(dtype), bytes(count * item()) {}

  int64_t item() const { return dtype == Dtype::kF32 ? 4 : 2; }
  int64_t count() const { return static_cast<int64_t>(bytes.size()) / item(); }
  void* data() { return bytes.data(); }
  const void* data() const { return bytes.data(); }
  float get(int64_t at) const;
  void set(int64_t at, float value);
  void fill(Random& random, float scale);
  // Every number NaN.
  void spoil() { bytes.assign(bytes.size(), 0xff); }
};

// By the definition of the formats, one number at a time: nothing of simd.h.
uint16_t round_to_bf16(float value);
uint16_t round_to_f16(float value);
float widen_bf16(uint16_t bits);
float widen_f16(uint16_t bits);
// Half the distance between neighbours near `value`.
double rounding_error(Dtype dtype, double value);

void check_linear(const Kernels& level, uint64_t seed, Threads& pool);
void check_mlp(const Kernels& level, uint64_t seed, Threads& pool);
void check_head(const Kernels& level, uint64_t seed, Threads& pool);
void check_attention(const Kernels& level, uint64_t seed, Threads& pool);
void check_pack(uint64_t seed);
void check_group_sums(uint64_t seed);
void check_teams(uint64_t seed);

}  // namespace quire::driver
