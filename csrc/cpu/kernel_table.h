// The kernels of one instruction set, for its table. Each is defined in the file of its op.
#pragma once

#include "kernels.h"

namespace quietstar::cpu::QUIETSTAR_ISA {

template <class T>
void mix(const MixForward<T>&);
template <class T>
void mix_backward(const MixBackward<T>&);
template <class T>
void mixed_cross_entropy(const MixedCrossEntropy<T>&);
template <class T>
void mixed_cross_entropy_backward(const MixedCrossEntropyBackward<T>&);
template <class T>
void thought_forward(const ThoughtAttention<T>&);
template <class T>
void thought_backward(const ThoughtAttentionBackward<T>&);
template <class T>
void linear_cross_entropy(const LinearCrossEntropy<T>&);
template <class T>
void linear_sample(const LinearSample<T>&);
template <class T>
void base_forward(const ThoughtAttention<T>&);
template <class T>
void base_backward(const ThoughtAttentionBackward<T>&);
void sample_rows(const SampleRows&);

}  // namespace quietstar::cpu::QUIETSTAR_ISA
