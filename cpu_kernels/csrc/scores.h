// The arithmetic of one chunk of keys: scores, weights, weighted values.
//
// Keys come with a lane for each and values with a lane for each number, from rows of f32 that a piece
// of many queries has made, or straight from the pages for one of few.

#pragma once

#include <algorithm>

#include "tiles.h"

namespace quire::QUIRE_LEVEL {

constexpr int64_t kChunk = 64;
constexpr int kGroup = 16;                       // keys whose values follow each other
constexpr int kKeyVectors = 4;                   // vectors of keys, or of values, of one pass
constexpr int kQueryRows = kLanes == 8 ? 2 : 4;  // queries that share the loads of a pass
// A score that no real one reaches; a maximum starts above it, so that its exponential is 0.
constexpr float kHidden = -1e30f, kLowest = -1e29f, kTiny = 1e-30f;

struct Bf16 {
  bf16 bits;
};
struct F16 {
  f16 bits;
};
inline Vf widened(const float* p) { return load(p); }
inline Vf widened(const Bf16* p) { return from_bf16(&p->bits); }
inline Vf widened(const F16* p) { return from_f16(&p->bits); }
inline float widened_one(float x) { return x; }
inline float widened_one(Bf16 x) { return from_bf16(x.bits); }
inline float widened_one(F16 x) { return from_f16(x.bits); }

template <typename Element>
void widen(const Element* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, widened(from + i));
  for (; i < count; ++i) to[i] = widened_one(from[i]);
}

// What the next chunk will read, a quarter at each address. It is asked for bit by bit while this
// chunk is worked on, as a core waits once it has asked for sixteen lines. 0: nothing; to ask for what
// is there does no harm.
struct Ahead {
  uintptr_t keys[4] = {}, values[4] = {};
};

inline void fetch(uintptr_t address) { __builtin_prefetch(reinterpret_cast<const void*>(address)); }

// Number i of the keys of vector v is at first[v] + i * stride.
template <typename Element>
struct Keys {
  const Element* first[kChunk / kLanes];
  int64_t stride;
};

// The values of key k are at first[k / 16] + k % 16 * stride; those of keys [begin, end) are read.
template <typename Element>
struct Values {
  const Element* first[kChunk / kGroup];
  int64_t stride, begin, end;
};

