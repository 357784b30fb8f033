// Attention over pages against loops in double precision, with NaN wherever nobody may look.

#include <algorithm>
#include <cmath>

#include "driver.h"

namespace quire::driver {
namespace {

// Tokens [past, past + fresh) of a sequence are new in this step.
struct Request {
  int64_t past, fresh, window;  // window: keys that a query sees, its own included
  std::vector<int32_t> pages;
  int64_t first;  // its tokens in the arrays of World
};

// Everything that does not depend on who shares a step.
struct World {
  Attention shape = {};  // pointers are set by run()
  std::vector<Request> requests;
  int64_t tokens = 0;
  std::vector<float> qkv, cos, sin, sinks;
  Numbers q_norm, k_norm, k, v;
  bool is_latent;

  // Of a number of a key, and of a value, in a slot of the cache.
  int64_t key_at(int64_t page, int64_t head, int64_t offset, int64_t i) const {
    return ((page * shape.kv_heads + head) * shape.head_dim + i) * shape.page_size + offset;
  }
  int64_t value_at(int64_t page, int64_t head, int64_t offset, int64_t i) const {
    if (is_latent) return key_at(page, head, offset, i);
    return ((page * shape.kv_heads + head) * shape.page_size + offset) * shape.value_dim + i;
  }
  int64_t row_size() const {
    const int64_t values = is_latent ? 0 : shape.kv_heads * shape.value_dim;
    return (shape.heads + shape.kv_heads) * shape.head_dim + values;
  }
};

// Which tokens of a step are alone and which are cut into items.
struct Step {
  struct Item {
    int32_t row, first, count;
  };
  Memory<int32_t> from, to, row, page, offset, table;
  std::vector<int64_t> token;  // of World, -1: padding
  std::vector<Item> items;
  int32_t num_single = 0;
  int64_t rows = 0, width = 0;
};

struct Result {
  Numbers k, v;
  Memory<float> out;
};

void draw_shape(Random& random, World& world) {
  Attention& shape = world.shape;
  shape.kv_heads = random.between(1, 3);
  shape.heads = shape.kv_heads * random.between(1, 5);
  shape.page_size = random.one_of<int64_t>({1, 4, 8, 16, 32, 64});
  shape.head_dim = 2 * random.between(1, random.chance(20) ? 64 : 20);
  shape.value_dim = random.chance(70) ? shape.head_dim : random.between(1, shape.head_dim);
  shape.kv_dtype = random.one_of({Dtype::kF32, Dtype::kBf16, Dtype::kF16});
  shape.vector_dtype = random.one_of({Dtype::kF32, Dtype::kBf16});
  shape.epsilon = 1e-6f;
  shape.scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  shape.soft_cap = random.chance(25) ? 5.0f : 0.0f;
  world.is_latent = random.chance(20);
  if (random.chance(50)) {
    world.q_norm = Numbers(shape.vector_dtype, shape.head_dim);
    world.k_norm = Numbers(shape.vector_dtype, shape.head_dim);
    world.q_norm.fill(random, 2.0f);
    world.k_norm.fill(random, 2.0f);
  }
  if (random.chance(30)) {
    for (int64_t head = 0; head < shape.heads; ++head) world.sinks.push_back(3 * random.number());
  }
}

// Every slot that holds no token of a request is NaN.
void draw_cache(Random& random, World& world) {
  Attention& shape = world.shape;
  for (const Request& request : world.requests) shape.num_pages += request.pages.size();
  shape.num_pages += random.between(0, 3);
  std::vector<int32_t> order(shape.num_pages);
  for (int64_t i = 0; i < shape.num_pages; ++i) {
    const int64_t at = random.between(0, i);
    order[i] = order[at];
    order[at] = static_cast<int32_t>(i);
  }
  const int64_t slots = shape.num_pages * shape.kv_heads * shape.page_size;
  world.k = Numbers(shape.kv_dtype, slots * shape.head_dim);
  world.v = Numbers(shape.kv_dtype, world.is_latent ? 0 : slots * shape.value_dim);
  world.k.spoil();
  world.v.spoil();
  int64_t next = 0;
  for (Request& request : world.requests) {
    for (int32_t& page : request.pages) page = order[next++];
    const int64_t seen = std::max<int64_t>(0, request.past + 1 - request.window);
    for (int64_t position = seen; position < request.past; ++position) {
      for (int64_t head = 0; head < shape.kv_heads; ++head) {
        const int64_t page = request.pages[position / shape.page_size];
        const int64_t offset = position % shape.page_size;
        for (int64_t i = 0; i < shape.head_dim; ++i) {
          world.k.set(world.key_at(page, head, offset, i), random.number() * 2);
        }
        for (int64_t i = 0; i < shape.value_dim && !world.is_latent; ++i) {
          world.v.set(world.value_at(page, head, offset, i), random.number() * 2);
        }
      }
    }
  }
}

World draw(Random& random) {
  World world;
  draw_shape(random, world);
  const int64_t num_requests = random.between(1, 5);
  for (int64_t i = 0; i < num_requests; ++i) {
    Request request = {};
    request.past = random.chance(15) ? random.between(300, 1700) : random.between(0, 150);
    request.fresh = random.chance(50) ? 1 : random.between(2, random.chance(20) ? 150 : 40);
    request.window = random.chance(30) ? random.between(1, 700) : 1 << 20;
    request.first = world.tokens;
    const int64_t length = request.past + request.fresh;
    request.pages.resize((length + world.shape.page_size - 1) / world.shape.page_size);
    world.tokens += request.fresh;
    world.requests.push_back(request);
  }
  draw_cache(random, world);
  for (int64_t i = 0; i < world.tokens * world.row_size(); ++i) world.qkv.push_back(2 * random.number());
  if (random.chance(60)) {
    const int64_t dim = world.shape.head_dim;
    for (int64_t i = 0; i < world.tokens * dim; ++i) {
      const float angle = 3.0f * random.number();
      world.cos.push_back(std::cos(angle));
      world.sin.push_back(i % dim < dim / 2 ? -std::sin(angle) : std::sin(angle));
    }
  }
  return world;
}

// The n-th new token of a request into the step.
void add_token(const World& world, const Request& request, int64_t n, int64_t row, Step& step) {
  const int64_t position = request.past + n, page_size = world.shape.page_size;
  step.from.push_back(static_cast<int32_t>(std::max<int64_t>(0, position + 1 - request.window)));
  step.to.push_back(static_cast<int32_t>(position + 1));
  step.row.push_back(static_cast<int32_t>(row));
  step.page.push_back(request.pages[position / page_size]);
  step.offset.push_back(static_cast<int32_t>(position % page_size));
  step.token.push_back(request.first + n);
}

void add_padding(const World& world, Step& step) {
  step.from.push_back(0);
  step.to.push_back(0);
  step.row.push_back(0);
  step.page.push_back(static_cast<int32_t>(world.shape.num_pages));
  step.offset.push_back(0);
  step.token.push_back(-1);
}

// The chosen requests in any order; those with one new token first, as the contract has it. Longer
// ones in items of random length, or every token alone.
Step arrange(Random& random, const World& world, std::vector<int64_t> chosen) {
  Step step;
  const bool is_cut = random.chance(80);
  for (size_t i = chosen.size(); i > 1; --i) std::swap(chosen[i - 1], chosen[random.between(0, i - 1)]);
  const auto is_single = [&](int64_t i) { return !is_cut || world.requests[i].fresh == 1; };
  std::stable_partition(chosen.begin(), chosen.end(), is_single);
  for (const int64_t index : chosen) {
    const Request& request = world.requests[index];
    step.width = std::max<int64_t>(step.width, request.pages.size() + random.between(0, 2));
  }
  // A row that has ended while a program of several steps goes on.
  if (random.chance(20)) {
    add_padding(world, step);
    step.num_single = 1;
    step.rows = 1;
    step.width = std::max<int64_t>(step.width, 1);
    step.table.assign(step.width, 0);
  }
  for (const int64_t index : chosen) {
    const Request& request = world.requests[index];
    const int64_t row = step.rows++;
    for (int64_t n = 0; n < request.fresh; ++n) add_token(world, request, n, row, step);
    // Pages that no query of the request sees have any number.
    const int64_t seen = std::max<int64_t>(0, request.past + 1 - request.window) / world.shape.page_size;
    for (int64_t i = 0; i < step.width; ++i) {
      const bool is_seen = i >= seen && i < static_cast<int64_t>(request.pages.size());
      step.table.push_back(is_seen ? request.pages[i] : random.one_of({-1, 0, 0x7fffffff}));
    }
    if (is_single(index)) {
      step.num_single += static_cast<int32_t>(request.fresh);
      continue;
    }
    auto at = static_cast<int32_t>(step.from.size() - request.fresh);
    for (int64_t left = request.fresh; left > 0;) {
      const int64_t count = std::min(left, random.between(1, 16));
      step.items.push_back({static_cast<int32_t>(row), at, static_cast<int32_t>(count)});
      at += static_cast<int32_t>(count);
      left -= count;
    }
  }
  for (int64_t padded = random.between(0, 5); padded > 0; --padded) add_padding(world, step);
  return step;
}

// Rows of an array of the world in the order of the step; NaN for padding.
Memory<float> in_order(const std::vector<float>& of_world, int64_t size, const Step& step) {
  Memory<float> made(of_world.empty() ? 0 : step.token.size() * size, NAN);
  for (size_t i = 0; i < step.token.size() && !of_world.empty(); ++i) {
    if (step.token[i] < 0) continue;
    std::copy_n(of_world.begin() + step.token[i] * size, size, made.begin() + i * size);
  }
  return made;
}

Result run(const Kernels& level, const World& world, const Step& step, Threads& pool, int num_threads) {
  const auto or_null = [](const auto& array) { return array.empty() ? nullptr : array.data(); };
  Attention call = world.shape;
  call.tokens = static_cast<int64_t>(step.token.size());
  call.rows = step.rows;
  call.width = step.width;
  Result result = {world.k, world.v, Memory<float>(call.tokens * call.heads * call.value_dim, NAN)};
  const auto qkv = in_order(world.qkv, world.row_size(), step);
  const auto cos = in_order(world.cos, call.head_dim, step), sin = in_order(world.sin, call.head_dim, step);
  // Items past the last have any numbers.
  std::vector<int32_t> row, first, count;
  for (const Step::Item& item : step.items) {
    row.push_back(item.row);
    first.push_back(item.first);
    count.push_back(item.count);
  }
  for (auto* array : {&row, &first, &count}) array->resize(array->size() + 3, 0x7fffffff);
  const auto num_items = static_cast<int32_t>(step.items.size());
  call.items = num_items + 3;
  call.qkv = qkv.data();
  call.cos = or_null(cos);
  call.sin = or_null(sin);
  call.q_norm = or_null(world.q_norm.bytes);
  call.k_norm = or_null(world.k_norm.bytes);
  call.sinks = or_null(world.sinks);
  call.k = result.k.data();
  call.v = world.is_latent ? nullptr : result.v.data();
  call.attend_from = step.from.data();
  call.attend_to = step.to.data();
  call.token_row = step.row.data();
  call.write_page = step.page.data();
  call.write_offset = step.offset.data();
  call.page_table = step.table.data();
  call.num_single = &step.num_single;
  call.num_items = &num_items;
  call.item_row = row.data();
  call.item_first = first.data();
  call.item_count = count.data();
  call.out = result.out.data();
  Team team(pool, num_threads);
  level.attention(team, call);
  return result;
}

// A head of a token, normed and rotated.
std::vector<double> prepared(const World& world, int64_t token, int64_t at, const Numbers& norm) {
  const int64_t dim = world.shape.head_dim, half = dim / 2;
  std::vector<double> x(dim), made(dim);
  double squares = 0.0;
  for (int64_t i = 0; i < dim; ++i) {
    x[i] = world.qkv[token * world.row_size() + at + i];
    squares += x[i] * x[i];
  }
  if (!norm.bytes.empty()) {
    const double scale = 1.0 / std::sqrt(squares / static_cast<double>(dim) + world.shape.epsilon);
    for (int64_t i = 0; i < dim; ++i) x[i] *= scale * norm.get(i);
  }
  if (world.cos.empty()) return x;
  for (int64_t i = 0; i < dim; ++i) {
    const int64_t other = i < half ? i + half : i - half;
    made[i] = x[i] * world.cos[token * dim + i] + x[other] * world.sin[token * dim + i];
  }
  return made;
}

// Every slot of the cache is as before, or holds a new token's key and value.
void compare_cache(Case& result, const World& world, const Step& step, const Result& found) {
  const Attention& shape = world.shape;
  Numbers k = world.k, v = world.v;
  const auto expect = [&](Numbers& cache, const Numbers& is, int64_t at, double should, const char* what) {
    // Half a unit of the format, and the few f32 operations before.
    const double error = rounding_error(shape.kv_dtype, should) * 1.001 + 1e-5 * (1 + std::abs(should));
    result.expect_near(is.get(at), should, error, what, at);
    std::memcpy(&cache.bytes[at * cache.item()], &is.bytes[at * is.item()], cache.item());
  };
  for (size_t i = 0; i < step.token.size(); ++i) {
    const int64_t token = step.token[i];
    if (token < 0) continue;
    for (int64_t head = 0; head < shape.kv_heads; ++head) {
      const int64_t page = step.page[i], offset = step.offset[i];
      const auto key = prepared(world, token, (shape.heads + head) * shape.head_dim, world.k_norm);
      for (int64_t j = 0; j < shape.head_dim; ++j) {
        expect(k, found.k, world.key_at(page, head, offset, j), key[j], "k");
      }
      const int64_t values = (shape.heads + shape.kv_heads) * shape.head_dim + head * shape.value_dim;
      for (int64_t j = 0; j < shape.value_dim && !world.is_latent; ++j) {
        const double value = world.qkv[token * world.row_size() + values + j];
        expect(v, found.v, world.value_at(page, head, offset, j), value, "v");
      }
    }
  }
  result.expect_same(found.k.data(), k.data(), k.bytes.size(), "k that nobody wrote");
  result.expect_same(found.v.data(), v.data(), v.bytes.size(), "v that nobody wrote");
}

// One head of one query against the keys as they are in the cache.
void compare_head(Case& result, const World& world, const Step& step, const Result& found, size_t i,
                  int64_t head, bool is_rounded) {
  const Attention& shape = world.shape;
  const auto q = prepared(world, step.token[i], head * shape.head_dim, world.q_norm);
  const int64_t kv_head = head / (shape.heads / shape.kv_heads);
  const Numbers& values = world.is_latent ? found.k : found.v;
  double total = world.sinks.empty() ? 0.0 : std::exp(world.sinks[head]), score_error = 0.0;
  std::vector<double> out(shape.value_dim), sizes(shape.value_dim);
  for (int64_t position = step.from[i]; position < step.to[i]; ++position) {
    const int64_t page = step.table[step.row[i] * step.width + position / shape.page_size];
    const int64_t offset = position % shape.page_size;
    double score = 0.0, size = 0.0;
    for (int64_t j = 0; j < shape.head_dim; ++j) {
      const double term = shape.scale * q[j] * found.k.get(world.key_at(page, kv_head, offset, j));
      score += term;
      size += std::abs(term);
    }
    // Each factor is off by a few units (norm: a sum of head_dim squares), and so is the sum.
    // In halves of bf16, 16 bits of q are kept, and the product of both second halves is left out.
    const double unit = static_cast<double>(2 * shape.head_dim + 32) * 0x1p-24 + (is_rounded ? 0x1.8p-15 : 0.0);
    score_error = std::max(score_error, size * unit);
    if (shape.soft_cap != 0.0f) score = shape.soft_cap * std::tanh(score / shape.soft_cap);
    const double weight = std::exp(score);
    total += weight;
    for (int64_t j = 0; j < shape.value_dim; ++j) {
      const double term = weight * values.get(world.value_at(page, kv_head, offset, j));
      out[j] += term;
      sizes[j] += std::abs(term);
    }
  }
  // Weights are off by e^error - 1, in the sum and in the total; each has an exponential or two, and
  // its sum as many additions as there are keys in a chunk and chunks in the range.
  const double error = 2 * score_error + (shape.soft_cap != 0.0f ? 4e-6 * shape.soft_cap : 0.0) + 3e-6 +
                       static_cast<double>(step.to[i] - step.from[i]) * 0x1p-24 +
                       // Half a unit of bf16 of the weight and of the value.
                       (is_rounded ? 0x1.02p-7 : 0.0);
  for (int64_t j = 0; j < shape.value_dim; ++j) {
    const int64_t at = (static_cast<int64_t>(i) * shape.heads + head) * shape.value_dim + j;
    const double norm = total == 0.0 ? 1.0 : total;
    result.expect_near(found.out[at], out[j] / norm, sizes[j] / norm * error + 1e-30, "out", at);
  }
}

}  // namespace

void check_attention(const Kernels& level, uint64_t seed, Threads& pool) {
  Random random(seed);
  Case result(level.name, "attention", seed);
  const World world = draw(random);
  std::vector<int64_t> all(world.requests.size());
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int64_t>(i);
  const Step step = arrange(random, world, all);
  const Result found = run(level, world, step, pool, 1);
  compare_cache(result, world, step, found);
  const bool is_rounded = level.has_tiles && world.shape.kv_dtype != Dtype::kF32;
  const int64_t row_size = world.shape.heads * world.shape.value_dim;
  std::vector<const float*> out_of(world.tokens);
  for (size_t i = 0; i < step.token.size(); ++i) {
    const float* out = &found.out[i * row_size];
    if (step.token[i] >= 0) {
      out_of[step.token[i]] = out;
      for (int64_t head = 0; head < world.shape.heads && !result.has_failed(); ++head) {
        compare_head(result, world, step, found, i, head, is_rounded);
      }
    } else if (std::any_of(out, out + row_size, [](float value) { return value != 0.0f; })) {
      result.fail("out of a padded token is not 0");
    }
  }
  for (const int num_threads : {2, 5}) {
    const Result again = run(level, world, step, pool, num_threads);
    result.expect_same(again.out.data(), found.out.data(), found.out.size() * 4, "out with more threads");
    result.expect_same(again.k.data(), found.k.data(), found.k.bytes.size(), "k with more threads");
  }
  // Each request alone, cut anew.
  for (const int64_t index : all) {
    const Step alone = arrange(random, world, {index});
    const Result again = run(level, world, alone, pool, 1);
    for (size_t i = 0; i < alone.token.size(); ++i) {
      if (alone.token[i] < 0) continue;
      result.expect_same(&again.out[i * row_size], out_of[alone.token[i]], row_size * 4, "out of a row alone");
    }
  }
}

}  // namespace quire::driver
