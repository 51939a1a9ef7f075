// A warp's turn. Lanes that are apart run as groups, the one furthest back first, until they meet again.

#include <cstdio>
#include <limits>

#include "meaning.h"

namespace ptx {

namespace {

constexpr s32 kNowhere = std::numeric_limits<s32>::max();

class Turn {
 public:
  Turn(Machine& machine, Warp& warp) : machine_(machine), warp_(warp) {
    budget_ = machine.order >= 2 ? 1 + machine.random() % (machine.quantum * warp.speed) : ~0ull;
  }

  void take() {
    while (!machine_.failed() && choose_group()) {
      if (!run_group()) return;
    }
  }

 private:
  LaneGroup& group() { return warp_.groups[chosen_]; }

  bool others_can_run() const {
    for (int k = 0; k < static_cast<int>(warp_.groups.size()); ++k) {
      if (k != chosen_ && !warp_.groups[k].waiting) return true;
    }
    return false;
  }

  // The group furthest back that does not wait, joined by all that are where it is; false: the warp's turn is over.
  bool choose_group() {
    std::vector<LaneGroup>& groups = warp_.groups;
    chosen_ = -1;
    for (int k = 0; k < static_cast<int>(groups.size()); ++k) {
      if (!groups[k].waiting && (chosen_ < 0 || groups[k].pc < groups[chosen_].pc)) chosen_ = k;
    }
    if (chosen_ < 0) {
      if (groups.empty()) {
        end_warp();
      } else if (!warp_.at_barrier) {
        machine_.fail("warp deadlock: lanes wait in different collectives", warp_, machine_.code[groups[0].pc],
                      first_lane(groups[0].mask), 0);
      }
      return false;
    }
    for (int k = 0; k < static_cast<int>(groups.size()); ++k) {
      if (k == chosen_ || groups[k].pc != group().pc) continue;
      group().mask |= groups[k].mask;
      groups.erase(groups.begin() + k);
      if (k < chosen_) --chosen_;
      --k;
    }
    return true;
  }

  void end_warp() {
    warp_.done = true;
    if (!warp_.copies.empty()) {
      const PendingCopy& copy = warp_.copies[0];
      machine_.note("kernel ends with cp.async in flight", warp_, machine_.code[copy.pc], copy.lane, copy.to);
      complete_copies(machine_, warp_, kAllLanes, 0, true);
    }
    if (!warp_.wgmmas.empty()) {
      machine_.report("kernel ends with wgmma in flight", warp_, machine_.code[0], 0, 0);
      end_wgmmas(machine_, warp_);
    }
    machine_.registers_free += warp_.register_limit * kWarp;
    warp_.register_limit = 0;
    ++machine_.changes;
  }

  // Where the next group ahead of `pc` is.
  s32 next_meeting(s32 pc) const {
    s32 next = kNowhere;
    for (int k = 0; k < static_cast<int>(warp_.groups.size()); ++k) {
      if (k != chosen_ && warp_.groups[k].pc > pc) next = std::min(next, warp_.groups[k].pc);
    }
    return next;
  }

  // Whether another group must be joined at `pc`, or run before what is there.
  bool must_meet(s32 pc) const {
    for (int k = 0; k < static_cast<int>(warp_.groups.size()); ++k) {
      const LaneGroup& other = warp_.groups[k];
      if (k != chosen_ && (other.pc == pc || (other.pc < pc && !other.waiting))) return true;
    }
    return false;
  }

  // Runs the chosen group until another is to be chosen (true), or the turn is over (false).
  bool run_group() {
    const bool alone = warp_.groups.size() == 1;
    s32 pc = group().pc, meeting = next_meeting(pc);
    const s32 end = static_cast<s32>(machine_.code.size());
    const u32 mask = group().mask;
    for (;;) {
      if (pc >= end) {
        machine_.fail("ran off the end", warp_, machine_.code[end - 1], 0, 0);
        return false;
      }
      const Instruction& in = machine_.code[pc];
      u32 active = mask;
      if (in.predicate >= 0) {
        const u32 predicate = *reinterpret_cast<const u32*>(warp_.registers + in.predicate);
        active &= in.predicate_negated ? ~predicate : predicate;
      }
      ++machine_.counts[kWARP_INSTRUCTIONS];
      ++machine_.executed[pc];
      if (++machine_.instructions_done > machine_.instruction_limit) {
        machine_.fail("the kernel goes on and on", warp_, in, 0, 0);
        return false;
      }
      ++warp_.step;
      if (in.kind == Kind::kBranch) {
        machine_.counts[kCONTROL] += count_lanes(mask);
        if (active == mask) {
          pc = in.target;
        } else if (active == 0) {
          ++pc;
        } else {
          group().pc = pc + 1;
          group().mask = mask & ~active;
          warp_.groups.push_back({in.target, active, false});
          return true;
        }
        if (!alone) {
          if (pc >= meeting || must_meet(pc)) {
            group().pc = pc;
            return true;
          }
          meeting = next_meeting(pc);
        }
        continue;
      }
      if (active) {
        switch (in.kind) {
          case Kind::kPlain:
            execute(in, active);
            if (machine_.failed()) return false;
            if (warp_.yields) {
              group().pc = warp_.repeats ? pc : pc + 1;
              warp_.yields = warp_.repeats = false;
              return false;
            }
            break;
          case Kind::kExit:
            exit_lanes(active, pc);
            return true;
          case Kind::kIndexedBranch:
            return branch_by_index(in, active, pc);
          case Kind::kBarrier:
            if (active == warp_.alive) {
              wait_at_barrier(in, pc);
              return false;
            }
            return wait_for_lanes(in, active, warp_.alive, pc, "bar.sync by part of a warp");
          case Kind::kCollective: {
            const u32 members = warp_.values<u32>(in, in.operands - 1)[first_lane(active)] & warp_.alive;
            if ((active & members) != members) {
              return wait_for_lanes(in, active, members, pc, "collective without all members");
            }
            execute(in, active);
            if (machine_.failed()) return false;
            break;
          }
          case Kind::kBranch:
            break;
        }
      }
      ++pc;
      if (!alone && pc >= meeting) {
        group().pc = pc;
        for (LaneGroup& other : warp_.groups) {
          if (other.pc == pc) other.waiting = false;
        }
        return true;
      }
      if (!--budget_ && alone) {
        group().pc = pc;
        return false;
      }
    }
  }

