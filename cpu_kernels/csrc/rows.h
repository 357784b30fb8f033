// Rows of an input in the form that a product reads: normed, in f32 or as tiles of bf16.

#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "kernels.h"
#include "simd.h"

namespace quire::QUIRE_LEVEL {

constexpr int64_t kTile = 16 * 32;       // elements of 16 rows over 32 inputs
constexpr int64_t kSmallRows = 1 << 14;  // elements that one thread prepares sooner than two

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;  // products of bf16, two at a time
#else
constexpr bool kHasPairs = false;
#endif
#if defined(__AMX_BF16__)
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
#endif

// Numbers that begin at a cache line: a vector that lies across two takes two loads.
class Floats {
 public:
  float* get(int64_t count) {
    if (count > capacity_) {
      floats_.reset(static_cast<float*>(std::aligned_alloc(64, round_up(count * 4, 64))));
      if (!floats_) throw std::bad_alloc();
      capacity_ = count;
    }
    return floats_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> floats_;
  int64_t capacity_ = 0;
};

// What a product reads. Pairs: tiles [rows / 16][depth / 32][16][32] of bf16, where with two copies
// rows 2 r and 2 r + 1 are the rounded row r and what rounding left. Wide: those of 32 rows lie side by
// side, [rows / 32][depth / 32][2][16][32], in the order in which they are read. Else f32 [rows][depth].
struct Rows {
  int64_t count;   // of the input
  int64_t copies;  // rows here for each of these
  int64_t depth;   // inputs, padded with zeros
  bool is_pairs, is_wide;
  void* data;

  int64_t blocks() const { return depth / kDepth; }
  bf16* tile(int64_t row, int64_t block) const {
    const int64_t at = is_wide ? (row / 32 * blocks() + block) * 2 + row / 16 % 2 : row / 16 * blocks() + block;
    return static_cast<bf16*>(data) + at * kTile + row % 16 * kDepth;
  }
  float* floats(int64_t row) const { return static_cast<float*>(data) + row * depth; }

  // At most `most` of them from `row` on, a multiple of 32.
  Rows from(int64_t row, int64_t most) const {
    Rows part = *this;
    part.count = std::min(most, count - row);
    part.data = is_pairs ? static_cast<void*>(tile(row * copies, 0)) : floats(row);
    return part;
  }
};

inline Rows rows_for(const Weight& weight, int64_t count, bool is_exact, void* workspace) {
  const bool is_pairs = kHasPairs && weight.dtype == Dtype::kBf16;
  const int64_t copies = is_pairs && is_exact ? 2 : 1;
  const bool is_wide = is_pairs && kHasTiles && count * copies > 16;
  return {count, copies, round_up(weight.in, kDepth), is_pairs, is_wide, workspace};
}

inline Vf load_as_f32(const void* p, Dtype dtype, int64_t i) {
  return dtype == Dtype::kBf16 ? from_bf16(static_cast<const bf16*>(p) + i)
                               : load(static_cast<const float*>(p) + i);
}

inline float get_as_f32(const void* p, Dtype dtype, int64_t i) {
  return dtype == Dtype::kBf16 ? from_bf16(static_cast<const bf16*>(p)[i])
                               : static_cast<const float*>(p)[i];
}

// 1 / rms(x), with one order of addition.
inline float inverse_rms(const float* x, int64_t count, float epsilon) {
  Vf total[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) {
      const Vf v = load(x + i + j * kLanes);
      total[j] = fma(v, v, total[j]);
    }
  }
  float all = sum((total[0] + total[1]) + (total[2] + total[3]));
  for (; i < count; ++i) all += x[i] * x[i];
  return 1.0f / std::sqrt(all / static_cast<float>(count) + epsilon);
}

// A normed row as f32.
inline void norm_row(const float* x, int64_t count, const Norm& norm, Dtype dtype, float* to) {
  if (norm.weight == nullptr) {
    std::memcpy(to, x, count * sizeof(float));
    return;
  }
  const float scale = inverse_rms(x, count, norm.epsilon);
  const Vf scales = broadcast(scale);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(to + i, load(x + i) * scales * load_as_f32(norm.weight, dtype, i));
  }
  for (; i < count; ++i) to[i] = x[i] * scale * get_as_f32(norm.weight, dtype, i);
}

#if defined(__AVX512BF16__)
inline void store_pairs(bf16* to, Vf v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(v));
}

// A row of f32, zeros up to the depth, into its tiles.
inline void pack_row(const float* x, const Rows& rows, int64_t row) {
  for (int64_t block = 0; block < rows.blocks(); ++block) {
    bf16* to = rows.tile(row * rows.copies, block);
    for (int half = 0; half < 32; half += 16) {
      const Vf v = load(x + block * kDepth + half);
      store_pairs(to + half, v);
      if (rows.copies == 2) store_pairs(to + kDepth + half, v - from_bf16(to + half));
    }
  }
}
#endif

inline void prepare(const float* x, const Norm& norm, const Weight& weight, const Rows& rows,
                    int64_t begin, int64_t end) {
  const int64_t in = weight.in;
  if (!rows.is_pairs) {
    for (int64_t r = begin; r < end; ++r) {
      norm_row(x + r * in, in, norm, weight.dtype, rows.floats(r));
      std::fill(rows.floats(r) + in, rows.floats(r) + rows.depth, 0.0f);
    }
    return;
  }
#if defined(__AVX512BF16__)
  if (norm.weight == nullptr && in == rows.depth) {
    for (int64_t r = begin; r < end; ++r) pack_row(x + r * in, rows, r);
    return;
  }
  const std::unique_ptr<float[]> row(new float[rows.depth]);
  std::fill(row.get() + in, row.get() + rows.depth, 0.0f);
  for (int64_t r = begin; r < end; ++r) {
    norm_row(x + r * in, in, norm, weight.dtype, row.get());
    pack_row(row.get(), rows, r);
  }
#endif
}

inline void prepare(Team& team, const float* x, const Norm& norm, const Weight& weight,
                    const Rows& rows) {
  const auto body = [&](int64_t begin, int64_t end) { prepare(x, norm, weight, rows, begin, end); };
  if (rows.count * weight.in <= kSmallRows) body(0, rows.count);
  else team.split(rows.count, 16, 2, body);
}

}  // namespace quire::QUIRE_LEVEL
