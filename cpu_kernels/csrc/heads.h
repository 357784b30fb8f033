// Queries, and every token's keys and values: head norms, rotation, the write to the cache.

#pragma once

#include "rows.h"

namespace quire::QUIRE_LEVEL {

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

constexpr int64_t qkv_size(const Attention& call) {
  return (call.heads + call.kv_heads) * call.head_dim + (call.v == nullptr ? 0 : call.kv_heads * call.value_dim);
}

// One query, normed, rotated and scaled. normed: room for as many numbers.
inline void prepare_query(const Attention& call, int64_t token, int64_t head, float* normed, float* to) {
  const float* q = call.qkv + token * qkv_size(call) + head * call.head_dim;
  norm_and_rotate(call, q, call.q_norm, token, call.scale, normed, to);
}

// A token's keys and values into the cache; zeros where its result stays, if it sees nothing.
// scratch: [2][head_dim].
inline void write_token(const Attention& call, int64_t token, float* scratch) {
  const int64_t dim = call.head_dim, q_size = call.heads * dim, k_size = call.kv_heads * dim;
  if (call.attend_from[token] >= call.attend_to[token]) {
    std::fill_n(call.out + token * call.heads * call.value_dim, call.heads * call.value_dim, 0.0f);
  }
  const int64_t page = call.write_page[token], offset = call.write_offset[token];
  if (page < 0 || page >= call.num_pages) return;  // a padded token
  const float* qkv = call.qkv + token * qkv_size(call);
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

}  // namespace quire::QUIRE_LEVEL
