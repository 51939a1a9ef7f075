// The parts of quietstar._C, each of which creates its own submodule, and the tensor and mask arguments of both.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "quietstar/contract.h"
#include "quietstar/thought_mask.h"

namespace quietstar {

// _C.cpu, defined in csrc/cpu/bindings.cpp.
void bind_cpu(pybind11::module_& module);

// _C.cuda, defined in csrc/cuda/bindings.cpp; only in builds with CUDA.
void bind_cuda(pybind11::module_& module);

// The address of a tensor and its strides except that within vectors, which is 1.
using Tensor = std::pair<std::uintptr_t, std::vector<std::int64_t>>;
using Tensors = std::map<std::string, Tensor>;

inline const Tensor& tensor_of(const Tensors& tensors, const char* name) {
  const auto found = tensors.find(name);
  if (found == tensors.end()) throw std::invalid_argument(std::string(name) + " must be among the tensors");
  return found->second;
}

inline const std::vector<std::int64_t>& strides_of(const char* name, const Tensor& tensor, std::size_t dimensions) {
  if (tensor.second.size() != dimensions) {
    refuse(name, "come with " + std::to_string(dimensions) + " strides",
           static_cast<std::int64_t>(tensor.second.size()));
  }
  for (std::int64_t stride : tensor.second) at_least("stride", 0, stride);
  return tensor.second;
}

// A tensor [B, P], with the strides of both dimensions.
inline PerAnchor per_anchor(const char* name, const Tensor& tensor) {
  const std::vector<std::int64_t>& strides = strides_of(name, tensor, 2);
  if (strides[1] > 1) refuse(name, "have an anchor stride of at most 1", strides[1]);
  return {optional_pointer<const std::int64_t>(name, tensor.first), strides[0], strides[1]};
}

// Anchors, key_start and thought_lengths (address 0: none), window (0: none), whether it is measured from the step,
// causal, scale, softcap (0: none).
using MaskNumbers = std::tuple<Tensor, Tensor, Tensor, std::int64_t, bool, bool, float, float>;

inline ThoughtMask thought_mask(const MaskNumbers& numbers) {
  const auto& [anchors, key_start, thought_lengths, window, from_step, causal, scale, softcap] = numbers;
  return {per_anchor("anchors", anchors),
          per_anchor("key_start", key_start),
          per_anchor("thought_lengths", thought_lengths),
          at_least("window", 0, window) ? window : ThoughtMask::kNoWindow,
          from_step,
          causal,
          scale,
          softcap};
}

}  // namespace quietstar
