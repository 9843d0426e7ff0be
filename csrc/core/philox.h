// Random numbers as a function of a counter and a key: no state, the same on every machine. A .cu file
// defines both macros before it includes this.
#pragma once

#include <cstdint>

#ifndef TW_HOST_DEVICE
#define TW_HOST_DEVICE
#define TW_FEW_REGISTERS
#endif

namespace tilewright {

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four random words
// that depend on counter and key alone.
struct PhiloxWords {
  uint32_t word[4];
};

TW_HOST_DEVICE static inline PhiloxWords philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                                uint32_t key0, uint32_t key1) {
  TW_FEW_REGISTERS
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t next0 = uint32_t(product1 >> 32) ^ c1 ^ key0;
    const uint32_t next2 = uint32_t(product0 >> 32) ^ c3 ^ key1;
    c1 = uint32_t(product1);
    c3 = uint32_t(product0);
    c0 = next0;
    c2 = next2;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace tilewright
