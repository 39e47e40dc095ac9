// x · ŵ on CPUs with weights of 2 bits, and softmax attention, called by XLA. tclip_jax/ternary/kernels/native_cpu.py
// packs the weights.
//
// Layout of the weights: a weight is the 2-bit code trit + 1. A panel has 32 columns and consists of consecutive chunks
// of 16 k. A chunk has one uint32 for each column, whose bits 8b + 2s and 8b + 2s + 1 are k = 4s + b. Zero trits pad
// each group to whole chunks. A shift and an AND give four k of every column as bytes, or two as 16-bit integers: the
// operands of integer dot instructions.

#include <atomic>
#include <thread>

#include "instruction_sets.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kBytesAtOnce = 192 << 10;      // activations that a task reads again for each panel, in the L2 cache
constexpr int64_t kProductsPerThread = 1 << 18;  // with fewer products, waking a thread takes longer than its work

enum Activations : int64_t { kA32, kA16, kA8 };

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

void ToFloat32(const ffi::AnyBuffer& from, int64_t start, int64_t size, float* to) {
  if (from.element_type() == ffi::F32) {
    std::memcpy(to, static_cast<const float*>(from.untyped_data()) + start, size * sizeof(float));
    return;
  }
  const auto* narrow = static_cast<const uint16_t*>(from.untyped_data()) + start;
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

bool IsFloat(ffi::DataType dtype) { return dtype == ffi::F32 || dtype == ffi::BF16; }

// Whether an optional operand is absent (no elements), or float32 of this size.
bool Fits(const ffi::AnyBuffer& operand, int64_t size) {
  const auto count = static_cast<int64_t>(operand.element_count());
  return count == 0 || (operand.element_type() == ffi::F32 && count == size);
}

const float* Optional(const ffi::AnyBuffer& operand) {
  return operand.element_count() ? static_cast<const float*>(operand.untyped_data()) : nullptr;
}

const Kernels* Find(int64_t instructions) {
  const auto& sets = InstructionSets();
  const bool known = instructions >= 0 && instructions < static_cast<int64_t>(sets.size());
  return known && sets[instructions].present ? &sets[instructions].kernels : nullptr;
}

ffi::Error Product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer data, ffi::AnyBuffer scale,
                   ffi::AnyBuffer gain, ffi::AnyBuffer shift, ffi::AnyBuffer bias, ffi::AnyBuffer residual,
                   ffi::Result<ffi::AnyBuffer> y, int64_t group, int64_t activations, int64_t activation,
                   float epsilon, int64_t instructions) {
  const Kernels* kernels = Find(instructions);
  if (!kernels) return ffi::Error::InvalidArgument("this CPU lacks the instruction set that was asked for");
  const int64_t rows = x.dimensions()[0], length = x.dimensions()[1], columns = y->dimensions()[1];
  const int64_t panels = (columns + kPanel - 1) / kPanel, groups = (length + group - 1) / group;
  const std::vector<Block> blocks = Blocks(length, group);
  const int64_t padded = blocks.empty() ? 0 : blocks.back().start + blocks.back().length;
  if (!IsFloat(x.element_type()) || y->element_type() != x.element_type() || !IsFloat(scale.element_type()) ||
      y->dimensions()[0] != rows || static_cast<int64_t>(data.element_count()) * kChunk != panels * padded * kPanel ||
      static_cast<int64_t>(scale.element_count()) != panels * groups * kPanel || !Fits(gain, length) ||
      gain.element_count() != shift.element_count() || !Fits(shift, length) || !Fits(bias, columns) ||
      !Fits(residual, rows * columns)) {
    return ffi::Error::InvalidArgument("operands do not fit together");
  }
  const int64_t tiles = (rows + kernels->rows - 1) / kernels->rows;
  const bool narrow = x.element_type() == ffi::BF16, exact = activations == kA32;
  // Rows at a distance of a multiple of 2 KiB share cache sets, so such rows are copied to another stride.
  const bool direct = exact && !narrow && !gain.element_count() && padded == length && length % 512 != 0;
  const int64_t size = exact ? 4 : activations == kA16 ? 2 : 1, stride = padded * size + (direct ? 0 : 64);
  const Shape shape{rows, columns, padded, stride, static_cast<int64_t>(blocks.size()), tiles};

  const auto copy = Allocate<char>(direct ? 0 : rows * stride);
  const char* values = direct ? static_cast<const char*>(x.untyped_data()) : copy.get();
  const auto sums = Allocate<int32_t>(exact ? 0 : rows * shape.blocks);
  const auto levels = Allocate<float>(rows);
  std::fill(levels.get(), levels.get() + rows, 1.0f);
  ParallelFor(pool, direct ? 0 : tiles, 1 + rows * length / kProductsPerThread * 8, [&](int64_t tile) {
    const auto token = Allocate<float>(length), row = Allocate<float>(padded);
    for (int64_t m = shape.first_row(tile); m < shape.first_row(tile + 1); ++m) {
      ToFloat32(x, m * length, length, token.get());
      if (gain.element_count()) {
        kernels->layer_norm(token.get(), length, epsilon, Optional(gain), Optional(shift));
      }
      for (const Block& block : blocks) {
        const int64_t offset = block.start - blocks[block.first].start, start = block.group * group + offset;
        const int64_t members = std::min({block.length, group - offset, length - start});
        std::copy(token.get() + start, token.get() + start + members, row.get() + block.start);
        std::fill(row.get() + block.start + members, row.get() + block.start + block.length, 0.0f);
      }
      char* to = copy.get() + m * stride;
      if (exact) {
        std::memcpy(to, row.get(), padded * sizeof(float));
      } else {
        const Rounding round = activations == kA16 ? kernels->to_shorts : kernels->to_bytes;
        levels[m] = round(shape, blocks.data(), row.get(), to, &sums[m * shape.blocks]);
      }
    }
  });

  const Panel multiply = exact ? kernels->floats : activations == kA16 ? kernels->shorts : kernels->bytes;
  const int64_t rows_at_once = std::max<int64_t>(64, kBytesAtOnce / std::max<int64_t>(1, stride));
  const int64_t parts = (rows + rows_at_once - 1) / rows_at_once;
  ParallelFor(pool, parts * panels, 1 + rows * length * columns / kProductsPerThread, [&](int64_t task) {
    const int64_t part = task / panels, panel = task % panels, column = panel * kPanel;
    const int64_t from = tiles * part / parts, to = tiles * (part + 1) / parts;
    const int64_t first = shape.first_row(from), count = shape.first_row(to) - first;
    const int64_t width = std::min<int64_t>(kPanel, columns - column);
    const auto out = std::make_unique<float[]>(count * kPanel);
    const auto level = Allocate<float>(groups * kPanel);
    ToFloat32(scale, panel * groups * kPanel, groups * kPanel, level.get());
    const uint32_t* packed = static_cast<const uint32_t*>(data.untyped_data()) + panel * padded / kChunk * kPanel;
    multiply(shape, blocks.data(), from, to, values, sums.get(), packed, level.get(), out.get());
    float own_bias[kPanel] = {}, own_residual[kPanel] = {};
    if (bias.element_count()) std::copy(Optional(bias) + column, Optional(bias) + column + width, own_bias);
    for (int64_t r = 0; r < count; ++r) {
      float* row = &out[r * kPanel];
      const int64_t place = (first + r) * columns + column;
      const float* added = Optional(residual);
      if (added && width == kPanel) {
        added += place;
      } else if (added) {
        std::copy(added + place, added + place + width, own_residual);
        added = own_residual;
      }
      kernels->finish(activation, levels[first + r], bias.element_count() ? own_bias : nullptr, added, row);
      if (narrow) {
        std::transform(row, row + width, static_cast<uint16_t*>(y->untyped_data()) + place, ToBfloat16);
      } else {
        std::copy(row, row + width, static_cast<float*>(y->untyped_data()) + place);
      }
    }
  });
  return ffi::Error::Success();
}

