// The products of product.h as C functions, for tclip_torch, which calls them by ctypes. They need neither jaxlib's
// headers nor PyTorch's.

#include <dlfcn.h>

#include <new>
#include <system_error>
#include <thread>

#include "product.h"

namespace {

using Work = void (*)(void*);

// The threads of the OpenMP runtime that this process has loaded, which PyTorch computes on: a second pool would compete
// with its threads, which spin for a while after each operation. Without one, threads that are started for the call.
class SharedPool {
 public:
  explicit SharedPool(int64_t threads) : threads_(threads) {}

  int64_t num_threads() const { return threads_; }

  template <typename First, typename Second>
  void ParallelFor(int64_t first_count, const First& first, int64_t count, const Second& second, int64_t most_threads) {
    Phases phases(first_count, count);
    auto work = [&] { phases.Run(first, second); };
    const int64_t threads = std::min({std::max(first_count, count), most_threads, threads_});
    // GNU's interface to a parallel region, which LLVM's runtime has too.
    using Parallel = void (*)(Work, void*, unsigned, unsigned);
    static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    if (threads < 2) {
      work();
    } else if (parallel) {
      parallel([](void* data) { (*static_cast<decltype(work)*>(data))(); }, &work, static_cast<unsigned>(threads), 0);
    } else {
      std::vector<std::thread> helpers;
      try {
        for (int64_t i = 1; i < threads; ++i) helpers.emplace_back(work);
      } catch (const std::system_error&) {
        // The threads that there are do the work.
      }
      work();
      for (std::thread& helper : helpers) helper.join();
    }
  }

 private:
  int64_t threads_;
};

Dtype FloatType(int64_t narrow) { return narrow ? Dtype::kBfloat16 : Dtype::kFloat32; }

}  // namespace

// y = x · ŵ + bias. x: (rows, length), y: (rows, columns), float32, or bfloat16 if `narrow`; words, scales: the packed
// weight, with the numbers of their elements, scales in bfloat16 if `narrow_scales`; bias: float32 (columns), or null.
// Returns null, or what is wrong. The number in its name is raised when it takes other arguments.
extern "C" const char* TclipLinear1(const void* x, void* y, int64_t narrow, int64_t rows, int64_t length,
                                    int64_t columns, const void* words, int64_t words_size, const void* scales,
                                    int64_t scales_size, int64_t narrow_scales, const void* bias, int64_t group,
                                    int64_t activations, int64_t instructions, int64_t threads) {
  const auto array = [](const void* data, int64_t size, Dtype dtype) {
    return Array{const_cast<void*>(data), size, dtype};
  };
  const Array none{nullptr, 0, Dtype::kFloat32};
  SharedPool pool(threads);
  try {
    return Product(pool, rows, length, columns, array(x, rows * length, FloatType(narrow)),
                   array(words, words_size, Dtype::kOther), array(scales, scales_size, FloatType(narrow_scales)), none,
                   none, array(bias, bias ? columns : 0, Dtype::kFloat32), none,
                   array(y, rows * columns, FloatType(narrow)), group, activations, kLinear, 0.0f, instructions);
  } catch (const std::bad_alloc&) {
    return "out of memory";
  }
}

// Returns the name of the i-th instruction set, best first: "" if this CPU lacks it, null after the last one.
extern "C" const char* TclipInstructions(int64_t i) {
  const auto& sets = InstructionSets();
  if (i < 0 || i >= static_cast<int64_t>(sets.size())) return nullptr;
  return sets[i].present ? sets[i].name : "";
}
