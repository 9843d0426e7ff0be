// What AddressSanitizer has to be told: which bytes nobody may touch, and that the stack changes.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define TILEWRIGHT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TILEWRIGHT_ASAN 1
#endif
#endif

#if TILEWRIGHT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace tilewright::emulator {

#if TILEWRIGHT_ASAN

inline constexpr bool kAddressSanitizer = true;
inline void forbid_access(void* start, size_t bytes) { __asan_poison_memory_region(start, bytes); }
inline void allow_access(void* start, size_t bytes) { __asan_unpoison_memory_region(start, bytes); }

#else

inline constexpr bool kAddressSanitizer = false;
inline void forbid_access(void*, size_t) {}
inline void allow_access(void*, size_t) {}

#endif

}  // namespace tilewright::emulator
