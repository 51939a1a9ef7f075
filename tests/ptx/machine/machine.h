// The machine that executes decoded PTX: what a launch consists of, and what is remembered to find mistakes.
//
// One warp instruction at a time, over 32 lanes; the warps of a block (CTA) take turns, blocks run one after another.
// Python (tests/ptx) parses PTX and encodes it; the other files of this folder say what instructions mean. Numbers in
// brackets name sections of NVIDIA's "Parallel Thread Execution ISA", version 9.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace ptx {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using s8 = std::int8_t;
using s16 = std::int16_t;
using s32 = std::int32_t;
using s64 = std::int64_t;

constexpr int kWarp = 32, kMostWarps = 32;
constexpr u32 kAllLanes = ~0u;
constexpr u32 kRegisterBytes =
    4 * kWarp;  // of a 32-bit register of a warp; registers are named by their place in bytes

// Where generic addresses of shared memory and of parameters lie [Generic Addressing]; far from the host's memory.
constexpr u64 kSharedWindow = 0x7f00000000000000ull, kWindowBytes = 1u << 24;
constexpr u64 kParameterWindow = 0x7e00000000000000ull;
constexpr u32 kSharedBase = 1024;  // of the shared window: nothing lies at address 0

struct Machine;
struct Warp;
struct Instruction;
struct TensorMemory;
using Meaning = void (*)(Machine&, Warp&, const Instruction&, u32 active);

// How the scheduler treats an instruction; numbers that Python uses too.
enum class Kind : s32 { kPlain, kBranch, kExit, kBarrier, kCollective, kIndexedBranch };

struct Instruction {
  Meaning meaning = nullptr;
  Kind kind = Kind::kPlain;
  s32 predicate = -1;  // register, or -1
  bool predicate_negated = false;
  s32 target = -1;                     // of a branch
  s32 negated = 0;                     // bit k: operand k is a negated predicate
  s32 unit = 0;                        // what the instruction is counted as: a Count
  s32 operands = 0, destinations = 0;  // how many; destinations come first
  const s32* operand = nullptr;        // registers; -1: thrown away
  s64 immediate[8] = {};
  s32 pc = 0;
  bool near_wgmma = false;  // none itself, but with a register that is an accumulator or of A in some wgmma
};

// What is counted. Per thread: F32 to F16 and OTHER. WAVEFRONTS and LEAST: passes through shared memory's banks, and
// how many there would be without conflicts. SECTORS: of 32 bytes.
// clang-format off
#define PTX_COUNTS(X) \
  X(WARP_INSTRUCTIONS) X(F32) X(FMA32) X(F16) X(EX2) X(MUFU) X(INT) X(CVT) X(CONTROL) X(OTHER) X(SHUFFLES) X(ATOMICS) \
  X(BARRIERS) X(MMA) X(MMA_FLOP) X(WGMMA) X(WGMMA_FLOP) X(WGMMA_SHARED_BYTES) \
  X(TCGEN05_MMA) X(TCGEN05_MMA_FLOP) X(TCGEN05_MMA_SHARED_BYTES) \
  X(GLOBAL_LOADS) X(GLOBAL_LOAD_BYTES) X(GLOBAL_LOAD_SECTORS) \
  X(GLOBAL_STORES) X(GLOBAL_STORE_BYTES) X(GLOBAL_STORE_SECTORS) \
  X(COPIES) X(COPY_BYTES) X(COPY_SECTORS) X(COPY_WAVEFRONTS) X(COPY_LEAST) X(TMA_LOADS) X(TMA_BYTES) \
  X(TMA_STORES) X(TMA_STORE_BYTES) \
  X(SHARED_LOADS) X(SHARED_LOAD_BYTES) X(SHARED_LOAD_WAVEFRONTS) X(SHARED_LOAD_LEAST) \
  X(SHARED_STORES) X(SHARED_STORE_BYTES) X(SHARED_STORE_WAVEFRONTS) X(SHARED_STORE_LEAST) \
  X(LDMATRIX_WAVEFRONTS) X(LDMATRIX_LEAST) X(STMATRIX_WAVEFRONTS) X(STMATRIX_LEAST) \
  X(WAITS) X(WAITS_FAILED)
// clang-format on
enum Count {
#define PTX_COUNT(name) k##name,
  PTX_COUNTS(PTX_COUNT)
#undef PTX_COUNT
      kCounts
};

// What the machine knows of two bytes of memory.
struct Shadow {
  u32 write_epoch = 0, read_epoch = 0, first_read_epoch = 0;
  u32 readers = 0;      // warps, in read_epoch (global memory)
  u32 write_sync = 0;   // the writer's count of bar.warp.sync
  u32 write_clock = 0;  // the writer's clock (shared memory)
  u8 writer = 0, writer_lane = 0;
  bool written_atomically = false, written_by_copy = false, mbarrier = false;  // by_copy: cp.async
  bool copy_in_flight = false;  // bytes that cp.async or TMA has yet to write
  u8 wgmma_reads = 0;           // by wgmma and tcgen05.mma in flight
  u8 mma_reader = 0;            // tcgen05.mma that are over: their entry of Clock,
  u32 mma_read_clock = 0;       // and its time
  u16 tma_stores = 0;           // not waited for: that read it (shared memory), that write it (global memory)
};

