// Every access to memory is checked: where it reaches, and which other accesses nothing orders it with.
#pragma once

#include "machine.h"

namespace ptx {

enum class Access { kRead, kWrite, kAtomic, kMbarrier };

// Where an access of a lane to global memory goes, or null: out of bounds.
u8* global_place(Machine&, const Warp&, const Instruction&, int lane, u64 address, u32 bytes, bool write);
// Remembers it; `data` is what is about to be written.
void check_global(Machine&, const Warp&, const Instruction&, int lane, u64 address, u32 bytes, Access,
                  const u8* data = nullptr);

bool shared_in_bounds(Machine&, const Warp&, const Instruction&, int lane, u64 address, u32 bytes, bool write);
void check_shared(Machine&, Warp&, const Instruction&, int lane, u32 address, u32 bytes, Access,
                  bool by_async_proxy = false, const u8* data = nullptr);
// Bytes that an asynchronous copy is about to write hold NaN, and may not be touched, until it has.
void begin_copy_to_shared(Machine&, Warp&, const Instruction&, int lane, u32 address, u32 bytes);

inline bool in_shared_window(u64 address) { return address >= kSharedWindow && address < kSharedWindow + kWindowBytes; }

// Passes through shared memory's 32 banks of 4 bytes that a request of so many bytes a lane takes, and the least.
void count_wavefronts(const u64* address, u32 active, u32 bytes, u64& wavefronts, u64& least);
// Pieces of 32 bytes that a request for global memory touches.
u64 count_sectors(const u64* address, u32 active);

}  // namespace ptx
