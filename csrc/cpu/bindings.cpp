// quietstar._C.cpu: the kernels of the `cpu` backend as Python sees them.
//
// Addresses, sizes and strides are integers; strides count elements. Arguments are named as in kernels.h.

#include "quietstar/bindings.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <new>
#include <string>
#include <vector>

#include "kernels.h"

namespace py = pybind11;

namespace quietstar {
namespace cpu {

void out_of_memory() { throw std::bad_alloc(); }

namespace {

using Address = std::uintptr_t;
using Size = std::int64_t;

// The instruction sets of this build that this machine has, the best last.
std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable = {&baseline::kernels};
#ifdef QUIETSTAR_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2) usable.push_back(&avx2::kernels);
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    usable.push_back(&avx512::kernels);
  }
#endif
  return usable;
}

const Kernels*& active() {
  static const Kernels* kernels = usable_kernels().back();
  return kernels;
}

void use_instruction_set(const std::string& name) {
  std::string names;
  for (const Kernels* kernels : usable_kernels()) {
    if (name == kernels->name) {
      active() = kernels;
      return;
    }
    names += std::string(names.empty() ? "" : ", ") + kernels->name;
  }
  throw std::invalid_argument("name must be one of " + names + ", got " + name);
}

// Calls function(kernels of the dtype, example) where the example is a T that says what T is.
template <class Function>
void with_dtype(int dtype, Function function) {
  switch (static_cast<DType>(dtype)) {
    case DType::kFloat32:
      return function(active()->float32, float{});
    case DType::kBFloat16:
      return function(active()->bfloat16, BFloat16{});
    default:
      refuse("dtype", "be 0 (float32) or 1 (bfloat16)", dtype);
  }
}

// A matrix of which rows may overlap (stride 0), but not lie in front of it.
template <class T>
Matrix<T> matrix(const char* name, Address address, Size stride, Size rows) {
  return {pointer<T>(name, address, rows), at_least("stride", 0, stride)};
}

template <class T>
Mix<T> mix_arguments(Address base, Size base_stride, Address thought, Size thought_stride, Address weight, Size rows,
                     Size vocabulary, int threads) {
  at_least("rows", 0, rows);
  at_least("vocabulary", 1, vocabulary);
  return {matrix<const T>("base", base, base_stride, rows),
          matrix<const T>("thought", thought, thought_stride, rows),
          pointer<const float>("weight", weight, rows),
          rows,
          vocabulary,
          static_cast<int>(at_least("threads", 1, threads))};
}

// For memory that nobody has written yet, or null. A large piece has only been promised so far, unless it was in use
// before; given in pages of 2 MiB instead of 4 KiB, it costs a fifth of the time (measured: 262 MB in 0.06 s instead of
// 0.30 s).
template <class T>
T* in_large_pages(T* data, [[maybe_unused]] Size count) {
#ifdef __linux__
  constexpr std::size_t kPage = 4096, kLarge = std::size_t{16} << 20;  // where a few rounded pages cost nothing
  const std::size_t bytes = count * sizeof(T);
  if (data && bytes >= kLarge) {
    const Address address = reinterpret_cast<Address>(data), begin = (address + kPage - 1) / kPage * kPage;
    madvise(reinterpret_cast<void*>(begin), address + bytes - begin, MADV_HUGEPAGE);  // advice: it may fail
  }
#endif
  return data;
}

// Token ids in [0, vocabulary): kernels use them as indices.
const Size* tokens(const char* name, Address address, Size count, Size vocabulary) {
  const Size* ids = pointer<const Size>(name, address, at_least(name, 0, count));
  for (Size i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= vocabulary) refuse(name, "be in [0, " + std::to_string(vocabulary) + ")", ids[i]);
  }
  return ids;
}

void mix(int dtype, Address base, Size base_stride, Address thought, Size thought_stride, Address weight, Address mixed,
         Size rows, Size vocabulary, int threads) {
  with_dtype(dtype, [&](const auto& kernels, auto example) {
    using T = decltype(example);
    const MixForward<T> arguments{
        mix_arguments<T>(base, base_stride, thought, thought_stride, weight, rows, vocabulary, threads),
        in_large_pages(pointer<T>("mixed", mixed, rows), rows * vocabulary)};
    py::gil_scoped_release released;
    kernels.mix(arguments);
  });
}

