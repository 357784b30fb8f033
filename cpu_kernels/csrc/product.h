// Products of prepared rows with a packed weight, for any number of rows.
//
// One output is always accumulated over the whole input in one order, whatever the number of rows,
// the chunk or the thread: rows only share loads. A packed bf16 panel is [in / 32][2][16 pairs of
// inputs][16 outputs][2], a packed f32 panel [in][32 outputs].

#pragma once

#include "rows.h"
#include "tiles.h"

namespace quire::QUIRE_LEVEL {

constexpr int64_t kPairBlock = 16 * 16 * 2;  // elements of 16 outputs over 32 inputs
constexpr int kVectors = 16 / kLanes;        // vectors of 16 outputs

// ---- Sums in f32: every level for f32 weights, and for bf16 ones where nothing multiplies bf16.

constexpr int kFloatRows = kLanes == 16 ? 6 : 4;  // rows that share the loads of a weight

template <int kRows>
void float_block(const float* x, int64_t stride, const void* panel, Dtype dtype, int64_t depth,
                 float* sums) {
  for (int half = 0; half < 2; ++half) {
    Vf total[kRows][kVectors] = {};
    if (dtype == Dtype::kF32) {
      const float* w = static_cast<const float*>(panel) + half * 16;
      for (int64_t k = 0; k < depth; ++k, w += kPanel) {
        for (int r = 0; r < kRows; ++r) {
          const Vf a = broadcast(x[r * stride + k]);
          for (int v = 0; v < kVectors; ++v) total[r][v] = fma(a, load(w + v * kLanes), total[r][v]);
        }
      }
    } else {
      const bf16* block = static_cast<const bf16*>(panel) + half * kPairBlock;
      for (int64_t k = 0; k < depth; k += kDepth, block += 2 * kPairBlock) {
        for (int pair = 0; pair < 16; ++pair) {
          Vf even[kVectors], odd[kVectors];
          for (int v = 0; v < kVectors; ++v) {
            const Vu both = *reinterpret_cast<const Vu*>(block + pair * 32 + v * kLanes * 2);
            even[v] = (Vf)(both << 16);
            odd[v] = (Vf)(both & 0xffff0000u);
          }
          for (int r = 0; r < kRows; ++r) {
            const float* a = x + r * stride + k + pair * 2;
            for (int v = 0; v < kVectors; ++v) {
              total[r][v] = fma(broadcast(a[0]), even[v], total[r][v]);
              total[r][v] = fma(broadcast(a[1]), odd[v], total[r][v]);
            }
          }
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        store(sums + r * kPanel + half * 16 + v * kLanes, total[r][v]);
      }
    }
  }
}

template <int kRows>
void float_rows(int64_t rows, const float* x, int64_t stride, const void* panel, Dtype dtype,
                int64_t depth, float* sums) {
  if (rows == kRows) return float_block<kRows>(x, stride, panel, dtype, depth, sums);
  if constexpr (kRows > 1) float_rows<kRows - 1>(rows, x, stride, panel, dtype, depth, sums);
}

template <typename Finish>
void float_panels(const Rows& x, const Weight& weight, int64_t begin, int64_t end,
                  const Finish& finish) {
  const int64_t panel_bytes = x.depth * kPanel * (weight.dtype == Dtype::kBf16 ? 2 : 4);
  // Rows that stay in the second cache while the panels go by.
  const int64_t near = std::max<int64_t>(1, (1 << 19) / (x.depth * 4) / kFloatRows) * kFloatRows;
  alignas(64) float sums[kFloatRows * kPanel];
  for (int64_t top = 0; top < x.count; top += near) {
    const int64_t bottom = std::min(x.count, top + near);
    for (int64_t panel = begin; panel < end; ++panel) {
      const char* w = static_cast<const char*>(weight.packed) + panel * panel_bytes;
      for (int64_t row = top; row < bottom; row += kFloatRows) {
        const int64_t count = std::min<int64_t>(kFloatRows, bottom - row);
        float_rows<kFloatRows>(count, x.floats(row), x.depth, w, weight.dtype, x.depth, sums);
        finish(row, count, panel, sums);
      }
    }
  }
}

#if defined(__AVX512BF16__)
// The rounded rows and what rounding left, together.
inline void join_copies(int64_t count, float* sums) {
  for (int64_t r = 0; r < count; ++r) {
    for (int half = 0; half < kPanel; half += 16) {
      const Vf high = load(sums + 2 * r * kPanel + half);
      store(sums + r * kPanel + half, high + load(sums + (2 * r + 1) * kPanel + half));
    }
  }
}

template <typename Finish>
void pair_panels(const Rows& x, const Weight& weight, int64_t begin, int64_t end,
                 const Finish& finish) {
  const int64_t rows = x.count * x.copies;
  const auto done = [&](int64_t row, int64_t count, int64_t panel, float* sums) {
    if (x.copies == 2) join_copies(count / 2, sums);
    finish(row / x.copies, count / x.copies, panel, sums);
  };
  const auto* packed = static_cast<const bf16*>(weight.packed);
  constexpr int64_t kFarRows = 256;  // rows whose tiles stay in the second cache
  alignas(64) float sums[kFarRows * kPanel];
#if defined(__AMX_BF16__)
  const TileSession session(rows);
#endif
  for (int64_t top = 0; top < rows; top += kFarRows) {
    const int64_t bottom = std::min(rows, top + kFarRows);
    for (int64_t panel = begin; panel < end; ++panel) {
      const bf16* w = packed + panel * x.blocks() * 2 * kPairBlock;
      panel_sums(x, top, bottom, w, sums, [&](int64_t row, int64_t count, float* s) {
        done(row, count, panel, s);
      });
    }
  }
}
#endif

// Calls finish(first row, rows, panel, sums [rows][32]) for every panel and all rows, from any thread.
template <typename Finish>
void multiply(Team& team, const Rows& x, const Weight& weight, const Finish& finish) {
  if (x.count == 0) return;
  constexpr int64_t kPiecesPerThread = 4;
  const int64_t panels = round_up(weight.out, kPanel) / kPanel;
  team.split(panels, 1, kPiecesPerThread, [&](int64_t begin, int64_t end) {
#if defined(__AVX512BF16__)
    if (x.is_pairs) return pair_panels(x, weight, begin, end, finish);
#endif
    float_panels(x, weight, begin, end, finish);
  });
}

}  // namespace quire::QUIRE_LEVEL
