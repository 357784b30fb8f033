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

#include "heads.h"
#include "scores.h"

namespace quire::QUIRE_LEVEL {

constexpr int64_t kSegment = 512;
constexpr int64_t kFewRows = 8;  // query rows that widen keys as often as they read them

// Consecutive queries of one row, the heads that share one kv head.
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

class PieceWork {
 public:
  PieceWork(const Attention& call, const Piece& piece)
      : call_(call), piece_(piece), group_(call.heads / call.kv_heads), rows_(piece.count * group_),
        width_(round_up(call.value_dim, kLanes)) {
    lowest_ = INT32_MAX;
    for (int64_t t = piece.first; t < piece.first + piece.count; ++t) {
      if (call.attend_from[t] >= call.attend_to[t]) continue;
      lowest_ = std::min<int64_t>(lowest_, call.attend_from[t]);
      end_ = std::max<int64_t>(end_, call.attend_to[t]);
    }
    lowest_ = std::min(lowest_, end_);
    first_segment_ = lowest_ / kSegment;
    num_segments_ = std::max<int64_t>(1, (end_ + kSegment - 1) / kSegment - first_segment_);
    // A vector of keys, and a group's values, have to lie in one page.
    is_direct_ = rows_ <= kFewRows && call.page_size % kGroup == 0 && width_ == call.value_dim &&
                 call.v != nullptr;
  }

  // next: what this thread does after it, or null.
  void run(Scratch& scratch, const PieceWork* next) {
    next_ = next;
    keys_ = scratch.keys.get(call_.head_dim * kChunk);
    values_ = scratch.values.get(kChunk * width_);
    scores_ = scratch.scores.get(rows_ * kChunk);
    lane_totals_ = scratch.lane_totals.get(rows_ * kLanes);
    sums_ = scratch.sums.get(num_segments_ * rows_ * width_);
    totals_ = scratch.totals.get(num_segments_ * rows_);
    highest_ = scratch.highest.get(num_segments_ * rows_);
    std::fill_n(sums_, num_segments_ * rows_ * width_, 0.0f);
    std::fill_n(highest_, num_segments_ * rows_, kLowest);
    switch (call_.kv_dtype) {
      case Dtype::kF32:
        attend_all<float>();
        break;
      case Dtype::kBf16:
        attend_all<Bf16>();
        break;
      case Dtype::kF16:
        attend_all<F16>();
        break;
    }
    for (int64_t row = 0; row < rows_; ++row) combine(row);
  }

 private:
  int64_t token_of(int64_t row) const { return piece_.first + row / group_; }
  int64_t head_of(int64_t row) const { return piece_.kv_head * group_ + row % group_; }

  // The first number of a page of a cache with `dim` numbers to a key.
  template <typename Element>
  const Element* page_of(const void* cache, int64_t dim, int64_t position) const {
    const int64_t page = call_.page_table[piece_.row * call_.width + position / call_.page_size];
    const int64_t at = (page * call_.kv_heads + piece_.kv_head) * call_.page_size * dim;
    return static_cast<const Element*>(cache) + at;
  }

  template <typename Element>
  void attend_all() {
    for (int64_t segment = 0; segment < num_segments_; ++segment) {
      const int64_t begin = (first_segment_ + segment) * kSegment;
      const int64_t end = std::min(end_, begin + kSegment), first = segment * rows_;
      std::fill_n(lane_totals_, rows_ * kLanes, 0.0f);
      int64_t chunk = std::max(begin, lowest_ / kChunk * kChunk);
      for (; chunk < end; chunk += kChunk) {
        if (is_direct_) {
          attend(first, chunk, page_keys<Element>(chunk), page_values<Element>(chunk));
        } else {
          const Keys<float> keys = widened_keys<Element>(chunk);  // before values, which may be theirs
          attend(first, chunk, keys, widened_values<Element>(chunk));
        }
      }
      for (int64_t row = 0; row < rows_; ++row) {
        totals_[first + row] = sum(load(lane_totals_ + row * kLanes));
      }
    }
  }

  // first: of the segment's rows among all partial results.
  template <typename KeysOf, typename ValuesOf>
  void attend(int64_t first, int64_t chunk, const KeysOf& keys, const ValuesOf& values) {
    const Ahead ahead = what_follows(chunk);
    for (int64_t row = 0; row < rows_; row += kQueryRows) {
      const int64_t count = std::min<int64_t>(kQueryRows, rows_ - row);
      const float* q[kQueryRows];
      for (int64_t r = 0; r < count; ++r) {
        q[r] = call_.q + (token_of(row + r) * call_.heads + head_of(row + r)) * call_.head_dim;
      }
      float* scores = scores_ + row * kChunk;
      float* sums = sums_ + (first + row) * width_;
      if (row == 0) score_rows<kQueryRows, true>(count, q, keys, call_.head_dim, ahead, scores);
      else score_rows<kQueryRows, false>(count, q, keys, call_.head_dim, ahead, scores);
      for (int64_t r = 0; r < count; ++r) weigh(first, row + r, chunk, scores + r * kChunk, sums + r * width_);
      if (row == 0) value_rows<kQueryRows, true>(count, scores, values, width_, ahead, sums);
      else value_rows<kQueryRows, false>(count, scores, values, width_, ahead, sums);
    }
  }

  // Scores become weights, and what was summed before shrinks to them.
  void weigh(int64_t first, int64_t row, int64_t chunk, float* scores, float* sums) {
    const int64_t token = token_of(row);
    const float shrink = soften(call_.soft_cap, scores, call_.attend_from[token] - chunk,
                                call_.attend_to[token] - chunk, highest_[first + row],
                                lane_totals_ + row * kLanes);
    if (shrink == 1.0f) return;
    for (float* s = sums; s < sums + width_; s += kLanes) store(s, load(s) * broadcast(shrink));
  }

