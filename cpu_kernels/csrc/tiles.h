// Sums of bf16 products over one panel: by tiles where there are any, else by pairs.

#pragma once

#include "rows.h"

namespace quire::QUIRE_LEVEL {

#if defined(__AMX_BF16__)
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
#endif

}  // namespace quire::QUIRE_LEVEL

#if defined(__AVX512BF16__)

namespace quire::QUIRE_LEVEL {

#if defined(__AMX_BF16__)
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// The tiles of one thread while it multiplies. 0 to 3: sums, 4 and 5: rows of the input, 6 and 7: what
// they are multiplied with.
class TileSession {
 public:
  explicit TileSession(int64_t rows) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = 64;
      config.rows[tile] = 16;
    }
    for (int tile = 0; tile < 6 && rows < 16; ++tile) config.rows[tile] = static_cast<uint8_t>(rows);
    _tile_loadconfig(&config);
  }
  ~TileSession() { _tile_release(); }
};

// The loads of a tile do not run ahead far enough to hide the way to memory.
inline void prefetch_block(const bf16* w) {
  const char* bytes = reinterpret_cast<const char*>(w);
  for (int line = 0; line < 32; ++line) _mm_prefetch(bytes + line * 64, _MM_HINT_T0);
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

// Sums [rows][32] of rows [top, bottom), finished 32 rows at a time. w: the panel.
template <typename Done>
void panel_sums(const Rows& x, int64_t top, int64_t bottom, const bf16* w, float* sums,
                const Done& done) {
  if (bottom - top <= 16) {
    one_tile(x.tile(top, 0), w, x.blocks(), sums);
    return done(top, bottom - top, sums);
  }
  // Blocks of the panel that stay in the first cache beside the rows that go by.
  constexpr int64_t kNearBlocks = 9;
  for (int64_t first = 0; first < x.blocks(); first += kNearBlocks) {
    const int64_t count = std::min(kNearBlocks, x.blocks() - first);
    for (int64_t row = top; row < bottom; row += 32) {
      float* s = sums + (row - top) * kPanel;
      // Rows past the last are computed and dropped; a second half that is missing is the first.
      const int64_t stride = bottom - row > 16 ? x.blocks() * kTile : 0;
      const bf16* a = x.tile(row, first);
      // The first rows bring the panel from memory.
      if (row == 0) two_tiles<true>(a, stride, w + first * 1024, count, first == 0, s);
      else two_tiles<false>(a, stride, w + first * 1024, count, first == 0, s);
      if (first + count == x.blocks()) done(row, std::min<int64_t>(32, bottom - row), s);
    }
  }
}

#else

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

template <typename Done>
void panel_sums(const Rows& x, int64_t top, int64_t bottom, const bf16* w, float* sums,
                const Done& done) {
  constexpr int64_t kRowsAtOnce = 8;
  for (int64_t row = top; row < bottom; row += kRowsAtOnce) {
    const int64_t count = std::min(kRowsAtOnce, bottom - row);
    pair_rows<kRowsAtOnce>(count, x.tile(row, 0), w, x.blocks(), sums);
    done(row, count, sums);
  }
}
#endif

}  // namespace quire::QUIRE_LEVEL

#endif
