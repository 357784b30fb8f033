// Ragged attention over pages in place: head norms, rope, the KV write, then an online softmax.
//
// Keys are taken in chunks of 64 at fixed positions, chunks in segments of 512; segments are
// combined in order. So a query's arithmetic depends on its own key range alone, not on who shares
// its work, how a prompt was cut, or the number of threads.

#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "attention_tiles.h"
#include "heads.h"
#include "pages.h"

namespace quire::QUIRE_LEVEL {

constexpr int64_t kSegment = 512;
constexpr int64_t kFewRows = 8;  // query rows that widen keys as often as they read them

// What a thread keeps from piece to piece: for one chunk of keys,
struct Scratch {
  Floats keys, values, scores, key_tiles, value_tiles;
};
// and for a piece while its chunks go by.
struct Progress {
  Floats lane_totals, sums, totals, highest, queries, query_tiles;
};

class PieceWork {
 public:
  PieceWork(const Attention& call, const Piece& piece)
      : call_(call), piece_(piece), group_(call.heads / call.kv_heads), rows_(piece.count * group_),
        width_(round_up(call.value_dim, kLanes)), pages_(call, piece, width_),
        is_tiled_(kHasTiles && call.kv_dtype != Dtype::kF32),
        padded_rows_(is_tiled_ && rows_ > 16 ? round_up(rows_, 16) : rows_),
        first_segment_(pages_.lowest() / kSegment) {
    const int64_t past_segment = (pages_.end() + kSegment - 1) / kSegment;
    num_segments_ = std::max<int64_t>(1, past_segment - first_segment_);
    // A vector of keys, and a group's values, have to lie in one page.
    is_direct_ = (rows_ <= kFewRows || is_tiled_) && call.page_size % kGroup == 0 &&
                 width_ == call.value_dim && call.v != nullptr;
  }

  int64_t rows() const { return rows_; }
  int64_t first_chunk() const { return pages_.lowest() / kChunk * kChunk; }
  int64_t end() const { return pages_.end(); }
  Ahead expect(int64_t chunk) const { return pages_.expect(chunk); }

  void start(Scratch& scratch, Progress& progress) {
    keys_ = scratch.keys.get(call_.head_dim * kChunk);
    values_ = scratch.values.get(kChunk * width_);
    scores_ = scratch.scores.get(padded_rows_ * kChunk);
    lane_totals_ = progress.lane_totals.get(rows_ * kLanes);
    sums_ = progress.sums.get(num_segments_ * padded_rows_ * width_);
    totals_ = progress.totals.get(num_segments_ * padded_rows_);
    highest_ = progress.highest.get(num_segments_ * padded_rows_);
    std::fill_n(sums_, num_segments_ * padded_rows_ * width_, 0.0f);
    std::fill_n(totals_, num_segments_ * padded_rows_, 0.0f);
    std::fill_n(highest_, num_segments_ * padded_rows_, kLowest);
    prepare_queries(progress);
#if defined(__AMX_BF16__)
    if (is_tiled_) split_queries(scratch, progress);
#endif
  }

  // ahead: what this thread reads next.
  void attend(int64_t chunk, const Ahead& ahead) {
    const int64_t segment = chunk / kSegment * kSegment, first = (chunk / kSegment - first_segment_) * padded_rows_;
    if (chunk == std::max(segment, first_chunk())) std::fill_n(lane_totals_, rows_ * kLanes, 0.0f);
    switch (call_.kv_dtype) {
      case Dtype::kF32:
        attend_chunk<float>(first, chunk, ahead);
        break;
      case Dtype::kBf16:
        attend_chunk<Bf16>(first, chunk, ahead);
        break;
      case Dtype::kF16:
        attend_chunk<F16>(first, chunk, ahead);
        break;
    }
    if (chunk + kChunk < std::min(segment + kSegment, end())) return;
    for (int64_t row = 0; row < rows_; ++row) totals_[first + row] = sum(load(lane_totals_ + row * kLanes));
  }

  void finish() {
    for (int64_t row = 0; row < rows_; ++row) combine(row);
  }

 private:
  int64_t token_of(int64_t row) const { return piece_.first + row / group_; }
  int64_t head_of(int64_t row) const { return piece_.kv_head * group_ + row % group_; }

