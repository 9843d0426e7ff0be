// Which tiles of keys a tile of queries goes through: the walk along the block lists, done by the producer,
// and what it tells the consumers.
//
// A tile of queries is two groups of 64 rows, each within one block row. Where these are two block rows the
// walk goes through the union of their lists. A tile of keys is made of pieces, as many rows as divide the
// block and the tile, so that small blocks fill tiles as well as large ones. Pieces are collected by who sees
// them: both groups, or one of them. So a tile is full for whoever multiplies it, and the other passes over
// it.
#pragma once

#include <cstdint>

#include "attention/block_sparse.h"
#include "device/math.h"
#include "device/qualifiers.h"

namespace tilewright::attention::sm90 {

constexpr int kGroups = 2;      // warpgroups that consume
constexpr int kGroupRows = 64;  // queries of each
constexpr int kQueries = kGroups * kGroupRows;
constexpr int kKeys = 128;
constexpr int kMaxPieces = 8;
constexpr int kFull = -1;    // in place of a table's number
constexpr int kAbsent = -2;  // likewise

// The rows of a piece: what divides block_kv and a tile.
__host__ __device__ __forceinline__ int piece_rows(int32_t block_kv) {
  int rows = kKeys;
  while (block_kv % rows != 0) rows /= 2;
  return rows;
}

enum class Seen : int32_t { kNothing, kMasked, kAll };

// What is in a tile of keys.
struct KeyTile {
  int32_t key[kMaxPieces];             // first key of a piece
  int32_t column[kMaxPieces];          // of the block, which that is
  int32_t table[kGroups][kMaxPieces];  // or kFull, kAbsent
  int32_t pieces;                      // that exist
  Seen seen[kGroups];
  int32_t is_last;
};

// Who sees a piece; tiles are collected for each.
constexpr int kBoth = 0;
constexpr int kAudiences = 1 + kGroups;  // then one group alone

// A unit of work: a tile of queries of a head; tile -1 ends.
struct Item {
  int32_t batch, head, tile;
  bool has_keys, in_turns;
};

__device__ __forceinline__ Item item_at(const BlockSparseParams& p, int32_t tiles, int32_t number) {
  const int32_t head = number / tiles;
  return {head / p.heads, head % p.heads, number % tiles, false, false};
}

// The queries of a group that exist, and what they may see by their position: some of them keys from..to, all
// of them keys all_from..all_to.
struct GroupRange {
  int64_t row;  // of the lists
  int32_t rows, from, to, all_from, all_to;
};

__device__ __forceinline__ GroupRange group_range(const BlockSparseParams& p, const Item& item, int group) {
  const int64_t first = int64_t{item.tile} * kQueries + group * kGroupRows;
  if (first >= p.q_len) return {-1, 0, 0, 0, 0, 0};
  const int64_t left = p.q_len - first, rows = left < kGroupRows ? left : kGroupRows;
  const KeyRange early = key_range(p, first), late = key_range(p, first + rows - 1);
  return {row_of(p.mask.q2k, item.batch, item.head, first / p.mask.block_q),
          int32_t(rows),
          int32_t(early.from),
          int32_t(late.to),
          int32_t(late.from),
          int32_t(early.to)};
}

__device__ __forceinline__ int32_t list_length(const BlockLists& lists, int64_t row) {
  if (row < 0) return 0;
  const int64_t count = lists.counts[row];
  return int32_t(count < lists.capacity ? count : lists.capacity);
}

class KeyWalk {
 public:
  // `open` is scratch: the tiles that are being collected.
  __device__ __forceinline__ KeyWalk(const BlockSparseParams& params, const Item& item,
                                     KeyTile (&open)[kAudiences])
      : p(params), open_(open), rows_(piece_rows(params.mask.block_kv)), column_(params.mask.block_kv) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      range_[g] = group_range(p, item, g);
      left_[g] = list_length(p.mask.q2k, range_[g].row);
      entry_[g] = range_[g].row * p.mask.q2k.capacity;
    }
    shared_ = range_[0].row == range_[1].row;
    if (shared_) left_[1] = 0;
    end_ = device::max(range_[0].to, range_[1].to);
    for (KeyTile& tile : open_) clear(tile);
    pass_unseen();
    advance();
  }

  // Whether both groups go through the same list.
  __device__ __forceinline__ bool is_shared() const { return shared_; }

  // Whether there are no further tiles.
  __device__ __forceinline__ bool is_done() const { return exhausted_ && collected_ == 0; }

  // The next tile: one that is full, or at the end what is left, and keys that do not exist.
  __device__ __forceinline__ void take(KeyTile& tile) {
    KeyTile& from = open_[collect()];
#pragma unroll 1
    for (int i = 0; i < kKeys / rows_; ++i) {
      const bool exists = i < from.pieces;
      tile.key[i] = exists ? from.key[i] : int32_t(p.kv_len);
      tile.column[i] = exists ? from.column[i] : 0;
      for (int g = 0; g < kGroups; ++g) tile.table[g][i] = exists ? from.table[g][i] : kAbsent;
    }
    for (int g = 0; g < kGroups; ++g) {
      const bool is_part = from.pieces * rows_ < kKeys && from.seen[g] == Seen::kAll;
      tile.seen[g] = is_part ? Seen::kMasked : from.seen[g];
    }
    collected_ -= from.pieces;
    clear(from);
    tile.is_last = is_done();
  }

 private:
  static __device__ __forceinline__ void clear(KeyTile& tile) {
    tile.pieces = 0;
    for (Seen& seen : tile.seen) seen = Seen::kNothing;
  }

  __device__ __forceinline__ bool is_full(const KeyTile& tile) const { return tile.pieces * rows_ == kKeys; }

  // The audience whose tile is next.
  __device__ __forceinline__ int collect() {
    while (!exhausted_) {
      const int audience = visible(0) ? (visible(1) ? kBoth : 1) : 2;
      add(open_[audience], key_, column_, visible(0) ? table_[0] : kAbsent, visible(1) ? table_[1] : kAbsent);
      ++collected_;
      advance();
      if (is_full(open_[audience])) return audience;
    }
    for (int audience = kBoth + 1; audience < kAudiences; ++audience) {
      for (KeyTile& from = open_[audience]; from.pieces > 0 && !is_full(open_[kBoth]);) {
        const int i = --from.pieces;
        add(open_[kBoth], from.key[i], from.column[i], from.table[0][i], from.table[1][i]);
      }
    }
    return kBoth;
  }

  __device__ __forceinline__ void add(KeyTile& tile, int32_t key, int32_t column, int32_t table0,
                                      int32_t table1) {
    const int32_t table[kGroups] = {table0, table1};
    const bool is_first = tile.pieces == 0;
    tile.key[tile.pieces] = key;
    tile.column[tile.pieces] = column;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      tile.table[g][tile.pieces] = table[g];
      const bool all = table[g] == kFull && key >= range_[g].all_from && key + rows_ <= range_[g].all_to;
      const Seen seen = all ? Seen::kAll : table[g] == kAbsent ? Seen::kNothing : Seen::kMasked;
      tile.seen[g] = is_first || tile.seen[g] == seen ? seen : Seen::kMasked;
    }
    ++tile.pieces;
  }

  __device__ __forceinline__ bool visible(int g) const {
    return table_[g] != kAbsent && key_ < range_[g].to && key_ + rows_ > range_[g].from;
  }

  // Blocks before those that the queries may see by their position, as in packed sequences.
  __device__ __forceinline__ void pass_unseen() {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int32_t first = range_[g].from / p.mask.block_kv;
      int32_t low = 0, high = first == 0 ? 0 : left_[g];
      while (low < high) {
        const int32_t middle = (low + high) / 2;
        if (p.mask.q2k.indices[entry_[g] + middle] < first) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      entry_[g] += low;
      left_[g] -= low;
    }
  }

  // To the next piece that any group sees.
  __device__ __forceinline__ void advance() {
    do {
      column_ += rows_;
      key_ += rows_;
      if (column_ >= p.mask.block_kv && !next_block()) {
        exhausted_ = true;
        return;
      }
    } while (!visible(0) && !visible(1));
  }

  __device__ __forceinline__ bool next_block() {
    int32_t block[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) block[g] = left_[g] > 0 ? p.mask.q2k.indices[entry_[g]] : 0x7fffffff;
    const int32_t chosen = device::min(block[0], block[1]);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      table_[g] = kAbsent;
      if (left_[g] == 0 || block[g] != chosen) continue;
      table_[g] = p.mask.q2k.bits == nullptr ? kFull : p.mask.q2k.bits[entry_[g]];
      ++entry_[g];
      --left_[g];
    }
    if (shared_) table_[1] = table_[0];
    if (table_[0] == kAbsent && table_[1] == kAbsent) return false;
    key_ = chosen * p.mask.block_kv;
    column_ = 0;
    return key_ < end_;
  }

  const BlockSparseParams& p;
  KeyTile (&open_)[kAudiences];
  GroupRange range_[kGroups];
  int64_t entry_[kGroups];
  int32_t left_[kGroups];
  int32_t table_[kGroups] = {kAbsent, kAbsent};
  int32_t rows_, column_, end_, key_ = 0, collected_ = 0;
  bool shared_, exhausted_ = false;
};

