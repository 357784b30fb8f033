// Products, the gated layer and the heads against loops in double precision.

#include <algorithm>
#include <cmath>

#include "../pack.h"
#include "driver.h"

namespace quire::driver {
namespace {

// A matrix, its packed form in memory of exactly its size, and a bias.
struct Matrix {
  int64_t rows, columns;
  Numbers plain, packed, bias;
  std::vector<double> values;  // of plain, once they are packed

  Matrix(Random& random, int64_t rows, int64_t columns, Dtype dtype, float scale)
      : rows(rows), columns(columns), plain(dtype, rows * columns) {
    plain.fill(random, scale);
    if (random.chance(50)) return;
    bias = Numbers(dtype, rows);
    bias.fill(random, 3.0f);
  }

  void pack_it(bool is_gated) {
    const int64_t padded = is_gated ? round_up(rows / 2, 16) * 2 : round_up(rows, kPanel);
    packed = Numbers(plain.dtype, padded * round_up(columns, kDepth));
    if (plain.dtype == Dtype::kF32) {
      pack(static_cast<const float*>(plain.data()), 0, rows, rows, columns, is_gated,
           static_cast<float*>(packed.data()));
    } else {
      pack(static_cast<const uint16_t*>(plain.data()), 0, rows, rows, columns, is_gated,
           static_cast<uint16_t*>(packed.data()));
    }
    for (int64_t i = 0; i < plain.count(); ++i) values.push_back(plain.get(i));
  }

  Weight weight() const {
    return {packed.data(), plain.dtype, columns, rows, bias.bytes.empty() ? nullptr : bias.data()};
  }
};

// Rows of an input, and a norm of it in the dtype of the matrix that follows.
struct Input {
  int64_t rows, in;
  Numbers x, norm;

  Input(Random& random, int64_t rows, int64_t in, Dtype dtype)
      : rows(rows), in(in), x(Dtype::kF32, rows * in) {
    x.fill(random, random.one_of({0.1f, 1.0f, 30.0f}));
    if (random.chance(50)) return;
    norm = Numbers(dtype, in);
    norm.fill(random, 2.0f);
  }

  const float* row(int64_t first) const { return static_cast<const float*>(x.data()) + first * in; }
  Norm as_norm() const { return {norm.bytes.empty() ? nullptr : norm.data(), 1e-5f}; }
};

// Number of rows and of inputs: at times several blocks of either.
struct Size {
  int64_t rows, in, out;

