#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace quire {

// QUIRE_WITHOUT_ a level: the compiler did not know its processor.
#define QUIRE_DECLARE(level)       \
  namespace level {                \
  extern const Kernels kernels;    \
  }
#if defined(__x86_64__)
#if !defined(QUIRE_WITHOUT_AMX)
QUIRE_DECLARE(amx)
#endif
#if !defined(QUIRE_WITHOUT_AVX512_BF16)
QUIRE_DECLARE(avx512_bf16)
#endif
#if !defined(QUIRE_WITHOUT_AVX512)
QUIRE_DECLARE(avx512)
#endif
#if !defined(QUIRE_WITHOUT_AVX2)
QUIRE_DECLARE(avx2)
#endif
#elif defined(__aarch64__)
QUIRE_DECLARE(neon)
#endif
QUIRE_DECLARE(portable)

namespace {

#if defined(__x86_64__)
bool has_avx512_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

// The system lets a process use tiles only after it has asked: they are 8 KiB of state a thread.
[[maybe_unused]] bool may_use_tiles() {
  unsigned a, b, c, d;
  constexpr unsigned kTile = 24, kBf16 = 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> kTile & 1) || !(d >> kBf16 & 1)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

std::vector<const Kernels*> find_levels() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  [[maybe_unused]] const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  [[maybe_unused]] const bool has_avx512 =
      has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512cd");
  [[maybe_unused]] const bool has_bf16 =
      has_avx512 && __builtin_cpu_supports("avx512vnni") && has_avx512_bf16();
#if !defined(QUIRE_WITHOUT_AMX)
  if (has_bf16 && may_use_tiles()) found.push_back(&amx::kernels);
#endif
#if !defined(QUIRE_WITHOUT_AVX512_BF16)
  if (has_bf16) found.push_back(&avx512_bf16::kernels);
#endif
#if !defined(QUIRE_WITHOUT_AVX512)
  if (has_avx512) found.push_back(&avx512::kernels);
#endif
#if !defined(QUIRE_WITHOUT_AVX2)
  if (has_avx2) found.push_back(&avx2::kernels);
#endif
#elif defined(__aarch64__)
  found.push_back(&neon::kernels);
#endif
  found.push_back(&portable::kernels);
  return found;
}

}  // namespace

const std::vector<const Kernels*>& levels() {
  static const std::vector<const Kernels*> found = find_levels();
  return found;
}

const Kernels* find_level(const std::string& name) {
  for (const Kernels* level : levels()) {
    if (name.empty() || name == level->name) return level;
  }
  return nullptr;
}

}  // namespace quire
