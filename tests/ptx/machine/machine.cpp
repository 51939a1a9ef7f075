// Findings, chance and the shadow of global memory.

#include "machine.h"

#include <cstdio>

#include "tensor_memory.h"

namespace ptx {

Machine::Machine() = default;
Machine::~Machine() {
  for (auto& page : pages) delete[] page.second;
}

u32 Machine::random() {
  random_state = random_state * 1664525u + 1013904223u;
  return random_state >> 8;
}

static std::string place(const Machine& machine, const Warp& warp, int lane, u64 address, const char* more) {
  char text[400];
  std::snprintf(text, sizeof text, "cta (%u,%u,%u) warp %d lane %d address 0x%llx %s", machine.cta[0], machine.cta[1],
                machine.cta[2], warp.id, lane, (unsigned long long)address, more);
  return text;
}

void Machine::found(bool serious, const char* kind, const Warp& warp, const Instruction& in, int lane, u64 address,
                    const char* more) {
  for (Finding& finding : findings) {
    if (finding.pc == in.pc && finding.kind == kind) {
      ++finding.count;
      return;
    }
  }
  if (findings.size() > 200 && !serious) return;
  findings.push_back({kind, serious, in.pc, 1, place(*this, warp, lane, address, more)});
}

void Machine::report(const char* kind, const Warp& warp, const Instruction& in, int lane, u64 address,
                     const char* more) {
  found(true, kind, warp, in, lane, address, more);
}

void Machine::note(const char* kind, const Warp& warp, const Instruction& in, int lane, u64 address, const char* more) {
  found(false, kind, warp, in, lane, address, more);
}

void Machine::fail(const char* kind, const Warp& warp, const Instruction& in, int lane, u64 address, const char* more) {
  if (failed()) return;
  report(kind, warp, in, lane, address, more);
  failure = std::string(kind) + ": " + place(*this, warp, lane, address, more) + " @" + std::to_string(in.pc);
}

Shadow* Machine::global_shadow(u64 address) {
  const u64 page = address >> 12;
  if (page != last_page) {
    Shadow*& shadows = pages[page];
    if (!shadows) shadows = new Shadow[2048];
    last_page = page;
    last_shadow = shadows;
  }
  return last_shadow + ((address & 4095) >> 1);
}

}  // namespace ptx
