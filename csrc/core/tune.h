// Constants of kernels that only measuring can choose: tiles, stages, resident blocks, shares of work. Each
// has its value where it is used, and a build may give it another one, to be timed beside it:
// -DTW_TUNE_NAME=64. scripts/gpu_variants.py lists the ones worth trying.
#pragma once

namespace tilewright {

// The digits of `text`; if it is no number, which is then the name of a macro that nobody defined: `usual`.
consteval int tuned(const char* text, int usual) {
  if (*text < '0' || *text > '9') return usual;
  int value = 0;
  for (; *text != 0; ++text) {
    if (*text < '0' || *text > '9') throw "TW_TUNE_...: give a whole number";
    value = 10 * value + (*text - '0');
  }
  return value;
}

}  // namespace tilewright

#define TW_TEXT_OF(...) #__VA_ARGS__
#define TW_TEXT(macro) TW_TEXT_OF(macro)
#define TW_TUNED(name, usual) ::tilewright::tuned(TW_TEXT(TW_TUNE_##name), usual)
