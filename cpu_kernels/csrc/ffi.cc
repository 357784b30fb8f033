// The library as XLA sees it: handlers of custom calls, and a few functions for Python's ctypes.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "dispatch.h"
#include "group_sums.h"
#include "pack.h"
#include "xla/ffi/api/ffi.h"

namespace quire {
namespace {

namespace ffi = xla::ffi;
using Matrix = ffi::BufferR2<ffi::F32>;
using Count = ffi::BufferR0<ffi::S32>;

std::atomic<const Kernels*> chosen{nullptr};
std::atomic<int> num_threads{1};

class XlaPool : public Scheduler {
 public:
  explicit XlaPool(ffi::ThreadPool& pool) : pool_(pool) {}
  void schedule(void (*task)(void*), void* data) override {
    pool_.Schedule([task, data] { task(data); });
  }

 private:
  ffi::ThreadPool& pool_;
};

Dtype dtype_of(ffi::DataType type) {
  if (type == ffi::DataType::F16) return Dtype::kF16;
  return type == ffi::DataType::BF16 ? Dtype::kBf16 : Dtype::kF32;
}

// An absent argument is passed with no elements.
const void* or_null(const ffi::AnyBuffer& buffer) {
  return buffer.element_count() == 0 ? nullptr : buffer.untyped_data();
}

bool is_float(ffi::DataType type) {
  return type == ffi::DataType::BF16 || type == ffi::DataType::F32;
}

Weight weight_of(const ffi::AnyBuffer& packed, int64_t in, int64_t out, const void* bias) {
  return {packed.untyped_data(), dtype_of(packed.element_type()), in, out, bias};
}

ffi::Error check(const char* op, const ffi::AnyBuffer& weight, int64_t workspace, int64_t needed) {
  if (!is_float(weight.element_type())) {
    return ffi::Error::InvalidArgument(std::string(op) + " takes weights of f32 and bf16");
  }
  if (workspace < needed) {
    return ffi::Error::InvalidArgument(std::string(op) + ": the workspace is too small");
  }
  return ffi::Error::Success();
}

// Rows from the count on are padding and not computed.
int64_t rows_of(const Matrix& x, const Count& count) {
  return std::clamp<int64_t>(*count.typed_data(), 0, x.dimensions()[0]);
}

const Kernels& kernels() { return *chosen.load(std::memory_order_acquire); }

template <typename Call>
ffi::Error run(ffi::ThreadPool& pool, void (*kernel)(Team&, const Call&), const Call& call) {
  XlaPool scheduler(pool);
  Team team(scheduler, num_threads.load(std::memory_order_relaxed));
  kernel(team, call);
  return ffi::Error::Success();
}

ffi::Error linear(ffi::ThreadPool pool, Count count, Matrix x, ffi::AnyBuffer weight, ffi::AnyBuffer norm,
                  ffi::AnyBuffer bias, ffi::AnyBuffer residual, ffi::Result<Matrix> y,
                  ffi::Result<ffi::AnyBuffer> workspace, double epsilon, bool is_exact) {
  Linear call = {};
  call.rows = rows_of(x, count);
  call.x = x.typed_data();
  call.norm = {or_null(norm), static_cast<float>(epsilon)};
  call.is_exact = is_exact;
  call.weight = weight_of(weight, x.dimensions()[1], y->dimensions()[1], or_null(bias));
  call.residual = static_cast<const float*>(or_null(residual));
  call.y = y->typed_data();
  call.workspace = workspace->untyped_data();
  const int64_t needed = workspace_bytes(call.rows, call.weight.in);
  const ffi::Error error = check("quire_linear", weight, workspace->size_bytes(), needed);
  if (error.failure()) return error;
  return run(pool, kernels().linear, call);
}

ffi::Error mlp(ffi::ThreadPool pool, Count count, Matrix x, ffi::AnyBuffer norm, ffi::AnyBuffer gate_up,
               ffi::AnyBuffer gate_up_bias, ffi::AnyBuffer down, ffi::AnyBuffer down_bias,
               ffi::Result<Matrix> y, ffi::Result<ffi::AnyBuffer> workspace, double epsilon,
               int64_t inner) {
  const int64_t hidden = x.dimensions()[1];
  Mlp call = {};
  call.rows = rows_of(x, count);
  call.x = x.typed_data();
  call.norm = {or_null(norm), static_cast<float>(epsilon)};
  call.gate_up = weight_of(gate_up, hidden, 2 * inner, or_null(gate_up_bias));
  call.down = weight_of(down, inner, hidden, or_null(down_bias));
  call.y = y->typed_data();
  call.workspace = workspace->untyped_data();
  const int64_t needed = workspace_bytes(call.rows, hidden) + workspace_bytes(call.rows, inner);
  const ffi::Error error = check("quire_mlp", gate_up, workspace->size_bytes(), needed);
  if (error.failure()) return error;
  return run(pool, kernels().mlp, call);
}

ffi::Error head_argmax(ffi::ThreadPool pool, Count count, Matrix x, ffi::AnyBuffer weight,
                       ffi::Result<ffi::BufferR1<ffi::S32>> token,
                       ffi::Result<ffi::BufferR1<ffi::S32>> is_bad,
                       ffi::Result<ffi::AnyBuffer> workspace, int64_t vocab) {
  HeadArgmax call = {};
  call.rows = rows_of(x, count);
  call.x = x.typed_data();
  call.weight = weight_of(weight, x.dimensions()[1], vocab, nullptr);
  call.token = token->typed_data();
  call.is_bad = is_bad->typed_data();
  call.workspace = workspace->untyped_data();
  const int64_t needed = workspace_bytes(call.rows, call.weight.in);
  const ffi::Error error = check("quire_head_argmax", weight, workspace->size_bytes(), needed);
  if (error.failure()) return error;
  std::fill(call.token + call.rows, call.token + x.dimensions()[0], 0);
  std::fill(call.is_bad + call.rows, call.is_bad + x.dimensions()[0], 0);
  return run(pool, kernels().head_argmax, call);
}

ffi::Error head_top_k(ffi::ThreadPool pool, Count count, Matrix x, ffi::AnyBuffer weight,
                      ffi::Result<Matrix> logit, ffi::Result<ffi::BufferR2<ffi::S32>> id,
                      ffi::Result<ffi::BufferR1<ffi::S32>> is_bad,
                      ffi::Result<ffi::AnyBuffer> workspace, int64_t vocab) {
  HeadTopK call = {};
  call.rows = rows_of(x, count);
  call.x = x.typed_data();
  call.weight = weight_of(weight, x.dimensions()[1], vocab, nullptr);
  call.k = logit->dimensions()[1];
  call.logit = logit->typed_data();
  call.id = id->typed_data();
  call.is_bad = is_bad->typed_data();
  call.workspace = workspace->untyped_data();
  if (call.k < 1 || call.k > vocab) {
    return ffi::Error::InvalidArgument("quire_head_top_k takes a k from 1 to the vocabulary");
  }
  const int64_t needed = workspace_bytes(call.rows, call.weight.in);
  const ffi::Error error = check("quire_head_top_k", weight, workspace->size_bytes(), needed);
  if (error.failure()) return error;
  for (int64_t row = call.rows; row < x.dimensions()[0]; ++row) {
    std::fill_n(call.logit + row * call.k, call.k, 0.0f);
    std::iota(call.id + row * call.k, call.id + (row + 1) * call.k, 0);
    call.is_bad[row] = 0;
  }
  return run(pool, kernels().head_top_k, call);
}

ffi::Error group_sums(Matrix x, ffi::BufferR2<ffi::S32> group, ffi::BufferR2<ffi::S32> place,
                      ffi::Result<Matrix> sums, int64_t size) {
  const GroupSums call = {x.dimensions()[0],  x.dimensions()[1],  sums->dimensions()[1], size,
                          x.typed_data(),     group.typed_data(), place.typed_data(),
                          sums->typed_data()};
  sum_groups(call);
  return ffi::Error::Success();
}

ffi::Error embed(ffi::ThreadPool pool, ffi::BufferR1<ffi::S32> ids, ffi::AnyBuffer table,
                 ffi::Result<ffi::BufferR2<ffi::F32>> out, int64_t vocab) {
  const int64_t hidden = out->dimensions()[1];
  const Dtype dtype = dtype_of(table.element_type());
  XlaPool scheduler(pool);
  Team team(scheduler, num_threads.load(std::memory_order_relaxed));
  team.split(ids.dimensions()[0], 8, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* row = out->typed_data() + i * hidden;
      const int64_t id = ids.typed_data()[i];
      if (id < 0 || id >= vocab) std::memset(row, 0, hidden * sizeof(float));
      else unpack_row(table.untyped_data(), dtype, id, hidden, row);
    }
  });
  return ffi::Error::Success();
}

