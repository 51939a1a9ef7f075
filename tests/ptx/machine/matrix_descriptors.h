// Matrices in shared memory that wgmma and tcgen05.mma read by descriptors [9.7.15.5.1.2 Shared Memory Matrix Layout;
// 9.7.16.4.1 Shared Memory Descriptor]: where their pieces of 16 bytes are.
#pragma once

#include "machine.h"
#include "swizzle.h"

namespace ptx {

struct MatrixDescriptor {
  u64 start, leading, stride;
  int swizzle;
  // All fields but the swizzle are where both kinds of descriptors have them.
  MatrixDescriptor(u64 bits, int swizzle)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        swizzle(swizzle) {}
  // K-major: of a row, the k-th piece along K.
  u64 k_major(int row, int k) const {
    const int row_bytes = swizzle_bytes(swizzle);
    const u64 across = swizzle == kNoSwizzle ? k * leading : u64(k) * 16;
    return swizzled(start + u64(row % 8) * row_bytes + row / 8 * stride + across, swizzle);
  }
  // MN-major, elements of 16 bits: of a k, the piece-th eight along M or N.
  u64 mn_major(int k, int piece) const {
    if (swizzle == kNoSwizzle) return start + piece * stride + u64(k % 8) * 16 + k / 8 * leading;
    const int pieces = swizzle_bytes(swizzle) / 16;
    const u64 inside = u64(piece % pieces) * 16 + u64(k % 8) * pieces * 16;
    return swizzled(start + inside + piece / pieces * leading + k / 8 * stride, swizzle);
  }
};

}  // namespace ptx