  void execute(const Instruction& in, u32 active) {
    if (warp_.loads_in_flight || (in.near_wgmma && warp_.wgmma_in_flight)) check_registers(in);
    if (in.near_wgmma) note_registers(warp_, in);
    in.meaning(machine_, warp_, in, active);
    machine_.counts[in.unit] += count_lanes(active);
  }

  void check_registers(const Instruction& in) {
    for (int k = 0; k < in.operands; ++k) {
      if (in.operand[k] < 0) continue;
      const u8 state = warp_.register_state[in.operand[k] / kRegisterBytes];
      if (state == kFree) continue;
      if (state == kLoadInFlight) {
        machine_.report(k < in.destinations ? "write to a register of a tcgen05.ld in flight"
                                            : "read of a register of a tcgen05.ld in flight (no tcgen05.wait::ld)",
                        warp_, in, 0, in.operand[k]);
      } else if (k < in.destinations) {
        machine_.report(state == kAccumulatorInFlight ? "write to an accumulator of a wgmma in flight"
                                                      : "write to an A register of a wgmma in flight",
                        warp_, in, 0, in.operand[k]);
      } else if (state == kAccumulatorInFlight) {
        machine_.report("read of an accumulator of a wgmma in flight", warp_, in, 0, in.operand[k]);
      }
    }
  }

  void exit_lanes(u32 active, s32 pc) {
    warp_.alive &= ~active;
    group().mask &= ~active;
    group().pc = pc + 1;
    if (!group().mask) warp_.groups.erase(warp_.groups.begin() + chosen_);
    for (LaneGroup& other : warp_.groups) other.waiting = false;  // perhaps for those
  }

  // Operands: index, targets.
  bool branch_by_index(const Instruction& in, u32 active, s32 pc) {
    const u32* index = warp_.values<u32>(in, 0);
    std::map<s32, u32> targets;
    for (int lane : Lanes(active)) {
      if (index[lane] >= static_cast<u32>(in.operands) - 1) {
        machine_.fail("brx.idx out of its table", warp_, in, lane, index[lane]);
        return false;
      }
      targets[in.operand[1 + index[lane]]] |= 1u << lane;
    }
    if (active == group().mask) {
      warp_.groups.erase(warp_.groups.begin() + chosen_);
    } else {
      group().mask &= ~active;
      group().pc = pc + 1;
    }
    for (const auto& [target, lanes] : targets) warp_.groups.push_back({target, lanes, false});
    return true;
  }

  void wait_at_barrier(const Instruction& in, s32 pc) {
    if (!arrive_at_barrier(machine_, warp_, in)) return;
    warp_.barrier = in.immediate[0];
    warp_.at_barrier = true;
    warp_.wait_pc = pc;
    group().pc = pc + 1;
    group().waiting = true;
    machine_.counts[kBARRIERS] += 1;
  }

  bool wait_for_lanes(const Instruction& in, u32 active, u32 members, s32 pc, const char* if_none_comes) {
    group().pc = pc;
    group().waiting = true;
    if (others_can_run()) return true;
    char more[100];
    std::snprintf(more, sizeof more, "members %08x, here %08x", members, active);
    machine_.fail(if_none_comes, warp_, in, first_lane(members & ~active), 0, more);
    return false;
  }

  Machine& machine_;
  Warp& warp_;
  u64 budget_;
  int chosen_ = -1;
};

}  // namespace

void run_warp(Machine& machine, Warp& warp) { Turn(machine, warp).take(); }

}  // namespace ptx
