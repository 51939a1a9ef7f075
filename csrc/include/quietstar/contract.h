// Checks of the raw numbers that native functions are called with. A violation is a ValueError in Python, not a crash.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace quietstar {

// Codes of the dtypes; must match quietstar/ops/_native.py.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

[[noreturn]] inline void refuse(const char* name, const std::string& wanted, std::int64_t got) {
  throw std::invalid_argument(std::string(name) + " must " + wanted + ", got " + std::to_string(got));
}

inline std::int64_t at_least(const char* name, std::int64_t smallest, std::int64_t value) {
  if (value < smallest) refuse(name, "be at least " + std::to_string(smallest), value);
  return value;
}

// A pointer to elements of T that may be absent: null, or aligned for T.
template <class T>
T* optional_pointer(const char* name, std::uintptr_t address, std::size_t alignment = alignof(T)) {
  if (address % alignment) {
    refuse(name, "be aligned to " + std::to_string(alignment) + " bytes", static_cast<std::int64_t>(address));
  }
  return reinterpret_cast<T*>(address);
}

// A pointer to `count` elements of T: aligned, and null only if there are none.
template <class T>
T* pointer(const char* name, std::uintptr_t address, std::int64_t count, std::size_t alignment = alignof(T)) {
  if (address == 0 && count > 0) throw std::invalid_argument(std::string(name) + " must not be null");
  return optional_pointer<T>(name, address, alignment);
}

}  // namespace quietstar
