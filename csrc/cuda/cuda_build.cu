// Compiled by nvcc, so that the version it reports is the one that compiled the CUDA part.

#include "quietstar/cuda_build.h"

namespace quietstar {

std::string cuda_version() { return std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__); }

std::string cuda_architectures() {
  const std::string given = QUIETSTAR_CUDA_ARCHITECTURES;
  if (given[0] >= '0' && given[0] <= '9') return given;
  std::string found;  // "native" and the like: what nvcc made of it, 800 for 8.0
  for (int architecture : {__CUDA_ARCH_LIST__}) {
    found += (found.empty() ? "" : " ") + std::to_string(architecture / 10) + "-real";
  }
  return found;
}

}  // namespace quietstar
