// Loads and stores of several elements by one instruction. The address is a multiple of the vector's
// size; the emulator reports one that is not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "device/qualifiers.h"

#if TILEWRIGHT_EMULATED
#include "emulator/runtime.h"
#endif

namespace tilewright::device {

__host__ __device__ __forceinline__ bool is_aligned(const void* address, size_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

template <class T, int N>
struct alignas(N * sizeof(T)) Vector {
  static_assert(std::is_trivially_copyable_v<T>);
  T v[N];
  __host__ __device__ __forceinline__ T& operator[](int i) { return v[i]; }
  __host__ __device__ __forceinline__ const T& operator[](int i) const { return v[i]; }
};

#if TILEWRIGHT_EMULATED

using emulator::Site;

template <class T, int N>
Vector<T, N> load(const Vector<T, N>* address, Site site = Site::current()) {
  emulator::check_aligned(address, alignof(Vector<T, N>), site);
  Vector<T, N> value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

template <class T, int N>
void store(Vector<T, N>* address, const Vector<T, N>& value, Site site = Site::current()) {
  emulator::check_aligned(address, alignof(Vector<T, N>), site);
  std::memcpy(static_cast<void*>(address), &value, sizeof value);
}

template <class T, int N>
Vector<T, N> load_streaming(const Vector<T, N>* address, Site site = Site::current()) {
  return load(address, site);
}

template <class T, int N>
void store_streaming(Vector<T, N>* address, const Vector<T, N>& value, Site site = Site::current()) {
  store(address, value, site);
}

#else

// The register type that one instruction moves; wider vectors take several of 16 bytes.
template <int kBytes>
struct WordOf {
  static_assert(kBytes % 16 == 0);
  using Type = uint4;
};
template <>
struct WordOf<1> {
  using Type = unsigned char;
};
template <>
struct WordOf<2> {
  using Type = unsigned short;
};
template <>
struct WordOf<4> {
  using Type = unsigned int;
};
template <>
struct WordOf<8> {
  using Type = uint2;
};

template <class T, int N>
struct Words {
  using Word = typename WordOf<sizeof(Vector<T, N>)>::Type;
  static constexpr int kCount = sizeof(Vector<T, N>) / sizeof(Word);
  Word word[kCount];
};

template <class T, int N>
__device__ __forceinline__ Vector<T, N> to_vector(const Words<T, N>& words) {
  Vector<T, N> value;
  memcpy(&value, &words, sizeof value);
  return value;
}

template <class T, int N>
__device__ __forceinline__ Words<T, N> to_words(const Vector<T, N>& value) {
  Words<T, N> words;
  memcpy(&words, &value, sizeof value);
  return words;
}

template <class T, int N>
__device__ __forceinline__ Vector<T, N> load(const Vector<T, N>* address) {
  using Word = typename Words<T, N>::Word;
  Words<T, N> words;
#pragma unroll
  for (int i = 0; i < Words<T, N>::kCount; ++i) words.word[i] = reinterpret_cast<const Word*>(address)[i];
  return to_vector(words);
}

template <class T, int N>
__device__ __forceinline__ void store(Vector<T, N>* address, const Vector<T, N>& value) {
  using Word = typename Words<T, N>::Word;
  const Words<T, N> words = to_words(value);
#pragma unroll
  for (int i = 0; i < Words<T, N>::kCount; ++i) reinterpret_cast<Word*>(address)[i] = words.word[i];
}

// Streaming: global memory that is touched once, so the caches give its lines up first (ld.cs, st.cs).
template <class T, int N>
__device__ __forceinline__ Vector<T, N> load_streaming(const Vector<T, N>* address) {
  using Word = typename Words<T, N>::Word;
  Words<T, N> words;
#pragma unroll
  for (int i = 0; i < Words<T, N>::kCount; ++i) {
    words.word[i] = __ldcs(reinterpret_cast<const Word*>(address) + i);
  }
  return to_vector(words);
}

template <class T, int N>
__device__ __forceinline__ void store_streaming(Vector<T, N>* address, const Vector<T, N>& value) {
  using Word = typename Words<T, N>::Word;
  const Words<T, N> words = to_words(value);
#pragma unroll
  for (int i = 0; i < Words<T, N>::kCount; ++i) __stcs(reinterpret_cast<Word*>(address) + i, words.word[i]);
}

#endif

}  // namespace tilewright::device
