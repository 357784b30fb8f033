// Sums of bf16 products over one panel: by tiles where there are any, else by pairs.

#pragma once

#include "rows.h"

#if defined(__AVX512BF16__)

namespace quire::QUIRE_LEVEL {

#if defined(__AMX_BF16__)
// GCC's loads of tiles do not say that they read memory: what was written before stays before this.
inline void writes_are_done() { asm volatile("" : : : "memory"); }

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
    asm volatile("" : : "r"(&config) : "memory");  // the same, of all of it
    _tile_loadconfig(&config);
  }
  ~TileSession() { _tile_release(); }
};

// Asks for what is read next where rows are few, and reading is all that takes time: every second line
// of the tile after this one. That makes the processor itself run ahead; more, or farther, gains less.
inline void fetch_next(const bf16* w) {
  for (int line = 0; line < 16; line += 2) {
    _mm_prefetch(reinterpret_cast<const char*>(w + kTile) + line * 64, _MM_HINT_T1);
  }
}

inline void one_tile(const bf16* a, const bf16* w, int64_t blocks, float* sums) {
  writes_are_done();
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t i = 0; i < blocks; ++i, a += kTile, w += 2 * kTile) {
    fetch_next(w);
    fetch_next(w + kTile);
    _tile_loadd(4, a, 64);
    _tile_loadd(6, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, sums, kPanel * 4);
  _tile_stored(1, sums + 16, kPanel * 4);
}

// Adds `blocks` more blocks of the input to the sums of 32 rows, and asks for kLines lines at `ahead`,
// the next panel, with each; 0: for what is read next.
template <int kLines>
void two_tiles(const bf16* a, const bf16* w, int64_t blocks, bool is_first, const char* ahead,
               float* sums) {
  writes_are_done();
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
  for (int64_t i = 0; i < blocks; ++i, a += 2 * kTile, w += 2 * kTile, ahead += kLines * 64) {
    for (int line = 0; line < kLines; ++line) {
      _mm_prefetch(ahead + line * 64, _MM_HINT_T1);
    }
    if (kLines == 0) {
      fetch_next(w);
      fetch_next(w + kTile);
    }
    _tile_loadd(4, a, 64);
    _tile_loadd(6, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + kTile, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, kPanel * 4);
  _tile_stored(1, sums + 16, kPanel * 4);
  _tile_stored(2, sums + 16 * kPanel, kPanel * 4);
  _tile_stored(3, sums + 16 * kPanel + 16, kPanel * 4);
}

template <int kLines>
void add_blocks(const Rows& x, int64_t rows, const bf16* w, int64_t begin, int64_t end, float* sums) {
  // Blocks of the panel that stay in the first cache beside the rows that go by.
  constexpr int64_t kNearBlocks = 9;
  const char* ahead = reinterpret_cast<const char*>(w + end * 2 * kTile);
  for (int64_t first = begin; first < end; first += kNearBlocks) {
    const int64_t count = std::min(kNearBlocks, end - first);
    for (int64_t row = 0; row < rows; row += 32, ahead += kLines * 64 * count) {
      // Rows past the last are computed and dropped.
      two_tiles<kLines>(x.tile(row, first), w + first * 2 * kTile, count, first == 0, ahead, sums + row * kPanel);
    }
  }
}

// Adds blocks [begin, end) of the inputs to sums [rows][32]; w: the panel. The first ones set them.
inline void add_blocks(const Rows& x, int64_t rows, const bf16* w, int64_t begin, int64_t end, float* sums) {
  if (rows <= 64) add_blocks<0>(x, rows, w, begin, end, sums);
  else if (rows <= 128) add_blocks<8>(x, rows, w, begin, end, sums);
  else add_blocks<4>(x, rows, w, begin, end, sums);
}

// Calls done(first row, rows, panel, sums) for panels [begin, end).
template <typename Done>
void panels_sums(const Rows& x, const bf16* packed, int64_t begin, int64_t end, const Done& done) {
  // Rows whose tiles and sums stay in the second cache, if their inputs are no more than kFarInputs;
  // else blocks come kDeepBlocks at a time, for kDeepPanels panels.
  constexpr int64_t kFarRows = 256, kFarInputs = 5 << 17, kDeepPanels = 8, kDeepBlocks = 32;
  const int64_t rows = x.count * x.copies, blocks = x.blocks();
  const TileSession session(x.is_wide ? 16 : rows);
  if (!x.is_wide) {
    alignas(64) float sums[16 * kPanel];
    for (int64_t panel = begin; panel < end; ++panel) {
      one_tile(x.tile(0, 0), packed + panel * blocks * 2 * kTile, blocks, sums);
      done(0, rows, panel, sums);
    }
    return;
  }
  thread_local Floats room;
  float* all = room.get(kDeepPanels * kFarRows * kPanel);
  for (int64_t top = 0; top < rows; top += kFarRows) {
    const int64_t count = std::min(kFarRows, rows - top);
    const Rows part = x.from(top / x.copies, kFarRows / x.copies);
    const bool is_deep = count * x.depth > kFarInputs;
    const int64_t at_once = is_deep ? kDeepPanels : 1, depth = is_deep ? kDeepBlocks : blocks;
    for (int64_t first = begin; first < end; first += at_once) {
      const int64_t past = std::min(end, first + at_once);
      const auto sums_of = [&](int64_t panel) { return all + (panel - first) * kFarRows * kPanel; };
      for (int64_t block = 0; block < blocks; block += depth) {
        for (int64_t panel = first; panel < past; ++panel) {
          const bf16* w = packed + panel * blocks * 2 * kTile;
          add_blocks(part, count, w, block, std::min(blocks, block + depth), sums_of(panel));
        }
      }
      for (int64_t panel = first; panel < past; ++panel) done(top, count, panel, sums_of(panel));
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
void panels_sums(const Rows& x, const bf16* packed, int64_t begin, int64_t end, const Done& done) {
  constexpr int64_t kRowsAtOnce = 8;
  constexpr int64_t kFarRows = 256;  // rows that stay in the second cache
  const int64_t rows = x.count * x.copies;
  alignas(64) float sums[kRowsAtOnce * kPanel];
  for (int64_t top = 0; top < rows; top += kFarRows) {
    const int64_t bottom = std::min(rows, top + kFarRows);
    for (int64_t panel = begin; panel < end; ++panel) {
      const bf16* w = packed + panel * x.blocks() * 2 * kTile;
      for (int64_t row = top; row < bottom; row += kRowsAtOnce) {
        const int64_t count = std::min(kRowsAtOnce, bottom - row);
        pair_rows<kRowsAtOnce>(count, x.tile(row, 0), w, x.blocks(), sums);
        done(row, count, panel, sums);
      }
    }
  }
}
#endif

}  // namespace quire::QUIRE_LEVEL

#endif