void mix_backward(int dtype, Address grad, Size grad_stride, Address base, Size base_stride, Address thought,
                  Size thought_stride, Address weight, Address d_base, Address d_thought, Address d_weight, Size rows,
                  Size vocabulary, int threads) {
  with_dtype(dtype, [&](const auto& kernels, auto example) {
    using T = decltype(example);
    const MixBackward<T> arguments{
        mix_arguments<T>(base, base_stride, thought, thought_stride, weight, rows, vocabulary, threads),
        matrix<const T>("grad", grad, grad_stride, rows),
        in_large_pages(optional_pointer<T>("d_base", d_base), rows * vocabulary),
        in_large_pages(optional_pointer<T>("d_thought", d_thought), rows * vocabulary),
        optional_pointer<float>("d_weight", d_weight)};
    py::gil_scoped_release released;
    kernels.mix_backward(arguments);
  });
}

void mixed_cross_entropy(int dtype, Address base, Size base_stride, Address thought, Size thought_stride,
                         Address weight, Address target, Address nll, Address slope, Address largest, Address log_total,
                         Size rows, Size vocabulary, int threads) {
  with_dtype(dtype, [&](const auto& kernels, auto example) {
    using T = decltype(example);
    const MixedCrossEntropy<T> arguments{
        mix_arguments<T>(base, base_stride, thought, thought_stride, weight, rows, vocabulary, threads),
        tokens("target", target, rows, vocabulary),
        pointer<float>("nll", nll, rows),
        pointer<float>("slope", slope, rows),
        pointer<float>("largest", largest, rows),
        pointer<float>("log_total", log_total, rows)};
    py::gil_scoped_release released;
    kernels.mixed_cross_entropy(arguments);
  });
}

void mixed_cross_entropy_backward(int dtype, Address scale, Address base, Size base_stride, Address thought,
                                  Size thought_stride, Address weight, Address target, Address largest,
                                  Address log_total, Address d_base, Address d_thought, Size rows, Size vocabulary,
                                  int threads) {
  with_dtype(dtype, [&](const auto& kernels, auto example) {
    using T = decltype(example);
    const MixedCrossEntropyBackward<T> arguments{
        mix_arguments<T>(base, base_stride, thought, thought_stride, weight, rows, vocabulary, threads),
        tokens("target", target, rows, vocabulary),
        pointer<const float>("scale", scale, rows),
        pointer<const float>("largest", largest, rows),
        pointer<const float>("log_total", log_total, rows),
        in_large_pages(optional_pointer<T>("d_base", d_base), rows * vocabulary),
        in_large_pages(optional_pointer<T>("d_thought", d_thought), rows * vocabulary)};
    py::gil_scoped_release released;
    kernels.mixed_cross_entropy_backward(arguments);
  });
}

void linear_cross_entropy(int dtype, Address hidden, Size hidden_stride, Address weight, Size weight_stride,
                          Address target, Address scale, Address entropy_scale, Address suppressed,
                          Size suppressed_count, float temperature, float softcap, Address room, Address nll,
                          Address entropy, Address d_hidden, Address d_weight, bool add, Size rows, Size vocabulary,
                          Size size, int threads) {
  at_least("rows", 0, rows);
  at_least("vocabulary", 1, vocabulary);
  at_least("size", 1, size);
  with_dtype(dtype, [&](const auto& kernels, auto example) {
    using T = decltype(example);
    const LinearCrossEntropy<T> arguments{
        matrix<const T>("hidden", hidden, hidden_stride, rows),
        matrix<const T>("weight", weight, weight_stride, vocabulary),
        tokens("target", target, rows, vocabulary),
        optional_pointer<const float>("scale", scale),
        optional_pointer<const float>("entropy_scale", entropy_scale),
        tokens("suppressed", suppressed, suppressed_count, vocabulary),
        suppressed_count,
        temperature,
        softcap,
        pointer<float>("room", room, scale ? rows : 0),
        pointer<float>("nll", nll, rows),
        pointer<float>("entropy", entropy, entropy_scale ? rows : 0),
        optional_pointer<float>("d_hidden", d_hidden),
        in_large_pages(optional_pointer<float>("d_weight", d_weight), add ? 0 : vocabulary * size),
        add,
        rows,
        vocabulary,
        size,
        static_cast<int>(at_least("threads", 1, threads))};
    py::gil_scoped_release released;
    kernels.linear_cross_entropy(arguments);
  });
}

