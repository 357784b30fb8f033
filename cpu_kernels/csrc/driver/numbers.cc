// Formats of numbers by their definition, slowly: what the kernels' conversions are compared with. And
// the memory that the numbers are in.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>

#include "driver.h"

namespace quire::driver {
namespace {

// `value` in a format of `mantissa` explicit bits and exponents from `lowest` to `highest`, ties to
// even; infinite past the largest.
double round_to(double value, int mantissa, int lowest, int highest) {
  if (value == 0.0 || !std::isfinite(value)) return value;
  const int exponent = std::max(std::ilogb(value), lowest);
  const double unit = std::ldexp(1.0, exponent - mantissa);
  const double rounded = std::nearbyint(value / unit) * unit;
  const double largest = std::ldexp(2.0 - std::ldexp(1.0, -mantissa), highest);
  return std::abs(rounded) > largest ? std::copysign(INFINITY, value) : rounded;
}

}  // namespace

void* allocate_guarded(size_t bytes) {
  const size_t page = sysconf(_SC_PAGESIZE), room = (bytes + page - 1) / page * page;
  void* start = mmap(nullptr, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) throw std::bad_alloc();
  mprotect(static_cast<char*>(start) + room, page, PROT_NONE);
  return static_cast<char*>(start) + room - bytes;
}

void free_guarded(void* p, size_t bytes) {
  const size_t page = sysconf(_SC_PAGESIZE), room = (bytes + page - 1) / page * page;
  munmap(static_cast<char*>(p) + bytes - room, room + page);
}

uint16_t round_to_bf16(float value) {
  if (std::isnan(value)) return std::signbit(value) ? 0xffc0 : 0x7fc0;
  const auto rounded = static_cast<float>(round_to(value, 7, -126, 127));
  uint32_t bits;
  std::memcpy(&bits, &rounded, 4);
  return static_cast<uint16_t>(bits >> 16);
}

float widen_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Saturates: no number becomes infinite.
uint16_t round_to_f16(float value) {
  const int sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return static_cast<uint16_t>(sign | 0x7e00);
  const double size = std::min(std::abs(round_to(value, 10, -14, 15)), 65504.0);
  if (size < std::ldexp(1.0, -14)) return static_cast<uint16_t>(sign | static_cast<int>(std::ldexp(size, 24)));
  const int exponent = std::ilogb(size);
  const int mantissa = static_cast<int>(std::ldexp(size, 10 - exponent)) - 1024;
  return static_cast<uint16_t>(sign | (exponent + 15) << 10 | mantissa);
}

float widen_f16(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  double size = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  if (exponent == 31) size = mantissa == 0 ? INFINITY : std::numeric_limits<double>::quiet_NaN();
  return static_cast<float>(half & 0x8000 ? -size : size);
}

double rounding_error(Dtype dtype, double value) {
  const int mantissa = dtype == Dtype::kF32 ? 23 : dtype == Dtype::kBf16 ? 7 : 10;
  const int lowest = dtype == Dtype::kF16 ? -14 : -126;
  const int exponent = value == 0.0 ? lowest : std::max(std::ilogb(value), lowest);
  return std::ldexp(1.0, exponent - mantissa - 1);
}

float Numbers::get(int64_t at) const {
  if (dtype == Dtype::kF32) {
    float value;
    std::memcpy(&value, &bytes[at * 4], 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, &bytes[at * 2], 2);
  return dtype == Dtype::kBf16 ? widen_bf16(half) : widen_f16(half);
}

void Numbers::set(int64_t at, float value) {
  if (dtype == Dtype::kF32) {
    std::memcpy(&bytes[at * 4], &value, 4);
    return;
  }
  const uint16_t half = dtype == Dtype::kBf16 ? round_to_bf16(value) : round_to_f16(value);
  std::memcpy(&bytes[at * 2], &half, 2);
}

void Numbers::fill(Random& random, float scale) {
  for (int64_t i = 0; i < count(); ++i) set(i, random.number() * scale);
}

}  // namespace quire::driver
