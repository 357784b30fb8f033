// Ragged attention over pages in place: head norms, rope, the KV write, then an online softmax.
//
// Keys are taken in chunks of 64 at fixed positions, chunks in segments of 512; segments are
// combined in order. So a query's arithmetic depends on its own key range alone, not on who shares
// its work, how a prompt was cut, or the number of threads.

#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "linear.h"

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
    const float scale = inverse_rms(x, dim, call.epsilon);
    for (int64_t i = 0; i < dim; ++i) normed[i] = x[i] * scale * get_as_f32(norm, call.vector_dtype, i);
    x = normed;
  }
  if (call.cos == nullptr) {
    for (int64_t i = 0; i < dim; ++i) to[i] = x[i] * factor;
    return;
  }
  const float* cos = call.cos + token * dim;
  const float* sin = call.sin + token * dim;
  for (int64_t i = 0; i < half; ++i) to[i] = (x[i] * cos[i] + x[i + half] * sin[i]) * factor;
  for (int64_t i = half; i < dim; ++i) to[i] = (x[i] * cos[i] + x[i - half] * sin[i]) * factor;
}

inline void write_row(const float* x, int64_t dim, void* cache, Dtype dtype, int64_t row) {
  if (dtype == Dtype::kF32) {
    std::memcpy(static_cast<float*>(cache) + row * dim, x, dim * sizeof(float));
    return;
  }
  auto* to = static_cast<uint16_t*>(cache) + row * dim;
  if (dtype == Dtype::kF16) {
    for (int64_t i = 0; i < dim; ++i) to[i] = to_f16(x[i]);
  } else {
    for (int64_t i = 0; i < dim; ++i) to[i] = to_bf16(x[i]);
  }
}

inline void prepare_token(const Attention& call, int64_t token, float* scratch) {
  const int64_t dim = call.head_dim, q_size = call.heads * dim, k_size = call.kv_heads * dim;
  const int64_t v_size = call.v == nullptr ? 0 : call.kv_heads * call.value_dim;
  const float* qkv = call.qkv + token * (q_size + k_size + v_size);
  for (int64_t head = 0; head < call.heads; ++head) {
    norm_and_rotate(call, qkv + head * dim, call.q_norm, token, call.scale, scratch,
                    call.q + (token * call.heads + head) * dim);
  }
  if (call.attend_from[token] >= call.attend_to[token]) {
    std::fill_n(call.out + token * call.heads * call.value_dim, call.heads * call.value_dim, 0.0f);
  }
  const int64_t page = call.write_page[token], offset = call.write_offset[token];
  if (page < 0 || page >= call.num_pages) return;  // a padded token
  float* rotated = scratch + dim;
  for (int64_t head = 0; head < call.kv_heads; ++head) {
    const int64_t row = (page * call.kv_heads + head) * call.page_size + offset;
    norm_and_rotate(call, qkv + q_size + head * dim, call.k_norm, token, 1.0f, scratch, rotated);
    write_row(rotated, dim, call.k, call.kv_dtype, row);
    if (call.v != nullptr) {
      const float* v = qkv + q_size + k_size + head * call.value_dim;
      write_row(v, call.value_dim, call.v, call.kv_dtype, row);
    }
  }
}

// ---- One piece of work: consecutive queries of one row, the heads that share one kv head.

struct Piece {
  int64_t first, count, row;  // tokens; row of the page table
  int64_t kv_head;
};

// Of one query row over one segment: sum of e^(s - highest) v, the sum of weights, the maximum.
struct Partial {
  std::vector<float> values;  // [segments][rows][value_width]
  std::vector<float> totals;  // [segments][rows]
  std::vector<float> highest;
};

struct Scratch {
  std::vector<float> rows;        // [kChunk][width], f32 keys
  std::vector<float> keys;        // [head_dim, padded][kChunk]
  std::vector<float> values;      // [kChunk][value_width]
  std::vector<float> scores;      // [query rows][kChunk]
  std::vector<float> lane_total;  // [query rows][kLanes]
  Partial partial;
};

