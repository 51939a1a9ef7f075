// cp.async.bulk.tensor and cp.reduce.async.bulk.tensor to global memory [9.7.9, Asynchronous copy: Tensor copy; Bulk
// async-groups].
//
// A store reads and writes at some time of its own, at the latest when the thread that issued it waits for its group:
// by wait_group.read its source is free again, by wait_group it can be seen. Until then nobody else may write the one
// or touch the other; two reductions may meet.

#include "numbers.h"
#include "tma.h"

namespace ptx {

namespace {

enum Reduction : s64 { kNone, kAdd, kMin, kMax };
// CUtensorMapDataType of CUDA's driver interface.
enum DataType : u32 {
  kUnsigned32 = 2,
  kSigned32 = 3,
  kUnsigned64 = 4,
  kSigned64 = 5,
  kFloat16 = 6,
  kFloat32 = 7,
  kBfloat16 = 9
};

// Floats of 32 bits can only be added, and those of 16 bits are as if by .noftz.
bool is_reduction(s64 what, u32 type) {
  switch (type) {
    case kFloat32:
      return what == kAdd;
    case kUnsigned32:
    case kSigned32:
    case kUnsigned64:
    case kSigned64:
    case kFloat16:
    case kBfloat16:
      return true;
    default:
      return false;
  }
}

template <class T>
T reduced(s64 what, T old, T x) {
  return what == kAdd ? T(old + x) : what == kMin ? std::min(old, x) : std::max(old, x);
}
template <>
float reduced(s64 what, float old, float x) {
  return what == kAdd ? old + x : what == kMin ? minimum(old, x) : maximum(old, x);
}

template <class T>
void reduce_as(s64 what, u8* place, const u8* data) {
  T old, x;
  std::memcpy(&old, place, sizeof old);
  std::memcpy(&x, data, sizeof x);
  old = reduced(what, old, x);
  std::memcpy(place, &old, sizeof old);
}

template <float Widen(u16), u16 Narrow(float)>
void reduce_half(s64 what, u8* place, const u8* data) {
  u16 old, x;
  std::memcpy(&old, place, 2);
  std::memcpy(&x, data, 2);
  old = Narrow(reduced(what, Widen(old), Widen(x)));
  std::memcpy(place, &old, 2);
}

void reduce(s64 what, u32 type, u8* place, const u8* data) {
  switch (type) {
    case kUnsigned32:
      return reduce_as<u32>(what, place, data);
    case kSigned32:
      return what == kAdd ? reduce_as<u32>(what, place, data) : reduce_as<s32>(what, place, data);
    case kUnsigned64:
      return reduce_as<u64>(what, place, data);
    case kSigned64:
      return what == kAdd ? reduce_as<u64>(what, place, data) : reduce_as<s64>(what, place, data);
    case kFloat16:
      return reduce_half<from_f16, to_f16>(what, place, data);
    case kBfloat16:
      return reduce_half<from_bf16, to_bf16>(what, place, data);
    default:
      return reduce_as<float>(what, place, data);
  }
}

// Calls each(address, place among the store's bytes) of the elements that are in the tensor.
template <class Each>
bool for_each_target(const PendingTmaStore& store, Each each) {
  return for_each_piece(store, [&](u64 shared, u32 column, u64 row) {
    return for_each_element(store, column, row,
                            [&](u64 address, u32 byte) { return each(address, shared - store.shared + byte); });
  });
}

void mark_source(Machine& machine, const PendingTmaStore& store, int by) {
  for (u32 k = 0; k < store.bytes; k += 2) machine.shadow(store.shared + k).tma_stores += by;
}

// Element by element; the bytes of smaller ones than 2 share a shadow and are not checked.
template <class Each>
void for_each_shadow(Machine& machine, const PendingTmaStore& store, Each each) {
  if (!machine.check_global || store.map.element_bytes < 2) return;
  for_each_target(store, [&](u64 address, u32) {
    for (u32 k = 0; k < store.map.element_bytes; k += 2) each(*machine.global_shadow(address + k));
    return true;
  });
}

void read_source(Machine& machine, PendingTmaStore& store) {
  if (!store.data.empty()) return;
  const u8* source = machine.shared_at(store.shared);
  store.data.assign(source, source + store.bytes);
}

void write_target(Machine& machine, PendingTmaStore& store) {
  read_source(machine, store);
  if (store.written) return;
  store.written = true;
  for_each_target(store, [&](u64 address, u32 byte) {
    u8* place = reinterpret_cast<u8*>(address);
    if (store.reduction) {
      reduce(store.reduction, store.map.type, place, &store.data[byte]);
    } else {
      std::memcpy(place, &store.data[byte], store.map.element_bytes);
    }
    return true;
  });
}

void wait_for_read(Machine& machine, PendingTmaStore& store) {
  read_source(machine, store);
  if (store.read_waited) return;
  store.read_waited = true;
  mark_source(machine, store, -1);
  const Warp& warp = machine.warps[store.warp];
  for (u32 k = 0; k < store.bytes; k += 2) {
    machine.reads_of(store.shared + k)[warp.id] = warp.clock.at[warp.id];
  }
}

// Global memory is as its thread finds it behind wait_group.
void wait_for_write(Machine& machine, PendingTmaStore& store) {
  wait_for_read(machine, store);
  write_target(machine, store);
  for_each_shadow(machine, store, [&](Shadow& shadow) {
    --shadow.tma_stores;
    shadow.write_epoch = machine.epoch;
    shadow.writer = store.warp;
    shadow.write_sync = machine.warps[store.warp].syncs;
  });
}

}  // namespace

MEANING("tma.store") {
  for (int lane : Lanes(active)) {
    PendingTmaStore store{};
    if (!read_tma(machine, warp, in, lane, store)) return;
    store.group = warp.store_group[lane];
    store.reduction = in.immediate[kTmaReduction];
    if (store.reduction && !is_reduction(store.reduction, store.map.type)) {
      return machine.fail("TMA reduction that there is not for elements of this type", warp, in, lane, store.map.type);
    }
    check_shared(machine, warp, in, lane, store.shared, store.bytes, Access::kRead, true);
    const u32 bytes = store.map.element_bytes;
    const Access access = store.reduction ? Access::kAtomic : Access::kWrite;
    const bool in_bounds = for_each_target(store, [&](u64 address, u32) {
      if (!global_place(machine, warp, in, lane, address, bytes, true)) return false;
      if (bytes > 1) check_global(machine, warp, in, lane, address, bytes, access);
      machine.counts[kTMA_STORE_BYTES] += bytes;
      return true;
    });
    if (!in_bounds) return;
    mark_source(machine, store, 1);
    for_each_shadow(machine, store, [](Shadow& shadow) { ++shadow.tma_stores; });
    machine.tma_stores.push_back(std::move(store));
    machine.counts[kTMA_STORES] += 1;
  }
}

MEANING("tma.commit_group") {
  for (int lane : Lanes(active)) ++warp.store_group[lane];
}

// Immediates: groups of the lane that may be pending, whether only their reading is waited for.
MEANING("tma.wait_group") {
  const bool only_read = in.immediate[1];
  std::size_t kept = 0;
  for (PendingTmaStore& store : machine.tma_stores) {
    const bool mine = store.warp == warp.id && active >> store.lane & 1;
    if (mine && s64(store.group) < s64(warp.store_group[store.lane]) - in.immediate[0]) {
      if (!only_read) {
        wait_for_write(machine, store);
        continue;
      }
      wait_for_read(machine, store);
    }
    std::swap(machine.tma_stores[kept++], store);
  }
  machine.tma_stores.resize(kept);
}

void deliver_tma_stores(Machine& machine) {
  for (PendingTmaStore& store : machine.tma_stores) {
    if (store.due <= machine.instructions_done) write_target(machine, store);
  }
}

// At the end of a block, which has waited until its shared memory was read.
void end_tma_stores(Machine& machine) {
  for (PendingTmaStore& store : machine.tma_stores) {
    if (!store.read_waited && !machine.failed()) {
      machine.report("block ends with a TMA store that was not waited for", machine.warps[store.warp],
                     machine.code[store.pc], store.lane, store.shared);
    }
    wait_for_write(machine, store);
  }
  machine.tma_stores.clear();
}

}  // namespace ptx