constexpr Size kGroup = 64;  // tokens of a group of the noise

Sample sample(Address chosen, Address suppressed, Size suppressed_count, Size vocabulary, Size seed, Size first_row,
              float temperature, float softcap, Size rows, int threads) {
  at_least("rows", 0, rows);
  return {pointer<Size>("tokens", chosen, rows),
          tokens("suppressed", suppressed, suppressed_count, vocabulary),
          suppressed_count,
          seed,
          first_row,
          temperature,
          softcap,
          rows,
          static_cast<int>(at_least("threads", 1, threads))};
}

void sample_rows(Address logits, Address chosen, Address suppressed, Size suppressed_count, Size seed, Size first_row,
                 float temperature, float softcap, Size top_k, double top_p, Size rows, Size groups, int threads) {
  at_least("groups", 1, groups);
  const SampleRows arguments{sample(chosen, suppressed, suppressed_count, groups * kGroup, seed, first_row, temperature,
                                    softcap, rows, threads),
                             pointer<float>("logits", logits, rows), at_least("top_k", 0, top_k), top_p, groups};
  py::gil_scoped_release released;
  active()->sample_rows(arguments);
}

void linear_sample(int dtype, Address hidden, Size hidden_stride, Address weight, Size weight_stride, Address logits,
                   Address chosen, Address suppressed, Size suppressed_count, Size seed, Size first_row,
                   float temperature, float softcap, Size rows, Size vocabulary, Size size, int threads) {
  at_least("vocabulary", 1, vocabulary);
  at_least("size", 1, size);
  with_dtype(dtype, [&](const auto& kernels, auto example) {
    using T = decltype(example);
    const LinearSample<T> arguments{
        sample(chosen, suppressed, suppressed_count, vocabulary, seed, first_row, temperature, softcap, rows, threads),
        matrix<const T>("hidden", hidden, hidden_stride, rows),
        matrix<const T>("weight", weight, weight_stride, vocabulary),
        pointer<float>("logits", logits, rows),
        vocabulary,
        size};
    py::gil_scoped_release released;
    kernels.linear_sample(arguments);
  });
}

// A tensor [B, heads, P, steps, D] with its first four strides.
template <class T>
Steps<T> steps(const Tensors& tensors, const char* name, bool optional = false) {
  const Tensor& tensor = tensor_of(tensors, name);
  const std::vector<Size>& strides = strides_of(name, tensor, 4);
  return {pointer<T>(name, tensor.first, optional ? 0 : 1), strides[0], strides[1], strides[2], strides[3]};
}

// Values of all anchors lie in a range: kernels use them as indices.
void check_range(const char* name, const PerAnchor& values, const ThoughtShape& shape, Size smallest, Size largest) {
  for (Size place = 0; values.data && place < shape.batch * shape.anchors; ++place) {
    const Size batch = place / shape.anchors, anchor = place % shape.anchors;
    const Size value = values.data[batch * values.batch_stride + anchor * values.anchor_stride];
    if (value < smallest || value > largest) {
      refuse(name, "be in [" + std::to_string(smallest) + ", " + std::to_string(largest) + "]", value);
    }
  }
}

ThoughtShape thought_shape(const std::vector<Size>& sizes, const MaskNumbers& mask, int threads) {
  if (sizes.size() != 9) refuse("sizes", "be B, Hq, Hkv, P, S, T, L, D, Dv", static_cast<Size>(sizes.size()));
  for (Size size : sizes) at_least("sizes", 1, size);
  const ThoughtShape shape{sizes[0],
                           sizes[1],
                           sizes[2],
                           sizes[3],
                           sizes[4],
                           sizes[5],
                           sizes[6],
                           sizes[7],
                           sizes[8],
                           thought_mask(mask),
                           static_cast<int>(at_least("threads", 1, threads))};
  if (shape.query_heads % shape.kv_heads) refuse("Hq", "be a multiple of Hkv", shape.query_heads);
  at_least("T", shape.steps, shape.thought_steps);
  if (!shape.mask.anchors.data && shape.anchors != shape.length) refuse("P", "be L without anchors", shape.anchors);
  check_range("anchors", shape.mask.anchors, shape, -1, shape.length - 1);
  check_range("key_start", shape.mask.key_start, shape, 0, shape.length);
  check_range("thought_lengths", shape.mask.thought_lengths, shape, 0, shape.thought_steps);
  return shape;
}