  // By the thread that multiplies them: another's would come through the third cache.
  void prepare_queries(Progress& progress) {
    const int64_t dim = call_.head_dim;
    float* normed = progress.queries.get((rows_ + 1) * dim);
    queries_ = normed + dim;
    for (int64_t row = 0; row < rows_; ++row) {
      prepare_query(call_, token_of(row), head_of(row), normed, queries_ + row * dim);
    }
  }

  template <typename Element>
  void attend_chunk(int64_t first, int64_t chunk, const Ahead& ahead) {
    if (is_direct_) {
      attend_any(first, chunk, pages_.page_keys<Element>(chunk), pages_.page_values<Element>(chunk), ahead);
    } else {
      const Keys<float> keys = pages_.widened_keys<Element>(chunk, keys_);
      attend_any(first, chunk, keys, pages_.widened_values<Element>(chunk, keys_, values_), ahead);
    }
  }

  // first: of the segment's rows among all partial results.
  template <typename KeysOf, typename ValuesOf>
  void attend_any(int64_t first, int64_t chunk, const KeysOf& keys, const ValuesOf& values, const Ahead& ahead) {
#if defined(__AMX_BF16__)
    if (is_tiled_) return attend_by_tiles(first, chunk, keys, values, ahead);
#endif
    attend_by_vectors(first, chunk, keys, values, ahead);
  }

#if defined(__AMX_BF16__)
  void split_queries(Scratch& scratch, Progress& progress) {
    const int64_t dim = call_.head_dim, size = query_tiles_size(dim);
    const auto tiles = [](Floats& room, int64_t count) { return reinterpret_cast<bf16*>(room.get(count / 2)); };
    query_tiles_ = tiles(progress.query_tiles, round_up(rows_, 16) / 16 * size);
    key_tiles_ = tiles(scratch.key_tiles, std::max(key_tiles_size(dim), value_tiles_size(width_)));
    // Of a lone tile of queries, values come when keys are done with: half as much stays in the first cache.
    value_tiles_ = rows_ <= 16 ? key_tiles_ : tiles(scratch.value_tiles, value_tiles_size(width_));
    for (int64_t row = 0; row < rows_; ++row) {
      split_query(queries_ + row * dim, dim, row % 16, query_tiles_ + row / 16 * size);
    }
  }

  // Whether a query of the tile from `row` on sees a key of the chunk; one that does not is unchanged by it.
  bool is_seen(int64_t row, int64_t chunk) const {
    const int64_t last = token_of(std::min(row + 16, rows_) - 1);
    for (int64_t token = token_of(row); token <= last; ++token) {
      if (call_.attend_from[token] < chunk + kChunk && call_.attend_to[token] > chunk) return true;
    }
    return false;
  }

  template <typename Element>
  void attend_by_tiles(int64_t first, int64_t chunk, const Keys<Element>& keys, const Values<Element>& values,
                       const Ahead& ahead) {
    const int64_t dim = call_.head_dim;
    const auto tiles_of = [&](int64_t i) { return key_tiles_ + i * kParts<Element> * kKeyGroups * kTile; };
    const auto make_tiles = [&](int64_t i) {
      key_tiles(keys, values.end, i * kDepth, dim, ahead, tiles_of(i));
      return tiles_of(i);
    };
    const bool is_lone = rows_ <= 16;
    for (int64_t i = 0; i * kDepth < dim && !is_lone; ++i) make_tiles(i);
    if (!is_lone) value_tiles(values, width_, ahead, value_tiles_);
    alignas(64) bf16 weights[kKeyBlocks * kTile];
    for (int64_t top = 0; top < rows_; top += 16) {
      if (!is_seen(top, chunk)) continue;
      const bf16* q = query_tiles_ + top / 16 * query_tiles_size(dim);
      if (is_lone) {
        // Each is multiplied while the next is made.
        score_tile<kParts<Element>>(q, dim, make_tiles, scores_);
        value_tiles(values, width_, ahead, value_tiles_);
      } else {
        score_tile<kParts<Element>>(q, dim, tiles_of, scores_);
      }
      const int64_t count = std::min<int64_t>(16, rows_ - top);
      const auto range_of = [&](int64_t row) {
        const int64_t token = token_of(top + row);
        return std::pair(call_.attend_from[token] - chunk, call_.attend_to[token] - chunk);
      };
      float* sums = sums_ + (first + top) * width_;
      float shrinks[16];
      store(shrinks, soften_tile(call_.soft_cap, count, range_of, scores_, highest_ + first + top,
                                 lane_totals_ + top * kLanes, weights));
      for (int64_t row = 0; row < count; ++row) shrink_sums(shrinks[row], sums + row * width_);
      value_tile<kParts<Element>>(weights, value_tiles_, values.end, width_, sums);
    }
  }
#endif

