// Weights into the form that the products read.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace quire {

// Where output `out` of a matrix of `rows` rows lies among the packed outputs. Gated: gates are the
// first half of the rows, ups the second, 16 of each to a panel.
inline int64_t packed_row(int64_t row, int64_t rows, bool is_gated) {
  if (!is_gated) return row;
  const int64_t half = rows / 2, i = row % half;
  return i / 16 * kPanel + row / half * 16 + i % 16;
}

// Element (row, column) of the packed form: bf16 in pairs of columns, f32 one by one.
inline int64_t packed_index(int64_t packed_row, int64_t column, int64_t depth, bool is_pairs) {
  const int64_t panel = packed_row / kPanel, lane = packed_row % kPanel;
  if (!is_pairs) return (panel * depth + column) * kPanel + lane;
  const int64_t block = panel * (depth / kDepth) + column / kDepth;
  return ((block * 2 + lane / 16) * 16 + column % kDepth / 2) * 32 + lane % 16 * 2 + column % 2;
}

// Rows [begin, end) of a matrix [rows, columns] into `packed`, which is zeroed where nothing lies.
template <typename Element>
void pack(const Element* source, int64_t begin, int64_t end, int64_t rows, int64_t columns,
          bool is_gated, Element* packed) {
  const int64_t depth = round_up(columns, kDepth);
  constexpr bool kIsPairs = sizeof(Element) == 2;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t to = packed_row(row, rows, is_gated);
    const Element* from = source + (row - begin) * columns;
    for (int64_t column = 0; column < columns; column += kDepth) {
      Element* target = packed + packed_index(to, column, depth, kIsPairs);
      const int64_t count = std::min(kDepth, columns - column);
      for (int64_t i = 0; i < count; ++i) {
        target[kIsPairs ? i / 2 * 32 + i % 2 : i * kPanel] = from[column + i];
      }
    }
  }
}

// Row `row` of the matrix back, as f32.
inline void unpack_row(const void* packed, Dtype dtype, int64_t row, int64_t columns, float* to) {
  const int64_t depth = round_up(columns, kDepth);
  for (int64_t first = 0; first < columns; first += kDepth) {
    const int64_t count = std::min(kDepth, columns - first);
    const int64_t at = packed_index(row, first, depth, dtype != Dtype::kF32);
    for (int64_t i = 0; i < count; ++i) {
      if (dtype == Dtype::kF32) {
        to[first + i] = static_cast<const float*>(packed)[at + i * kPanel];
        continue;
      }
      const uint32_t wide = uint32_t{static_cast<const uint16_t*>(packed)[at + i / 2 * 32 + i % 2]} << 16;
      std::memcpy(to + first + i, &wide, 4);
    }
  }
}

}  // namespace quire