// Which of 32 keys of a tile, from `slot` on, a query sees.
__device__ __forceinline__ uint32_t visible_word(const BlockSparseParams& p, const KeyTile& tile, int group,
                                                 int32_t row, int slot) {
  const int rows = piece_rows(p.mask.block_kv), step = rows < 32 ? rows : 32;
  const KeyRange range = key_range(p, row);
  const int32_t from = int32_t(range.from), to = int32_t(range.to);
  const int32_t line = row % p.mask.block_q, words = (p.mask.block_kv + 31) / 32;
  uint32_t result = 0;
#pragma unroll 1
  for (int at = 0; at < 32; at += step) {
    const int piece = (slot + at) / rows, behind = slot + at - piece * rows;
    const int32_t table = tile.table[group][piece], column = tile.column[piece] + behind;
    if (table == kAbsent) continue;
    uint32_t bits = ~0u;
    if (table >= 0) {
      const int64_t at_line = int64_t{table} * p.mask.block_q + line;
      bits = p.mask.tables[at_line * words + column / 32] >> column % 32;
    }
    const int32_t key = tile.key[piece] + behind, before = from - key, count = device::min(to - key, step);
    if (before > 0) bits = before < 32 ? bits >> before << before : 0;
    if (count < 32) bits = count > 0 ? bits & ((1u << count) - 1u) : 0;
    result |= bits << at;
  }
  return result;
}

}  // namespace tilewright::attention::sm90
