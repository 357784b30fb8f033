// Matrix products with a packed weight, for any number of rows.
//
// One output is always accumulated over the whole input in one order, whatever the number of rows,
// the chunk or the thread: rows only share loads. A packed bf16 panel is [in / 32][2][16 pairs of
// inputs][16 outputs][2], a packed f32 panel [in][32 outputs].

#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "simd.h"

namespace quire::QUIRE_LEVEL {

constexpr int64_t kPairBlock = 16 * 16 * 2;  // elements of 16 outputs over 32 inputs
constexpr int kVectors = 16 / kLanes;        // vectors of 16 outputs
constexpr int64_t kSmallPack = 1 << 14;      // elements that one thread prepares sooner than two

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

// Row `row` of the input, normed, as f32 with zeros up to `padded`.
inline void prepare_row(const Linear& call, int64_t row, float* to, int64_t padded) {
  if (call.x_dtype == Dtype::kBf16) {
    const auto* x = static_cast<const bf16*>(call.x) + row * call.in;
    int64_t i = 0;
    for (; i + kLanes <= call.in; i += kLanes) store(to + i, from_bf16(x + i));
    for (; i < call.in; ++i) to[i] = from_bf16(x[i]);
  } else {
    const auto* x = static_cast<const float*>(call.x) + row * call.in;
    if (call.norm == nullptr) {
      std::memcpy(to, x, call.in * sizeof(float));
    } else {
      const float scale = inverse_rms(x, call.in, call.epsilon);
      const Vf scales = broadcast(scale);
      int64_t i = 0;
      for (; i + kLanes <= call.in; i += kLanes) {
        store(to + i, load(x + i) * scales * load_as_f32(call.norm, call.vector_dtype, i));
      }
      for (; i < call.in; ++i) to[i] = x[i] * scale * get_as_f32(call.norm, call.vector_dtype, i);
    }
  }
  for (int64_t i = call.in; i < padded; ++i) to[i] = 0.0f;
}

// What is done with finished sums of one panel: f32 [rows][32] of virtual rows.
struct Epilogue {
  const Linear& call;

  void operator()(int64_t first_row, int64_t rows, int64_t panel, float* sums) const {
    const int64_t per_panel = call.is_gated ? 16 : kPanel;
    const int64_t first = panel * per_panel;
    const int64_t count = std::min(per_panel, call.out - first);
    for (int64_t r = 0; r < rows; ++r) {
      float* s = sums + r * kPanel;
      if (call.is_gated) gate(s, first, count);
      else if (call.bias != nullptr) add_bias(s, first, count);
      write(s, (first_row + r) * call.out + first, count);
    }
  }

 private:
  void add_bias(float* s, int64_t first, int64_t count) const {
    for (int64_t j = 0; j < count; ++j) s[j] += get_as_f32(call.bias, call.vector_dtype, first + j);
  }

  void gate(float* s, int64_t first, int64_t count) const {
    if (call.bias != nullptr) {
      for (int64_t j = 0; j < count; ++j) {
        s[j] += get_as_f32(call.bias, call.vector_dtype, first + j);
        s[16 + j] += get_as_f32(call.bias, call.vector_dtype, call.out + first + j);
      }
    }
    for (int j = 0; j < 16; j += kLanes) store(s + j, silu(load(s + j)) * load(s + 16 + j));
  }