  int64_t begin_in(int64_t chunk) const { return std::max<int64_t>(0, lowest_ - chunk); }
  int64_t end_in(int64_t chunk) const { return std::min(kChunk, end_ - chunk); }

  // Keys past the end are masked when they have a score, so any page will do for them.
  template <typename Element>
  Keys<Element> page_keys(int64_t chunk) const {
    Keys<Element> keys;
    keys.stride = call_.page_size;
    for (int64_t v = 0; v < kChunk / kLanes; ++v) {
      const int64_t position = within(chunk + v * kLanes);
      keys.first[v] = page_of<Element>(call_.k, call_.head_dim, position) + position % call_.page_size;
    }
    return keys;
  }

  template <typename Element>
  Values<Element> page_values(int64_t chunk) const {
    Values<Element> values;
    values.stride = call_.value_dim;
    values.begin = begin_in(chunk);
    values.end = end_in(chunk);
    for (int64_t group = 0; group < kChunk / kGroup; ++group) {
      const int64_t position = within(chunk + group * kGroup);
      const Element* page = page_of<Element>(call_.v, call_.value_dim, position);
      values.first[group] = page + position % call_.page_size * call_.value_dim;
    }
    return values;
  }

  // The position, or one of the same place in its group in a page that the row has.
  int64_t within(int64_t position) const {
    if (position < end_ && position / call_.page_size >= lowest_ / call_.page_size) return position;
    return lowest_ / kGroup * kGroup + position % kGroup;
  }

  // f32 [head_dim][kChunk], zeros outside the range.
  template <typename Element>
  Keys<float> widened_keys(int64_t chunk) {
    const int64_t dim = call_.head_dim, begin = begin_in(chunk), end = end_in(chunk);
    if (begin > 0 || end < kChunk) std::fill_n(keys_, dim * kChunk, 0.0f);
    for (int64_t key = begin; key < end;) {
      const int64_t offset = (chunk + key) % call_.page_size;
      const int64_t count = std::min(call_.page_size - offset, end - key);
      const Element* page = page_of<Element>(call_.k, dim, chunk + key) + offset;
      for (int64_t i = 0; i < dim; ++i) {
        widen(page + i * call_.page_size, count, keys_ + i * kChunk + key);
      }
      key += count;
    }
    Keys<float> keys;
    keys.stride = kChunk;
    for (int64_t v = 0; v < kChunk / kLanes; ++v) keys.first[v] = keys_ + v * kLanes;
    return keys;
  }

  // f32 [kChunk][width], zeros past value_dim; of a latent cache the first numbers of each key.
  template <typename Element>
  Values<float> widened_values(int64_t chunk) {
    const int64_t dim = call_.value_dim;
    Values<float> values = {{}, width_, begin_in(chunk), end_in(chunk)};
    for (int64_t group = 0; group < kChunk / kGroup; ++group) {
      values.first[group] = values_ + group * kGroup * width_;
    }
    if (width_ > dim) std::fill_n(values_, kChunk * width_, 0.0f);
    for (int64_t key = values.begin; key < values.end; ++key) {
      float* to = values_ + key * width_;
      if (call_.v == nullptr) {
        for (int64_t i = 0; i < dim; ++i) to[i] = keys_[i * kChunk + key];
      } else {
        const int64_t position = chunk + key;
        widen(page_of<Element>(call_.v, dim, position) + position % call_.page_size * dim, dim, to);
      }
    }
    return values;
  }

  // What this thread reads after the chunk.
  Ahead what_follows(int64_t chunk) const {
    if (chunk + kChunk < end_) return expect(chunk + kChunk);
    return next_ == nullptr ? Ahead{} : next_->expect(next_->lowest_ / kChunk * kChunk);
  }

  Ahead expect(int64_t chunk) const {
    Ahead ahead;
    const int64_t bytes = call_.kv_dtype == Dtype::kF32 ? 4 : 2;
    const auto at = [&](const void* cache, int64_t dim, int64_t position) {
      // Of bytes, as many as a key has: where its values are, and about where its numbers are.
      const char* page = page_of<char>(cache, dim * bytes, position);
      return reinterpret_cast<uintptr_t>(page + position % call_.page_size * dim * bytes);
    };
    for (int quarter = 0; quarter < 4; ++quarter) {
      if (chunk + quarter * kGroup >= end_) break;
      const int64_t position = within(chunk + quarter * kGroup);
      ahead.keys[quarter] = at(call_.k, call_.head_dim, position);
      if (call_.v != nullptr) ahead.values[quarter] = at(call_.v, call_.value_dim, position);
    }
    return ahead;
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
  const PieceWork* next_ = nullptr;
  int64_t lowest_, end_ = 0, first_segment_, num_segments_;
  bool is_direct_;
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
  const auto work_at = [&](int64_t index) {
    const int64_t work = index / call.kv_heads, item = work - num_single;
    const int64_t kv_head = index % call.kv_heads;
    if (item < 0) return PieceWork(call, {work, 1, call.token_row[work], kv_head});
    return PieceWork(call, {call.item_first[item], call.item_count[item], call.item_row[item], kv_head});
  };
  team.split(num_pieces, 1, 8, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t index = num_pieces - 1 - n;
      PieceWork now = work_at(index);
      if (n + 1 < end) { const PieceWork next = work_at(index - 1); now.run(scratch, &next); }
      else now.run(scratch, nullptr);
    }
  });
}

}  // namespace quire::QUIRE_LEVEL
