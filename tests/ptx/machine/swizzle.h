// How shared memory of wgmma and TMA is swizzled [Strides; Swizzling Modes]: pieces of 16 bytes are exchanged within
// rows of 128, 64 or 32 bytes, by the number of the row of 128 bytes they lie in.
#pragma once

#include "machine.h"

namespace ptx {

// As descriptors of wgmma number them.
enum Swizzle { kNoSwizzle, kSwizzle128, kSwizzle64, kSwizzle32 };

// Bytes of a row; without swizzling rows of a matrix are 16 bytes.
inline int swizzle_bytes(int swizzle) { return swizzle == kNoSwizzle ? 16 : 256 >> swizzle; }

inline u64 swizzled(u64 address, int swizzle) {
  switch (swizzle) {
    case kSwizzle128:
      return address ^ (address >> 3 & 0x70);
    case kSwizzle64:
      return address ^ (address >> 3 & 0x30);
    case kSwizzle32:
      return address ^ (address >> 3 & 0x10);
    default:
      return address;
  }
}

}  // namespace ptx
