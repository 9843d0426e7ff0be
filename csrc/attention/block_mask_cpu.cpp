// Block lists on the CPU, compiled once per instruction-set level.
//
// Codes are looked at as words of 64 bits, a bit a block: a list is the numbers of the bits that are set. A
// strip of 64 lists takes its words from tiles of 64 x 64 codes, transposed where the lists run across
// memory.
//
// Roofline: a byte (or four) a code, read once for each direction, and four bytes an entry written; the work
// is about an instruction a code for the words and four an entry.
#include "attention/block_mask.h"
#include "core/integers.h"
#include "core/threads.h"

namespace tilewright::TW_ISA {
namespace {

using namespace ::tilewright::attention;

constexpr int64_t kTile = 64;
constexpr int64_t kSerialCodes = 1 << 15;  // below this, waking a second thread costs more than it saves

// The codes of one head, seen from its lists: entry e of list l.
struct Map {
  const void* codes;
  int64_t list_stride, entry_stride, lists, entries;
  bool wide;

  int32_t at(int64_t list, int64_t entry) const {
    const int64_t offset = list * list_stride + entry * entry_stride;
    return wide ? static_cast<const int32_t*>(codes)[offset] : static_cast<const uint8_t*>(codes)[offset];
  }
};

// Bit i of the result: byte i is not zero.
uint64_t bits_of_bytes(const uint8_t* bytes) {
  uint64_t x;
  __builtin_memcpy(&x, bytes, 8);
  constexpr uint64_t kLow = 0x7f7f7f7f7f7f7f7full;
  x = (((x & kLow) + kLow) | x) & ~kLow;  // the top bit of each byte that is not zero
  return ((x >> 7) * 0x0102040810204080ull) >> 56;
}

// Bit i of the result: code i of a run of up to 64 is not zero.
uint64_t word_of(const Map& map, int64_t offset, int64_t stride, int64_t count) {
  uint64_t word = 0;
  int64_t i = 0;
  if (map.wide) {
    const int32_t* codes = static_cast<const int32_t*>(map.codes) + offset;
    for (; i < count; ++i) word |= uint64_t{codes[i * stride] != 0} << i;
    return word;
  }
  const uint8_t* codes = static_cast<const uint8_t*>(map.codes) + offset;
  if (stride == 1) {
    for (; i + 8 <= count; i += 8) word |= bits_of_bytes(codes + i) << i;
  }
  for (; i < count; ++i) word |= uint64_t{codes[i * stride] != 0} << i;
  return word;
}

// Bit j of word i becomes bit i of word j: halves change places, then quarters of each half, and so on.
void transpose(uint64_t (&words)[kTile]) {
  uint64_t mask = 0x00000000ffffffffull;
  for (int64_t width = 32; width > 0; width /= 2, mask ^= mask << width) {
    for (int64_t i = 0; i < kTile; i = (i + width + 1) & ~width) {
      const uint64_t moved = ((words[i] >> width) ^ words[i + width]) & mask;
      words[i] ^= moved << width;
      words[i + width] ^= moved;
    }
  }
}

// words[l]: which of the 64 entries from `entry` on list `list` + l has.
void read_tile(uint64_t (&words)[kTile], const Map& map, int64_t list, int64_t entry) {
  const int64_t lists = smaller(kTile, map.lists - list), entries = smaller(kTile, map.entries - entry);
  const int64_t offset = list * map.list_stride + entry * map.entry_stride;
  const bool across = map.list_stride == 1 && map.entry_stride != 1;
  const int64_t runs = across ? entries : lists, length = across ? lists : entries;
  const int64_t step = across ? map.entry_stride : map.list_stride;
  for (int64_t i = 0; i < runs; ++i) {
    words[i] = word_of(map, offset + i * step, across ? 1 : map.entry_stride, length);
  }
  for (int64_t i = runs; i < kTile; ++i) words[i] = 0;
  if (across) transpose(words);
}

// Appends the entries of one word to a list that has `count`; returns how many it has then.
int64_t append(const NewLists& to, int64_t number, int64_t count, const Map& map, int64_t list, int64_t entry,
               uint64_t word) {
  int32_t* indices = to.indices + number * to.capacity;
  int32_t* bits = to.bits == nullptr ? nullptr : to.bits + number * to.capacity;
  if (word == ~uint64_t{0} && bits == nullptr && count + kTile <= to.capacity) {
    for (int64_t i = 0; i < kTile; ++i) indices[count + i] = int32_t(entry + i);
    return count + kTile;
  }
  for (; word != 0 && count < to.capacity; word &= word - 1, ++count) {
    const int64_t e = entry + __builtin_ctzll(word);
    indices[count] = int32_t(e);
    if (bits != nullptr) bits[count] = map.at(list, e) - 2;
  }
  return count;
}

// The lists from `list` on, 64 of them; `first` is the number of the head's first list.
void write_strip(const NewLists& to, const Map& map, int64_t first, int64_t list) {
  const int64_t lists = smaller(kTile, map.lists - list);
  int64_t counts[kTile] = {};
  uint64_t words[kTile];
  for (int64_t entry = 0; entry < map.entries; entry += kTile) {
    read_tile(words, map, list, entry);
    for (int64_t i = 0; i < lists; ++i) {
      if (words[i] == 0) continue;
      counts[i] = to.indices == nullptr
                      ? counts[i] + __builtin_popcountll(words[i])
                      : append(to, first + list + i, counts[i], map, list + i, entry, words[i]);
    }
  }
  for (int64_t i = 0; i < lists; ++i) to.counts[first + list + i] = int32_t(counts[i]);
}

const void* head_codes(const BlockListsParams& p, int64_t head) {
  const int64_t offset = head / p.heads * p.batch_stride + head % p.heads * p.head_stride;
  return p.wide ? static_cast<const void*>(static_cast<const int32_t*>(p.codes) + offset)
                : static_cast<const void*>(static_cast<const uint8_t*>(p.codes) + offset);
}

// ---- codes from lists ----

template <class Code>
int32_t scatter_row(const BlockCodesParams& p, int64_t row) {
  Code* codes = static_cast<Code*>(p.codes) + row * p.blocks;
  __builtin_memset(codes, 0, size_t(p.blocks) * sizeof(Code));
  int32_t flags = 0;
  int64_t count = p.counts[row];
  if (count < 0 || count > p.capacity) {
    flags |= kBadCount;
    count = count < 0 ? 0 : p.capacity;
  }
  for (int64_t i = row * p.capacity; i < row * p.capacity + count; ++i) {
    const int32_t block = p.indices[i], table = p.bits == nullptr ? -1 : p.bits[i];
    if (block < 0 || block >= p.blocks) {
      flags |= kBadIndex;
    } else if (table < -1 || table >= p.tables) {
      flags |= kBadTable;
    } else if (codes[block] != 0) {
      flags |= kRepeated;
    } else {
      codes[block] = Code(table + 2);
    }
  }
  return flags;
}

}  // namespace

void block_lists_cpu(const BlockListsParams& p, int threads) {
  const int64_t heads = p.batch * p.heads;
  const int64_t q_strips = (p.q_blocks + kTile - 1) / kTile, kv_strips = (p.kv_blocks + kTile - 1) / kTile;
  const int64_t strips = q_strips + kv_strips;
  const bool serial = heads * p.q_blocks * p.kv_blocks < kSerialCodes;
  parallel_chunks(heads * strips, serial ? 1 : threads, [&](int64_t chunk) {
    const int64_t head = chunk / strips, strip = chunk % strips;
    const void* codes = head_codes(p, head);
    if (strip < q_strips) {
      const Map map{codes, p.q_stride, p.kv_stride, p.q_blocks, p.kv_blocks, p.wide};
      write_strip(p.q2k, map, head * p.q_blocks, strip * kTile);
    } else {
      const Map map{codes, p.kv_stride, p.q_stride, p.kv_blocks, p.q_blocks, p.wide};
      write_strip(p.k2q, map, head * p.kv_blocks, (strip - q_strips) * kTile);
    }
  });
}

void block_codes_cpu(const BlockCodesParams& p, int threads) {
  const int64_t chunks = (p.rows + kTile - 1) / kTile;
  parallel_chunks(chunks, p.rows * p.blocks < kSerialCodes ? 1 : threads, [&](int64_t chunk) {
    for (int64_t row = chunk * kTile; row < smaller((chunk + 1) * kTile, p.rows); ++row) {
      p.flags[row] = p.wide ? scatter_row<int32_t>(p, row) : scatter_row<uint8_t>(p, row);
    }
  });
}

}  // namespace tilewright::TW_ISA
