// The table of one instruction set, and its elementary functions on arrays, for tests.

#include "kernel_table.h"

#include "vector.h"

namespace quietstar::cpu::QUIETSTAR_ISA {
namespace {

void exponential(const float* x, float* result, int64_t count) {
  for_vectors(0, count, [&](int64_t i, auto extent) { store(result + i, exp(load(x + i, extent)), extent); });
}

void logarithm(const float* x, float* result, int64_t count) {
  for_vectors(0, count, [&](int64_t i, auto extent) { store(result + i, log(load(x + i, extent)), extent); });
}

void hyperbolic_tangent(const float* x, float* result, int64_t count) {
  for_vectors(0, count, [&](int64_t i, auto extent) { store(result + i, tanh(load(x + i, extent)), extent); });
}

template <class T>
constexpr TypedKernels<T> kTyped = {mix<T>,
                                    mix_backward<T>,
                                    mixed_cross_entropy<T>,
                                    mixed_cross_entropy_backward<T>,
                                    thought_forward<T>,
                                    thought_backward<T>,
                                    linear_cross_entropy<T>,
                                    linear_sample<T>,
                                    base_forward<T>,
                                    base_backward<T>};

#define QUIETSTAR_TEXT(name) #name
#define QUIETSTAR_NAME(name) QUIETSTAR_TEXT(name)

}  // namespace

extern const Kernels kernels = {QUIETSTAR_NAME(QUIETSTAR_ISA),
                                kTyped<float>,
                                kTyped<BFloat16>,
                                sample_rows,
                                exponential,
                                logarithm,
                                hyperbolic_tangent};

}  // namespace quietstar::cpu::QUIETSTAR_ISA
