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

#endif

// Calls finish(first row, rows, panel, sums [rows][32]) for panels [begin, end) and all rows.
template <typename Finish>
void multiply(const Rows& x, const Weight& weight, int64_t begin, int64_t end, const Finish& finish) {
#if defined(__AVX512BF16__)
  if (x.is_pairs) {
    const auto done = [&](int64_t row, int64_t count, int64_t panel, float* sums) {
      if (x.copies == 2) join_copies(count / 2, sums);
      finish(row / x.copies, count / x.copies, panel, sums);
    };
    return panels_sums(x, static_cast<const bf16*>(weight.packed), begin, end, done);
  }
#endif
  float_panels(x, weight, begin, end, finish);
}

inline int64_t num_panels(const Weight& weight) { return round_up(weight.out, kPanel) / kPanel; }

// Of few rows: the panels are shared among threads, as most of the time goes to reading them.
template <typename Finish>
void multiply(Team& team, const Rows& x, const Weight& weight, const Finish& finish) {
  if (x.count == 0) return;
  constexpr int64_t kPiecesPerThread = 4;
  team.split(num_panels(weight), 1, kPiecesPerThread, [&](int64_t begin, int64_t end) {
    multiply(x, weight, begin, end, finish);
  });
}

// Of many rows: the rows are, so that all that a thread reads of them and writes stays in its cache.
// body(first row, rows) for pieces of them; false, and nothing is done, if they are few.
template <typename Body>
bool in_row_pieces(Team& team, const Rows& x, const Body& body) {
  constexpr int64_t kMany = 128, kMost = 256;  // rows of a thread
  const int64_t threads = team.num_threads(), rows = x.count * x.copies;
  if (rows < kMany * threads) return false;
  const int64_t pieces = round_up((rows + kMost - 1) / kMost, threads);
  const int64_t count = round_up((x.count + pieces - 1) / pieces, 32);
  team.run((x.count + count - 1) / count, [&](int64_t piece) {
    body(piece * count, std::min(count, x.count - piece * count));
  });
  return true;
}

}  // namespace quire::QUIRE_LEVEL
