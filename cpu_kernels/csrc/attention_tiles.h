// Attention by tiles of bf16, where the processor has them: for one query as for many.
//
// A number of q keeps 16 bits in two halves, one of a float16 key or value all of its 11; a weight is
// rounded to 8, in the sum of the weights as well. A row of a tile is computed alike in any company, so
// a lone query takes the same way.

#pragma once

#include "scores.h"

#if defined(__AMX_BF16__)

namespace quire::QUIRE_LEVEL {

constexpr int64_t kKeyGroups = kChunk / kGroup;
constexpr int64_t kKeyBlocks = kChunk / kDepth;

// Halves that a key or value has; f32 are those of f16 pages, widened.
template <typename Element>
constexpr int kParts = 2;
template <>
constexpr int kParts<Bf16> = 1;

constexpr int64_t query_tiles_size(int64_t dim) { return 2 * round_up(dim, kDepth) / kDepth * kTile; }
constexpr int64_t key_tiles_size(int64_t dim) { return kKeyGroups * query_tiles_size(dim); }
constexpr int64_t value_tiles_size(int64_t width) { return 2 * kKeyBlocks * width / 16 * kTile; }

// Into the second cache: to bring as much into the first takes a third longer.
inline void fetch_far(uintptr_t address) {
  _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T1);
}

// One query into row `row` of tiles [depth / 32][2][16][32].
inline void split_query(const float* q, int64_t dim, int64_t row, bf16* tiles) {
  for (int64_t i = 0; i < round_up(dim, kDepth); i += kLanes) {
    float padded[kLanes] = {};
    const float* from = q + i;
    if (i + kLanes > dim) {
      for (int64_t j = i; j < dim; ++j) padded[j - i] = q[j];
      from = padded;
    }
    bf16* to = tiles + i / kDepth * 2 * kTile + row * kDepth + i % kDepth;
    const Vf v = load(from);
    store_pairs(to, v);
    store_pairs(to + kTile, v - from_bf16(to));
  }
}

// Two rows of numbers as a row of pairs: the upper half of each number, and what is left of it. What is
// cut off a float16 of 11 bits has 3, so both are exact.
template <int kParts>
void split_pairs(Vf even, Vf odd, bf16* upper, bf16* lower) {
  const Vi mask = (Vi)Vf{} + static_cast<int32_t>(0xffff0000);
  const Vi even_upper = (Vi)even & mask, odd_upper = (Vi)odd & mask;
  *reinterpret_cast<Vi*>(upper) = (Vi)((Vu)even_upper >> 16) | odd_upper;
  if (kParts == 1) return;
  const Vf even_lower = even - (Vf)even_upper, odd_lower = odd - (Vf)odd_upper;
  *reinterpret_cast<Vi*>(lower) = (Vi)((Vu)even_lower >> 16) | (Vi)odd_lower;
}

// Numbers [first, first + 32) of the keys into tiles [part][4 groups of keys][16 pairs of numbers]
// [16 keys][2]. Groups past the last of `end` keys stay what they were: their scores are hidden.
template <typename Element>
void key_tiles(const Keys<Element>& keys, int64_t end, int64_t first, int64_t dim, const Ahead& ahead,
               bf16* tiles) {
  constexpr int64_t kPart = kKeyGroups * kTile;
  for (int64_t group = 0; group * kGroup < end; ++group, tiles += kTile) {
    const Element* key = keys.first[group] + first * keys.stride;
    uintptr_t line = ahead.keys[group] + first * 32;
    bf16* to = tiles;
    for (int64_t i = first; i < first + kDepth; i += 2, key += 2 * keys.stride, to += 32, line += 64) {
      fetch_far(line);
      const Vf even = i < dim ? widened(key) : Vf{};
      const Vf odd = i + 1 < dim ? widened(key + keys.stride) : Vf{};
      split_pairs<kParts<Element>>(even, odd, to, to + kPart);
    }
  }
}

// Values into tiles [part][32 keys][width / 16][16 pairs of keys][16 numbers][2]; zeros where no key is
// seen.
template <typename Element>
void value_tiles(const Values<Element>& values, int64_t width, const Ahead& ahead, bf16* tiles) {
  const int64_t block = width / 16 * kTile, part = kKeyBlocks * block;
  for (int64_t key = 0; key < round_up(values.end, kDepth); key += 2) {
    const int64_t group = key / kGroup;
    const Element* even = values.first[group] + key % kGroup * values.stride;
    const Element* odd = even + values.stride;
    const bool has_even = key >= values.begin && key < values.end;
    const bool has_odd = key + 1 >= values.begin && key + 1 < values.end;
    uintptr_t line = ahead.values[group] + key % kGroup * width * 2;
    bf16* to = tiles + key / kDepth * block + key % kDepth * 16;
    for (int64_t column = 0; column < width; column += 16, to += kTile, line += 64) {
      fetch_far(line);
      const Vf a = has_even ? widened(even + column) : Vf{};
      const Vf b = has_odd ? widened(odd + column) : Vf{};
      split_pairs<kParts<Element>>(a, b, to, to + part);
    }
  }
}

// 2^x for x <= 0 to 3e-6 of it, in half the instructions of exp: the result is rounded to bf16.
inline Vf power_of_two(Vf x) {
  const Vf n = _mm512_roundscale_ps(x, 0);
  const Vf r = x - n;
  Vf p = broadcast(0.009582853220668137f);
  p = fma(p, r, broadcast(0.05590642620810378f));
  p = fma(p, r, broadcast(0.24024098617764722f));
  p = fma(p, r, broadcast(0.6931241932253026f));
  p = fma(p, r, broadcast(1.0f));
  return _mm512_scalef_ps(p, n);
}