inline void transpose(Vf (&rows)[kLanes]) {
  Vi low, high;
  for (int i = 0; i < kLanes / 2; ++i) {
    low[2 * i] = i;
    low[2 * i + 1] = kLanes + i;
    high[2 * i] = kLanes / 2 + i;
    high[2 * i + 1] = kLanes + kLanes / 2 + i;
  }
  for (int stage = 1; stage < kLanes; stage *= 2) {
    Vf next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], high);
    }
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// `used` numbers of a row of the cache as f32.
inline void widen(const void* cache, Dtype dtype, int64_t row, int64_t dim, int64_t used, float* to) {
  int64_t i = 0;
  if (dtype == Dtype::kF32) {
    std::memcpy(to, static_cast<const float*>(cache) + row * dim, used * sizeof(float));
  } else if (dtype == Dtype::kBf16) {
    const bf16* from = static_cast<const bf16*>(cache) + row * dim;
    for (; i + kLanes <= used; i += kLanes) store(to + i, from_bf16(from + i));
    for (; i < used; ++i) to[i] = from_bf16(from[i]);
  } else {
    const f16* from = static_cast<const f16*>(cache) + row * dim;
    for (; i + kLanes <= used; i += kLanes) store(to + i, from_f16(from + i));
    for (; i < used; ++i) to[i] = from_f16(from[i]);
  }
}