// Queries, keys and values (batch, length, 3 · width) to mixed values (batch, length, width).
ffi::Error Attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> qkv, ffi::Result<ffi::Buffer<ffi::F32>> mixed,
                     int64_t heads, bool causal, int64_t instructions) {
  const Kernels* kernels = Find(instructions);
  if (!kernels) return ffi::Error::InvalidArgument("this CPU lacks the instruction set that was asked for");
  const int64_t batch = qkv.dimensions()[0], length = qkv.dimensions()[1], width = qkv.dimensions()[2] / 3;
  if (heads < 1 || width % heads || qkv.dimensions()[2] != 3 * width ||
      mixed->element_count() * 3 != qkv.element_count()) {
    return ffi::Error::InvalidArgument("operands do not fit together");
  }
  const Heads shape{length, width / heads, 3 * width, width, causal};
  // A task packs the keys and values of its head, so a head has several tasks only if there are few heads.
  const int64_t most = (length + kernels->rows - 1) / kernels->rows;
  const int64_t parts = std::clamp<int64_t>(2 * pool.num_threads() / std::max<int64_t>(1, batch * heads), 1, most);
  const int64_t products = 2 * batch * heads * length * length * shape.size;
  ParallelFor(pool, batch * heads * parts, 1 + products / kProductsPerThread, [&](int64_t task) {
    const int64_t part = task % parts, head = task / parts % heads, item = task / parts / heads;
    const float* q = qkv.typed_data() + item * length * shape.stride + head * shape.size;
    float* out = mixed->typed_data() + item * length * width + head * shape.size;
    kernels->attend(shape, length * part / parts, length * (part + 1) / parts, q, q + width, q + 2 * width, out);
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
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("activations")
                                  .Attr<int64_t>("activation")
                                  .Attr<float>("epsilon")
                                  .Attr<int64_t>("instructions"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(TclipAttention, Attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("heads")
                                  .Attr<bool>("causal")
                                  .Attr<int64_t>("instructions"));

// Tells a library of this interface from those of other versions; see native_cpu.py.
extern "C" void TclipInterface2() {}

// Returns the name of the i-th instruction set, best first: "" if this CPU lacks it, null after the last one.
extern "C" const char* TclipInstructions(int64_t i) {
  const auto& sets = InstructionSets();
  if (i >= static_cast<int64_t>(sets.size())) return nullptr;
  return sets[i].present ? sets[i].name : "";
}