// The highest number of each of 16 rows.
inline Vf highest_of_rows(const Vf* rows) {
  Vf pairs[8], fours[4], eights[2];
  for (int i = 0; i < 8; ++i) {
    const Vf a = rows[2 * i], b = rows[2 * i + 1];
    pairs[i] = max(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = (__m512d)pairs[2 * i], b = (__m512d)pairs[2 * i + 1];
    fours[i] = max((Vf)_mm512_unpacklo_pd(a, b), (Vf)_mm512_unpackhi_pd(a, b));
  }
  const auto join = [](Vf a, Vf b) {
    return max(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  for (int i = 0; i < 2; ++i) eights[i] = join(fours[2 * i], fours[2 * i + 1]);
  return join(eights[0], eights[1]);
}

// Like soften, of up to 16 rows of scores [rows][kChunk], with weights [2][16 rows][32] of bf16, whose
// sums are those of the rounded. range_of(row): the first key that it sees, and past the last.
template <typename RangeOf>
Vf soften_tile(float soft_cap, int64_t rows, const RangeOf& range_of, float* scores, float* highest,
               float* lane_totals, bf16* weights) {
  Vf tops[16] = {};
  for (int64_t row = 0; row < rows; ++row) {
    const auto [from, to] = range_of(row);
    float* at = scores + row * kChunk;
    Vf s[kChunk / kLanes];
    tops[row] = seen_scores(soft_cap, at, from, to, s);
    if (soft_cap == 0.0f && from <= 0 && to >= kChunk) continue;
    for (int i = 0; i < kChunk / kLanes; ++i) store(at + i * kLanes, s[i]);
  }
  const __mmask16 are_rows = static_cast<__mmask16>((1 << rows) - 1);
  const Vf before = _mm512_maskz_loadu_ps(are_rows, highest);
  const Vf now = max(highest_of_rows(tops), before);
  _mm512_mask_storeu_ps(highest, are_rows, now);
  const Vf shrinks = exp(before - now);
  const Vf log2_e = broadcast(1.44269504088896341f);
  float bases[16], factors[16];
  store(bases, now * log2_e);
  store(factors, shrinks);
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  for (int64_t row = 0; row < rows; ++row, scores += kChunk, lane_totals += kLanes, weights += kDepth) {
    const Vf base = broadcast(bases[row]);
    Vf total = load(lane_totals) * broadcast(factors[row]);
    for (int64_t block = 0; block < kKeyBlocks; ++block) {
      const Vf low = power_of_two(fma(load(scores + block * kDepth), log2_e, -base));
      const Vf high = power_of_two(fma(load(scores + block * kDepth + kLanes), log2_e, -base));
      const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
      total = _mm512_dpbf16_ps(total, both, ones);
      _mm512_store_si512(weights + block * kTile, (__m512i)both);
    }
    store(lane_totals, total);
  }
  return shrinks;
}

// Adds to four sums, each of its own 16 keys (or numbers), so that none waits for the one before.
inline void add_products(const bf16* left, const bf16* right) {
  writes_are_done();
  _tile_loadd(4, left, 64);
  _tile_loadd(6, right, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, right + kTile, 64);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(6, right + 2 * kTile, 64);
  _tile_dpbf16ps(2, 4, 6);
  _tile_loadd(7, right + 3 * kTile, 64);
  _tile_dpbf16ps(3, 4, 7);
}

// scores [rows][kChunk] of a tile of queries. tiles_of(i): those of the i-th 32 numbers of the keys.
template <int kParts, typename TilesOf>
void score_tile(const bf16* q, int64_t dim, const TilesOf& tiles_of, float* scores) {
  constexpr int64_t kStride = kChunk * 4;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i * kDepth < dim; ++i, q += 2 * kTile) {
    const bf16* keys = tiles_of(i);
    add_products(q, keys);
    add_products(q + kTile, keys);
    if (kParts == 2) add_products(q, keys + kKeyGroups * kTile);
  }
  _tile_stored(0, scores, kStride);
  _tile_stored(1, scores + 16, kStride);
  _tile_stored(2, scores + 32, kStride);
  _tile_stored(3, scores + 48, kStride);
}

// sums [rows][width] += weights values of the first `end` keys; weights: a tile for each 32.
template <int kParts>
void value_tile(const bf16* weights, const bf16* values, int64_t end, int64_t width, float* sums) {
  const int64_t stride = width * 4, block = width / 16 * kTile;
  writes_are_done();
  for (; width >= 64; width -= 64, sums += 64, values += 4 * kTile) {
    _tile_loadd(0, sums, stride);
    _tile_loadd(1, sums + 16, stride);
    _tile_loadd(2, sums + 32, stride);
    _tile_loadd(3, sums + 48, stride);
    for (int64_t i = 0; i < kParts * kKeyBlocks; ++i) {
      const int64_t key_block = i % kKeyBlocks;
      if (key_block * kDepth < end) add_products(weights + key_block * kTile, values + i * block);
    }
    _tile_stored(0, sums, stride);
    _tile_stored(1, sums + 16, stride);
    _tile_stored(2, sums + 32, stride);
    _tile_stored(3, sums + 48, stride);
  }
  for (; width > 0; width -= 16, sums += 16, values += kTile) {
    _tile_loadd(0, sums, stride);
    for (int64_t i = 0; i < kParts * kKeyBlocks; ++i) {
      if (i % kKeyBlocks * kDepth >= end) continue;
      _tile_loadd(4, weights + i % kKeyBlocks * kTile, 64);
      _tile_loadd(6, values + i * block, 64);
      _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, sums, stride);
  }
}

}  // namespace quire::QUIRE_LEVEL

#endif