// The memory is new to the process: before it is touched, it can still be had in huge pages.
ffi::Error zeros(ffi::Result<ffi::AnyBuffer> out) {
  const size_t size = out->size_bytes();
#if defined(MADV_HUGEPAGE)
  const auto address = reinterpret_cast<uintptr_t>(out->untyped_data());
  const uintptr_t begin = round_up(address, 1 << 21), end = (address + size) >> 21 << 21;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  std::memset(out->untyped_data(), 0, size);
  return ffi::Error::Success();
}

ffi::Error attention(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> qkv, ffi::AnyBuffer k,
                     ffi::AnyBuffer v, ffi::BufferR0<ffi::S32> layer, ffi::AnyBuffer cos, ffi::AnyBuffer sin,
                     ffi::AnyBuffer q_norm, ffi::AnyBuffer k_norm, ffi::AnyBuffer sinks,
                     ffi::RemainingArgs batch, ffi::Result<ffi::AnyBuffer> out,
                     ffi::Result<ffi::AnyBuffer> k_out, ffi::Result<ffi::AnyBuffer> v_out,
                     int64_t heads, int64_t value_dim, double epsilon, double scale,
                     double soft_cap) {
  const auto pages = k.dimensions();
  const int64_t at = *layer.typed_data();
  if (pages.size() != 5 || at < 0 || at >= pages[0]) {
    return ffi::Error::InvalidArgument("quire_attention: there are no pages of that layer");
  }
  const bool is_kv_known = is_float(k.element_type()) || k.element_type() == ffi::DataType::F16;
  if (!is_kv_known || !is_float(q_norm.element_type()) || !is_float(k_norm.element_type())) {
    return ffi::Error::InvalidArgument(
        "quire_attention takes pages of f32, bf16 and f16, and norms of f32 and bf16");
  }
  Attention call = {};
  call.tokens = qkv.dimensions()[0];
  call.heads = heads;
  call.num_pages = pages[1];
  call.kv_heads = pages[2];
  call.page_size = pages[3];
  call.head_dim = pages[4];
  call.value_dim = value_dim;
  call.qkv = qkv.typed_data();
  call.cos = static_cast<const float*>(or_null(cos));
  call.sin = static_cast<const float*>(or_null(sin));
  call.q_norm = or_null(q_norm);
  call.k_norm = or_null(k_norm);
  call.vector_dtype = dtype_of(q_norm.element_type());
  call.epsilon = static_cast<float>(epsilon);
  call.scale = static_cast<float>(scale);
  call.soft_cap = static_cast<float>(soft_cap);
  call.sinks = static_cast<const float*>(or_null(sinks));
  if (k_out->untyped_data() != k.untyped_data() || v_out->untyped_data() != v.untyped_data()) {
    return ffi::Error::Internal("quire_attention: the cache is not written in place");
  }
  const auto of_layer = [&](void* data, size_t size) {
    return data == nullptr ? nullptr : static_cast<char*>(data) + size / pages[0] * at;
  };
  call.k = of_layer(k_out->untyped_data(), k.size_bytes());
  call.v = of_layer(const_cast<void*>(or_null(v)), v.size_bytes());
  call.kv_dtype = dtype_of(k.element_type());
  const int32_t* arrays[11];
  for (size_t i = 0; i < 11; ++i) {
    const auto array = batch.get<ffi::AnyBuffer>(i);
    if (array.has_error()) return array.error();
    if (array->element_type() != ffi::DataType::S32) {
      return ffi::Error::InvalidArgument("quire_attention: the batch must be i32");
    }
    arrays[i] = static_cast<const int32_t*>(array->untyped_data());
    if (i == 5) {
      call.rows = array->dimensions()[0];
      call.width = array->dimensions()[1];
    }
    if (i == 8) call.items = array->dimensions()[0];
  }
  call.attend_from = arrays[0];
  call.attend_to = arrays[1];
  call.token_row = arrays[2];
  call.write_page = arrays[3];
  call.write_offset = arrays[4];
  call.page_table = arrays[5];
  call.num_single = arrays[6];
  call.num_items = arrays[7];
  call.item_row = arrays[8];
  call.item_first = arrays[9];
  call.item_count = arrays[10];
  call.out = static_cast<float*>(out->untyped_data());
  return run(pool, kernels().attention, call);
}

}  // namespace
}  // namespace quire

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_linear, quire::linear,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::BufferR0<xla::ffi::S32>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<double>("epsilon")
                                  .Attr<bool>("is_exact"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_mlp, quire::mlp,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::BufferR0<xla::ffi::S32>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<double>("epsilon")
                                  .Attr<int64_t>("inner"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_head_argmax, quire::head_argmax,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::BufferR0<xla::ffi::S32>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::BufferR1<xla::ffi::S32>>()
                                  .Ret<xla::ffi::BufferR1<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("vocab"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_head_top_k, quire::head_top_k,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::BufferR0<xla::ffi::S32>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::S32>>()
                                  .Ret<xla::ffi::BufferR1<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("vocab"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_group_sums, quire::group_sums,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::S32>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::S32>>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Attr<int64_t>("size"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_embed, quire::embed,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::BufferR1<xla::ffi::S32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Attr<int64_t>("vocab"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_zeros, quire::zeros,
                              xla::ffi::Ffi::Bind().Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_attention, quire::attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::BufferR0<xla::ffi::S32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("heads")
                                  .Attr<int64_t>("value_dim")
                                  .Attr<double>("epsilon")
                                  .Attr<double>("scale")
                                  .Attr<double>("soft_cap"));

extern "C" {

// The name of the level at `index`, the best first; null past the last.
const char* quire_level(int index) {
  const auto& all = quire::levels();
  return index < static_cast<int>(all.size()) ? all[index]->name : nullptr;
}

// Chooses a level (empty: the best) and the number of threads. 0 if there is no such level here.
int quire_configure(const char* level, int threads) {
  const quire::Kernels* found = quire::find_level(level);
  if (found == nullptr || threads < 1) return 0;
  quire::chosen.store(found, std::memory_order_release);
  quire::num_threads.store(threads, std::memory_order_relaxed);
  return 1;
}

// The version of XLA's calls that this was built for: major * 1000 + minor.
int quire_ffi_version() { return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR; }

// Rows [begin, end) of a matrix [rows, columns] of elements of 2 or 4 bytes.
void quire_pack(const void* source, int64_t begin, int64_t end, int64_t rows, int64_t columns,
                int is_gated, int element_bytes, void* packed) {
  if (element_bytes == 2) {
    quire::pack(static_cast<const uint16_t*>(source), begin, end, rows, columns, is_gated,
                static_cast<uint16_t*>(packed));
  } else {
    quire::pack(static_cast<const float*>(source), begin, end, rows, columns, is_gated,
                static_cast<float*>(packed));
  }
}
}

#pragma GCC visibility pop
