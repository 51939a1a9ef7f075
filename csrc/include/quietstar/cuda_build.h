// What the CUDA part of the module was compiled with.
#pragma once

#include <string>

namespace quietstar {

// Release of nvcc, for example "13.0".
std::string cuda_version();

// CMake's list of targets, for example "80-real 90a-real 100-virtual"; "virtual" is PTX.
std::string cuda_architectures();

}  // namespace quietstar
