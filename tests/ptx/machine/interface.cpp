// What Python calls (tests/ptx/library.py).

#include "meaning.h"

using namespace ptx;

#pragma GCC visibility push(default)
extern "C" {

// Name of a Count, null behind the last.
const char* ptx_count_name(int which) {
  static const char* const names[] = {
#define PTX_COUNT(name) #name,
      PTX_COUNTS(PTX_COUNT)
#undef PTX_COUNT
          nullptr};
  return names[which];
}

Machine* ptx_new(const u8* register_image, u64 bytes) {
  Machine* machine = new Machine;
  machine->register_image.assign(register_image, register_image + bytes);
  return machine;
}

void ptx_free(Machine* machine) { delete machine; }

void ptx_add_special(Machine* machine, s32 which, s32 place) { machine->specials.push_back({which, place}); }

// False: nothing says what an instruction of this name means.
int ptx_add_instruction(Machine* machine, const char* name, s32 kind, s32 predicate, s32 predicate_negated, s32 target,
                        s32 negated, s32 unit, s32 operands, s32 destinations, const s32* operand,
                        const s64* immediate) {
  Instruction in;
  in.kind = static_cast<Kind>(kind);
  if (in.kind == Kind::kPlain || in.kind == Kind::kCollective) {
    const auto found = meanings().find(name);
    if (found == meanings().end()) return 0;
    in.meaning = found->second;
  }
  in.predicate = predicate;
  in.predicate_negated = predicate_negated;
  in.target = target;
  in.negated = negated;
  in.unit = unit;
  in.operands = operands;
  in.destinations = destinations;
  in.pc = machine->code.size();
  std::copy(immediate, immediate + 8, in.immediate);
  machine->operands.emplace_back(operand, operand + operands);
  machine->code.push_back(in);
  return 1;
}

// Buffers: four numbers each, see machine.h. False: something failed.
int ptx_launch(Machine* machine, const u32* grid, const u32* block, u32 register_limit, u32 shared_bytes,
               const u8* parameters, u32 parameter_bytes, const u64* buffers, int buffer_count, int order,
               int check_global, u64 instruction_limit, const u32* ctas, int cta_count) {
  for (std::size_t k = 0; k < machine->code.size(); ++k) machine->code[k].operand = machine->operands[k].data();
  find_wgmma_registers(*machine);
  std::copy(grid, grid + 3, machine->grid);
  std::copy(block, block + 3, machine->block);
  machine->shared_bytes = shared_bytes;
  machine->shared.assign(shared_bytes + 16, 0xFF);
  machine->shared_shadow.assign(shared_bytes / 2 + 16, Shadow());
  machine->parameters.assign(parameters, parameters + parameter_bytes);
  machine->buffers.clear();
  for (int k = 0; k < buffer_count; ++k, buffers += 4) {
    machine->buffers.push_back({buffers[0], buffers[1], buffers[2], buffers[3]});
  }
  machine->last_buffer = 0;
  machine->order = order;
  machine->check_global = check_global;
  machine->instruction_limit = instruction_limit;
  machine->instructions_done = 0;
  machine->failure.clear();
  machine->findings.clear();
  std::fill(std::begin(machine->counts), std::end(machine->counts), 0);
  for (auto* by_instruction : {&machine->executed, &machine->wavefronts, &machine->least_wavefronts}) {
    by_instruction->assign(machine->code.size(), 0);
  }
  return !launch(*machine, register_limit, ctas, cta_count);
}

const u64* ptx_counts(const Machine* machine) { return machine->counts; }

// By instruction: 0 executions, 1 wavefronts, 2 the least.
const u64* ptx_instruction_counts(const Machine* machine, int which) {
  return (which == 0 ? machine->executed : which == 1 ? machine->wavefronts : machine->least_wavefronts).data();
}

const char* ptx_failure(const Machine* machine) { return machine->failure.c_str(); }

int ptx_finding_count(const Machine* machine) { return machine->findings.size(); }

void ptx_finding(const Machine* machine, int which, const char** kind, const char** first, s32* pc, u64* count,
                 s32* serious) {
  const Finding& finding = machine->findings[which];
  *kind = finding.kind.c_str();
  *first = finding.first.c_str();
  *pc = finding.pc;
  *count = finding.count;
  *serious = finding.serious;
}

}  // extern "C"
#pragma GCC visibility pop