  explicit Size(Random& random) {
    rows = random.chance(70) ? random.between(1, 20) : random.between(1, 90);
    in = random.between(1, 300);
    out = random.between(1, 150);
    if (random.chance(8)) {
      rows = random.between(20, 45);
      in = random.between(8200, 8400);
      out = random.between(1, 40);
    } else if (random.chance(5)) {
      rows = random.between(100, 700);
      out = random.between(1, 40);
    } else if (random.chance(2)) {
      rows = random.between(250, 300);
      in = random.between(2600, 2800);
      out = random.between(1, 70);
    }
    if (random.chance(30)) in = round_up(in, kDepth);  // nothing to pad, so rows go by themselves
  }
};

Dtype weight_dtype(Random& random) { return random.chance(50) ? Dtype::kBf16 : Dtype::kF32; }

// A value and the largest error that rounding may leave in it.
struct Bounded {
  double value = 0.0, error = 0.0;
};

// Of products of bf16: how far from 1 the rounding of an input may be.
double rounding_of(const Kernels& level, Dtype dtype, bool is_exact) {
  const std::string name = level.name;
  if (dtype != Dtype::kBf16 || (name != "amx" && name != "avx512_bf16")) return 0.0;
  return is_exact ? 0x1p-16 : 0x1p-8;
}

// The row as a product reads it, before it is rounded.
std::vector<Bounded> normed(const Input& input, int64_t row) {
  std::vector<Bounded> x(input.in);
  double squares = 0.0;
  for (int64_t i = 0; i < input.in; ++i) {
    x[i].value = input.x.get(row * input.in + i);
    squares += x[i].value * x[i].value;
  }
  if (input.norm.bytes.empty()) return x;
  const double scale = 1.0 / std::sqrt(squares / static_cast<double>(input.in) + 1e-5f);
  for (int64_t i = 0; i < input.in; ++i) {
    x[i].value *= scale * input.norm.get(i);
    x[i].error = std::abs(x[i].value) * static_cast<double>(input.in + 16) * 0x1p-24;
  }
  return x;
}

// Each term is off by what x is and by its rounding; the order of the sum adds half a unit of a number
// no larger than the sum of sizes for each addition. Numbers below the normal ones may count as 0.
Bounded product(const std::vector<Bounded>& x, const Matrix& matrix, int64_t output, double rounding) {
  Bounded sum;
  double sizes = 0.0;
  for (int64_t i = 0; i < matrix.columns; ++i) {
    const double w = matrix.values[output * matrix.columns + i];
    sum.value += x[i].value * w;
    sum.error += std::abs(w) * (x[i].error + std::abs(x[i].value) * rounding);
    sizes += std::abs(x[i].value * w);
  }
  sum.error += (sizes + sum.error) * static_cast<double>(matrix.columns + 16) * 0x1p-24;
  if (!matrix.bias.bytes.empty()) sum.value += matrix.bias.get(output);
  sum.error += std::abs(sum.value) * 0x1p-23 + 1e-30;
  return sum;
}

// ---- Linear

Numbers run_linear(const Kernels& level, Linear call, Threads& pool, int num_threads) {
  Numbers y(Dtype::kF32, call.rows * call.weight.out);
  y.spoil();
  Memory<uint8_t> workspace(workspace_bytes(call.rows, call.weight.in), 0xff);
  call.y = static_cast<float*>(y.data());
  call.workspace = workspace.data();
  Team team(pool, num_threads);
  level.linear(team, call);
  return y;
}

// ---- The gated layer

Numbers run_mlp(const Kernels& level, Mlp call, Threads& pool, int num_threads) {
  Numbers y(Dtype::kF32, call.rows * call.down.out);
  y.spoil();
  Memory<uint8_t> workspace(
      workspace_bytes(call.rows, call.gate_up.in) + workspace_bytes(call.rows, call.down.in), 0xff);
  call.y = static_cast<float*>(y.data());
  call.workspace = workspace.data();
  Team team(pool, num_threads);
  level.mlp(team, call);
  return y;
}

std::vector<Bounded> gated(const std::vector<Bounded>& x, const Matrix& gate_up, double rounding) {
  const int64_t width = gate_up.rows / 2;
  std::vector<Bounded> made(width);
  for (int64_t i = 0; i < width; ++i) {
    const Bounded gate = product(x, gate_up, i, rounding);
    const Bounded up = product(x, gate_up, width + i, rounding);
    const double act = gate.value / (1.0 + std::exp(-gate.value));
    made[i].value = act * up.value;
    // silu's slope is at most 1.1; the rest is for its own exponential and division.
    made[i].error = 1.1 * gate.error * (std::abs(up.value) + up.error) + std::abs(act) * up.error +
                    1e-6 * std::abs(act * up.value) + 1e-30;
  }
  return made;
}

std::string describe(const Input& input, const Matrix& matrix) {
  return std::to_string(input.rows) + " x " + std::to_string(input.in) + " x " +
         std::to_string(matrix.rows) + ", " + (matrix.plain.dtype == Dtype::kF32 ? "f32" : "bf16") +
         (input.norm.bytes.empty() ? "" : ", norm") + (matrix.bias.bytes.empty() ? "" : ", bias");
}

// The rows to compare: the loops are slow, and each row is as the others.
std::vector<int64_t> sample(Random& random, int64_t rows) {
  std::vector<int64_t> chosen = {0, rows - 1};
  for (int n = 0; n < 6; ++n) chosen.push_back(random.between(0, rows - 1));
  std::sort(chosen.begin(), chosen.end());
  chosen.erase(std::unique(chosen.begin(), chosen.end()), chosen.end());
  return chosen;
}

// The k highest of `logits`, of equal ones the lowest ids first. highest: null if there are but ids.
void expect_highest(Case& result, const float* logits, int64_t vocab, int64_t k, const float* highest,
                    const int32_t* ids, int32_t is_bad) {
  std::vector<int32_t> order(vocab);
  for (int64_t id = 0; id < vocab; ++id) order[id] = static_cast<int32_t>(id);
  const bool has_bad = !std::all_of(logits, logits + vocab, [](float x) { return std::isfinite(x); });
  if (is_bad != static_cast<int32_t>(has_bad)) return result.fail("is_bad is %d", is_bad);
  for (int64_t i = 0; has_bad && i < k; ++i) {
    if (ids[i] < 0 || ids[i] >= vocab) result.fail("id %d is none", ids[i]);
  }
  if (has_bad) return;
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  for (int64_t i = 0; i < k; ++i) {
    if (ids[i] != order[i]) {
      result.fail("id %d is %d and should be %d", static_cast<int>(i), ids[i], order[i]);
    }
    if (highest != nullptr && highest[i] != logits[order[i]]) result.fail("logit %d", static_cast<int>(i));
  }
}

// Some rows of a call, whose result has to be the same alone.
struct Part {
  int64_t first, rows;

