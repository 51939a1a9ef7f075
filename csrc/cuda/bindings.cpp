// quietstar._C.cuda: the kernels of the cuda backend as Python sees them.
//
// Addresses, sizes and strides are integers; strides count elements. Arguments are named as in cuda_kernels.h. All
// functions end with the device and the stream to launch on, return before the kernel has run, and read nothing that
// lies on the device.

#include "quietstar/bindings.h"

#include "quietstar/cuda_kernels.h"

namespace py = pybind11;

namespace quietstar {
namespace {

using Address = std::uintptr_t;
using Size = std::int64_t;

std::size_t alignment_of(int dtype) {
  if (dtype < 0 || dtype > 2) refuse("dtype", "be 0 (float32), 1 (bfloat16) or 2 (float16)", dtype);
  return static_cast<DType>(dtype) == DType::kFloat32 ? 4 : 2;
}

// A matrix [rows, columns] of which rows may overlap (stride 0), but not lie in front of it.
cuda::MatrixIn matrix(int dtype, const char* name, Address address, Size stride, Size rows) {
  return {pointer<const char>(name, address, rows, alignment_of(dtype)), at_least("stride", 0, stride)};
}

cuda::Mix mix_arguments(int dtype, Address base, Size base_stride, Address thought, Size thought_stride, Address weight,
                        Size rows, Size vocabulary) {
  at_least("rows", 0, rows);
  at_least("vocabulary", 1, vocabulary);
  return {matrix(dtype, "base", base, base_stride, rows), matrix(dtype, "thought", thought, thought_stride, rows),
          pointer<const float>("weight", weight, rows), rows, vocabulary};
}

void* result(int dtype, const char* name, Address address) {
  return optional_pointer<char>(name, address, alignment_of(dtype));
}

cuda::Launch place(int device, Address stream) {
  return {static_cast<int>(at_least("device", 0, device)), reinterpret_cast<void*>(stream)};
}

void mix(int dtype, Address base, Size base_stride, Address thought, Size thought_stride, Address weight, Address mixed,
         Size rows, Size vocabulary, int device, Address stream) {
  const cuda::MixForward arguments{
      mix_arguments(dtype, base, base_stride, thought, thought_stride, weight, rows, vocabulary),
      pointer<char>("mixed", mixed, rows, alignment_of(dtype))};
  cuda::mix(static_cast<DType>(dtype), arguments, place(device, stream));
}

void mix_backward(int dtype, Address grad, Size grad_stride, Address base, Size base_stride, Address thought,
                  Size thought_stride, Address weight, Address d_base, Address d_thought, Address d_weight, Size rows,
                  Size vocabulary, int device, Address stream) {
  const cuda::MixBackward arguments{
      mix_arguments(dtype, base, base_stride, thought, thought_stride, weight, rows, vocabulary),
      matrix(dtype, "grad", grad, grad_stride, rows), result(dtype, "d_base", d_base),
      result(dtype, "d_thought", d_thought), optional_pointer<float>("d_weight", d_weight)};
  cuda::mix_backward(static_cast<DType>(dtype), arguments, place(device, stream));
}

void mixed_cross_entropy(int dtype, Address base, Size base_stride, Address thought, Size thought_stride,
                         Address weight, Address target, Address nll, Address slope, Address largest, Address log_total,
                         Size rows, Size vocabulary, int device, Address stream) {
  const cuda::MixedCrossEntropy arguments{
      mix_arguments(dtype, base, base_stride, thought, thought_stride, weight, rows, vocabulary),
      pointer<const Size>("target", target, rows),
      pointer<float>("nll", nll, rows),
      pointer<float>("slope", slope, rows),
      pointer<float>("largest", largest, rows),
      pointer<float>("log_total", log_total, rows)};
  cuda::mixed_cross_entropy(static_cast<DType>(dtype), arguments, place(device, stream));
}

void mixed_cross_entropy_backward(int dtype, Address scale, Address base, Size base_stride, Address thought,
                                  Size thought_stride, Address weight, Address target, Address largest,
                                  Address log_total, Address d_base, Address d_thought, Size rows, Size vocabulary,
                                  int device, Address stream) {
  const cuda::MixedCrossEntropyBackward arguments{
      mix_arguments(dtype, base, base_stride, thought, thought_stride, weight, rows, vocabulary),
      pointer<const Size>("target", target, rows),
      pointer<const float>("scale", scale, rows),
      pointer<const float>("largest", largest, rows),
      pointer<const float>("log_total", log_total, rows),
      result(dtype, "d_base", d_base),
      result(dtype, "d_thought", d_thought)};
  cuda::mixed_cross_entropy_backward(static_cast<DType>(dtype), arguments, place(device, stream));
}

void cross_entropy_rows(int gradient_dtype, Address logits, Size stride, Address target, Address scale,
                        Address entropy_scale, Address nll, Address entropy, float inverse_temperature, float softcap,
                        Size rows, Size vocabulary, int device, Address stream) {
  alignment_of(gradient_dtype);
  at_least("vocabulary", 1, vocabulary);
  const cuda::CrossEntropyRows arguments{pointer<float>("logits", logits, at_least("rows", 0, rows)),
                                         at_least("stride", vocabulary, stride),
                                         pointer<const Size>("target", target, rows),
                                         optional_pointer<const float>("scale", scale),
                                         optional_pointer<const float>("entropy_scale", entropy_scale),
                                         pointer<float>("nll", nll, rows),
                                         optional_pointer<float>("entropy", entropy),
                                         inverse_temperature,
                                         softcap,
                                         rows,
                                         vocabulary};
  cuda::cross_entropy_rows(static_cast<DType>(gradient_dtype), arguments, place(device, stream));
}

void sample_rows(Address logits, Address seed, Address tokens, Size first_row, float temperature, float softcap,
                 Size top_k, double top_p, Size rows, Size groups, int device, Address stream) {
  at_least("groups", 1, groups);
  if (!(temperature > 0)) throw std::invalid_argument("temperature must be positive");
  const cuda::SampleRows arguments{pointer<float>("logits", logits, at_least("rows", 0, rows), 16),
                                   pointer<const Size>("seed", seed, rows),
                                   pointer<Size>("tokens", tokens, rows),
                                   at_least("first_row", 0, first_row),
                                   temperature,
                                   softcap,
                                   at_least("top_k", 0, top_k),
                                   top_p,
                                   rows,
                                   groups};
  cuda::sample_rows(arguments, place(device, stream));
}

// A tensor of vectors: [B, heads, P, steps, D], or [B, heads, L, D].
cuda::Steps steps(int dtype, const Tensors& tensors, const char* name, std::size_t dimensions) {
  const Tensor& tensor = tensor_of(tensors, name);
  std::vector<Size> strides = strides_of(name, tensor, dimensions);
  strides.resize(4);
  return {pointer<const char>(name, tensor.first, 1, alignment_of(dtype)), strides[0], strides[1], strides[2],
          strides[3]};
}

void thought_attention(int dtype, const std::vector<Size>& sizes, const MaskNumbers& mask, const Tensors& tensors,
                       int device, Address stream) {
  if (sizes.size() != 10) {
    refuse("sizes", "be B, Hq, Hkv, P, S, T, L, D, Dv, splits", static_cast<Size>(sizes.size()));
  }
  for (Size size : sizes) at_least("sizes", 1, size);
  const bool split = sizes[9] > 1;
  const auto address = [&](const char* name) { return tensor_of(tensors, name).first; };
  cuda::ThoughtAttention a{};
  a.query = steps(dtype, tensors, "query", 4);
  a.key = steps(dtype, tensors, "key", 3);
  a.value = steps(dtype, tensors, "value", 3);
  a.thought_key = steps(dtype, tensors, "thought_key", 4);
  a.thought_value = steps(dtype, tensors, "thought_value", 4);
  a.mask = thought_mask(mask);
  a.output = pointer<char>("output", address("output"), 1, 4);
  a.lse = pointer<float>("lse", address("lse"), 1);
  if (split) {
    a.split_output = pointer<float>("split_output", address("split_output"), 1, 8);
    a.split_lse = pointer<float>("split_lse", address("split_lse"), 1);
  }
  a.batch = sizes[0];
  a.query_heads = sizes[1];
  a.kv_heads = sizes[2];
  a.anchors_per_batch = sizes[3];
  a.steps = sizes[4];
  a.thought_steps = at_least("T", sizes[4], sizes[5]);
  a.length = sizes[6];
  a.head_size = sizes[7];
  a.value_size = sizes[8];
  a.splits = sizes[9];
  constexpr Size kMost = 1 << 30;  // rows and keys are counted in 32 bits
  if (a.length > kMost) refuse("L", "be at most 2^30", a.length);
  if (a.thought_steps > kMost / a.anchors_per_batch) refuse("P * T", "be at most 2^30", a.thought_steps);
  if (a.query_heads / a.kv_heads * a.steps > kMost / a.anchors_per_batch) refuse("rows", "be at most 2^30", a.steps);
  if (a.query_heads % a.kv_heads) refuse("Hq", "be a multiple of Hkv", a.query_heads);
  const std::string wanted = "be at most " + std::to_string(cuda::kLargestHead);
  if (a.head_size > cuda::kLargestHead) refuse("D", wanted, a.head_size);
  if (a.value_size > cuda::kLargestHead) refuse("Dv", wanted, a.value_size);
  cuda::thought_attention(static_cast<DType>(dtype), a, place(device, stream));
}

}  // namespace

void bind_cuda(py::module_& module) {
  using Released = py::call_guard<py::gil_scoped_release>;
  py::module_ submodule = module.def_submodule("cuda", "Kernels of the cuda backend.");
  submodule.attr("LARGEST_HEAD") = cuda::kLargestHead;
  submodule.attr("TILE_ROWS") = cuda::kTileRows;
  submodule.def("mix", &mix, Released());
  submodule.def("mix_backward", &mix_backward, Released());
  submodule.def("mixed_cross_entropy", &mixed_cross_entropy, Released());
  submodule.def("mixed_cross_entropy_backward", &mixed_cross_entropy_backward, Released());
  submodule.def("cross_entropy_rows", &cross_entropy_rows, Released());
  submodule.def("sample_rows", &sample_rows, Released());
  submodule.def("thought_attention", &thought_attention, Released());
}

}  // namespace quietstar
