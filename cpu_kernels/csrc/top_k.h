// The vocabulary head for rows that need their k highest logits alone: the others are not written.
//
// A row keeps every logit that may still be among its k highest; once it has three times as many, all
// but k go, and what is below those need not be looked at. Ranks are all different, so which k are left
// depends neither on the order of the panels nor on the threads.

#pragma once

#include <thread>

#include "head.h"

namespace quire::QUIRE_LEVEL {

inline float logit_of(uint64_t rank) {
  const auto ordered = static_cast<uint32_t>(rank >> 32);
  const uint32_t bits = ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered;
  float logit;
  std::memcpy(&logit, &bits, 4);
  return logit;
}

inline int32_t id_of(uint64_t rank) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(rank));
}

// A type of this level, so that what sorts by it is, too.
struct Falling {
  bool operator()(uint64_t a, uint64_t b) const { return a > b; }
};

class KHighest {
 public:
  explicit KHighest(const HeadTopK& call)
      : call_(call), room_(3 * call.k), rows_(new Row[call.rows]), ranks_(new uint64_t[call.rows * room_]) {}

  void operator()(int64_t first_row, int64_t rows, int64_t panel, const float* sums) const {
    const int64_t first = panel * kPanel, count = std::min(kPanel, call_.weight.out - first);
    for (int64_t r = 0; r < rows; ++r) {
      const float* logits = sums + r * kPanel;
      const PanelOfRow here(logits, count);
      Row& row = rows_[first_row + r];
      if (here.is_bad) row.is_bad.store(true, std::memory_order_relaxed);
      if (rank_of(here.highest, first) < row.floor.load(std::memory_order_relaxed)) continue;
      const Lock lock(row.is_locked);
      add(row, ranks_.get() + (first_row + r) * room_, logits, first, count);
    }
  }

  void write(Team& team) const {
    constexpr int64_t kRowsAtOnce = 4;
    team.split(call_.rows, kRowsAtOnce, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) write_row(row);
    });
  }

 private:
  struct alignas(64) Row {
    std::atomic<bool> is_locked{false};
    std::atomic<bool> is_bad{false};
    std::atomic<uint64_t> floor{0};  // k ranks are known that are not below
    int64_t count = 0;               // of ranks kept, under the lock
  };

  // Held for less than a microsecond by a thread that runs: nobody waits for one that has not begun.
  class Lock {
   public:
    explicit Lock(std::atomic<bool>& is_locked) : is_locked_(is_locked) {
      constexpr int kSpinsBeforeYield = 2000;
      for (int spins = 0; is_locked_.exchange(true, std::memory_order_acquire); ++spins) {
        relax();
        if (spins > kSpinsBeforeYield) std::this_thread::yield();
      }
    }
    ~Lock() { is_locked_.store(false, std::memory_order_release); }

   private:
    std::atomic<bool>& is_locked_;
  };

  void add(Row& row, uint64_t* ranks, const float* logits, int64_t first, int64_t count) const {
    uint64_t floor = row.floor.load(std::memory_order_relaxed);
    const float lowest = floor == 0 ? -INFINITY : logit_of(floor);
    // Which ones, first: a branch on each would be guessed wrong as often as not.
    int at[kPanel], num_candidates = 0;
    for (int j = 0; j < static_cast<int>(count); ++j) {
      at[num_candidates] = j;
      num_candidates += !(logits[j] < lowest);
    }
    for (int i = 0; i < num_candidates; ++i) {
      const uint64_t rank = rank_of(logits[at[i]], first + at[i]);
      if (rank < floor) continue;
      ranks[row.count++] = rank;
      if (row.count < room_) continue;
      keep_k(row, ranks);
      floor = ranks[call_.k - 1];
      row.floor.store(floor, std::memory_order_relaxed);
    }
  }

  // The k highest are the first, the last of them the lowest.
  void keep_k(Row& row, uint64_t* ranks) const {
    std::nth_element(ranks, ranks + call_.k - 1, ranks + row.count, Falling());
    row.count = call_.k;
  }

  void write_row(int64_t at) const {
    Row& row = rows_[at];
    uint64_t* ranks = ranks_.get() + at * room_;
    keep_k(row, ranks);
    std::sort(ranks, ranks + call_.k, Falling());
    for (int64_t i = 0; i < call_.k; ++i) {
      call_.logit[at * call_.k + i] = logit_of(ranks[i]);
      call_.id[at * call_.k + i] = id_of(ranks[i]);
    }
    call_.is_bad[at] = row.is_bad.load(std::memory_order_relaxed);
  }

  const HeadTopK& call_;
  const int64_t room_;
  const std::unique_ptr<Row[]> rows_;
  const std::unique_ptr<uint64_t[]> ranks_;  // [rows, room]
};

inline void head_top_k(Team& team, const HeadTopK& call) {
  const Rows x = rows_for(call.weight, call.rows, false, call.workspace);
  prepare(team, call.x, Norm{}, call.weight, x);
  const KHighest highest(call);
  multiply(team, x, call.weight, highest);
  highest.write(team);
}

}  // namespace quire::QUIRE_LEVEL
