// y = residual + norm(x) W^T + bias, and the gated layer made of two of them.

#pragma once

#include "product.h"

namespace quire::QUIRE_LEVEL {

// Adds what is left to finished sums and writes them.
struct Finish {
  const Weight& weight;
  const float* residual;  // null: none
  float* y;

  void operator()(int64_t first_row, int64_t rows, int64_t panel, float* sums) const {
    const int64_t first = panel * kPanel, count = std::min(kPanel, weight.out - first);
    if (count < kPanel || weight.bias != nullptr) return any(first_row, rows, first, count, sums);
    int64_t at = first_row * weight.out + first;
    for (int64_t r = 0; r < rows; ++r, sums += kPanel, at += weight.out) {
      for (int64_t j = 0; j < kPanel; j += kLanes) {
        Vf v = load(sums + j);
        if (residual != nullptr) v = v + load(residual + at + j);
        store(y + at + j, v);
      }
    }
  }

 private:
  // A panel with biases, or with less than 32 outputs. What is rare stays out of the common loops.
  [[gnu::noinline]] void any(int64_t first_row, int64_t rows, int64_t first, int64_t count,
                             const float* s) const {
    for (int64_t r = 0; r < rows; ++r, s += kPanel) {
      const int64_t at = (first_row + r) * weight.out + first;
      int64_t j = 0;
      for (; j + kLanes <= count; j += kLanes) {
        Vf v = load(s + j);
        if (weight.bias != nullptr) v = v + load_as_f32(weight.bias, weight.dtype, first + j);
        if (residual != nullptr) v = v + load(residual + at + j);
        store(y + at + j, v);
      }
      for (; j < count; ++j) {
        float v = s[j];
        if (weight.bias != nullptr) v += get_as_f32(weight.bias, weight.dtype, first + j);
        if (residual != nullptr) v += residual[at + j];
        y[at + j] = v;
      }
    }
  }
};

// silu(gate) * up into the rows that the next product reads. A panel holds 16 gates, then their ups.
struct Gate {
  const Weight& weight;
  const Rows& to;

  void operator()(int64_t first_row, int64_t rows, int64_t panel, float* sums) const {
    const int64_t half = weight.out / 2, first = panel * 16;
    if (weight.bias != nullptr) add_biases(rows, half, first, sums);
    for (int64_t r = 0; r < rows; ++r) {
      const float* s = sums + r * kPanel;
      for (int j = 0; j < 16; j += kLanes) {
        write(first_row + r, first + j, silu(load(s + j)) * load(s + 16 + j));
      }
    }
    // Outputs come 16 at a time, inputs are padded to 32.
    if (first + 16 >= half && first + 16 < to.depth) clear(first_row, rows, first + 16);
  }

 private:
  [[gnu::noinline]] void clear(int64_t first_row, int64_t rows, int64_t column) const {
    for (int64_t r = 0; r < rows; ++r) {
      for (int j = 0; j < 16; j += kLanes) write(first_row + r, column + j, Vf{});
    }
  }

  [[gnu::noinline]] void add_biases(int64_t rows, int64_t half, int64_t first, float* sums) const {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < std::min<int64_t>(16, half - first); ++j) {
        sums[r * kPanel + j] += get_as_f32(weight.bias, weight.dtype, first + j);
        sums[r * kPanel + 16 + j] += get_as_f32(weight.bias, weight.dtype, half + first + j);
      }
    }
  }

  void write(int64_t row, int64_t column, Vf v) const {
#if defined(__AVX512BF16__)
    if (to.is_pairs) return store_pairs(to.tile(row, column / kDepth) + column % kDepth, v);
#endif
    store(to.floats(row) + column, v);
  }
};

inline void linear(Team& team, const Linear& call) {
  const Rows x = rows_for(call.weight, call.rows, call.is_exact, call.workspace);
  const bool is_done = in_row_pieces(team, x, [&](int64_t row, int64_t count) {
    const Rows part = x.from(row, count);
    prepare(call.x + row * call.weight.in, call.norm, call.weight, part, 0, count);
    const int64_t at = row * call.weight.out;
    const float* residual = call.residual == nullptr ? nullptr : call.residual + at;
    multiply(part, call.weight, 0, num_panels(call.weight), Finish{call.weight, residual, call.y + at});
  });
  if (is_done) return;
  prepare(team, call.x, call.norm, call.weight, x);
  multiply(team, x, call.weight, Finish{call.weight, call.residual, call.y});
}

inline void mlp(Team& team, const Mlp& call) {
  const Rows x = rows_for(call.gate_up, call.rows, false, call.workspace);
  void* rest = static_cast<char*>(call.workspace) + workspace_bytes(call.rows, call.gate_up.in);
  const Rows inner = rows_for(call.down, call.rows, false, rest);
  Weight gate_up = call.gate_up;
  // Half panels at the end of the gates and of the ups are one panel.
  gate_up.out = round_up(call.down.in, 16) * 2;
  const bool is_done = in_row_pieces(team, x, [&](int64_t row, int64_t count) {
    const Rows part = x.from(row, count), between = inner.from(row, count);
    const int64_t at = row * call.gate_up.in;
    prepare(call.x + at, call.norm, call.gate_up, part, 0, count);
    multiply(part, gate_up, 0, num_panels(gate_up), Gate{call.gate_up, between});
    multiply(between, call.down, 0, num_panels(call.down), Finish{call.down, call.x + at, call.y + at});
  });
  if (is_done) return;
  prepare(team, call.x, call.norm, call.gate_up, x);
  multiply(team, x, gate_up, Gate{call.gate_up, inner});
  multiply(team, inner, call.down, Finish{call.down, call.x, call.y});
}

}  // namespace quire::QUIRE_LEVEL
