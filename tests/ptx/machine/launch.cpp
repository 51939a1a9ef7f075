// A launch: blocks one after another, the warps of a block in turns.
//
// `order` chooses the turns. 0: warps one after another; 1: the other way round, and blocks too; 2: random quanta; 3
// and more: seeds of quanta, of the speed of warps (even) or of warp groups (odd) and of the delays of TMA.

#include <cstdio>

#include "meaning.h"
#include "tensor_memory.h"

namespace ptx {

// Numbers of special registers, as Python numbers them [10 Special Registers].
static u32 special_value(const Machine& machine, int warp, int lane, s32 which) {
  const u32 thread = warp * kWarp + lane;
  const u32* block = machine.block;
  switch (which) {
    case 0:
      return thread % block[0];
    case 1:
      return thread / block[0] % block[1];
    case 2:
      return thread / block[0] / block[1];
    case 3:
    case 4:
    case 5:
      return block[which - 3];
    case 6:
    case 7:
    case 8:
      return machine.cta[which - 6];
    case 9:
    case 10:
    case 11:
      return machine.grid[which - 9];
    case 12:
      return lane;
    case 13:
      return warp;
    case 14:  // masks of lanes: this one, those below, those above
      return 1u << lane;
    case 15:
      return (1u << lane) - 1;
    case 16:
      return (2u << lane) - 1;
    case 17:
      return ~((1u << lane) - 1);
    case 18:
      return ~((2u << lane) - 1);
    case 20:
      return machine.shared_bytes;
    default:  // clocks stand still
      return 0;
  }
}

namespace {

class Block {
 public:
  Block(Machine& machine, std::vector<std::vector<u8>>& register_files, u32 register_limit)
      : machine_(machine), turns_(machine.warp_count) {
    machine.cta_epoch = ++machine.epoch;
    std::fill(machine.shared.begin(), machine.shared.end(), 0xFF);  // NaN, until it is written
    for (Shadow& shadow : machine.shared_shadow) {
      shadow.copy_in_flight = shadow.mbarrier = false;
      shadow.wgmma_reads = shadow.tma_stores = shadow.writer = 0;
      shadow.write_clock = shadow.mma_read_clock = 0;
    }
    std::fill(machine.last_read.begin(), machine.last_read.end(), 0);
    machine.mbarriers.clear();
    machine.tma.clear();
    machine.tensor_memory.reset();
    machine.tma_stores.clear();
    machine.copy_clocks_used = 0;
    std::fill(std::begin(machine.copy_clocks), std::end(machine.copy_clocks), 0);
    for (NamedBarrier& barrier : machine.barriers) barrier = NamedBarrier();
    machine.register_limit = register_limit;
    machine.registers_free = 0;
    for (int k = 0; k < machine.warp_count; ++k) {
      begin_warp(k, register_files[k].data());
      turns_[k] = k;
    }
  }

  void run() {
    while (!machine_.failed()) {
      const u64 before = machine_.changes;
      take_turns();
      if (machine_.failed()) return;
      release_barriers(machine_);
      if (all([](const Warp& warp) { return warp.done; })) return check_end();
      // Nothing can go on by itself when nothing changed and everybody waited twice in vain.
      const auto waits = [](const Warp& warp) { return warp.done || warp.at_barrier || warp.failed_waits >= 2; };
      if (machine_.changes != before || !all(waits)) continue;
      if (complete_next_commit(machine_)) continue;
      if (machine_.tma.empty()) {
        machine_.failure = deadlock();
      } else {
        complete_tma(machine_, earliest_tma());
      }
    }
  }

 private:
  template <class Predicate>
  bool all(Predicate holds) const {
    return std::all_of(machine_.warps.begin(), machine_.warps.end(), holds);
  }

  void begin_warp(int id, u8* registers) {
    Warp& warp = machine_.warps[id];
    warp = Warp();
    warp.id = id;
    warp.registers = reinterpret_cast<u8*>((reinterpret_cast<u64>(registers) + 63) & ~63ull);
    std::copy(machine_.register_image.begin(), machine_.register_image.end(), warp.registers);
    warp.register_state.assign(machine_.register_image.size() / kRegisterBytes + 2, kFree);
    warp.register_use.assign(warp.register_state.size(), RegisterUse());
    std::fill(std::begin(warp.copy_group), std::end(warp.copy_group), 0);
    std::fill(std::begin(warp.store_group), std::end(warp.store_group), 0);
    const int threads = machine_.block[0] * machine_.block[1] * machine_.block[2];
    const int lanes = std::min(kWarp, threads - kWarp * id);
    warp.alive = lanes == kWarp ? kAllLanes : (1u << lanes) - 1;
    warp.groups.push_back({0, warp.alive, false});
    warp.clock.at[id] = 1;
    warp.register_limit = machine_.register_limit;
    if (machine_.order >= 3) warp.speed = speed(id);
    for (const auto& [which, place] : machine_.specials) {
      u32* values = reinterpret_cast<u32*>(warp.registers + place);
      for (int lane = 0; lane < kWarp; ++lane) values[lane] = special_value(machine_, id, lane, which);
    }
  }

  u32 speed(int id) {
    static constexpr u32 kOfWarps[] = {1, 1, 5, 20}, kOfWarpGroups[] = {1, 1, 30, 300};
    if (machine_.order % 2 == 0) return kOfWarps[machine_.random() % 4];
    return id % 4 ? machine_.warps[id & ~3].speed : kOfWarpGroups[machine_.random() % 4];
  }