  void write(const float* s, int64_t at, int64_t count) const {
    int64_t j = 0;
    if (call.y_dtype == Dtype::kBf16) {
      auto* y = static_cast<bf16*>(call.y) + at;
      for (; j + kLanes <= count; j += kLanes) store_bf16(y + j, load(s + j));
      for (; j < count; ++j) y[j] = to_bf16(s[j]);
      return;
    }
    auto* y = static_cast<float*>(call.y) + at;
    const float* residual = call.residual == nullptr ? nullptr : call.residual + at;
    for (; j + kLanes <= count; j += kLanes) {
      const Vf v = load(s + j);
      store(y + j, residual == nullptr ? v : v + load(residual + j));
    }
    for (; j < count; ++j) y[j] = residual == nullptr ? s[j] : s[j] + residual[j];
  }
};

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
void float_panels(const Linear& call, const float* x, int64_t begin, int64_t end,
                  const Finish& finish) {
  const int64_t depth = round_up(call.in, kDepth);
  const int64_t element = call.weight_dtype == Dtype::kBf16 ? 2 : 4;
  // Rows whose inputs stay in the nearest caches while the panels go by.
  const int64_t block = std::max<int64_t>(kFloatRows, (1 << 19) / (depth * 4) / kFloatRows * kFloatRows);
  float sums[kFloatRows * kPanel];
  for (int64_t top = 0; top < call.rows; top += block) {
    const int64_t bottom = std::min(call.rows, top + block);
    for (int64_t panel = begin; panel < end; ++panel) {
      const char* w = static_cast<const char*>(call.weight) + panel * depth * kPanel * element;
      for (int64_t row = top; row < bottom; row += kFloatRows) {
        const int64_t count = std::min<int64_t>(kFloatRows, bottom - row);
        float_rows<kFloatRows>(count, x + row * depth, depth, w, call.weight_dtype, depth, sums);
        finish(row, count, panel, sums);
      }
    }
  }
}

// ---- Sums of bf16 products.

#if defined(__AVX512BF16__)

#if defined(__AMX_BF16__)
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3: sums, 4 and 5: rows of the input, 6 and 7: the halves of a panel.
inline void configure_tiles(int64_t first_rows, int64_t second_rows) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = 16;
  }
  config.rows[0] = config.rows[1] = config.rows[4] = static_cast<uint8_t>(first_rows);
  config.rows[2] = config.rows[3] = config.rows[5] = static_cast<uint8_t>(second_rows);
  _tile_loadconfig(&config);
}

struct TileSession {
  TileSession() = default;
  ~TileSession() { _tile_release(); }
};

// The loads of a tile do not run ahead far enough to hide the way to memory.
inline void prefetch_block(const bf16* w) {
  for (int line = 0; line < 32; ++line) _mm_prefetch(reinterpret_cast<const char*>(w) + line * 64, _MM_HINT_T0);
}

inline void one_tile(const bf16* a, const bf16* w, int64_t blocks, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t i = 0; i < blocks; ++i, a += 512, w += 1024) {
    prefetch_block(w + 4096);
    _tile_loadd(4, a, 64);
    _tile_loadd(6, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + 512, 64);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, sums, kPanel * 4);
  _tile_stored(1, sums + 16, kPanel * 4);
}

// Adds `blocks` more blocks of the input to the sums of 32 rows.
template <bool kIsFar>
void two_tiles(const bf16* a, int64_t tile_stride, const bf16* w, int64_t blocks, bool is_first,
               float* sums) {
  if (is_first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kPanel * 4);
    _tile_loadd(1, sums + 16, kPanel * 4);
    _tile_loadd(2, sums + 16 * kPanel, kPanel * 4);
    _tile_loadd(3, sums + 16 * kPanel + 16, kPanel * 4);
  }
  for (int64_t i = 0; i < blocks; ++i, a += 512, w += 1024) {
    if (kIsFar) prefetch_block(w + 4096);
    _tile_loadd(4, a, 64);
    _tile_loadd(6, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + 512, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + tile_stride, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, kPanel * 4);
  _tile_stored(1, sums + 16, kPanel * 4);
  _tile_stored(2, sums + 16 * kPanel, kPanel * 4);
  _tile_stored(3, sums + 16 * kPanel + 16, kPanel * 4);
}

// Blocks of a panel that stay in the nearest cache beside the rows that go by.
constexpr int64_t kNearBlocks = 9;
#endif

