// Compiled by nvcc, so that the version it reports is the one that compiled the CUDA part.

#include "quietstar/cuda_build.h"

namespace quietstar {

std::string cuda_version() { return std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__); }

std::string cuda_architectures() { return QUIETSTAR_CUDA_ARCHITECTURES; }

}  // namespace quietstar
