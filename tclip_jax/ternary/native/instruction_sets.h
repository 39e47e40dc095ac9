// The kernels of each instruction set, and the table of sets from which a call takes the first that the CPU has.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

constexpr int kPanel = 32;
constexpr int kChunk = 16;
constexpr int kBlock = 256;  // most k that are summed in integers before the scale is applied
constexpr float kSmallest = 0x1p-100f;

enum Activation : int64_t { kLinear, kGelu, kQuickGelu, kGeluTanh };

struct Block {
  int64_t start, length, group, first;  // start and length in padded k; first: the first block of its group
};

struct Shape {
  int64_t rows, columns, padded, stride, blocks, tiles;  // stride: bytes from one row of activations to the next

  // Tiles share the rows evenly.
  int64_t first_row(int64_t tile) const { return rows * tile / tiles; }
};

struct Heads {
  int64_t length, size, stride, out_stride;  // tokens, channels of a head, floats from one token to the next
  bool causal;
};

using Panel = void (*)(const Shape&, const Block*, int64_t, int64_t, const char*, const int32_t*, const uint32_t*,
                       const float*, float*);
using Rounding = float (*)(const Shape&, const Block*, const float*, char*, int32_t*);

using Attending = void (*)(const Heads&, int64_t, int64_t, const float*, const float*, const float*, float*);

struct Kernels {
  int64_t rows;  // largest number of rows of a tile
  Panel floats, shorts, bytes;
  Rounding to_shorts, to_bytes;
  void (*layer_norm)(const float*, int64_t, float, const float*, const float*, float*);
  void (*finish)(int64_t, int64_t, const float*, const float*, const float*, int64_t, const float*, float*, int64_t);
  Attending attend, attend_in_integers;
};

template <typename T>
std::unique_ptr<T[]> Allocate(int64_t size) {
  return std::unique_ptr<T[]>(new T[size]);
}

#define VECTORS(lanes)                                            \
  constexpr int kLanes = lanes;                                   \
  typedef float Floats __attribute__((vector_size(4 * lanes)));   \
  typedef int32_t Ints __attribute__((vector_size(4 * lanes)));   \
  typedef uint32_t Words __attribute__((vector_size(4 * lanes)));

namespace portable {
#define TARGET
VECTORS(4)
constexpr int kRows = 4;
struct Bytes {
  using Value = int8_t;
  static Ints Dot(Ints sum, Words codes, int32_t q) {
    for (int byte = 0; byte < 4; ++byte) {
      sum += (Ints)((codes >> (8 * byte)) & 0xffu) * static_cast<int32_t>(static_cast<int8_t>(q >> (8 * byte)));
    }
    return sum;
  }
  static Ints Widen(Ints sum) { return sum; }
};
struct Shorts {
  using Value = int16_t;
  static Ints Dot(Ints sum, Words codes, int32_t q) {
    return sum + ((Ints)(codes << 16) >> 16) * static_cast<int32_t>(static_cast<int16_t>(q)) + ((Ints)codes >> 16) * (q >> 16);
  }
  static Ints Widen(Ints sum) { return sum; }
};
inline Floats MultiplyAdd(Floats a, Floats b, Floats sum) { return a * b + sum; }
#include "kernels.inc"
#include "elementwise.inc"
#include "attention.inc"
#undef TARGET
}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {
#define TARGET __attribute__((target("avx2,fma")))
VECTORS(8)
constexpr int kRows = 6;
// Sums are added in assembly, in the order of the source: GCC would load all rows first, and leave the registers.
struct Bytes {
  using Value = int8_t;
  // Sums of 16 bits: kBlock k give at most 64 · 2 · 2 · 127 = 32,512.
  TARGET static Ints Dot(Ints sum, Words codes, int32_t q) {
    const __m256i product = _mm256_maddubs_epi16((__m256i)codes, _mm256_set1_epi32(q));
    asm volatile("vpaddw %1, %0, %0" : "+x"(sum) : "x"(product));
    return sum;
  }
  TARGET static Ints Widen(Ints sum) { return (Ints)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1)); }
};
struct Shorts {
  using Value = int16_t;
  TARGET static Ints Dot(Ints sum, Words codes, int32_t q) {
    const __m256i product = _mm256_madd_epi16((__m256i)codes, _mm256_set1_epi32(q));
    asm volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(product));
    return sum;
  }
  TARGET static Ints Widen(Ints sum) { return sum; }
};
TARGET inline Floats MultiplyAdd(Floats a, Floats b, Floats sum) { return _mm256_fmadd_ps(a, b, sum); }
#include "kernels.inc"
#include "elementwise.inc"
#include "attention.inc"
#undef TARGET
}  // namespace avx2