  Part(Random& random, int64_t of) : first(random.between(0, of - 1)) {
    rows = random.chance(50) ? 1 : random.between(1, of - first);
  }
};

}  // namespace

void check_linear(const Kernels& level, uint64_t seed, Threads& pool) {
  Random random(seed);
  const Size size(random);
  const Dtype dtype = weight_dtype(random);
  const Input input(random, size.rows, size.in, dtype);
  Matrix matrix(random, size.out, size.in, dtype, 2.0f / std::sqrt(static_cast<float>(size.in)));
  matrix.pack_it(false);
  Numbers residual(Dtype::kF32, random.chance(50) ? size.rows * size.out : 0);
  residual.fill(random, 3.0f);
  const auto* residuals = residual.bytes.empty() ? nullptr : static_cast<const float*>(residual.data());
  const bool is_exact = random.chance(40);
  Linear call = {size.rows, input.row(0), input.as_norm(), is_exact, matrix.weight(), residuals,
                 nullptr,   nullptr};
  Case result(level.name, "linear", seed);
  const Numbers y = run_linear(level, call, pool, 1);
  const double rounding = rounding_of(level, dtype, is_exact);
  for (const int64_t row : sample(random, size.rows)) {
    const std::vector<Bounded> x = normed(input, row);
    for (int64_t output = 0; output < size.out; ++output) {
      Bounded sum = product(x, matrix, output, rounding);
      const int64_t at = row * size.out + output;
      if (residuals != nullptr) sum.value += residuals[at];
      sum.error += rounding_error(Dtype::kF32, std::abs(sum.value) + sum.error);
      result.expect_near(y.get(at), sum.value, sum.error, "y", at);
    }
  }
  for (const int num_threads : {2, 5}) {
    const Numbers again = run_linear(level, call, pool, num_threads);
    result.expect_same(again.data(), y.data(), y.bytes.size(), "y with more threads");
  }
  const Part part(random, size.rows);
  call.rows = part.rows;
  call.x = input.row(part.first);
  if (residuals != nullptr) call.residual = residuals + part.first * size.out;
  const Numbers alone = run_linear(level, call, pool, 1);
  result.expect_same(alone.data(), &y.bytes[part.first * size.out * 4], alone.bytes.size(),
                     "y of rows alone");
  if (result.has_failed()) result.describe(describe(input, matrix) + (is_exact ? ", exact" : ""));
}

void check_mlp(const Kernels& level, uint64_t seed, Threads& pool) {
  Random random(seed);
  const Size size(random);
  const int64_t width = random.between(1, size.in > 1000 ? 40 : 150);
  const Dtype dtype = weight_dtype(random);
  const Dtype down_dtype = random.chance(80) ? dtype : weight_dtype(random);
  const Input input(random, size.rows, size.in, dtype);
  const float scale = 2.0f / std::sqrt(static_cast<float>(size.in));
  Matrix gate_up(random, 2 * width, size.in, dtype, scale);
  Matrix down(random, size.in, width, down_dtype, 1.0f);
  gate_up.pack_it(true);
  down.pack_it(false);
  Mlp call = {size.rows,     input.row(0), input.as_norm(), gate_up.weight(),
              down.weight(), nullptr,      nullptr};
  Case result(level.name, "mlp", seed);
  const Numbers y = run_mlp(level, call, pool, 1);
  const double rounding = rounding_of(level, dtype, false);
  const double down_rounding = rounding_of(level, down_dtype, false);
  for (const int64_t row : sample(random, size.rows)) {
    const std::vector<Bounded> inner = gated(normed(input, row), gate_up, rounding);
    for (int64_t output = 0; output < size.in; ++output) {
      Bounded sum = product(inner, down, output, down_rounding);
      const int64_t at = row * size.in + output;
      sum.value += input.x.get(at);
      sum.error += rounding_error(Dtype::kF32, std::abs(sum.value) + sum.error);
      result.expect_near(y.get(at), sum.value, sum.error, "y", at);
    }
  }
  for (const int num_threads : {2, 5}) {
    const Numbers again = run_mlp(level, call, pool, num_threads);
    result.expect_same(again.data(), y.data(), y.bytes.size(), "y with more threads");
  }
  const Part part(random, size.rows);
  call.rows = part.rows;
  call.x = input.row(part.first);
  const Numbers alone = run_mlp(level, call, pool, 1);
  result.expect_same(alone.data(), &y.bytes[part.first * size.in * 4], alone.bytes.size(),
                     "y of rows alone");
  if (result.has_failed()) result.describe(describe(input, gate_up));
}

void check_head(const Kernels& level, uint64_t seed, Threads& pool) {
  Random random(seed);
  Case result(level.name, "heads", seed);
  const int64_t rows = random.between(1, 40);
  const int64_t in = round_up(random.between(1, 200), random.one_of({1, 1, 32}));
  const int64_t vocab = random.between(1, 700);
  const Dtype dtype = random.chance(50) ? Dtype::kBf16 : Dtype::kF32;
  Matrix weight(random, vocab, in, dtype, 1.0f);
  weight.bias = Numbers();  // a head has none
  const int64_t bytes = in * weight.plain.item();
  for (int64_t ties = random.between(0, vocab / 2); ties > 0; --ties) {
    std::memcpy(&weight.plain.bytes[random.between(0, vocab - 1) * bytes],
                &weight.plain.bytes[random.between(0, vocab - 1) * bytes], bytes);
  }
  if (random.chance(15)) weight.plain.set(random.between(0, vocab * in - 1), INFINITY);
  weight.pack_it(false);
  Numbers x(Dtype::kF32, rows * in);
  x.fill(random, 2.0f);
  if (random.chance(30)) x.set(random.between(0, rows * in - 1), random.one_of({NAN, INFINITY, -INFINITY}));
  if (random.chance(10)) std::fill(x.bytes.begin(), x.bytes.end(), 0);  // every logit is 0

  // The logits as the product has them, whose values check_linear checks.
  const auto* rows_of_x = static_cast<const float*>(x.data());
  const Linear product = {rows, rows_of_x, Norm{}, false, weight.weight(), nullptr, nullptr, nullptr};
  const Numbers logits = run_linear(level, product, pool, 1);
  const auto* numbers = static_cast<const float*>(logits.data());
  const int64_t k = random.between(1, random.chance(50) ? vocab : std::min<int64_t>(vocab, 70));
  for (const int num_threads : {1, 2, 5}) {
    Team team(pool, num_threads);
    Memory<int32_t> token(rows, -1), ids(rows * k, -1), is_bad(rows, -1);
    Memory<float> highest(rows * k, NAN);
    Memory<uint8_t> workspace(workspace_bytes(rows, in), 0xff);
    level.head_argmax(team, {rows, rows_of_x, weight.weight(), token.data(), is_bad.data(),
                             workspace.data()});
    for (int64_t row = 0; row < rows; ++row) {
      expect_highest(result, numbers + row * vocab, vocab, 1, nullptr, &token[row], is_bad[row]);
    }
    std::fill(is_bad.begin(), is_bad.end(), -1);
    level.head_top_k(team, {rows, rows_of_x, weight.weight(), k, highest.data(), ids.data(), is_bad.data(),
                            workspace.data()});
    for (int64_t row = 0; row < rows; ++row) {
      expect_highest(result, numbers + row * vocab, vocab, k, &highest[row * k], &ids[row * k],
                     is_bad[row]);
    }
    if (result.has_failed()) return result.describe(std::to_string(num_threads) + " threads");
  }
}

void check_pack(uint64_t seed) {
  Random random(seed);
  Case result("any level", "pack", seed);
  for (int n = 0; n < 300; ++n) {
    const int64_t columns = random.between(1, 200);
    const bool is_gated = random.chance(50);
    const int64_t rows = is_gated ? 2 * random.between(1, 100) : random.between(1, 200);
    Matrix weight(random, rows, columns, random.one_of({Dtype::kF32, Dtype::kBf16}), 1.0f);
    weight.pack_it(is_gated);
    std::vector<float> back(columns);
    std::vector<uint8_t> is_used(weight.packed.count());
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = packed_row(row, rows, is_gated);
      unpack_row(weight.packed.data(), weight.plain.dtype, at, columns, back.data());
      for (int64_t column = 0; column < columns; ++column) {
        const float should = weight.plain.get(row * columns + column);
        if (back[column] != should) result.fail("row %d is not unpacked", static_cast<int>(row));
        is_used[packed_index(at, column, round_up(columns, kDepth), weight.plain.item() == 2)] = 1;
      }
    }
    for (int64_t i = 0; i < weight.packed.count(); ++i) {
      if (!is_used[i] && weight.packed.get(i) != 0.0f) result.fail("padding is not 0");
    }
  }
}

}  // namespace quire::driver
