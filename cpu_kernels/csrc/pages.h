// The keys and values of a piece of work, where they lie in the pages.
//
// Inside a page, keys lie with their positions side by side, [head_dim][page_size], so that a vector
// holds one number of several keys; values lie [page_size][value_dim].

#pragma once

#include <algorithm>

#include "scores.h"

namespace quire::QUIRE_LEVEL {

// Consecutive queries of one row, the heads that share one kv head.
struct Piece {
  int64_t first, count, row;  // tokens; row of the page table
  int64_t kv_head;
};

// Where a position lies among pages; a division for each took a tenth of a lone query's time.
class Paging {
 public:
  explicit Paging(int64_t size) : size_(size), is_power_((size & (size - 1)) == 0) {
    while (is_power_ && (int64_t{1} << shift_) < size) ++shift_;
  }

  int64_t page(int64_t position) const { return is_power_ ? position >> shift_ : position / size_; }
  int64_t offset(int64_t position) const { return is_power_ ? position & (size_ - 1) : position % size_; }

 private:
  int64_t size_;
  bool is_power_;
  int shift_ = 0;
};

// width: numbers of a value, padded to a vector.
class PiecePages {
 public:
  PiecePages(const Attention& call, const Piece& piece, int64_t width)
      : call_(call), piece_(piece), paging_(call.page_size), width_(width) {
    lowest_ = INT32_MAX;
    for (int64_t t = piece.first; t < piece.first + piece.count; ++t) {
      if (call.attend_from[t] >= call.attend_to[t]) continue;
      lowest_ = std::min<int64_t>(lowest_, call.attend_from[t]);
      end_ = std::max<int64_t>(end_, call.attend_to[t]);
    }
    lowest_ = std::min(lowest_, end_);
  }

  // The keys that a query of the piece sees are among [lowest, end).
  int64_t lowest() const { return lowest_; }
  int64_t end() const { return end_; }

  // Keys past the end are masked when they have a score, so any page will do for them.
  template <typename Element>
  Keys<Element> page_keys(int64_t chunk) const {
    Keys<Element> keys;
    keys.stride = call_.page_size;
    for (int64_t v = 0; v < kChunk / kLanes; ++v) {
      const int64_t position = within(chunk + v * kLanes);
      keys.first[v] = page_of<Element>(call_.k, call_.head_dim, position) + paging_.offset(position);
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
      values.first[group] = page + paging_.offset(position) * call_.value_dim;
    }
    return values;
  }

  // f32 [head_dim][kChunk], zeros outside the range.
  template <typename Element>
  Keys<float> widened_keys(int64_t chunk, float* to) const {
    const int64_t dim = call_.head_dim, begin = begin_in(chunk), end = end_in(chunk);
    if (begin > 0 || end < kChunk) std::fill_n(to, dim * kChunk, 0.0f);
    for (int64_t key = begin; key < end;) {
      const int64_t offset = paging_.offset(chunk + key);
      const int64_t count = std::min(call_.page_size - offset, end - key);
      const Element* page = page_of<Element>(call_.k, dim, chunk + key) + offset;
      for (int64_t i = 0; i < dim; ++i) {
        widen(page + i * call_.page_size, count, to + i * kChunk + key);
      }
      key += count;
    }
    Keys<float> keys;
    keys.stride = kChunk;
    for (int64_t v = 0; v < kChunk / kLanes; ++v) keys.first[v] = to + v * kLanes;
    return keys;
  }

  // f32 [kChunk][width], zeros past value_dim; of a latent cache the first numbers of each key.
  template <typename Element>
  Values<float> widened_values(int64_t chunk, const float* keys, float* to) const {
    const int64_t dim = call_.value_dim;
    Values<float> values = {{}, width_, begin_in(chunk), end_in(chunk)};
    for (int64_t group = 0; group < kChunk / kGroup; ++group) {
      values.first[group] = to + group * kGroup * width_;
    }
    if (width_ > dim) std::fill_n(to, kChunk * width_, 0.0f);
    for (int64_t key = values.begin; key < values.end; ++key) {
      float* row = to + key * width_;
      if (call_.v == nullptr) {
        for (int64_t i = 0; i < dim; ++i) row[i] = keys[i * kChunk + key];
      } else {
        const int64_t position = chunk + key;
        widen(page_of<Element>(call_.v, dim, position) + paging_.offset(position) * dim, dim, row);
      }
    }
    return values;
  }

  // What the chunk will read.
  Ahead expect(int64_t chunk) const {
    Ahead ahead;
    const int64_t bytes = call_.kv_dtype == Dtype::kF32 ? 4 : 2;
    const auto at = [&](const void* cache, int64_t dim, int64_t position) {
      // Of bytes, as many as a key has: where its values are, and about where its numbers are.
      const char* page = page_of<char>(cache, dim * bytes, position);
      return reinterpret_cast<uintptr_t>(page + paging_.offset(position) * dim * bytes);
    };
    for (int quarter = 0; quarter < 4; ++quarter) {
      if (chunk + quarter * kGroup >= end_) break;
      const int64_t position = within(chunk + quarter * kGroup);
      ahead.keys[quarter] = at(call_.k, call_.head_dim, position);
      if (call_.v != nullptr) ahead.values[quarter] = at(call_.v, call_.value_dim, position);
    }
    return ahead;
  }

 private:
  // The first number of a page of a cache with `dim` numbers to a key.
  template <typename Element>
  const Element* page_of(const void* cache, int64_t dim, int64_t position) const {
    const int64_t page = call_.page_table[piece_.row * call_.width + paging_.page(position)];
    const int64_t at = (page * call_.kv_heads + piece_.kv_head) * call_.page_size * dim;
    return static_cast<const Element*>(cache) + at;
  }

  int64_t begin_in(int64_t chunk) const { return std::max<int64_t>(0, lowest_ - chunk); }
  int64_t end_in(int64_t chunk) const { return std::min(kChunk, end_ - chunk); }

  // The position, or one of the same place in its group in a page that the row has.
  int64_t within(int64_t position) const {
    if (position < end_ && paging_.page(position) >= paging_.page(lowest_)) return position;
    return lowest_ / kGroup * kGroup + position % kGroup;
  }

  const Attention& call_;
  const Piece piece_;
  const Paging paging_;
  const int64_t width_;
  int64_t lowest_, end_ = 0;
};

}  // namespace quire::QUIRE_LEVEL
