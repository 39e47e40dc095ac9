// x · ŵ on CPUs with weights of 2 bits, called by XLA. tclip_jax/ternary/kernels/native_cpu.py packs the weights.
//
// Layout of the weights: a weight is the 2-bit code trit + 1. A panel has 32 columns and consists of consecutive chunks
// of 16 k. A chunk has one uint32 for each column, whose bits 8b + 2s and 8b + 2s + 1 are k = 4s + b. Zero trits pad
// each group to whole chunks. A shift and an AND give four k of every column as bytes, the operands of int8 dot
// instructions.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace ffi = xla::ffi;

namespace {

constexpr int kPanel = 32;
constexpr int kChunk = 16;
constexpr int kBlock = 256;  // most k that are summed in int32 before the scale is applied
constexpr int64_t kRowsAtOnce = 192;
constexpr int64_t kProductsPerThread = 1 << 18;  // with fewer products, waking a thread takes longer than its work
constexpr float kSmallest = 0x1p-100f;

struct Block {
  int64_t start, length, group, first;  // start and length in padded k; first: the first block of its group
};

struct Shape {
  int64_t rows, columns, padded, stride, blocks, tiles;

  // Tiles share the rows evenly.
  int64_t first_row(int64_t tile) const { return rows * tile / tiles; }
};

struct Kernels {
  int64_t rows;  // largest number of rows of a tile
  void (*panel_a8)(const Shape&, const Block*, int64_t, int64_t, const int8_t*, const int32_t*, const uint32_t*,
                   const float*, float*);
  void (*panel_f32)(const Shape&, const Block*, int64_t, int64_t, const float*, const uint32_t*, const float*, float*);
  float (*quantize)(const Shape&, const Block*, const float*, int8_t*, int32_t*);
};

#define VECTORS(lanes)                                                   \
  constexpr int kLanes = lanes;                                          \
  typedef float Floats __attribute__((vector_size(4 * lanes)));          \
  typedef int32_t Ints __attribute__((vector_size(4 * lanes)));          \
  typedef uint32_t Words __attribute__((vector_size(4 * lanes)));

namespace portable {
#define TARGET
VECTORS(4)
constexpr int kRows = 4;
inline Ints Dot(Ints sum, Words codes, int32_t q) {
  for (int byte = 0; byte < 4; ++byte) {
    sum += (Ints)((codes >> (8 * byte)) & 0xffu) * static_cast<int32_t>(static_cast<int8_t>(q >> (8 * byte)));
  }
  return sum;
}
inline Floats MultiplyAdd(Floats a, Floats b, Floats sum) { return a * b + sum; }
#include "kernels.inc"
#undef TARGET
}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {
#define TARGET __attribute__((target("avx2,fma")))
VECTORS(8)
constexpr int kRows = 6;
TARGET inline Ints Dot(Ints sum, Words codes, int32_t q) {
  // Two products of at most 2 · 127 never overflow an int16.
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)codes, _mm256_set1_epi32(q));
  return sum + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
TARGET inline Floats MultiplyAdd(Floats a, Floats b, Floats sum) { return _mm256_fmadd_ps(a, b, sum); }
#include "kernels.inc"
#undef TARGET
}  // namespace avx2

namespace avx_vnni {
#define TARGET __attribute__((target("avx2,fma,avxvnni")))
VECTORS(8)
constexpr int kRows = 6;
TARGET inline Ints Dot(Ints sum, Words codes, int32_t q) {
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, _mm256_set1_epi32(q));
}
TARGET inline Floats MultiplyAdd(Floats a, Floats b, Floats sum) { return _mm256_fmadd_ps(a, b, sum); }
#include "kernels.inc"
#undef TARGET
}  // namespace avx_vnni