template <int kRows>
void pair_block(const bf16* a, const bf16* w, int64_t blocks, float* sums) {
  __m512 total[kRows][2];
  for (int r = 0; r < kRows; ++r) total[r][0] = total[r][1] = _mm512_setzero_ps();
  for (int64_t i = 0; i < blocks; ++i, a += 512, w += 1024) {
    for (int pair = 0; pair < 16; ++pair) {
      if (kRows <= 4) {
        _mm_prefetch(reinterpret_cast<const char*>(w + pair * 32) + 4096, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(w + 512 + pair * 32) + 4096, _MM_HINT_T0);
      }
      const __m512bh low = (__m512bh)_mm512_loadu_si512(w + pair * 32);
      const __m512bh high = (__m512bh)_mm512_loadu_si512(w + 512 + pair * 32);
      for (int r = 0; r < kRows; ++r) {
        int32_t two;
        std::memcpy(&two, a + r * 32 + pair * 2, 4);
        const __m512bh both = (__m512bh)_mm512_set1_epi32(two);
        total[r][0] = _mm512_dpbf16_ps(total[r][0], both, low);
        total[r][1] = _mm512_dpbf16_ps(total[r][1], both, high);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    _mm512_storeu_ps(sums + r * kPanel, total[r][0]);
    _mm512_storeu_ps(sums + r * kPanel + 16, total[r][1]);
  }
}

template <int kRows>
void pair_rows(int64_t rows, const bf16* a, const bf16* w, int64_t blocks, float* sums) {
  if (rows == kRows) return pair_block<kRows>(a, w, blocks, sums);
  if constexpr (kRows > 1) pair_rows<kRows - 1>(rows, a, w, blocks, sums);
}

// Rows [begin, end) of the input as tiles [rows / 16][in / 32][16][32] of bf16; with is_exact, rows
// 2 r and 2 r + 1 are the rounded row r and what rounding left.
inline void pack_rows(const Linear& call, int64_t begin, int64_t end, bf16* tiles) {
  const int64_t depth = round_up(call.in, kDepth), blocks = depth / kDepth;
  const int64_t copies = call.is_exact ? 2 : 1;
  std::unique_ptr<float[]> row(new float[depth]);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t virtual_row = r * copies;
    bf16* to = tiles + virtual_row / 16 * blocks * 512 + virtual_row % 16 * 32;
    if (call.x_dtype == Dtype::kBf16 && call.norm == nullptr && call.in == depth && copies == 1) {
      const auto* x = static_cast<const bf16*>(call.x) + r * depth;
      for (int64_t block = 0; block < blocks; ++block) std::memcpy(to + block * 512, x + block * 32, 64);
      continue;
    }
    const float* x = row.get();
    if (call.x_dtype == Dtype::kF32 && call.norm == nullptr && call.in == depth) {
      x = static_cast<const float*>(call.x) + r * depth;
    } else {
      prepare_row(call, r, row.get(), depth);
    }
    for (int64_t block = 0; block < blocks; ++block, to += 512) {
      for (int half = 0; half < 32; half += 16) {
        const __m512 v = _mm512_loadu_ps(x + block * 32 + half);
        const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(v);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + half), rounded);
        if (call.is_exact) {
          const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16);
          const __m256i rest = (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(v, _mm512_castsi512_ps(wide)));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32 + half), rest);
        }
      }
    }
  }
}

inline void pack_input(Team& team, const Linear& call, bf16* tiles) {
  const auto pack = [&](int64_t begin, int64_t end) { pack_rows(call, begin, end, tiles); };
  if (call.rows * call.in <= kSmallPack) pack(0, call.rows);
  else team.split(call.rows, 16, 2, pack);
}