// f32 rows [kChunk][width] of a cache at positions [begin, end) of the chunk; zeros elsewhere.
inline void gather(const Attention& call, const Piece& piece, const void* cache, int64_t dim,
                   int64_t chunk, int64_t begin, int64_t end, int64_t used, float* to,
                   int64_t width) {
  const int32_t* table = call.page_table + piece.row * call.width;
  std::fill_n(to, begin * width, 0.0f);
  std::fill_n(to + end * width, (kChunk - end) * width, 0.0f);
  for (int64_t key = begin; key < end; ++key) {
    const int64_t position = chunk + key, page = table[position / call.page_size];
    const int64_t row =
        (page * call.kv_heads + piece.kv_head) * call.page_size + position % call.page_size;
    widen(cache, call.kv_dtype, row, dim, used, to + key * width);
    std::fill_n(to + key * width + used, width - used, 0.0f);
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

// Scores to weights in place. Returns by what the row's earlier sums shrink.
inline float soften(const Attention& call, float* scores, int64_t from, int64_t to, float& highest,
                    float* lane_total) {
  Vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  Vf top = broadcast(kHidden);
  for (int64_t key = 0; key < kChunk; key += kLanes) {
    Vf s = load(scores + key);
    if (call.soft_cap != 0.0f) s = soft_capped(s, call.soft_cap);
    const Vi at = lane + static_cast<int32_t>(key);
    const Vi sees = (at >= static_cast<int32_t>(from)) & (at < static_cast<int32_t>(to));
    s = sees ? s : broadcast(kHidden);
    top = max(top, s);
    store(scores + key, s);
  }
  const float now = std::max(highest, max(top));
  const Vf base = broadcast(now);
  Vf total = {};
  for (int64_t key = 0; key < kChunk; key += kLanes) {
    const Vf weight = exp(load(scores + key) - base);
    total = total + weight;
    store(scores + key, weight);
  }
  const float shrink = highest == now ? 1.0f : exp(broadcast(highest - now))[0];
  store(lane_total, load(lane_total) * broadcast(shrink) + total);
  highest = now;
  return shrink;
}

class PieceWork {
 public:
  PieceWork(const Attention& call, const Piece& piece, Scratch& scratch)
      : call_(call), piece_(piece), scratch_(scratch), group_(call.heads / call.kv_heads),
        rows_(piece.count * group_), dim_(round_up(call.head_dim, kLanes)),
        width_(round_up(call.value_dim, kLanes)) {
    lowest_ = INT32_MAX;
    for (int64_t t = piece.first; t < piece.first + piece.count; ++t) {
      if (call.attend_from[t] >= call.attend_to[t]) continue;
      lowest_ = std::min<int64_t>(lowest_, call.attend_from[t]);
      end_ = std::max<int64_t>(end_, call.attend_to[t]);
    }
    lowest_ = std::min(lowest_, end_);
    scratch.rows.resize(kChunk * std::max(dim_, width_));
    scratch.keys.resize(dim_ * kChunk);
    scratch.values.resize(kChunk * width_);
    scratch.scores.resize(rows_ * kChunk);
    scratch.lane_total.resize(rows_ * kLanes);
    first_segment_ = lowest_ / kSegment;
    num_segments_ = std::max<int64_t>(1, (end_ + kSegment - 1) / kSegment - first_segment_);
    scratch.partial.values.assign(num_segments_ * rows_ * width_, 0.0f);
    scratch.partial.totals.resize(num_segments_ * rows_);
    scratch.partial.highest.assign(num_segments_ * rows_, kLowest);
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
    std::fill(scratch_.lane_total.begin(), scratch_.lane_total.end(), 0.0f);
    for (int64_t chunk = std::max(begin, lowest_ / kChunk * kChunk); chunk < end; chunk += kChunk) {
      attend_chunk(segment, chunk);
    }
    for (int64_t row = 0; row < rows_; ++row) {
      scratch_.partial.totals[segment * rows_ + row] = sum(load(&scratch_.lane_total[row * kLanes]));
    }
  }

  void attend_chunk(int64_t segment, int64_t chunk) {
    const int64_t begin = std::max<int64_t>(0, lowest_ - chunk);
    const int64_t end = std::min(kChunk, end_ - chunk);
    load_keys(chunk, begin, end);
    gather(call_, piece_, call_.v == nullptr ? call_.k : call_.v,
           call_.v == nullptr ? call_.head_dim : call_.value_dim, chunk, begin, end, call_.value_dim,
           scratch_.values.data(), width_);
    for (int64_t row = 0; row < rows_; row += kQueryRows) {
      const int64_t count = std::min<int64_t>(kQueryRows, rows_ - row);
      const float* q[kQueryRows];
      for (int64_t r = 0; r < count; ++r) {
        q[r] = call_.q + (token_of(row + r) * call_.heads + head_of(row + r)) * call_.head_dim;
      }
      float* scores = &scratch_.scores[row * kChunk];
      score_rows<kQueryRows>(count, q, scratch_.keys.data(), call_.head_dim, scores);
      float* values = &scratch_.partial.values[(segment * rows_ + row) * width_];
      for (int64_t r = 0; r < count; ++r) {
        const int64_t token = token_of(row + r);
        const float shrink = soften(
            call_, scores + r * kChunk, call_.attend_from[token] - chunk,
            call_.attend_to[token] - chunk, scratch_.partial.highest[segment * rows_ + row + r],
            &scratch_.lane_total[(row + r) * kLanes]);
        if (shrink == 1.0f) continue;
        for (int64_t i = 0; i < width_; i += kLanes) {
          store(values + r * width_ + i, load(values + r * width_ + i) * broadcast(shrink));
        }
      }
      value_rows<kQueryRows>(count, scores, scratch_.values.data(), width_, values);
    }
  }

  // Keys of the chunk with a lane for each.
  void load_keys(int64_t chunk, int64_t begin, int64_t end) {
    gather(call_, piece_, call_.k, call_.head_dim, chunk, begin, end, call_.head_dim,
           scratch_.rows.data(), dim_);
    for (int64_t key = 0; key < kChunk; key += kLanes) {
      for (int64_t i = 0; i < dim_; i += kLanes) {
        Vf block[kLanes];
        for (int j = 0; j < kLanes; ++j) block[j] = load(&scratch_.rows[(key + j) * dim_ + i]);
        transpose(block);
        for (int j = 0; j < kLanes; ++j) store(&scratch_.keys[(i + j) * kChunk + key], block[j]);
      }
    }
  }

  void combine(int64_t row) {
    const Partial& partial = scratch_.partial;
    const bool has_sink = call_.sinks != nullptr;
    const float sink = has_sink ? call_.sinks[head_of(row)] : kLowest;
    float highest = sink;
    for (int64_t s = 0; s < num_segments_; ++s) {
      highest = std::max(highest, partial.highest[s * rows_ + row]);
    }
    float total = has_sink ? exp(broadcast(sink - highest))[0] : 0.0f;
    float* out = call_.out + (token_of(row) * call_.heads + head_of(row)) * call_.value_dim;
    std::fill_n(out, call_.value_dim, 0.0f);
    for (int64_t s = 0; s < num_segments_; ++s) {
      const float share = exp(broadcast(partial.highest[s * rows_ + row] - highest))[0];
      total += partial.totals[s * rows_ + row] * share;
      const float* values = &partial.values[(s * rows_ + row) * width_];
      for (int64_t i = 0; i < call_.value_dim; ++i) out[i] += values[i] * share;
    }
    const float factor = 1.0f / std::max(total, kTiny);
    for (int64_t i = 0; i < call_.value_dim; ++i) out[i] *= factor;
  }

  const Attention& call_;
  const Piece piece_;
  Scratch& scratch_;
  const int64_t group_, rows_, dim_, width_;
  int64_t lowest_, end_ = 0, first_segment_, num_segments_;
};

inline void attention(Team& team, const Attention& call) {
  const int64_t per_token = (call.heads + 2 * call.kv_heads) * call.head_dim;
  const auto prepare = [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * call.head_dim);
    for (int64_t token = begin; token < end; ++token) prepare_token(call, token, scratch.data());
  };
  if (call.tokens * per_token <= kSmallPack) prepare(0, call.tokens);
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
