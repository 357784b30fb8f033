// Vectors of the level that this file is compiled for, and the few operations the kernels need.
//
// Every operation is explicit (the compiler may not fuse or reorder floating-point arithmetic), so
// that a number does not depend on which instantiation of a template computed it.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace quire::QUIRE_LEVEL {

using bf16 = uint16_t;
using f16 = uint16_t;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vf __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t Vi __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t Vu __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t Vh __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

inline Vf load(const float* p) { return *reinterpret_cast<const Vf*>(p); }
inline void store(float* p, Vf v) { *reinterpret_cast<Vf*>(p) = v; }
inline Vf broadcast(float x) { return x - Vf{}; }

inline Vf fma(Vf a, Vf b, Vf c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

inline Vf max(Vf a, Vf b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline Vf from_bf16(const bf16* p) {
  const Vh h = *reinterpret_cast<const Vh*>(p);
  return (Vf)(__builtin_convertvector(h, Vu) << 16);
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<bf16>((bits >> 16) | 0x40);
  return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_bf16(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline void store_bf16(bf16* p, Vf v) {
  const Vu bits = (Vu)v;
  const Vu is_nan = (Vu)(v != v);
  const Vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Vu chosen = (is_nan & ((bits >> 16) | 0x40)) | (~is_nan & rounded);
  *reinterpret_cast<Vh*>(p) = __builtin_convertvector(chosen, Vh);
}

// IEEE half precision, bit by bit: numbers below its normal range are scaled in, not looked up.
inline float from_f16(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, magnitude = x & 0x7fff;
  uint32_t bits = magnitude << 13;
  float value;
  if (magnitude >= 0x7c00) {
    bits |= 0x7f800000;
    std::memcpy(&value, &bits, 4);
  } else {
    std::memcpy(&value, &bits, 4);
    value *= 0x1p112f;
  }
  std::memcpy(&bits, &value, 4);
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Rounds to nearest, ties to even, and saturates: infinity would become NaN in a softmax.
inline f16 to_f16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<f16>(sign | 0x7e00);
  if (magnitude >= 0x477fe000) return static_cast<f16>(sign | 0x7bff);
  if (magnitude < 0x38800000) {
    // Adding 1/2 lets the processor round to multiples of 2^-24.
    float value;
    std::memcpy(&value, &magnitude, 4);
    value += 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &value, 4);
    return static_cast<f16>(sign | (rounded - 0x3f000000));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000;
  return static_cast<f16>(sign | std::min<uint32_t>(rounded >> 13, 0x7bff));
}

#if defined(__AVX512F__)
inline Vf from_f16(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#elif defined(__F16C__)
inline Vf from_f16(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
#elif defined(__aarch64__)
inline Vf from_f16(const f16* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
#else
inline Vf from_f16(const f16* p) {
  Vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = from_f16(p[i]);
  return v;
}
#endif

// Like to_f16.
inline void store_f16(f16* p, Vf v) {
#if defined(__AVX512F__)
  const Vf most = broadcast(65504.0f);
  // Of a NaN and a number, min and max give the second.
  const Vf clamped = _mm512_max_ps(-most, _mm512_min_ps(most, v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(clamped, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  const Vf most = broadcast(65504.0f);
  const Vf clamped = _mm256_max_ps(-most, _mm256_min_ps(most, v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(clamped, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = to_f16(v[i]);
#endif
}

// Sum and maximum over the lanes, always in the same order.
inline float sum(Vf v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

inline float max(Vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  float highest = v[0];
  for (int i = 1; i < kLanes; ++i) highest = highest > v[i] ? highest : v[i];
  return highest;
#endif
}

// e^x to 2 units in the last place; 0 below -87.3 (also for -infinity); NaN stays NaN. Cephes'
// reduction: x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial in r.
inline Vf exp(Vf x) {
  const Vf lowest = broadcast(-87.3365447505f), highest = broadcast(88.3762626647949f);
#if defined(__AVX512F__)
  // Of a NaN and a number, min and max give the second.
  const Vf clamped = _mm512_min_ps(highest, _mm512_max_ps(lowest, x));
  const Vf n = _mm512_roundscale_ps(clamped * broadcast(1.44269504088896341f), 0);
#else
  Vf clamped = x > highest ? highest : x;
  clamped = x < lowest ? lowest : clamped;
  // Adding 1.5 * 2^23 rounds to a whole number, which its low bits then hold.
  const Vf magic = broadcast(12582912.0f);
  const Vf shifted = fma(clamped, broadcast(1.44269504088896341f), magic);
  const Vf n = shifted - magic;
#endif
  Vf r = fma(n, broadcast(-0.693359375f), clamped);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vf p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, r * r, r + broadcast(1.0f));
#if defined(__AVX512F__)
  return _mm512_mask_scalef_ps(_mm512_setzero_ps(), _mm512_cmp_ps_mask(x, lowest, _CMP_NLT_UQ), p, n);
#else
  const Vf scale = (Vf)(((Vi)shifted - (Vi)magic + 127) << 23);
  return x < lowest ? Vf{} : p * scale;
#endif
}

// 1 / x to within a unit or two in the last place; a division takes as long as all of exp.
inline Vf reciprocal(Vf x) {
#if defined(__AVX512F__)
  Vf y = _mm512_rcp14_ps(x);
  y = fma(fma(-x, y, broadcast(1.0f)), y, y);
  return fma(fma(-x, y, broadcast(1.0f)), y, y);
#else
  return broadcast(1.0f) / x;
#endif
}

// 1 + e^88 is finite, so is its reciprocal.
inline Vf silu(Vf x) { return x * reciprocal(broadcast(1.0f) + exp(-x)); }

}  // namespace quire::QUIRE_LEVEL