struct Finding {
  std::string kind;
  bool serious;  // or only a note
  s32 pc;
  u64 count;
  std::string first;
};

// Vector clocks order accesses to shared memory. Entries: warps, then asynchronous copies by their mbarrier
// and tcgen05.mma by the warp that issues them.
constexpr int kMostCopyClocks = 32;
struct Clock {
  u32 at[kMostWarps + kMostCopyClocks] = {};
  u32 fenced[kMostWarps + kMostCopyClocks] =
      {};  // the same, of what the asynchronous proxy may see: a fence is between
  void join(const Clock& other) {
    for (int k = 0; k < kMostWarps + kMostCopyClocks; ++k) {
      at[k] = std::max(at[k], other.at[k]);
      fenced[k] = std::max(fenced[k], other.fenced[k]);
    }
  }
};

struct PendingCopy {  // cp.async
  u32 to, bytes;
  u32 lane;
  u64 group;
  u8 data[16];
  s32 pc;
};

struct WgmmaOperands {
  u64 group;
  std::vector<u32> shared;  // addresses of 16 bytes each
  std::vector<s32> registers;
};

struct PendingWgmma {  // accumulators in flight, and all that goes into them
  std::vector<s32> registers;
  std::vector<float> values;
  u64 group;
  std::vector<WgmmaOperands> inputs;
};

// Lanes of a warp that are at one instruction.
struct LaneGroup {
  s32 pc;
  u32 mask;
  bool waiting;  // for other lanes, or for a barrier
};

enum RegisterState : u8 { kFree, kAccumulatorInFlight, kOperandInFlight, kLoadInFlight };

// When (Warp::step) a register of wgmma was last used: by other instructions, and by wgmma as what.
struct RegisterUse {
  u32 read = 0, written = 0, by_wgmma = 0;
  s64 columns = 0;  // of the wgmma of which it was an accumulator; 0: it was of A
};

struct Warp {
  u8* registers = nullptr;
  std::vector<LaneGroup> groups;
  int id = 0;
  u32 alive = 0;
  bool at_barrier = false, done = false;
  int barrier = 0;  // that it waits at
  u32 syncs = 1;    // counts bar.warp.sync and barriers
  Clock clock;

  std::vector<PendingCopy> copies;
  u64 copy_group[kWarp];

  std::vector<PendingWgmma> wgmmas;
  u64 wgmma_group = 0;
  bool wgmma_in_flight = false, loads_in_flight = false;  // loads: tcgen05.ld
  std::vector<u8> register_state;                         // RegisterState of each 32-bit register
  std::vector<RegisterUse> register_use;
  u32 step = 1, fence_step = 0;  // now; at the last wgmma.fence
  u32 mbarrier_fences = 1;

  u64 store_group[kWarp];  // of TMA

  bool yields = false, repeats = false;  // asked for by an instruction: give others a turn; execute it again
  u32 wait_address = 0;
  u64 wait_parity = 0, wait_change = 0;
  s32 wait_pc = -1;
  int failed_waits = 0;  // since anything changed

  s64 register_limit = 0;                             // of a thread: setmaxnreg
  std::vector<std::pair<s64, s32>> register_changes;  // to what, where
  u32 speed = 1;

  template <class T>
  T* values(const Instruction& in, int operand) {
    return reinterpret_cast<T*>(registers + in.operand[operand]);
  }
  // A predicate register is a mask of lanes.
  u32 predicate(const Instruction& in, int operand) {
    const u32 mask = *values<u32>(in, operand);
    return in.negated >> operand & 1 ? ~mask : mask;
  }
  void set_predicate(s32 place, u32 active, u32 value) {
    u32* mask = reinterpret_cast<u32*>(registers + place);
    *mask = (*mask & ~active) | (value & active);
  }
  // Address of a lane: operand plus offset, with the operand's width in bytes.
  u64 address(const Instruction& in, int operand, int lane, s64 offset, s64 width) {
    return (width == 4 ? u64{values<u32>(in, operand)[lane]} : values<u64>(in, operand)[lane]) + offset;
  }
  // As most memory instructions have it: offset and width are the first two immediates.
  u64 address(const Instruction& in, int operand, int lane) {
    return address(in, operand, lane, in.immediate[0], in.immediate[1]);
  }
};

struct Mbarrier {
  u32 address;
  s64 expected, pending, bytes;  // arrivals of a phase; arrivals and bytes that are missing
  u64 phase;
  Clock arriving, completed;
  int warp;        // that initialised it
  u32 fence;       // its fences then
  int copy_clock;  // entry of Clock, or -1
  s32 pc;
};