void thought_attention(int dtype, const std::vector<Size>& sizes, const MaskNumbers& mask, const Tensors& tensors,
                       int threads) {
  with_dtype(dtype, [&](const auto& kernels, auto example) {
    using T = decltype(example);
    const ThoughtAttention<T> arguments{thought_shape(sizes, mask, threads),
                                        steps<const T>(tensors, "query"),
                                        steps<const T>(tensors, "key"),
                                        steps<const T>(tensors, "value"),
                                        steps<const T>(tensors, "thought_key"),
                                        steps<const T>(tensors, "thought_value"),
                                        steps<float>(tensors, "base_output"),
                                        steps<float>(tensors, "lse"),
                                        steps<T>(tensors, "output")};
    py::gil_scoped_release released;
    kernels.base_forward(arguments);
    kernels.thought_forward(arguments);
  });
}

void thought_attention_backward(int dtype, const std::vector<Size>& sizes, const MaskNumbers& mask,
                                const Tensors& tensors, int threads) {
  with_dtype(dtype, [&](const auto& kernels, auto example) {
    using T = decltype(example);
    const ThoughtAttentionBackward<T> arguments{
        thought_shape(sizes, mask, threads),      steps<const T>(tensors, "query"),
        steps<const T>(tensors, "key"),           steps<const T>(tensors, "value"),
        steps<const T>(tensors, "thought_key"),   steps<const T>(tensors, "thought_value"),
        steps<const T>(tensors, "output"),        steps<const T>(tensors, "grad_output"),
        steps<const float>(tensors, "lse"),       steps<const float>(tensors, "grad_lse", true),
        steps<float>(tensors, "base_grad_query"), steps<float>(tensors, "grad_key"),
        steps<float>(tensors, "grad_value"),      steps<T>(tensors, "grad_query"),
        steps<T>(tensors, "grad_thought_key"),    steps<T>(tensors, "grad_thought_value")};
    py::gil_scoped_release released;
    kernels.base_backward(arguments);
    kernels.thought_backward(arguments);
  });
}

void bind(py::module_& module) {
  module.def(
      "instruction_sets",
      [] {
        std::vector<std::string> names;
        for (const Kernels* kernels : usable_kernels()) names.push_back(kernels->name);
        return names;
      },
      "Instruction sets of this build that this machine has, the best last.");
  module.def("instruction_set", [] { return std::string(active()->name); }, "The one in use; at first the best.");
  module.def("use_instruction_set", &use_instruction_set, py::arg("name"), "Use another one, in all threads.");
  const auto elementary = [](auto member) {
    return [member](Address x, Address result, Size count) {
      (active()->*member)(pointer<const float>("x", x, at_least("count", 0, count)),
                          pointer<float>("result", result, count), count);
    };
  };
  module.def("exponential", elementary(&Kernels::exponential), py::arg("x"), py::arg("result"), py::arg("count"));
  module.def("logarithm", elementary(&Kernels::logarithm), py::arg("x"), py::arg("result"), py::arg("count"));
  module.def("hyperbolic_tangent", elementary(&Kernels::hyperbolic_tangent), py::arg("x"), py::arg("result"),
             py::arg("count"));
  module.def("mix", &mix);
  module.def("mix_backward", &mix_backward);
  module.def("mixed_cross_entropy", &mixed_cross_entropy);
  module.def("mixed_cross_entropy_backward", &mixed_cross_entropy_backward);
  module.def("sample_rows", &sample_rows);
  module.def("linear_cross_entropy", &linear_cross_entropy);
  module.def("linear_sample", &linear_sample);
  module.def("thought_attention", &thought_attention);
  module.def("thought_attention_backward", &thought_attention_backward);
}

}  // namespace
}  // namespace cpu

void bind_cpu(py::module_& module) {
  py::module_ submodule = module.def_submodule("cpu", "Kernels of the cpu backend.");
  cpu::bind(submodule);
}

}  // namespace quietstar
