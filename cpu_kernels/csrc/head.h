// The vocabulary head for greedy rows: no logits are written. What it shares with that of the k highest.

#pragma once

#include <atomic>
#include <memory>

#include "product.h"

namespace quire::QUIRE_LEVEL {

// Orders like the logit, then like the negated id: the highest is the lowest id of the highest logit.
inline uint64_t rank_of(float logit, int64_t id) {
  int32_t bits;
  const float positive_zero = logit + 0.0f;
  std::memcpy(&bits, &positive_zero, 4);
  const uint32_t ordered =
      bits < 0 ? ~static_cast<uint32_t>(bits) : static_cast<uint32_t>(bits) | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}

// The logits of one row in one panel.
struct PanelOfRow {
  float highest;
  bool is_bad;  // one is not finite

  PanelOfRow(const float* logits, int64_t count) : highest(logits[0]) {
    float zeros = 0.0f;
    if (count == kPanel) {
      Vf top = load(logits), zero = load(logits) * broadcast(0.0f);
      for (int j = kLanes; j < kPanel; j += kLanes) {
        top = max(top, load(logits + j));
        zero = zero + load(logits + j) * broadcast(0.0f);
      }
      highest = max(top);
      zeros = sum(zero);
    } else {
      for (int64_t j = 0; j < count; ++j) {
        highest = logits[j] > highest ? logits[j] : highest;
        zeros += logits[j] * 0.0f;
      }
    }
    // 0 * x is not 0 only of an x that is not finite.
    is_bad = zeros != 0.0f;
  }
};

inline void raise_to(std::atomic<uint64_t>& best, uint64_t rank) {
  uint64_t seen = best.load(std::memory_order_relaxed);
  while (seen < rank && !best.compare_exchange_weak(seen, rank, std::memory_order_relaxed)) {
  }
}

// Keeps the best of each row, and whether one of its logits is not finite.
class Highest {
 public:
  explicit Highest(const HeadArgmax& call)
      : call_(call), best_(new std::atomic<uint64_t>[call.rows]), is_bad_(new std::atomic<bool>[call.rows]) {
    for (int64_t row = 0; row < call.rows; ++row) {
      best_[row].store(0, std::memory_order_relaxed);
      is_bad_[row].store(false, std::memory_order_relaxed);
    }
  }

  void operator()(int64_t first_row, int64_t rows, int64_t panel, const float* sums) const {
    const int64_t first = panel * kPanel, count = std::min(kPanel, call_.weight.out - first);
    for (int64_t r = 0; r < rows; ++r) {
      const float* s = sums + r * kPanel;
      const PanelOfRow here(s, count);
      if (here.is_bad) is_bad_[first_row + r].store(true, std::memory_order_relaxed);
      std::atomic<uint64_t>& best = best_[first_row + r];
      if (rank_of(here.highest, first) < best.load(std::memory_order_relaxed)) continue;
      int64_t at = 0;
      while (at < count - 1 && s[at] != here.highest) ++at;
      raise_to(best, rank_of(here.highest, first + at));
    }
  }

  void write() const {
    for (int64_t row = 0; row < call_.rows; ++row) {
      const auto rank = static_cast<uint32_t>(best_[row].load(std::memory_order_relaxed));
      call_.token[row] = static_cast<int32_t>(0xffffffffu - rank);
      call_.is_bad[row] = is_bad_[row].load(std::memory_order_relaxed);
    }
  }

 private:
  const HeadArgmax& call_;
  const std::unique_ptr<std::atomic<uint64_t>[]> best_;
  const std::unique_ptr<std::atomic<bool>[]> is_bad_;
};

inline void head_argmax(Team& team, const HeadArgmax& call) {
  const Rows x = rows_for(call.weight, call.rows, false, call.workspace);
  prepare(team, call.x, Norm{}, call.weight, x);
  const Highest highest(call);
  multiply(team, x, call.weight, highest);
  highest.write();
}

}  // namespace quire::QUIRE_LEVEL
