// The products and attention of product.h, called by XLA. The C functions of plain.cc are in the same library.

#include <thread>

#include "plain.cc"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// XLA's threads.
class XlaPool {
 public:
  explicit XlaPool(const ffi::ThreadPool& pool) : pool_(pool) {}

  int64_t num_threads() { return pool_.num_threads(); }

  // The calling thread works too. It waits only for tasks that other threads have started, which avoids a deadlock. A
  // thread that comes late finds no task, and does not touch what is gone by then.
  template <typename First, typename Second>
  void ParallelFor(int64_t first_count, const First& first, int64_t count, const Second& second, int64_t most_threads) {
    const int64_t helpers = std::min({std::max(first_count, count), most_threads, pool_.num_threads()}) - 1;
    const auto phases = std::make_shared<Phases>(first_count, count);
    auto work = [phases, &first, &second] { phases->Run(first, second); };
    for (int64_t i = 0; i < helpers; ++i) pool_.Schedule(decltype(work)(work));
    work();
    phases->Wait();
  }

 private:
  ffi::ThreadPool pool_;
};

Array ToArray(const ffi::AnyBuffer& buffer) {
  const auto dtype = buffer.element_type();
  return {buffer.untyped_data(), static_cast<int64_t>(buffer.element_count()),
          dtype == ffi::F32    ? Dtype::kFloat32
          : dtype == ffi::BF16 ? Dtype::kBfloat16
                               : Dtype::kOther};
}

ffi::Error ToError(const char* wrong) { return wrong ? ffi::Error::InvalidArgument(wrong) : ffi::Error::Success(); }

ffi::Error XlaProduct(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer data, ffi::AnyBuffer scale,
                      ffi::AnyBuffer gain, ffi::AnyBuffer shift, ffi::AnyBuffer bias, ffi::AnyBuffer residual,
                      ffi::Result<ffi::AnyBuffer> y, int64_t group, int64_t activations, int64_t activation,
                      float epsilon, int64_t instructions) {
  XlaPool pool(threads);
  return ToError(Product(pool, x.dimensions()[0], x.dimensions()[1], y->dimensions()[1], ToArray(x), ToArray(data),
                         ToArray(scale), ToArray(gain), ToArray(shift), ToArray(bias), ToArray(residual), ToArray(*y),
                         group, activations, activation, epsilon, instructions));
}

ffi::Error XlaAttention(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> qkv, ffi::Result<ffi::Buffer<ffi::F32>> mixed,
                        int64_t heads, bool causal, int64_t activations, int64_t instructions) {
  const int64_t width = qkv.dimensions()[2] / 3;
  if (qkv.dimensions()[2] != 3 * width || mixed->element_count() * 3 != qkv.element_count()) return ToError(kDoNotFit);
  XlaPool pool(threads);
  return ToError(Attention(pool, qkv.dimensions()[0], qkv.dimensions()[1], width, qkv.typed_data(),
                           mixed->typed_data(), heads, causal, activations, instructions));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(TclipTernaryMatmul, XlaProduct,
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(TclipAttention, XlaAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("heads")
                                  .Attr<bool>("causal")
                                  .Attr<int64_t>("activations")
                                  .Attr<int64_t>("instructions"));

// Tells a library of this interface from those of other versions; see native_cpu.py.
extern "C" void TclipInterface4() {}
