// The conversions of simd.h; compiled once for each level, as level.cc is.

#include <cmath>

#include "../simd.h"
#include "driver.h"

namespace quire::QUIRE_LEVEL {

using driver::Case;

void check_conversions(Case& result, uint64_t seed);

// Both forms of to_bf16, and to_f16, of one vector.
static void check_rounding(Case& result, const float (&values)[kLanes]) {
  bf16 halves[kLanes];
  store_bf16(halves, load(values));
  for (int i = 0; i < kLanes; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, 4);
    const bool is_nan = std::isnan(values[i]);
    const uint16_t should = driver::round_to_bf16(values[i]);
    for (const bf16 is : {halves[i], to_bf16(values[i])}) {
      if (is_nan ? !std::isnan(driver::widen_bf16(is)) : is != should) {
        result.fail("to_bf16 of %08x is %04x and should be %04x", bits, is, should);
      }
    }
    const uint16_t f16_is = to_f16(values[i]), f16_should = driver::round_to_f16(values[i]);
    if (f16_is != f16_should) {
      result.fail("to_f16 of %08x is %04x and should be %04x", bits, f16_is, f16_should);
    }
  }
}

static void check_widening(Case& result, uint32_t first) {
  uint16_t halves[kLanes];
  for (int i = 0; i < kLanes; ++i) halves[i] = static_cast<uint16_t>(first + i);
  float wide[kLanes], half[kLanes];
  store(wide, from_bf16(halves));
  store(half, from_f16(halves));
  for (int i = 0; i < kLanes; ++i) {
    const float bf16_should = driver::widen_bf16(halves[i]), f16_should = driver::widen_f16(halves[i]);
    const float one_bf16 = from_bf16(halves[i]), one_f16 = from_f16(halves[i]);
    const bool is_bf16_nan = std::isnan(bf16_should), is_f16_nan = std::isnan(f16_should);
    for (const float is : {wide[i], one_bf16}) {
      if (is_bf16_nan ? !std::isnan(is) : std::memcmp(&is, &bf16_should, 4) != 0) {
        result.fail("from_bf16 of %04x is %a and should be %a", halves[i], is, bf16_should);
      }
    }
    for (const float is : {half[i], one_f16}) {
      if (is_f16_nan ? !std::isnan(is) : std::memcmp(&is, &f16_should, 4) != 0) {
        result.fail("from_f16 of %04x is %a and should be %a", halves[i], is, f16_should);
      }
    }
  }
}

static void check_exp(Case& result, const float (&values)[kLanes]) {
  float is[kLanes];
  store(is, exp(load(values)));
  for (int i = 0; i < kLanes; ++i) {
    const double x = values[i];
    if (std::isnan(x) ? !std::isnan(is[i]) : x < -87.3366 && is[i] != 0.0f) {
      result.fail("exp of %a is %a", values[i], is[i]);
    } else if (x > -87.3365 && x < 88.0) {
      result.expect_near(is[i], std::exp(x), 3e-7 * std::exp(x), "exp", i);  // 2 units and a half
    }
  }
}

void check_conversions(Case& result, uint64_t seed) {
  for (uint32_t first = 0; first < 1 << 16; first += kLanes) check_widening(result, first);
  driver::Random random(seed);
  float values[kLanes];
  // Around every number of both formats, and half-way between two: one bit pattern more, the same, less.
  for (uint32_t half = 0; half < 1 << 16; ++half) {
    const float at[2] = {driver::widen_bf16(static_cast<uint16_t>(half)),
                         driver::widen_f16(static_cast<uint16_t>(half))};
    for (int format = 0; format < 2; ++format) {
      uint32_t bits;
      std::memcpy(&bits, at + format, 4);
      const uint32_t middle = bits + (format == 0 ? 0x8000 : 0x1000);
      for (int i = 0; i < kLanes; ++i) {
        const uint32_t near[6] = {bits - 1, bits, bits + 1, middle - 1, middle, middle + 1};
        const uint32_t chosen = i < 6 ? near[i] : static_cast<uint32_t>(random.bits());
        std::memcpy(values + i, &chosen, 4);
      }
      check_rounding(result, values);
      if constexpr (kLanes < 6) {
        const uint32_t rest[4] = {middle, middle + 1, bits, bits};
        std::memcpy(values, rest, sizeof(rest));
        check_rounding(result, values);
      }
    }
  }
  for (int n = 0; n < 20000; ++n) {
    for (float& value : values) value = random.number() * 100.0f;
    check_exp(result, values);
  }
  for (const float edge : {0.0f, -0.0f, 88.0f, -87.336f, -87.337f, -1e29f, -INFINITY, NAN, 1e-38f}) {
    for (float& value : values) value = edge;
    check_exp(result, values);
  }
}

}  // namespace quire::QUIRE_LEVEL