namespace avx_vnni {
#define TARGET __attribute__((target("avx2,fma,avxvnni")))
VECTORS(8)
constexpr int kRows = 6;
struct Bytes {
  using Value = int8_t;
  TARGET static Ints Dot(Ints sum, Words codes, int32_t q) {
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, _mm256_set1_epi32(q));
  }
  TARGET static Ints Widen(Ints sum) { return sum; }
};
struct Shorts {
  using Value = int16_t;
  TARGET static Ints Dot(Ints sum, Words codes, int32_t q) {
    return (Ints)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)codes, _mm256_set1_epi32(q));
  }
  TARGET static Ints Widen(Ints sum) { return sum; }
};
TARGET inline Floats MultiplyAdd(Floats a, Floats b, Floats sum) { return _mm256_fmadd_ps(a, b, sum); }
#include "kernels.inc"
#include "elementwise.inc"
#include "attention.inc"
#undef TARGET
}  // namespace avx_vnni

namespace avx512_vnni {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")))
VECTORS(16)
constexpr int kRows = 12;
struct Bytes {
  using Value = int8_t;
  TARGET static Ints Dot(Ints sum, Words codes, int32_t q) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(q));
  }
  TARGET static Ints Widen(Ints sum) { return sum; }
};
struct Shorts {
  using Value = int16_t;
  TARGET static Ints Dot(Ints sum, Words codes, int32_t q) {
    return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(q));
  }
  TARGET static Ints Widen(Ints sum) { return sum; }
};
TARGET inline Floats MultiplyAdd(Floats a, Floats b, Floats sum) { return _mm512_fmadd_ps(a, b, sum); }
#include "kernels.inc"
#include "elementwise.inc"
#include "attention.inc"
#undef TARGET
}  // namespace avx512_vnni
#elif defined(__aarch64__)
namespace neon {
#define TARGET
VECTORS(4)
constexpr int kRows = 8;
struct Bytes {
  using Value = int8_t;
  static Ints Dot(Ints sum, Words codes, int32_t q) {
    const int8x16_t left = vreinterpretq_s8_u32((uint32x4_t)codes), right = vreinterpretq_s8_s32(vdupq_n_s32(q));
#if defined(__ARM_FEATURE_DOTPROD)
    return (Ints)vdotq_s32((int32x4_t)sum, left, right);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(left), vget_low_s8(right)), high = vmull_high_s8(left, right);
    return sum + (Ints)vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
#endif
  }
  static Ints Widen(Ints sum) { return sum; }
};
struct Shorts {
  using Value = int16_t;
  static Ints Dot(Ints sum, Words codes, int32_t q) {
    const int16x8_t left = vreinterpretq_s16_u32((uint32x4_t)codes), right = vreinterpretq_s16_s32(vdupq_n_s32(q));
    const int32x4_t low = vmull_s16(vget_low_s16(left), vget_low_s16(right)), high = vmull_high_s16(left, right);
    return sum + (Ints)vpaddq_s32(low, high);
  }
  static Ints Widen(Ints sum) { return sum; }
};
inline Floats MultiplyAdd(Floats a, Floats b, Floats sum) {
  return (Floats)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
}
#include "kernels.inc"
#include "elementwise.inc"
#include "attention.inc"
#undef TARGET
}  // namespace neon
#endif

struct InstructionSet {
  const char* name;
  bool present;
  Kernels kernels;
};

// The instruction sets, best first.
const std::vector<InstructionSet>& InstructionSets() {
  static const std::vector<InstructionSet> sets = {
#if defined(__x86_64__)
      {"avx512_vnni",
       __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
       avx512_vnni::kKernels},
      {"avx_vnni", __builtin_cpu_supports("avxvnni") && __builtin_cpu_supports("fma"), avx_vnni::kKernels},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), avx2::kKernels},
#elif defined(__aarch64__)
      {"neon", true, neon::kKernels},
#endif
      {"portable", true, portable::kKernels},
  };
  return sets;
}

}  // namespace