// scores [rows][kChunk] = q keys
template <int kRows, bool kIsFirst, typename Element>
void score_block(const float* const* q, const Keys<Element>& keys, int64_t dim, const Ahead& ahead,
                 float* scores) {
  for (int pass = 0; pass < kChunk / kLanes; pass += kKeyVectors) {
    Vf total[kRows][kKeyVectors] = {};
    for (int64_t i = 0; i < dim; ++i) {
      if (kIsFirst && pass == 0) {
        fetch(ahead.keys[i % 4] + i / 4 * 128);
        fetch(ahead.keys[i % 4] + i / 4 * 128 + 64);
      }
      Vf key[kKeyVectors];
      for (int v = 0; v < kKeyVectors; ++v) key[v] = widened(keys.first[pass + v] + i * keys.stride);
      for (int r = 0; r < kRows; ++r) {
        const Vf a = broadcast(q[r][i]);
        for (int v = 0; v < kKeyVectors; ++v) total[r][v] = fma(a, key[v], total[r][v]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kKeyVectors; ++v) {
        store(scores + r * kChunk + (pass + v) * kLanes, total[r][v]);
      }
    }
  }
}

template <int kRows, bool kIsFirst, typename Element>
void score_rows(int64_t rows, const float* const* q, const Keys<Element>& keys, int64_t dim,
                const Ahead& ahead, float* scores) {
  if (rows == kRows) return score_block<kRows, kIsFirst>(q, keys, dim, ahead, scores);
  if constexpr (kRows > 1) score_rows<kRows - 1, kIsFirst>(rows, q, keys, dim, ahead, scores);
}

// sums [rows][width], from column `first` on, += weights values
template <int kRows, int kWidth, bool kIsFirst, typename Element>
void value_block(const float* weights, const Values<Element>& values, int64_t first, int64_t width,
                 const Ahead& ahead, float* sums) {
  Vf total[kRows][kWidth];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kWidth; ++v) total[r][v] = load(sums + r * width + first + v * kLanes);
  }
  for (int64_t group = values.begin / kGroup; group * kGroup < values.end; ++group) {
    const int64_t begin = std::max(values.begin, group * kGroup);
    const int64_t end = std::min(values.end, (group + 1) * kGroup);
    const Element* row = values.first[group] + begin % kGroup * values.stride + first;
    uintptr_t line = ahead.values[group] + (begin % kGroup * width + first) * 2;
    for (int64_t key = begin; key < end; ++key, row += values.stride, line += width * 2) {
      if (kIsFirst) {
        for (int v = 0; v < kWidth * kLanes * 2; v += 64) fetch(line + v);
      }
      Vf value[kWidth];
      for (int v = 0; v < kWidth; ++v) value[v] = widened(row + v * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const Vf a = broadcast(weights[r * kChunk + key]);
        for (int v = 0; v < kWidth; ++v) total[r][v] = fma(a, value[v], total[r][v]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kWidth; ++v) store(sums + r * width + first + v * kLanes, total[r][v]);
  }
}

template <int kRows, bool kIsFirst, typename Element>
void value_rows(int64_t rows, const float* weights, const Values<Element>& values, int64_t width,
                const Ahead& ahead, float* sums) {
  if (rows == kRows) {
    int64_t at = 0;
    for (; at + kKeyVectors * kLanes <= width; at += kKeyVectors * kLanes) {
      value_block<kRows, kKeyVectors, kIsFirst>(weights, values, at, width, ahead, sums);
    }
    for (; at < width; at += kLanes) {
      value_block<kRows, 1, kIsFirst>(weights, values, at, width, ahead, sums);
    }
    return;
  }
  if constexpr (kRows > 1) value_rows<kRows - 1, kIsFirst>(rows, weights, values, width, ahead, sums);
}

inline Vf soft_capped(Vf s, float cap) {
  const Vf e = exp(s * broadcast(2.0f / cap));
  return broadcast(cap) * (broadcast(1.0f) - broadcast(2.0f) / (e + broadcast(1.0f)));
}

// Scores to s, hidden where a key is not one of [from, to); the highest of each lane.
inline Vf seen_scores(float soft_cap, const float* scores, int64_t from, int64_t to, Vf* s) {
  for (int64_t i = 0; i < kChunk / kLanes; ++i) {
    s[i] = load(scores + i * kLanes);
    if (soft_cap != 0.0f) s[i] = soft_capped(s[i], soft_cap);
  }
  if (from > 0 || to < kChunk) {
    Vi lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    const Vi low = lane - static_cast<int32_t>(from), high = lane - static_cast<int32_t>(to);
    for (int32_t i = 0; i < kChunk / kLanes; ++i) {
      s[i] = (low + i * kLanes >= 0) & (high + i * kLanes < 0) ? s[i] : broadcast(kHidden);
    }
  }
  Vf top = s[0];
  for (int64_t i = 1; i < kChunk / kLanes; ++i) top = max(top, s[i]);
  return top;
}

// Scores to weights in place; keys [from, to) are seen. Returns by what the row's earlier sums shrink.
inline float soften(float soft_cap, float* scores, int64_t from, int64_t to, float& highest,
                    float* lane_total) {
  Vf s[kChunk / kLanes];
  const float now = std::max(highest, max(seen_scores(soft_cap, scores, from, to, s)));
  const Vf base = broadcast(now);
  Vf total = {};
  for (int64_t i = 0; i < kChunk / kLanes; ++i) {
    const Vf weight = exp(s[i] - base);
    total = total + weight;
    store(scores + i * kLanes, weight);
  }
  const float shrink = highest == now ? 1.0f : exp(broadcast(highest - now))[0];
  store(lane_total, load(lane_total) * broadcast(shrink) + total);
  highest = now;
  return shrink;
}

}  // namespace quire::QUIRE_LEVEL
