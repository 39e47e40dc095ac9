// x · ŵ on CPUs with weights of 2 bits, and softmax attention, on arrays and threads of any framework: a front
// (ternary_cpu.cc for XLA, plain.cc for C) includes this file. tclip_jax/ternary/kernels/native_cpu.py packs the weights.
//
// Layout of the weights: a weight is the 2-bit code trit + 1. A panel has 32 columns and consists of consecutive chunks
// of 16 k. A chunk has one uint32 for each column, whose bits 8b + 2s and 8b + 2s + 1 are k = 4s + b. Zero trits pad
// each group to whole chunks. A shift and an AND give four k of every column as bytes, or two as 16-bit integers: the
// operands of integer dot instructions.
//
// A Pool has
//   int64_t num_threads();
//   void ParallelFor(int64_t first_count, const First& first, int64_t count, const Second& second, int64_t most_threads),
//     which runs first(0) … first(first_count − 1), then second(0) … second(count − 1), and returns when all are done.

#pragma once

#include <atomic>
#include <thread>

#include "instruction_sets.h"

namespace {

constexpr int64_t kBytesAtOnce = 192 << 10;      // activations that a task reads again for each panel, in the L2 cache
constexpr int64_t kProductsPerThread = 1 << 18;  // with fewer products, waking a thread takes longer than its work

constexpr char kLacksInstructions[] = "this CPU lacks the instruction set that was asked for";
constexpr char kDoNotFit[] = "operands do not fit together";

enum Activations : int64_t { kA32, kA16, kA8 };

enum class Dtype { kFloat32, kBfloat16, kOther };

// Tasks in two phases for several threads, which wake up only once. A task of the second phase starts when all of the
// first are done.
class Phases {
 public:
  Phases(int64_t first_count, int64_t count) : first_count_(first_count), count_(count) {}

  template <typename First, typename Second>
  void Run(const First& first, const Second& second) {
    for (int64_t i; (i = first_next_.fetch_add(1)) < first_count_; first_done_.fetch_add(1)) first(i);
    while (first_done_.load() < first_count_) std::this_thread::yield();
    for (int64_t i; (i = next_.fetch_add(1)) < count_; done_.fetch_add(1)) second(i);
  }

  void Wait() const {
    while (done_.load() < count_) std::this_thread::yield();
  }

 private:
  const int64_t first_count_, count_;
  std::atomic<int64_t> first_next_{0}, first_done_{0}, next_{0}, done_{0};
};

// A dense array of `size` elements; an optional operand that is absent has none.
struct Array {
  void* data;
  int64_t size;
  Dtype dtype;