template <typename Finish>
void pair_panels(const Linear& call, const bf16* tiles, int64_t begin, int64_t end,
                 const Finish& finish) {
  const int64_t blocks = round_up(call.in, kDepth) / kDepth, tile_stride = blocks * 512;
  const int64_t copies = call.is_exact ? 2 : 1, rows = call.rows * copies;
  const auto* weight = static_cast<const bf16*>(call.weight);
  const auto done = [&](int64_t row, int64_t count, int64_t panel, float* sums) {
    if (call.is_exact) {
      for (int64_t r = 0; r < count / 2; ++r) {
        for (int half = 0; half < 32; half += 16) {
          const __m512 high = _mm512_load_ps(sums + 2 * r * kPanel + half);
          const __m512 rest = _mm512_load_ps(sums + (2 * r + 1) * kPanel + half);
          _mm512_store_ps(sums + r * kPanel + half, _mm512_add_ps(high, rest));
        }
      }
    }
    finish(row / copies, count / copies, panel, sums);
  };
#if defined(__AMX_BF16__)
  const TileSession session;
  if (rows <= 16) {
    alignas(64) float sums[16 * kPanel];
    configure_tiles(rows, 1);
    for (int64_t panel = begin; panel < end; ++panel) {
      one_tile(tiles, weight + panel * blocks * 1024, blocks, sums);
      done(0, rows, panel, sums);
    }
    return;
  }
  configure_tiles(16, 16);
  constexpr int64_t kFarRows = 256;  // rows whose tiles stay in the second cache
  alignas(64) float sums[kFarRows * kPanel];
  for (int64_t top = 0; top < rows; top += kFarRows) {
    const int64_t bottom = std::min(rows, top + kFarRows);
    for (int64_t panel = begin; panel < end; ++panel) {
      const bf16* w = weight + panel * blocks * 1024;
      for (int64_t first = 0; first < blocks; first += kNearBlocks) {
        const int64_t count = std::min(kNearBlocks, blocks - first);
        const bool is_last = first + count == blocks;
        // Rows of the workspace past the last are computed and dropped.
        for (int64_t row = top; row < bottom; row += 32) {
          float* s = sums + (row - top) * kPanel;
          const bf16* a = tiles + row / 16 * tile_stride + first * 512;
          // Its second half may be missing: the first again, whose sums nobody reads.
          const int64_t stride = bottom - row > 16 ? tile_stride : 0;
          // The first rows bring the panel from memory.
          if (row == 0) two_tiles<true>(a, stride, w + first * 1024, count, first == 0, s);
          else two_tiles<false>(a, stride, w + first * 1024, count, first == 0, s);
          if (is_last) done(row, std::min<int64_t>(32, bottom - row), panel, s);
        }
      }
    }
  }
#else
  constexpr int64_t kPairRows = 8;
  alignas(64) float sums[kPairRows * kPanel];
  const int64_t block = std::max<int64_t>(16, (1 << 19) / (blocks * 64) / 16 * 16);
  for (int64_t top = 0; top < rows; top += block) {
    const int64_t bottom = std::min(rows, top + block);
    for (int64_t panel = begin; panel < end; ++panel) {
      const bf16* w = weight + panel * blocks * 1024;
      for (int64_t row = top; row < bottom; row += kPairRows) {
        const int64_t count = std::min(kPairRows, bottom - row);
        const bf16* a = tiles + row / 16 * tile_stride + row % 16 * 32;
        pair_rows<kPairRows>(count, a, w, blocks, sums);
        done(row, count, panel, sums);
      }
    }
  }
#endif
}
#endif  // __AVX512BF16__

// Calls finish(first row, rows, panel, sums) for every panel and block of rows.
template <typename Finish>
void multiply(Team& team, const Linear& call, int64_t panels, const Finish& finish) {
  constexpr int64_t kPiecesPerThread = 4;
#if defined(__AVX512BF16__)
  if (call.weight_dtype == Dtype::kBf16) {
    auto* tiles = static_cast<bf16*>(call.workspace);
    pack_input(team, call, tiles);
    team.split(panels, 1, kPiecesPerThread,
               [&](int64_t begin, int64_t end) { pair_panels(call, tiles, begin, end, finish); });
    return;
  }
#endif
  auto* x = static_cast<float*>(call.workspace);
  const int64_t depth = round_up(call.in, kDepth);
  const auto prepare = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) prepare_row(call, row, x + row * depth, depth);
  };
  if (call.rows * depth <= kSmallPack) prepare(0, call.rows);
  else team.split(call.rows, 16, 2, prepare);
  team.split(panels, 1, kPiecesPerThread,
             [&](int64_t begin, int64_t end) { float_panels(call, x, begin, end, finish); });
}

inline void linear(Team& team, const Linear& call) {
  const int64_t per_panel = call.is_gated ? 16 : kPanel;
  multiply(team, call, round_up(call.out, per_panel) / per_panel, Epilogue{call});
}

}  // namespace quire::QUIRE_LEVEL