// What a parameter of 128 bytes holds in the place of CUDA's opaque descriptor; packed by triton_launches.py.
struct TensorMap {
  u64 magic, base, size[5], stride[5];
  u32 box[5];
  u16 rank, swizzle;
  u32 element_bytes, type;  // CUtensorMapDataType
};
static_assert(sizeof(TensorMap) == 128, "a descriptor has 128 bytes");
constexpr u64 kTensorMapMagic = 0x50414d5254584d54ull;

struct PendingTma {
  u64 due;  // when the machine has executed so many instructions
  TensorMap map;
  s32 at[5];
  u32 shared, mbarrier, bytes;
  int warp, lane;
  s32 pc;
};

struct PendingTmaStore : PendingTma {
  u64 group;
  s64 reduction;
  bool read_waited, written;
  std::vector<u8> data;  // as it lies in shared memory, once it is read
};

struct NamedBarrier {
  s64 count = 0;  // of threads; -1: all
  u32 threads = 0, warps = 0;
  Clock clock;
  s32 pc = 0;
};

struct Buffer {  // global memory: a storage, and the part of it that tensors show
  u64 low, high, view_low, view_high;
};

struct Machine {
  // The kernel.
  std::vector<Instruction> code;
  std::vector<std::vector<s32>> operands;
  std::vector<u8> register_image;             // of a warp at its start: constants
  std::vector<std::pair<s32, s32>> specials;  // special register, its place

  // The launch.
  std::vector<Buffer> buffers;
  std::size_t last_buffer = 0;
  std::vector<u8> parameters;
  u32 grid[3], block[3], cta[3];
  int warp_count = 0;
  bool check_global = true;
  u64 instruction_limit = 0, instructions_done = 0;

  // The block.
  std::vector<Warp> warps;
  std::vector<u8> shared;
  u32 shared_bytes = 0;
  std::vector<Shadow> shared_shadow;
  std::vector<u32> last_read;  // of each two bytes of shared memory and each warp: clock
  std::map<u32, Mbarrier> mbarriers;
  std::vector<PendingTma> tma;
  std::unique_ptr<TensorMemory> tensor_memory;  // once some is allocated
  std::vector<PendingTmaStore> tma_stores;
  u32 copy_clocks[kMostCopyClocks] = {};
  int copy_clocks_used = 0;
  NamedBarrier barriers[16];
  u64 changes = 1;  // of anything that a warp may wait for
  s64 registers_free = 0, register_limit = 0;

  // The order in which warps run; see launch.cpp.
  int order = 0;
  u32 random_state = 12345, quantum = 4000, tma_delay = 200;

  // Global memory: shadows by page.
  std::unordered_map<u64, Shadow*> pages;
  u64 last_page = ~0ull;
  Shadow* last_shadow = nullptr;
  u32 epoch = 1, cta_epoch = 1, launch_epoch = 1;  // between barriers of all threads; at the start of block and launch

  // What came out.
  u64 counts[kCounts] = {};
  std::vector<u64> executed, wavefronts, least_wavefronts;  // by instruction
  std::vector<Finding> findings;
  std::string failure;  // ends the launch

  Machine();
  Machine(const Machine&) = delete;
  ~Machine();

  u32 random();
  bool failed() const { return !failure.empty(); }
  // Something is wrong (report), odd (note), or so wrong that nothing can follow (fail).
  void report(const char* kind, const Warp&, const Instruction&, int lane, u64 address, const char* more = "");
  void note(const char* kind, const Warp&, const Instruction&, int lane, u64 address, const char* more = "");
  void fail(const char* kind, const Warp&, const Instruction&, int lane, u64 address, const char* more = "");
  Shadow* global_shadow(u64 address);
  Shadow& shadow(u32 shared_address) { return shared_shadow[(shared_address - kSharedBase) >> 1]; }
  u32* reads_of(u32 shared_address) {
    return &last_read[std::size_t{(shared_address - kSharedBase) >> 1} * warp_count];
  }
  u8* shared_at(u64 address) { return shared.data() + (address - kSharedBase); }

 private:
  void found(bool serious, const char* kind, const Warp&, const Instruction&, int lane, u64 address, const char* more);
};

// The parts of a launch, each in the file of its name.
int launch(Machine&, u32 register_limit, const u32* ctas, int cta_count);
void run_warp(Machine&, Warp&);
bool arrive_at_barrier(Machine&, Warp&, const Instruction&);
void release_barriers(Machine&);
void complete_tma(Machine&, std::size_t which);
void deliver_tma(Machine&);
// Of tcgen05: arrivals at mbarriers that are due, or (true) the next of all; what is left when a block ends.
void deliver_commits(Machine&);
bool complete_next_commit(Machine&);
void check_tensor_memory_at_end(Machine&);
void deliver_tma_stores(Machine&);
void end_tma_stores(Machine&);
void complete_copies(Machine&, Warp&, u32 active, s64 pending, bool all);
void end_wgmmas(Machine&, Warp&);
void find_wgmma_registers(Machine&);
void note_registers(Warp&, const Instruction&);

}  // namespace ptx