  template <typename KeysOf, typename ValuesOf>
  void attend_by_vectors(int64_t first, int64_t chunk, const KeysOf& keys, const ValuesOf& values,
                         const Ahead& ahead) {
    for (int64_t row = 0; row < rows_; row += kQueryRows) {
      const int64_t count = std::min<int64_t>(kQueryRows, rows_ - row);
      const float* q[kQueryRows];
      for (int64_t r = 0; r < count; ++r) q[r] = queries_ + (row + r) * call_.head_dim;
      float* scores = scores_ + row * kChunk;
      float* sums = sums_ + (first + row) * width_;
      if (row == 0) score_rows<kQueryRows, true>(count, q, keys, call_.head_dim, ahead, scores);
      else score_rows<kQueryRows, false>(count, q, keys, call_.head_dim, ahead, scores);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t token = token_of(row + r);
        const float shrink = soften(call_.soft_cap, scores + r * kChunk, call_.attend_from[token] - chunk,
                                    call_.attend_to[token] - chunk, highest_[first + row + r],
                                    lane_totals_ + (row + r) * kLanes);
        shrink_sums(shrink, sums + r * width_);
      }
      if (row == 0) value_rows<kQueryRows, true>(count, scores, values, width_, ahead, sums);
      else value_rows<kQueryRows, false>(count, scores, values, width_, ahead, sums);
    }
  }

  // What was summed before, to the weights of a new maximum.
  void shrink_sums(float shrink, float* sums) {
    if (shrink == 1.0f) return;
    for (int64_t i = 0; i < width_; i += kLanes) store(sums + i, load(sums + i) * broadcast(shrink));
  }

  void combine(int64_t row) {
    const bool has_sink = call_.sinks != nullptr;
    const float sink = has_sink ? call_.sinks[head_of(row)] : kLowest;
    float highest = sink;
    for (int64_t s = 0; s < num_segments_; ++s) highest = std::max(highest, highest_[s * padded_rows_ + row]);
    float total = has_sink ? exp(broadcast(sink - highest))[0] : 0.0f;
    for (int64_t s = 0; s < num_segments_; ++s) {
      float& share = highest_[s * padded_rows_ + row];
      share = share == highest ? 1.0f : exp(broadcast(share - highest))[0];
      total += totals_[s * padded_rows_ + row] * share;
    }
    const float factor = 1.0f / std::max(total, kTiny);
    float* out = call_.out + (token_of(row) * call_.heads + head_of(row)) * call_.value_dim;
    for (int64_t i = 0; i < call_.value_dim; i += kLanes) {
      Vf joined = {};
      for (int64_t s = 0; s < num_segments_; ++s) {
        const int64_t at = s * padded_rows_ + row;
        joined = joined + load(sums_ + at * width_ + i) * broadcast(highest_[at]);
      }
      joined = joined * broadcast(factor);
      const int64_t count = std::min<int64_t>(kLanes, call_.value_dim - i);
      if (count == kLanes) store(out + i, joined);
      else std::memcpy(out + i, &joined, count * sizeof(float));
    }
  }

  const Attention& call_;
  const Piece piece_;
  const int64_t group_, rows_, width_;
  const PiecePages pages_;
  const bool is_tiled_;
  const int64_t padded_rows_;  // of the arrays below, in whole tiles
  const int64_t first_segment_;
  int64_t num_segments_;
  bool is_direct_;
  float* queries_;      // [rows][head_dim]
  float* keys_;         // [head_dim][kChunk]
  float* values_;       // [kChunk][width]
  float* scores_;       // [rows][kChunk]
#if defined(__AMX_BF16__)
  bf16 *query_tiles_, *key_tiles_, *value_tiles_;
#endif
  float* lane_totals_;  // [rows][kLanes], of the segment: sums of weights
  float* sums_;         // [segments][rows][width]: sums of e^(score - highest) v
  float* totals_;       // [segments][rows]: sums of weights
  float* highest_;      // [segments][rows]
};

