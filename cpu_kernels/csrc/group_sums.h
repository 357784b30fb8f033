// Sums of a few numbers as if they were added up in their place among many zeros.
//
// A group of 2^n places is summed by halves: the second is added to the first until one number is left
// (sum_last of pallas_kernels/reductions.py). To add 0 changes nothing, so only places with a number
// take part. Whatever the level, the same bits.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace quire {

struct GroupSums {
  int64_t rows, count, groups, size;  // size: places of a group, a power of 2
  const float* x;                     // [rows, count]
  const int32_t* group;               // [rows, count]; another group than those there are: left out
  const int32_t* place;               // [rows, count], in its group, each once
  float* sums;                        // [rows, groups]
};

struct Placed {
  uint64_t key;  // the group, then the place with its bits turned around
  float value;
};

// The halves of a group differ in the lowest bit of the place, their halves in the next one, and so on.
inline uint64_t turned(uint64_t place, int bits) {
  uint64_t made = 0;
  for (int bit = 0; bit < bits; ++bit) made |= (place >> bit & 1) << (bits - 1 - bit);
  return made;
}

// Of one group, in order; `half`: the bit in which its halves differ.
inline float sum_by_halves(const Placed* begin, const Placed* end, uint64_t half) {
  if (end - begin == 1 || half == 0) return begin->value;  // at 0, if no two have the same place
  const Placed* middle = begin;
  while (middle < end && (middle->key & half) == 0) ++middle;
  if (middle == begin || middle == end) return sum_by_halves(begin, end, half >> 1);
  return sum_by_halves(begin, middle, half >> 1) + sum_by_halves(middle, end, half >> 1);
}

// placed: room for as many as a row has.
inline void sum_groups_of_row(const GroupSums& call, int64_t row, int bits, Placed* placed) {
  int64_t count = 0;
  for (int64_t i = row * call.count; i < (row + 1) * call.count; ++i) {
    const int64_t group = call.group[i];
    if (group < 0 || group >= call.groups || call.x[i] == 0.0f) continue;
    const auto place = static_cast<uint64_t>(call.place[i]) & static_cast<uint64_t>(call.size - 1);
    placed[count++] = {static_cast<uint64_t>(group) << bits | turned(place, bits), call.x[i]};
  }
  std::sort(placed, placed + count, [](const Placed& a, const Placed& b) { return a.key < b.key; });
  float* sums = call.sums + row * call.groups;
  std::memset(sums, 0, call.groups * sizeof(float));
  for (int64_t begin = 0, end = 0; begin < count; begin = end) {
    const uint64_t group = placed[begin].key >> bits;
    while (end < count && placed[end].key >> bits == group) ++end;
    sums[group] = sum_by_halves(placed + begin, placed + end, static_cast<uint64_t>(call.size) >> 1);
  }
}

inline void sum_groups(const GroupSums& call) {
  int bits = 0;
  while (int64_t{1} << bits < call.size) ++bits;
  std::vector<Placed> placed(static_cast<size_t>(call.count));
  for (int64_t row = 0; row < call.rows; ++row) sum_groups_of_row(call, row, bits, placed.data());
}

}  // namespace quire
