// Sums of groups against all of their places, added up by halves.

#include "../group_sums.h"
#include "driver.h"

namespace quire::driver {

void check_group_sums(uint64_t seed) {
  Random random(seed);
  Case result("any level", "group_sums", seed);
  for (int n = 0; n < 200; ++n) {
    const int64_t rows = random.between(1, 4), groups = random.between(1, 40);
    const int64_t size = int64_t{1} << random.between(0, 7);
    const int64_t places = groups * size, count = random.between(0, std::min<int64_t>(places, 70));
    Memory<float> x(rows * count), sums(rows * groups, 7.0f), all(rows * places);
    Memory<int32_t> group(rows * count), place(rows * count);
    for (int64_t row = 0; row < rows; ++row) {
      // One of as many equal parts of the places each, so that no two are the same.
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = i * places / count + random.between(0, places / count - 1);
        const float value = random.chance(10) ? 0.0f : random.number() * (random.chance(50) ? 1.0f : 1e-4f);
        const bool is_left_out = random.chance(10);
        x[row * count + i] = value;
        group[row * count + i] = static_cast<int32_t>(is_left_out ? groups : at / size);
        place[row * count + i] = static_cast<int32_t>(at % size);
        if (!is_left_out) all[row * places + at] = value;
      }
    }
    sum_groups({rows, count, groups, size, x.data(), group.data(), place.data(), sums.data()});
    for (int64_t i = 0; i < rows * groups; ++i) {
      float* whole = &all[i * size];
      for (int64_t half = size / 2; half > 0; half /= 2) {
        for (int64_t j = 0; j < half; ++j) whole[j] += whole[j + half];
      }
    }
    for (int64_t i = 0; i < rows * groups; ++i) {
      if (sums[i] != all[i * size]) result.fail("sum %d", static_cast<int>(i));
    }
  }
}

}  // namespace quire::driver