  const float* floats() const { return size ? static_cast<const float*>(data) : nullptr; }
  bool is_float() const { return dtype == Dtype::kFloat32 || dtype == Dtype::kBfloat16; }
  // Whether it is absent, or float32 of this size.
  bool fits(int64_t expected) const { return !size || (dtype == Dtype::kFloat32 && size == expected); }
};

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

void ToFloat32(const Array& from, int64_t start, int64_t size, float* to) {
  if (from.dtype == Dtype::kFloat32) {
    std::memcpy(to, static_cast<const float*>(from.data) + start, size * sizeof(float));
    return;
  }
  const auto* narrow = static_cast<const uint16_t*>(from.data) + start;
  for (int64_t i = 0; i < size; ++i) to[i] = FromBfloat16(narrow[i]);
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

// Copies a row of `length` floats to its place in padded k, with zeros as padding.
void Spread(const std::vector<Block>& blocks, const float* from, int64_t length, int64_t group, float* to) {
  for (const Block& block : blocks) {
    const int64_t offset = block.start - blocks[block.first].start, start = block.group * group + offset;
    const int64_t members = std::min({block.length, group - offset, length - start});
    std::copy_n(from + start, members, to + block.start);
    std::fill_n(to + block.start + members, block.length - members, 0.0f);
  }
}

const Kernels* Find(int64_t instructions) {
  const auto& sets = InstructionSets();
  const bool known = instructions >= 0 && instructions < static_cast<int64_t>(sets.size());
  return known && sets[instructions].present ? &sets[instructions].kernels : nullptr;
}

// y = residual + activation(layer_norm(x) · ŵ + bias), with x (rows, length) and y (rows, columns) in one dtype. Returns
// null, or what is wrong.
template <typename Pool>
const char* Product(Pool& pool, int64_t rows, int64_t length, int64_t columns, const Array& x, const Array& data,
                    const Array& scale, const Array& gain, const Array& shift, const Array& bias,
                    const Array& residual, const Array& y, int64_t group, int64_t activations, int64_t activation,
                    float epsilon, int64_t instructions) {
  const Kernels* kernels = Find(instructions);
  if (!kernels) return kLacksInstructions;
  if (group < 1) return kDoNotFit;
  const int64_t panels = (columns + kPanel - 1) / kPanel, groups = (length + group - 1) / group;
  const std::vector<Block> blocks = Blocks(length, group);
  const int64_t padded = blocks.empty() ? 0 : blocks.back().start + blocks.back().length;
  if (!x.is_float() || y.dtype != x.dtype || !scale.is_float() || x.size != rows * length ||
      y.size != rows * columns || data.size * kChunk != panels * padded * kPanel ||
      scale.size != panels * groups * kPanel || !gain.fits(length) || gain.size != shift.size || !shift.fits(length) ||
      !bias.fits(columns) || !residual.fits(rows * columns)) {
    return kDoNotFit;
  }
  const int64_t tiles = (rows + kernels->rows - 1) / kernels->rows;
  const bool narrow = x.dtype == Dtype::kBfloat16, exact = activations == kA32;
  // Rows at a distance of a multiple of 2 KiB share cache sets, so such rows are copied to another stride.
  const bool direct = exact && !narrow && !gain.size && padded == length && length % 512 != 0;
  const int64_t size = exact ? 4 : activations == kA16 ? 2 : 1, stride = padded * size + (direct ? 0 : 64);
  const Shape shape{rows, columns, padded, stride, static_cast<int64_t>(blocks.size()), tiles};

  const auto copy = Allocate<char>(direct ? 0 : rows * stride);
  const char* values = direct ? static_cast<const char*>(x.data) : copy.get();
  const auto sums = Allocate<int32_t>(exact ? 0 : rows * shape.blocks);
  const auto levels = Allocate<float>(rows);
  std::fill(levels.get(), levels.get() + rows, 1.0f);
  const auto prepare = [&](int64_t tile) {
    const auto token = Allocate<float>(length), row = Allocate<float>(padded);
    for (int64_t m = shape.first_row(tile); m < shape.first_row(tile + 1); ++m) {
      const float* from = static_cast<const float*>(x.data) + m * length;
      if (narrow) {
        ToFloat32(x, m * length, length, token.get());
        from = token.get();
      }
      if (gain.size) {
        kernels->layer_norm(from, length, epsilon, gain.floats(), shift.floats(), token.get());
        from = token.get();
      }
      if (padded != length) {
        Spread(blocks, from, length, group, row.get());
        from = row.get();
      }
      char* to = copy.get() + m * stride;
      if (exact) {
        std::memcpy(to, from, padded * sizeof(float));
      } else {
        const Rounding round = activations == kA16 ? kernels->to_shorts : kernels->to_bytes;
        levels[m] = round(shape, blocks.data(), from, to, &sums[m * shape.blocks]);
      }
    }
  };

  const Panel multiply = exact ? kernels->floats : activations == kA16 ? kernels->shorts : kernels->bytes;
  const int64_t rows_at_once = std::max<int64_t>(64, kBytesAtOnce / std::max<int64_t>(1, stride));
  const int64_t parts = (rows + rows_at_once - 1) / rows_at_once;
  const auto panel_of_rows = [&](int64_t task) {
    const int64_t part = task / panels, panel = task % panels, column = panel * kPanel;
    const int64_t from = tiles * part / parts, to = tiles * (part + 1) / parts;
    const int64_t first = shape.first_row(from), count = shape.first_row(to) - first;
    const int64_t width = std::min<int64_t>(kPanel, columns - column), place = first * columns + column;
    const auto product = std::make_unique<float[]>(count * kPanel);
    const auto level = Allocate<float>(groups * kPanel);
    ToFloat32(scale, panel * groups * kPanel, groups * kPanel, level.get());
    const uint32_t* packed = static_cast<const uint32_t*>(data.data) + panel * padded / kChunk * kPanel;
    multiply(shape, blocks.data(), from, to, values, sums.get(), packed, level.get(), product.get());
    float own_bias[kPanel] = {};
    if (bias.size) std::copy(bias.floats() + column, bias.floats() + column + width, own_bias);
    const float* biases = bias.size ? own_bias : nullptr;
    if (width == kPanel && !narrow) {
      kernels->finish(activation, count, &levels[first], biases, residual.size ? residual.floats() + place : nullptr,
                      columns, product.get(), static_cast<float*>(y.data) + place, columns);
      return;
    }
    const auto added = std::make_unique<float[]>(residual.size ? count * kPanel : 0);
    for (int64_t r = 0; r < count && residual.size; ++r) {
      std::copy_n(residual.floats() + place + r * columns, width, &added[r * kPanel]);
    }
    kernels->finish(activation, count, &levels[first], biases, residual.size ? added.get() : nullptr, kPanel,
                    product.get(), product.get(), kPanel);
    for (int64_t r = 0; r < count; ++r) {
      const float* row = &product[r * kPanel];
      if (narrow) {
        std::transform(row, row + width, static_cast<uint16_t*>(y.data) + place + r * columns, ToBfloat16);
      } else {
        std::copy_n(row, width, static_cast<float*>(y.data) + place + r * columns);
      }
    }
  };
  pool.ParallelFor(direct ? 0 : tiles, prepare, parts * panels, panel_of_rows,
                   1 + rows * length * columns / kProductsPerThread);
  return nullptr;
}

// Queries, keys and values (batch, length, 3 · width) to mixed values (batch, length, width).
template <typename Pool>
const char* Attention(Pool& pool, int64_t batch, int64_t length, int64_t width, const float* qkv, float* mixed,
                      int64_t heads, bool causal, int64_t activations, int64_t instructions) {
  const Kernels* kernels = Find(instructions);
  if (!kernels) return kLacksInstructions;
  if (heads < 1 || width % heads) return kDoNotFit;
  const Attending attend = activations == kA8 ? kernels->attend_in_integers : kernels->attend;
  const Heads shape{length, width / heads, 3 * width, width, causal};
  // A task packs the keys and values of its head, so a head has several tasks only if there are few heads.
  const int64_t most = (length + kernels->rows - 1) / kernels->rows;
  const int64_t parts = std::clamp<int64_t>(2 * pool.num_threads() / std::max<int64_t>(1, batch * heads), 1, most);
  const int64_t products = 2 * batch * heads * length * length * shape.size;
  const auto part_of_head = [&](int64_t task) {
    const int64_t part = task % parts, head = task / parts % heads, item = task / parts / heads;
    const float* q = qkv + item * length * shape.stride + head * shape.size;
    float* out = mixed + item * length * width + head * shape.size;
    attend(shape, length * part / parts, length * (part + 1) / parts, q, q + width, q + 2 * width, out);
  };
  pool.ParallelFor(0, [](int64_t) {}, batch * heads * parts, part_of_head, 1 + products / kProductsPerThread);
  return nullptr;
}

}  // namespace
