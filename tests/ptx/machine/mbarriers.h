// What barriers and TMA know of mbarriers [9.7.13, mbarrier].
#pragma once

#include "machine.h"

namespace ptx {

// The mbarrier at a (generic or shared) address, or null: it was never initialised. `by_tma`: used by the async proxy.
Mbarrier* find_mbarrier(Machine&, Warp&, const Instruction&, int lane, u64 address, bool by_tma = false);
// Begins the next phase if neither arrivals nor bytes are missing.
void complete_phase(Machine&, Mbarrier&);
constexpr s64 kMostExpected = (1 << 20) - 1;  // arrivals, and bytes [Phase of the mbarrier object]

}  // namespace ptx
