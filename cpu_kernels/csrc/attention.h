// Ragged attention over pages in place: head norms, rope, the KV write, then an online softmax.
//
// Inside a page, keys lie with their positions side by side, [head_dim][page_size], so that a vector
// holds one number of several keys; values lie [page_size][value_dim].
//
// Keys are taken in chunks of 64 at fixed positions, chunks in segments of 512; segments are
// combined in order. So a query's arithmetic depends on its own key range alone, not on who shares
// its work, how a prompt was cut, or the number of threads.

#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "rows.h"

namespace quire::QUIRE_LEVEL {

constexpr int64_t kChunk = 64, kSegment = 512;
constexpr int kKeyVectors = 4;                   // vectors of keys, or of values, of one pass
constexpr int kQueryRows = kLanes == 8 ? 2 : 4;  // queries that share the loads of a pass
// A score that no real one reaches; a maximum starts above it, so that its exponential is 0.
constexpr float kHidden = -1e30f, kLowest = -1e29f, kTiny = 1e-30f;

// ---- Before: every token's q, k and v in their places.

inline void norm_and_rotate(const Attention& call, const float* x, const void* norm, int64_t token,
                            float factor, float* normed, float* to) {
  const int64_t dim = call.head_dim, half = dim / 2;
  if (norm != nullptr) {
    norm_row(x, dim, {norm, call.epsilon}, call.vector_dtype, normed);
    x = normed;
  }
  const Vf factors = broadcast(factor);
  int64_t i = 0;
  if (call.cos == nullptr) {
    for (; i + kLanes <= dim; i += kLanes) store(to + i, load(x + i) * factors);
    for (; i < dim; ++i) to[i] = x[i] * factor;
    return;
  }
  const float* cos = call.cos + token * dim;
  const float* sin = call.sin + token * dim;
  for (; i + kLanes <= half; i += kLanes) {
    const Vf low = load(x + i), high = load(x + half + i);
    store(to + i, (low * load(cos + i) + high * load(sin + i)) * factors);
    store(to + half + i, (high * load(cos + half + i) + low * load(sin + half + i)) * factors);
  }
  for (; i < half; ++i) {
    const float low = x[i], high = x[half + i];
    to[i] = (low * cos[i] + high * sin[i]) * factor;
    to[half + i] = (high * cos[half + i] + low * sin[half + i]) * factor;
  }
}

// Numbers x[i] to cache[first + i * stride].
inline void write(const float* x, int64_t dim, void* cache, Dtype dtype, int64_t first, int64_t stride) {
  if (dtype == Dtype::kF32) {
    float* to = static_cast<float*>(cache) + first;
    for (int64_t i = 0; i < dim; ++i) to[i * stride] = x[i];
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(cache) + first;
  uint16_t narrow[kLanes];
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    if (dtype == Dtype::kF16) store_f16(narrow, load(x + i));
    else store_bf16(narrow, load(x + i));
    for (int j = 0; j < kLanes; ++j) to[(i + j) * stride] = narrow[j];
  }
  for (; i < dim; ++i) to[i * stride] = dtype == Dtype::kF16 ? to_f16(x[i]) : to_bf16(x[i]);
}

inline void prepare_token(const Attention& call, int64_t token, float* scratch) {
  const int64_t dim = call.head_dim, q_size = call.heads * dim, k_size = call.kv_heads * dim;
  const int64_t v_size = call.v == nullptr ? 0 : call.kv_heads * call.value_dim;
  const float* qkv = call.qkv + token * (q_size + k_size + v_size);
  if (call.attend_from[token] >= call.attend_to[token]) {
    std::fill_n(call.out + token * call.heads * call.value_dim, call.heads * call.value_dim, 0.0f);
  } else {
    for (int64_t head = 0; head < call.heads; ++head) {
      norm_and_rotate(call, qkv + head * dim, call.q_norm, token, call.scale, scratch,
                      call.q + (token * call.heads + head) * dim);
    }
  }
  const int64_t page = call.write_page[token], offset = call.write_offset[token];
  if (page < 0 || page >= call.num_pages) return;  // a padded token
  float* rotated = scratch + dim;
  for (int64_t head = 0; head < call.kv_heads; ++head) {
    const int64_t first = (page * call.kv_heads + head) * call.page_size;
    norm_and_rotate(call, qkv + q_size + head * dim, call.k_norm, token, 1.0f, scratch, rotated);
    write(rotated, dim, call.k, call.kv_dtype, first * dim + offset, call.page_size);
    if (call.v != nullptr) {
      const float* v = qkv + q_size + k_size + head * call.value_dim;
      write(v, call.value_dim, call.v, call.kv_dtype, (first + offset) * call.value_dim, 1);
    }
  }
}

// ---- One piece of work: consecutive queries of one row, the heads that share one kv head.

struct Piece {
  int64_t first, count, row;  // tokens; row of the page table
  int64_t kv_head;
};

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

// What a thread keeps from piece to piece.
struct Scratch {
  Floats keys, values, scores, lane_totals, sums, totals, highest;
};

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

// Calls run(first page-relative position's address, its key in the chunk, keys) for each stretch of
// keys [begin, end) of the chunk that lies in one page. dim: numbers of one key.
template <typename Element, typename Run>
void each_page(const Attention& call, const Piece& piece, const Element* cache, int64_t dim,
               int64_t chunk, int64_t begin, int64_t end, const Run& run) {
  const int32_t* table = call.page_table + piece.row * call.width;
  for (int64_t key = begin; key < end;) {
    const int64_t page = (chunk + key) / call.page_size;
    const int64_t offset = chunk + key - page * call.page_size;
    const int64_t count = std::min(call.page_size - offset, end - key);
    run(cache + (table[page] * call.kv_heads + piece.kv_head) * call.page_size * dim, offset, key, count);
    key += count;
  }
}

// f32 [head_dim][kChunk], zeros outside [begin, end).
template <typename Element>
void gather_keys(const Attention& call, const Piece& piece, const Element* cache, int64_t chunk,
                 int64_t begin, int64_t end, float* to) {
  const int64_t dim = call.head_dim;
  if (begin > 0 || end < kChunk) std::fill_n(to, dim * kChunk, 0.0f);
  each_page(call, piece, cache, dim, chunk, begin, end,
            [&](const Element* page, int64_t offset, int64_t key, int64_t count) {
              for (int64_t i = 0; i < dim; ++i) {
                widen(page + i * call.page_size + offset, count, to + i * kChunk + key);
              }
            });
}

// f32 [kChunk][width], zeros outside [begin, end) and past value_dim.
template <typename Element>
void gather_values(const Attention& call, const Piece& piece, const Element* cache, int64_t chunk,
                   int64_t begin, int64_t end, float* to, int64_t width) {
  const int64_t dim = call.value_dim;
  if (begin > 0 || end < kChunk || width > dim) std::fill_n(to, kChunk * width, 0.0f);
  each_page(call, piece, cache, dim, chunk, begin, end,
            [&](const Element* page, int64_t offset, int64_t key, int64_t count) {
              for (int64_t row = 0; row < count; ++row) {
                widen(page + (offset + row) * dim, dim, to + (key + row) * width);
              }
            });
}

// The first numbers of each key as its value.
inline void keys_as_values(const float* keys, int64_t dim, float* to, int64_t width) {
  std::fill_n(to, kChunk * width, 0.0f);
  for (int64_t key = 0; key < kChunk; ++key) {
    for (int64_t i = 0; i < dim; ++i) to[key * width + i] = keys[i * kChunk + key];
  }
}

template <int kRows>
void score_block(const float* const* q, const float* keys, int64_t dim, float* scores) {
  for (int64_t first = 0; first < kChunk; first += kKeyVectors * kLanes) {
    Vf total[kRows][kKeyVectors] = {};
    for (int64_t i = 0; i < dim; ++i) {
      for (int r = 0; r < kRows; ++r) {
        const Vf a = broadcast(q[r][i]);
        for (int v = 0; v < kKeyVectors; ++v) {
          total[r][v] = fma(a, load(keys + i * kChunk + first + v * kLanes), total[r][v]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kKeyVectors; ++v) {
        store(scores + r * kChunk + first + v * kLanes, total[r][v]);
      }
    }
  }
}

template <int kRows>
void score_rows(int64_t rows, const float* const* q, const float* keys, int64_t dim, float* scores) {
  if (rows == kRows) return score_block<kRows>(q, keys, dim, scores);
  if constexpr (kRows > 1) score_rows<kRows - 1>(rows, q, keys, dim, scores);
}

// acc[r] += sum over keys of weight[r][key] * values[key]
template <int kRows, int kWidth>
void value_block(const float* weights, const float* values, int64_t stride, float* acc) {
  Vf total[kRows][kWidth];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kWidth; ++v) total[r][v] = load(acc + r * stride + v * kLanes);
  }
  for (int64_t key = 0; key < kChunk; ++key) {
    for (int r = 0; r < kRows; ++r) {
      const Vf a = broadcast(weights[r * kChunk + key]);
      for (int v = 0; v < kWidth; ++v) {
        total[r][v] = fma(a, load(values + key * stride + v * kLanes), total[r][v]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kWidth; ++v) store(acc + r * stride + v * kLanes, total[r][v]);
  }
}

template <int kRows>
void value_rows(int64_t rows, const float* weights, const float* values, int64_t stride, float* acc) {
  if (rows == kRows) {
    int64_t at = 0;
    for (; at + kKeyVectors * kLanes <= stride; at += kKeyVectors * kLanes) {
      value_block<kRows, kKeyVectors>(weights, values + at, stride, acc + at);
    }
    for (; at < stride; at += kLanes) {
      value_block<kRows, 1>(weights, values + at, stride, acc + at);
    }
    return;
  }
  if constexpr (kRows > 1) value_rows<kRows - 1>(rows, weights, values, stride, acc);
}

inline Vf soft_capped(Vf s, float cap) {
  const Vf e = exp(s * broadcast(2.0f / cap));
  return broadcast(cap) * (broadcast(1.0f) - broadcast(2.0f) / (e + broadcast(1.0f)));
}

// Scores to weights in place; keys [from, to) are seen. Returns by what the row's earlier sums shrink.
inline float soften(float soft_cap, float* scores, int64_t from, int64_t to, float& highest,
                    float* lane_total) {
  Vf s[kChunk / kLanes];
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
  const float now = std::max(highest, max(top));
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

class PieceWork {
 public:
  PieceWork(const Attention& call, const Piece& piece, Scratch& scratch)
      : call_(call), piece_(piece), group_(call.heads / call.kv_heads),
        rows_(piece.count * group_), width_(round_up(call.value_dim, kLanes)) {
    lowest_ = INT32_MAX;
    for (int64_t t = piece.first; t < piece.first + piece.count; ++t) {
      if (call.attend_from[t] >= call.attend_to[t]) continue;
      lowest_ = std::min<int64_t>(lowest_, call.attend_from[t]);
      end_ = std::max<int64_t>(end_, call.attend_to[t]);
    }
    lowest_ = std::min(lowest_, end_);
    first_segment_ = lowest_ / kSegment;
    num_segments_ = std::max<int64_t>(1, (end_ + kSegment - 1) / kSegment - first_segment_);
    keys_ = scratch.keys.get(call.head_dim * kChunk);
    values_ = scratch.values.get(kChunk * width_);
    scores_ = scratch.scores.get(rows_ * kChunk);
    lane_totals_ = scratch.lane_totals.get(rows_ * kLanes);
    sums_ = scratch.sums.get(num_segments_ * rows_ * width_);
    totals_ = scratch.totals.get(num_segments_ * rows_);
    highest_ = scratch.highest.get(num_segments_ * rows_);
    std::fill_n(sums_, num_segments_ * rows_ * width_, 0.0f);
    std::fill_n(highest_, num_segments_ * rows_, kLowest);
  }

  void run() {
    for (int64_t segment = 0; segment < num_segments_; ++segment) attend(segment);
    for (int64_t row = 0; row < rows_; ++row) combine(row);
  }

 private:
  int64_t token_of(int64_t row) const { return piece_.first + row / group_; }
  int64_t head_of(int64_t row) const { return piece_.kv_head * group_ + row % group_; }

  void attend(int64_t segment) {
    const int64_t begin = (first_segment_ + segment) * kSegment;
    const int64_t end = std::min(end_, begin + kSegment);
    std::fill_n(lane_totals_, rows_ * kLanes, 0.0f);
    for (int64_t chunk = std::max(begin, lowest_ / kChunk * kChunk); chunk < end; chunk += kChunk) {
      attend_chunk(segment * rows_, chunk);
    }
    for (int64_t row = 0; row < rows_; ++row) {
      totals_[segment * rows_ + row] = sum(load(lane_totals_ + row * kLanes));
    }
  }

  // first: of the segment's rows among all partial results.
  void attend_chunk(int64_t first, int64_t chunk) {
    const int64_t begin = std::max<int64_t>(0, lowest_ - chunk);
    const int64_t end = std::min(kChunk, end_ - chunk);
    switch (call_.kv_dtype) {
      case Dtype::kF32:
        load_chunk<float>(chunk, begin, end);
        break;
      case Dtype::kBf16:
        load_chunk<Bf16>(chunk, begin, end);
        break;
      case Dtype::kF16:
        load_chunk<F16>(chunk, begin, end);
        break;
    }
    for (int64_t row = 0; row < rows_; row += kQueryRows) {
      const int64_t count = std::min<int64_t>(kQueryRows, rows_ - row);
      const float* q[kQueryRows];
      for (int64_t r = 0; r < count; ++r) {
        q[r] = call_.q + (token_of(row + r) * call_.heads + head_of(row + r)) * call_.head_dim;
      }
      float* scores = scores_ + row * kChunk;
      score_rows<kQueryRows>(count, q, keys_, call_.head_dim, scores);
      float* sums = sums_ + (first + row) * width_;
      for (int64_t r = 0; r < count; ++r) {
        const int64_t token = token_of(row + r);
        const float shrink = soften(call_.soft_cap, scores + r * kChunk,
                                    call_.attend_from[token] - chunk, call_.attend_to[token] - chunk,
                                    highest_[first + row + r], lane_totals_ + (row + r) * kLanes);
        if (shrink == 1.0f) continue;
        for (float* s = sums + r * width_; s < sums + (r + 1) * width_; s += kLanes) {
          store(s, load(s) * broadcast(shrink));
        }
      }
      value_rows<kQueryRows>(count, scores, values_, width_, sums);
    }
  }

  template <typename Element>
  void load_chunk(int64_t chunk, int64_t begin, int64_t end) {
    gather_keys(call_, piece_, static_cast<const Element*>(call_.k), chunk, begin, end, keys_);
    if (call_.v == nullptr) return keys_as_values(keys_, call_.value_dim, values_, width_);
    const auto* v = static_cast<const Element*>(call_.v);
    gather_values(call_, piece_, v, chunk, begin, end, values_, width_);
  }

  void combine(int64_t row) {
    const bool has_sink = call_.sinks != nullptr;
    const float sink = has_sink ? call_.sinks[head_of(row)] : kLowest;
    float highest = sink;
    for (int64_t s = 0; s < num_segments_; ++s) highest = std::max(highest, highest_[s * rows_ + row]);
    float total = has_sink ? exp(broadcast(sink - highest))[0] : 0.0f;
    float* out = call_.out + (token_of(row) * call_.heads + head_of(row)) * call_.value_dim;
    std::fill_n(out, call_.value_dim, 0.0f);
    for (int64_t s = 0; s < num_segments_; ++s) {
      const float share = exp(broadcast(highest_[s * rows_ + row] - highest))[0];
      total += totals_[s * rows_ + row] * share;
      const float* sums = sums_ + (s * rows_ + row) * width_;
      for (int64_t i = 0; i < call_.value_dim; ++i) out[i] += sums[i] * share;
    }
    const float factor = 1.0f / std::max(total, kTiny);
    for (int64_t i = 0; i < call_.value_dim; ++i) out[i] *= factor;
  }

  const Attention& call_;
  const Piece piece_;
  const int64_t group_, rows_, width_;
  int64_t lowest_, end_ = 0, first_segment_, num_segments_;
  float* keys_;         // [head_dim][kChunk]
  float* values_;       // [kChunk][width]
  float* scores_;       // [rows][kChunk]
  float* lane_totals_;  // [rows][kLanes], of the segment: sums of weights
  float* sums_;         // [segments][rows][width]: sums of e^(score - highest) v
  float* totals_;       // [segments][rows]: sums of weights
  float* highest_;      // [segments][rows]
};

inline void attention(Team& team, const Attention& call) {
  const int64_t per_token = (call.heads + 2 * call.kv_heads) * call.head_dim;
  const auto prepare = [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * call.head_dim);
    for (int64_t token = begin; token < end; ++token) prepare_token(call, token, scratch.data());
  };
  if (call.tokens * per_token <= kSmallRows) prepare(0, call.tokens);
  else team.split(call.tokens, 1, 4, prepare);

  const int64_t num_single = std::clamp<int64_t>(*call.num_single, 0, call.tokens);
  const int64_t num_items = std::clamp<int64_t>(*call.num_items, 0, call.items);
  const int64_t num_pieces = (num_single + num_items) * call.kv_heads;
  team.split(num_pieces, 1, 8, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    // The longest ranges come last in a prompt: from the end, so that no thread starts one late.
    for (int64_t n = begin; n < end; ++n) {
      const int64_t index = num_pieces - 1 - n, work = index / call.kv_heads;
      Piece piece = {work, 1, 0, index % call.kv_heads};
      if (work >= num_single) {
        const int64_t item = work - num_single;
        piece.first = call.item_first[item];
        piece.count = call.item_count[item];
        piece.row = call.item_row[item];
      } else {
        piece.row = call.token_row[work];
      }
      PieceWork(call, piece, scratch).run();
    }
  });
}

}  // namespace quire::QUIRE_LEVEL
