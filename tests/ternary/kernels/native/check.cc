// Compares the kernels of every instruction set of this CPU with the portable ones, without JAX: for emulators.
//
// Integer products must be equal to the bit; float products and attention close. Prints a line for each set.

#include <cstdio>
#include <random>
#include <string>

#include "instruction_sets.h"

namespace {

constexpr int64_t kGroups = 3;

std::mt19937 random_bits(1);

std::vector<float> Normal(int64_t size) {
  std::normal_distribution<float> normal;
  std::vector<float> values(size);
  for (float& value : values) value = normal(random_bits);
  return values;
}

// The product of `rows` tokens of kGroups groups with one panel.
std::vector<float> Multiply(const Kernels& kernels, int bits, int64_t rows, int64_t group,
                            const std::vector<float>& x, const std::vector<uint32_t>& packed,
                            const std::vector<float>& scale) {
  std::vector<Block> blocks;
  for (int64_t index = 0; index < kGroups; ++index) {
    const int64_t first = static_cast<int64_t>(blocks.size());
    for (int64_t start = 0; start < group; start += kBlock) {
      blocks.push_back({index * group + start, std::min<int64_t>(kBlock, group - start), index, first});
    }
  }
  const int64_t length = kGroups * group, stride = length * bits / 8 + 64;
  const int64_t tiles = (rows + kernels.rows - 1) / kernels.rows;
  const Shape shape{rows, kPanel, length, stride, static_cast<int64_t>(blocks.size()), tiles};
  std::vector<char> values((rows + 16) * stride);
  std::vector<int32_t> sums(rows * shape.blocks);
  std::vector<float> out(rows * kPanel), levels(rows, 1.0f);
  for (int64_t m = 0; m < rows; ++m) {
    const float* token = &x[m * length];
    if (bits == 32) std::memcpy(&values[m * stride], token, length * sizeof(float));
    const Rounding round = bits == 16 ? kernels.to_shorts : kernels.to_bytes;
    if (bits < 32) levels[m] = round(shape, blocks.data(), token, &values[m * stride], &sums[m * shape.blocks]);
  }
  const Panel panel = bits == 32 ? kernels.floats : bits == 16 ? kernels.shorts : kernels.bytes;
  panel(shape, blocks.data(), 0, tiles, values.data(), sums.data(), packed.data(), scale.data(), out.data());
  kernels.finish(kLinear, rows, levels.data(), nullptr, nullptr, 0, out.data(), out.data(), kPanel);
  return out;
}

std::vector<float> Attend(Attending attend, int64_t length, int64_t size, bool causal, const std::vector<float>& qkv) {
  std::vector<float> out(length * size);
  const Heads heads{length, size, 3 * size, size, causal};
  attend(heads, 0, length, &qkv[0], &qkv[size], &qkv[2 * size], out.data());
  return out;
}

float Distance(const std::vector<float>& a, const std::vector<float>& b) {
  float most = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (!(a[i] == b[i])) most = std::max(most, a[i] - a[i] == 0 ? std::abs(a[i] - b[i]) : INFINITY);
  }
  return most;
}

bool Check(const InstructionSet& set) {
  const Kernels &own = set.kernels, &portable = InstructionSets().back().kernels;
  float integers = 0, floats = 0, attention = 0, rounded = 0, functions = 0;
  for (int64_t group : {16, 32, 256, 400}) {
    for (int64_t rows : {1, 5, 13, 27}) {
      const std::vector<float> x = Normal(rows * kGroups * group), scale = Normal(kGroups * kPanel);
      std::vector<uint32_t> packed(kGroups * group / kChunk * kPanel);
      for (uint32_t& word : packed) {
        for (int k = 0; k < kChunk; ++k) word |= random_bits() % 3 << (2 * k);
      }
      for (int bits : {8, 16, 32}) {
        const float distance = Distance(Multiply(own, bits, rows, group, x, packed, scale),
                                        Multiply(portable, bits, rows, group, x, packed, scale));
        (bits == 32 ? floats : integers) = std::max(bits == 32 ? floats : integers, distance);
      }
    }
  }
  for (int64_t size : {16, 64, 80}) {
    for (int64_t length : {1, 50, 77, 197}) {
      for (bool causal : {false, true}) {
        const std::vector<float> qkv = Normal(length * 3 * size);
        attention = std::max(attention, Distance(Attend(own.attend, length, size, causal, qkv),
                                                 Attend(portable.attend, length, size, causal, qkv)));
        rounded = std::max(rounded, Distance(Attend(own.attend_in_integers, length, size, causal, qkv),
                                             Attend(portable.attend_in_integers, length, size, causal, qkv)));
      }
    }
  }
  for (Activation activation : {kGelu, kQuickGelu, kGeluTanh}) {
    for (int i = 0; i < 100; ++i) {
      std::vector<float> own_row = Normal(kPanel), portable_row = own_row;
      for (const auto& [kernels, row] : {std::pair{&own, &own_row}, std::pair{&portable, &portable_row}}) {
        const float level = 3.0f;
        kernels->finish(activation, 1, &level, nullptr, nullptr, 0, row->data(), row->data(), kPanel);
      }
      functions = std::max(functions, Distance(own_row, portable_row));
    }
  }
  std::printf("%s: integers %g, floats %g, attention %g, rounded attention %g, activations %g\n", set.name, integers,
              floats, attention, rounded, functions);
  // A weight of 15 bits may be rounded to its other neighbour.
  return integers == 0 && floats < 2e-4f && attention < 3e-6f && rounded < 2e-4f && functions < 3e-6f;
}

}  // namespace

int main() {
  bool passed = true;
  for (const InstructionSet& set : InstructionSets()) {
    if (set.present) passed = Check(set) && passed;
  }
  return passed ? 0 : 1;
}