// Pieces that a thread does at once, chunk by chunk: heads of one query, whose keys lie side by side.
using Bundle = std::vector<PieceWork>;

// next: what the thread does after it, or empty.
inline void attend(Bundle& bundle, const Bundle& next, Scratch& scratch, std::vector<Progress>& progress) {
  if (progress.size() < bundle.size()) progress.resize(bundle.size());
  for (size_t i = 0; i < bundle.size(); ++i) bundle[i].start(scratch, progress[i]);
#if defined(__AMX_BF16__)
  const TileSession session(bundle[0].rows());
#endif
  for (int64_t chunk = bundle[0].first_chunk(); chunk < bundle[0].end(); chunk += kChunk) {
    for (size_t i = 0; i < bundle.size(); ++i) {
      Ahead ahead;
      if (i + 1 < bundle.size()) ahead = bundle[i + 1].expect(chunk);
      else if (chunk + kChunk < bundle[0].end()) ahead = bundle[0].expect(chunk + kChunk);
      else if (!next.empty()) ahead = next[0].expect(next[0].first_chunk());
      bundle[i].attend(chunk, ahead);
    }
  }
  for (PieceWork& work : bundle) work.finish();
}

// Queries of the first of `heads` kv heads that are one bundle.
struct Queries {
  Piece piece;
  int64_t heads;
};

// Items that follow each other in a prompt share the keys that they read, and the heads of a lone query
// are one bundle, as long as there are bundles enough for all threads.
inline std::vector<Queries> all_queries(const Attention& call, int64_t num_threads) {
  constexpr int64_t kMostQueries = 64, kPerThread = 8;
  const int64_t num_single = std::clamp<int64_t>(*call.num_single, 0, call.tokens);
  const int64_t num_items = std::clamp<int64_t>(*call.num_items, 0, call.items);
  const int64_t shared = num_items * call.kv_heads / (num_threads * kPerThread);
  const int64_t heads = num_single >= num_threads * kPerThread ? call.kv_heads : 1;
  std::vector<Queries> all;
  const auto add = [&](const Piece& piece, int64_t at_once) {
    for (int64_t head = 0; head < call.kv_heads; head += at_once) {
      all.push_back({{piece.first, piece.count, piece.row, head}, at_once});
    }
  };
  for (int64_t token = 0; token < num_single; ++token) add({token, 1, call.token_row[token], 0}, heads);
  for (int64_t item = 0; item < num_items;) {
    Piece piece = {call.item_first[item], call.item_count[item], call.item_row[item], 0};
    const int64_t group = item / std::max<int64_t>(1, shared);
    for (++item; item < num_items && item / std::max<int64_t>(1, shared) == group; ++item) {
      const bool follows = call.item_row[item] == piece.row && call.item_first[item] == piece.first + piece.count;
      if (!follows || piece.count + call.item_count[item] > kMostQueries) break;
      piece.count += call.item_count[item];
    }
    add(piece, 1);
  }
  return all;
}

inline void attention(Team& team, const Attention& call) {
  const int64_t per_token = 2 * call.kv_heads * call.head_dim;
  const auto prepare = [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * call.head_dim);
    for (int64_t token = begin; token < end; ++token) write_token(call, token, scratch.data());
  };
  if (call.tokens * per_token <= kSmallRows) prepare(0, call.tokens);
  else team.split(call.tokens, 1, 4, prepare);

  const std::vector<Queries> queries = all_queries(call, team.num_threads());
  const auto count = static_cast<int64_t>(queries.size());
  // The last of a prompt first: they take longest.
  const auto bundle_at = [&](int64_t n) {
    const Queries& these = queries[count - 1 - n];
    Bundle bundle;
    bundle.reserve(these.heads);
    Piece piece = these.piece;
    for (int64_t head = 0; head < these.heads; ++head, ++piece.kv_head) bundle.emplace_back(call, piece);
    return bundle;
  };
  team.split(count, 1, 8, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    thread_local std::vector<Progress> progress;
    Bundle now = bundle_at(begin);
    for (int64_t n = begin; n < end; ++n) {
      Bundle next;
      if (n + 1 < end) next = bundle_at(n + 1);
      attend(now, next, scratch, progress);
      now = std::move(next);
    }
  });
}

}  // namespace quire::QUIRE_LEVEL