namespace avx512_vnni {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")))
VECTORS(16)
constexpr int kRows = 12;
TARGET inline Ints Dot(Ints sum, Words codes, int32_t q) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(q));
}
TARGET inline Floats MultiplyAdd(Floats a, Floats b, Floats sum) { return _mm512_fmadd_ps(a, b, sum); }
#include "kernels.inc"
#undef TARGET
}  // namespace avx512_vnni
#elif defined(__aarch64__)
namespace neon {
#define TARGET
VECTORS(4)
constexpr int kRows = 8;
inline Ints Dot(Ints sum, Words codes, int32_t q) {
  const int8x16_t left = vreinterpretq_s8_u32((uint32x4_t)codes), right = vreinterpretq_s8_s32(vdupq_n_s32(q));
#if defined(__ARM_FEATURE_DOTPROD)
  return (Ints)vdotq_s32((int32x4_t)sum, left, right);
#else
  const int16x8_t low = vmull_s8(vget_low_s8(left), vget_low_s8(right)), high = vmull_high_s8(left, right);
  return sum + (Ints)vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
#endif
}
inline Floats MultiplyAdd(Floats a, Floats b, Floats sum) {
  return (Floats)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
}
#include "kernels.inc"
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

// Runs task(0) … task(count − 1) on the calling thread and on XLA's threads. The caller waits only for tasks that
// other threads have started, which avoids a deadlock.
template <typename Task>
void ParallelFor(ffi::ThreadPool& pool, int64_t count, int64_t most_threads, const Task& task) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  const int64_t helpers = std::min({count, most_threads, pool.num_threads()}) - 1;
  if (helpers < 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  auto state = std::make_shared<State>();
  auto work = [state, count, &task] {
    for (int64_t i; (i = state->next.fetch_add(1)) < count; state->done.fetch_add(1)) task(i);
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(work)(work));
  work();
  while (state->done.load() < count) std::this_thread::yield();
}

float FromBfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

uint16_t ToBfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void ToFloat32(const void* from, bool bfloat16, int64_t start, int64_t size, float* to) {
  if (!bfloat16) {
    std::memcpy(to, static_cast<const float*>(from) + start, size * sizeof(float));
    return;
  }
  const auto* narrow = static_cast<const uint16_t*>(from) + start;
  for (int64_t i = 0; i < size; ++i) to[i] = FromBfloat16(narrow[i]);
}

template <typename T>
std::unique_ptr<T[]> Allocate(int64_t size) {
  return std::unique_ptr<T[]>(new T[size]);
}

std::vector<Block> Blocks(int64_t length, int64_t group) {
  std::vector<Block> blocks;
  int64_t padded = 0, first = 0;
  for (int64_t start = 0, index = 0; start < length; start += group, ++index) {
    const int64_t members = std::min(group, length - start), chunks = (members + kChunk - 1) / kChunk * kChunk;
    for (int64_t block = 0; block < chunks; block += kBlock) {
      blocks.push_back({padded + block, std::min<int64_t>(kBlock, chunks - block), index, first});
    }
    padded += chunks;
    first = static_cast<int64_t>(blocks.size());
  }
  return blocks;
}

bool IsFloat(ffi::DataType dtype) { return dtype == ffi::F32 || dtype == ffi::BF16; }

ffi::Error Product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer data, ffi::AnyBuffer scale,
                   ffi::Result<ffi::AnyBuffer> y, int64_t group, bool int8_activations, int64_t instructions) {
  const auto& sets = InstructionSets();
  const int64_t rows = x.dimensions()[0], length = x.dimensions()[1], columns = y->dimensions()[1];
  const int64_t panels = (columns + kPanel - 1) / kPanel, groups = (length + group - 1) / group;
  const std::vector<Block> blocks = Blocks(length, group);
  const int64_t padded = blocks.empty() ? 0 : blocks.back().start + blocks.back().length;
  if (instructions < 0 || instructions >= static_cast<int64_t>(sets.size()) || !sets[instructions].present) {
    return ffi::Error::InvalidArgument("this CPU lacks the instruction set that was asked for");
  }
  if (!IsFloat(x.element_type()) || y->element_type() != x.element_type() || !IsFloat(scale.element_type()) ||
      y->dimensions()[0] != rows || static_cast<int64_t>(data.element_count()) * kChunk != panels * padded * kPanel ||
      static_cast<int64_t>(scale.element_count()) != panels * groups * kPanel) {
    return ffi::Error::InvalidArgument("operands do not fit together");
  }
  const Kernels& kernels = sets[instructions].kernels;
  const int64_t tiles = (rows + kernels.rows - 1) / kernels.rows;
  const bool narrow = x.element_type() == ffi::BF16, narrow_scale = scale.element_type() == ffi::BF16;
  // Rows at a distance of a multiple of 2 KiB share cache sets, so such rows are copied to another stride.
  const bool direct = !int8_activations && !narrow && padded == length && length % 512 != 0;
  const int64_t stride = direct ? length : padded + 64 / (int8_activations ? 1 : 4);
  const Shape shape{rows, columns, padded, stride, static_cast<int64_t>(blocks.size()), tiles};

  auto floats = Allocate<float>(int8_activations || direct ? 0 : rows * stride);
  const float* values = direct ? static_cast<const float*>(x.untyped_data()) : floats.get();
  auto q = Allocate<int8_t>(int8_activations ? rows * stride : 0);
  auto sums = Allocate<int32_t>(int8_activations ? rows * shape.blocks : 0);
  auto levels = Allocate<float>(rows);
  std::fill(levels.get(), levels.get() + rows, 1.0f);
  ParallelFor(pool, direct ? 0 : tiles, 1 + rows * length / kProductsPerThread * 8, [&](int64_t tile) {
    auto row = Allocate<float>(padded);
    for (int64_t m = shape.first_row(tile); m < shape.first_row(tile + 1); ++m) {
      float* to = int8_activations ? row.get() : &floats[m * stride];
      for (const Block& block : blocks) {
        const int64_t offset = block.start - blocks[block.first].start, start = block.group * group + offset;
        const int64_t members = std::min({block.length, group - offset, length - start});
        ToFloat32(x.untyped_data(), narrow, m * length + start, members, to + block.start);
        std::fill(to + block.start + members, to + block.start + block.length, 0.0f);
      }
      if (int8_activations) {
        levels[m] = kernels.quantize(shape, blocks.data(), to, &q[m * stride], &sums[m * shape.blocks]) / 127.0f;
      }
    }
  });

  const int64_t parts = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
  ParallelFor(pool, parts * panels, 1 + rows * length * columns / kProductsPerThread, [&](int64_t task) {
    const int64_t part = task / panels, panel = task % panels;
    const int64_t from = tiles * part / parts, to = tiles * (part + 1) / parts;
    const int64_t first = shape.first_row(from), count = shape.first_row(to) - first;
    auto out = std::make_unique<float[]>(count * kPanel);
    auto level = Allocate<float>(groups * kPanel);
    ToFloat32(scale.untyped_data(), narrow_scale, panel * groups * kPanel, groups * kPanel, level.get());
    const uint32_t* packed = static_cast<const uint32_t*>(data.untyped_data()) + panel * padded / kChunk * kPanel;
    if (int8_activations) {
      kernels.panel_a8(shape, blocks.data(), from, to, q.get(), sums.get(), packed, level.get(), out.get());
    } else {
      kernels.panel_f32(shape, blocks.data(), from, to, values, packed, level.get(), out.get());
    }
    const int64_t width = std::min<int64_t>(kPanel, columns - panel * kPanel);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t to = (first + r) * columns + panel * kPanel;
      for (int64_t n = 0; n < width; ++n) {
        const float value = out[r * kPanel + n] * levels[first + r];
        if (narrow) {
          static_cast<uint16_t*>(y->untyped_data())[to + n] = ToBfloat16(value);
        } else {
          static_cast<float*>(y->untyped_data())[to + n] = value;
        }
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(TclipTernaryMatmul, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("group")
                                  .Attr<bool>("int8_activations")
                                  .Attr<int64_t>("instructions"));

// Returns the name of the i-th instruction set, best first: "" if this CPU lacks it, null after the last one.
extern "C" const char* TclipInstructions(int64_t i) {
  const auto& sets = InstructionSets();
  if (i >= static_cast<int64_t>(sets.size())) return nullptr;
  return sets[i].present ? sets[i].name : "";
}