  void take_turns() {
    const int count = machine_.warp_count;
    const u32 first = machine_.order == 2 ? machine_.random() : 0;
    for (int k = count - 1; k > 0 && machine_.order >= 3; --k)
      std::swap(turns_[k], turns_[machine_.random() % (k + 1)]);
    for (int k = 0; k < count && !machine_.failed(); ++k) {
      const int id = machine_.order == 1 ? count - 1 - k : machine_.order == 2 ? (k + first) % count : turns_[k];
      deliver_tma(machine_);
      deliver_commits(machine_);
      deliver_tma_stores(machine_);
      release_barriers(machine_);
      Warp& warp = machine_.warps[id];
      if (!warp.done && !warp.at_barrier && !machine_.failed()) run_warp(machine_, warp);
    }
  }

  std::size_t earliest_tma() const {
    const auto earlier = [](const PendingTma& a, const PendingTma& b) { return a.due < b.due; };
    return std::min_element(machine_.tma.begin(), machine_.tma.end(), earlier) - machine_.tma.begin();
  }

  // Who waits for what.
  std::string deadlock() const {
    std::string text = "deadlock:";
    char line[400];
    const auto missing = [&](const Mbarrier& mbarrier) {
      std::snprintf(line, sizeof line, "mbarrier 0x%x, phase %llu, %lld of %lld arrivals and %lld bytes missing",
                    mbarrier.address, (unsigned long long)mbarrier.phase, (long long)mbarrier.pending,
                    (long long)mbarrier.expected, (long long)mbarrier.bytes);
      return std::string(line);
    };
    for (const Warp& warp : machine_.warps) {
      if (warp.done) continue;
      text += "\n  warp " + std::to_string(warp.id);
      if (warp.at_barrier) {
        const NamedBarrier& barrier = machine_.barriers[warp.barrier];
        std::snprintf(line, sizeof line, " at barrier %d (%u threads of %lld)", warp.barrier, barrier.threads,
                      (long long)barrier.count);
        text += line;
      } else if (const auto found = machine_.mbarriers.find(warp.wait_address); found != machine_.mbarriers.end()) {
        text += " waits for parity " + std::to_string(warp.wait_parity) + " of " + missing(found->second);
      } else {
        std::snprintf(line, sizeof line, " holds %lld registers and wants more; %lld are free",
                      (long long)warp.register_limit, (long long)machine_.registers_free);
        text += line;
      }
      text += " @" + std::to_string(warp.wait_pc);
    }
    for (const auto& entry : machine_.mbarriers) {
      text += "\n  " + missing(entry.second) + " (init @" + std::to_string(entry.second.pc) + ")";
    }
    return text;
  }

  void check_end() {
    end_tma_stores(machine_);
    for (const PendingTma& copy : machine_.tma) {
      machine_.report("block ends with a TMA load in flight", machine_.warps[copy.warp], machine_.code[copy.pc],
                      copy.lane, copy.shared);
    }
    check_tensor_memory_at_end(machine_);
    for (const auto& [address, mbarrier] : machine_.mbarriers) {
      if (!mbarrier.bytes) continue;
      machine_.report("block ends with bytes missing (or too many) on an mbarrier", machine_.warps[mbarrier.warp],
                      machine_.code[mbarrier.pc], 0, address, (std::to_string(mbarrier.bytes) + " bytes").c_str());
    }
    for (const NamedBarrier& barrier : machine_.barriers) {
      if (!barrier.threads) continue;
      machine_.report("block ends with arrivals at a barrier", machine_.warps[0], machine_.code[barrier.pc], 0,
                      barrier.threads);
    }
    for (const Warp& warp : machine_.warps) {
      const auto& changes = warp.register_changes;
      if (changes.empty() || changes.size() == machine_.warps[warp.id & ~3].register_changes.size()) continue;
      machine_.report("warps of a warp group disagree in setmaxnreg", warp, machine_.code[changes.back().second], 0, 0);
    }
  }

  Machine& machine_;
  std::vector<int> turns_;
};

}  // namespace

int launch(Machine& machine, u32 register_limit, const u32* ctas, int cta_count) {
  const int threads = machine.block[0] * machine.block[1] * machine.block[2];
  machine.warp_count = (threads + kWarp - 1) / kWarp;
  if (machine.warp_count > kMostWarps) {
    machine.failure = "more than 1024 threads";
    return 1;
  }
  machine.last_read.assign(machine.shared_shadow.size() * machine.warp_count, 0);
  machine.random_state = 12345u + 977u * std::max(machine.order - 2, 0);
  machine.quantum = 4000;
  machine.tma_delay = 200;
  if (machine.order >= 3) {
    static constexpr u32 kQuanta[] = {40, 400, 4000}, kDelays[] = {20000, 300, 4000};
    machine.quantum = kQuanta[machine.random() % 3];
    machine.tma_delay = kDelays[machine.random() % 3];
  }
  machine.warps.assign(machine.warp_count, Warp());
  std::vector<std::vector<u8>> register_files(machine.warp_count, std::vector<u8>(machine.register_image.size() + 64));
  machine.launch_epoch = ++machine.epoch;
  const u64 total = u64{machine.grid[0]} * machine.grid[1] * machine.grid[2];
  for (u64 n = 0; n < (ctas ? u64(cta_count) : total) && !machine.failed(); ++n) {
    const u64 cta = ctas ? ctas[n] : machine.order == 1 ? total - 1 - n : n;
    machine.cta[0] = cta % machine.grid[0];
    machine.cta[1] = cta / machine.grid[0] % machine.grid[1];
    machine.cta[2] = cta / machine.grid[0] / machine.grid[1];
    Block(machine, register_files, register_limit).run();
  }
  end_tma_stores(machine);  // of a block that failed
  return machine.failed();
}

}  // namespace ptx
