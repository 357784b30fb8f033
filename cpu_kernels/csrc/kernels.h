// What a level offers: the same operations, in the instructions of that level.

#pragma once

#include <cstdint>

#include "pool.h"

namespace quire {

enum class Dtype : int32_t { kF32, kBf16, kF16 };  // f16: KV pages alone

// Outputs of a packed weight lie in panels of so many; an input is padded to a multiple of kDepth.
constexpr int64_t kPanel = 32;
constexpr int64_t kDepth = 32;

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// A packed matrix [out, in]; the gates and ups of a gated layer: see pack.h.
struct Weight {
  const void* packed;
  Dtype dtype;  // f32 or bf16, of the vectors that go with it as well
  int64_t in, out;
  const void* bias;  // [out]; null: none
};

// An RMS norm; no weight: none.
struct Norm {
  const void* weight;  // [in], in the dtype of the matrix that follows
  float epsilon;
};

// y = residual + norm(x) W^T + bias
struct Linear {
  int64_t rows;
  const float* x;  // [rows, in]
  Norm norm;
  bool is_exact;  // norm(x) is kept to twice the bits of bf16
  Weight weight;
  const float* residual;  // [rows, out]; null: none
  float* y;               // [rows, out]
  void* workspace;        // workspace_bytes(rows, in)
};

// y = x + (silu(gate) * up) D^T + bias, where gate and up are products with norm(x).
struct Mlp {
  int64_t rows;
  const float* x;  // [rows, in]
  Norm norm;
  Weight gate_up;   // gated: out is twice the width between
  Weight down;      // in is that width, out that of x
  float* y;         // [rows, in]
  void* workspace;  // workspace_bytes(rows, in) + workspace_bytes(rows, down.in)
};

// The highest logit of each row and where it is.
struct HeadArgmax {
  int64_t rows;
  const float* x;  // [rows, in]
  Weight weight;   // out: the vocabulary
  int32_t* token;   // [rows], the lowest id of the highest logit
  int32_t* is_bad;  // [rows], 1 if a logit is not finite
  void* workspace;  // workspace_bytes(rows, in)
};

// The k highest logits of each row and where they are.
struct HeadTopK {
  int64_t rows;
  const float* x;  // [rows, in]
  Weight weight;   // out: the vocabulary
  int64_t k;       // 1 to the vocabulary
  float* logit;     // [rows, k], falling; 0 for -0
  int32_t* id;      // [rows, k], of equal logits the lowest first
  int32_t* is_bad;  // [rows], 1 if a logit is not finite: then the others mean nothing
  void* workspace;  // workspace_bytes(rows, in)
};

// Room for prepared rows: f32, or twice bf16.
constexpr int64_t workspace_bytes(int64_t rows, int64_t in) {
  return round_up(rows, 16) * round_up(in, kDepth) * 4;
}

struct Attention {
  int64_t tokens, rows, width, heads, kv_heads, head_dim, value_dim, num_pages, page_size;
  const float* qkv;  // [tokens, (heads + kv_heads) * head_dim + kv_heads * value_dim]
  const float* cos;  // [tokens, head_dim], null: no rotation
  const float* sin;  // the same, the first half negative
  const void* q_norm;  // [head_dim], vector_dtype, null: none
  const void* k_norm;
  Dtype vector_dtype;
  float epsilon;
  float scale;
  float soft_cap;      // 0: none
  const float* sinks;  // [heads], null: none
  void* k;             // [num_pages, kv_heads, head_dim, page_size], kv_dtype
  void* v;             // [num_pages, kv_heads, page_size, value_dim]; null: the first columns of k
  Dtype kv_dtype;
  const int32_t *attend_from, *attend_to, *token_row, *write_page, *write_offset;  // [tokens]
  const int32_t* page_table;  // [rows, width]
  const int32_t *num_single, *num_items;              // []
  const int32_t *item_row, *item_first, *item_count;  // [items]
  int64_t items;
  float* out;  // [tokens, heads * value_dim]
};

struct Kernels {
  const char* name;
  bool has_tiles;  // attention over pages of 2 bytes multiplies in bf16: see attention_tiles.h
  void (*linear)(Team&, const Linear&);
  void (*mlp)(Team&, const Mlp&);
  void (*head_argmax)(Team&, const HeadArgmax&);
  void (*head_top_k)(Team&, const HeadTopK&);
  void (*attention)(Team&, const Attention&);
};

}  // namespace quire
