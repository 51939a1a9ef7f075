// What TMA loads and stores share [9.7.9, Asynchronous copy: Tensor copy]: tiles of 1 to 5 dimensions, in the block's
// own shared memory as the descriptor swizzles them.
#pragma once

#include "checks.h"
#include "meaning.h"
#include "swizzle.h"

namespace ptx {

// Operands: shared memory, descriptor, coordinates (innermost first) [, mbarrier]. Immediates: offset and width of the
// address in shared memory, dimensions, offset and width of the mbarrier's, offset of the descriptor's; of a store,
// what it does with the numbers that are there.
enum TmaImmediate {
  kTmaOffset,
  kTmaAddressWidth,
  kTmaRank,
  kTmaMbarrierOffset,
  kTmaMbarrierWidth,
  kTmaDescriptorOffset,
  kTmaReduction
};

// What a lane asks for; false: that cannot be.
bool read_tma(Machine&, Warp&, const Instruction&, int lane, PendingTma&);

// Of each 16 bytes in a row of the box calls each(address in shared memory, bytes from the row's start, address of the
// row's first element or 0 outside of the tensor) until that returns false.
template <class Each>
bool for_each_piece(const PendingTma& copy, Each each) {
  static constexpr int kSwizzles[] = {kNoSwizzle, kSwizzle32, kSwizzle64, kSwizzle128};  // as descriptors number them
  const TensorMap& map = copy.map;
  const u32 row_bytes = map.box[0] * map.element_bytes;
  for (u32 r = 0; r < copy.bytes / row_bytes; ++r) {
    u64 row = map.base + s64{copy.at[0]} * map.element_bytes;
    u32 rest = r;
    bool inside = true;
    for (u32 k = 1; k < map.rank; ++k) {
      const s64 place = s64{copy.at[k]} + rest % map.box[k];
      rest /= map.box[k];
      inside &= place >= 0 && place < static_cast<s64>(map.size[k]);
      row += place * map.stride[k];
    }
    for (u32 column = 0; column < row_bytes; column += 16) {
      const u64 shared = swizzled(copy.shared + r * row_bytes + column, kSwizzles[map.swizzle]);
      if (!each(shared, column, inside ? row : 0)) return false;
    }
  }
  return true;
}

// Of each element in a piece that is in the tensor calls each(address, its place among the 16 bytes) until that returns
// false.
template <class Each>
bool for_each_element(const PendingTma& copy, u32 column, u64 row, Each each) {
  const u32 bytes = copy.map.element_bytes;
  for (u32 byte = 0; row && byte < 16; byte += bytes) {
    const s64 x = s64{copy.at[0]} + (column + byte) / bytes;
    if (x < 0 || x >= static_cast<s64>(copy.map.size[0])) continue;
    if (!each(row + column + byte, byte)) return false;
  }
  return true;
}

}  // namespace ptx
