// Block-sparse attention forward on Hopper: the copy engine fetches tiles, warpgroups multiply them.
//
//   S = Q K^T,  m' = max(m, max_j S[j]),  P = exp2(c S - c m'),  l' = exp2(c m - c m') l + sum_j P[j],
//   O' = exp2(c m - c m') O + P V,  out = O / l,  lse = ln 2 (c m + log2 l),  with c = scale log2 e
//
// A thread block of three warpgroups stays on each multiprocessor. One thread of the first walks the lists
// and has tiles copied into rings in shared memory; the other two take 64 queries each and multiply: while P
// V of a tile runs, so does Q K^T of the next and then its softmax. Blocks of queries are taken up by an
// atomic counter, those with the longest lists first, so the order does not show in the results.
//
// Roofline, for 128 x 128 pairs of query and key at head dim 128: 8.4 MFLOP, 2048 cycles of the tensor cores;
// 64 KB of K and V, so 32 bytes a cycle out of the L2 cache; 16384 powers of two, 1024 cycles of the special
// function units; about 1200 instructions of each scheduler.
#include "attention/block_sparse_sm90.h"

#include <algorithm>

#include "attention/block_sparse_order_sm90.h"
#include "attention/block_sparse_rings_sm90.h"
#include "attention/block_sparse_softmax_sm90.h"
#include "attention/block_sparse_tiles_sm90.h"
#include "core/tune.h"
#include "device/atomics.h"
#include "device/half.h"
#include "device/launch.h"
#include "device/math.h"
#include "device/mbarrier.h"
#include "device/memory.h"
#include "device/smem.h"
#include "device/sync.h"
#include "device/tma.h"
#include "device/warp.h"
#include "device/wgmma.h"

namespace tilewright::attention {
namespace {

using namespace sm90;
using device::Major;
using device::Mbarrier;

constexpr int kThreads = (1 + kGroups) * device::kWarpgroup;
constexpr int kPanel = 64;  // elements of a row of a tile in shared memory
constexpr int kTileSlots = TW_TUNED(BLOCK_SPARSE_SM90_TILE_SLOTS, 2);  // of keys, and of values
constexpr int kItemSlots = TW_TUNED(BLOCK_SPARSE_SM90_ITEM_SLOTS, 2);
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;  // 168 each at first
constexpr bool kInTurns = TW_TUNED(BLOCK_SPARSE_SM90_TURNS, 1) != 0;

struct FwdParams {
  device::TensorMap q, k, v;
  BlockSparseParams attention;
  int32_t q_tiles, items;
  // 0 where a tensor is the same for all heads or batch rows, else 1: no map has a stride of 0.
  int32_t q_batch_step, q_head_step, k_batch_step, k_head_step, v_batch_step, v_head_step;
  ScoreScale scale;
  uint32_t* next_item;   // zero at first
  const int32_t* order;  // [items]; null: as they are
};

template <class T, int kDim>
struct Smem {
  alignas(1024) T q[kItemSlots][kDim / kPanel][kQueries][kPanel];
  alignas(1024) T k[kTileSlots][kDim / kPanel][kKeys][kPanel];
  alignas(1024) T v[kTileSlots][kDim / kPanel][kKeys][kPanel];
  Mbarrier q_full[kItemSlots], q_empty[kItemSlots];
  Mbarrier k_full[kTileSlots], k_empty[kTileSlots];
  Mbarrier v_full[kTileSlots], v_empty[kTileSlots];
  KeyTile tiles[kTileSlots];  // as k
  Item items[kItemSlots];     // as q
  KeyTile open[kAudiences];   // the producer's own
};

using ItemTurn = Turn<kItemSlots>;
using TileTurn = Turn<kTileSlots>;

template <class T, int kDim>
__device__ __forceinline__ void make_barriers(Smem<T, kDim>& smem) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < kItemSlots; ++i) {
      device::mbarrier_init(smem.q_full[i], 1);
      device::mbarrier_init(smem.q_empty[i], kConsumerWarps);
    }
    for (int i = 0; i < kTileSlots; ++i) {
      device::mbarrier_init(smem.k_full[i], 1);
      device::mbarrier_init(smem.k_empty[i], kConsumerWarps);
      device::mbarrier_init(smem.v_full[i], 1);
      device::mbarrier_init(smem.v_empty[i], kConsumerWarps);
    }
    device::fence_mbarrier_init();
  }
  device::sync_block();
}

// ---- the producer ----

// Fills a slot of keys or values by the pieces of the tile.
template <class T, int kDim>
__device__ __forceinline__ void load_tile(T (&to)[kDim / kPanel][kKeys][kPanel], const device::TensorMap& map,
                                          Mbarrier& barrier, const KeyTile& tile, int rows, int32_t head,
                                          int32_t batch) {
  device::mbarrier_arrive_expect(barrier, int(sizeof to));
#pragma unroll 1
  for (int piece = 0; piece < kKeys / rows; ++piece) {
#pragma unroll
    for (int panel = 0; panel < kDim / kPanel; ++panel) {
      device::tma_load(to[panel][piece * rows], map, barrier, panel * kPanel, tile.key[piece], head, batch);
    }
  }
}

template <class T, int kDim>
__device__ __forceinline__ void load_queries(const FwdParams& p, Smem<T, kDim>& smem, const ItemTurn& turn,
                                             const Item& item) {
  smem.items[turn.slot] = item;
  Mbarrier& full = smem.q_full[turn.slot];
  if (!item.has_keys) return device::mbarrier_arrive(full);
  device::mbarrier_arrive_expect(full, int(sizeof smem.q[0]));
#pragma unroll
  for (int panel = 0; panel < kDim / kPanel; ++panel) {
    device::tma_load(smem.q[turn.slot][panel], p.q, full, panel * kPanel, item.tile * kQueries,
                     item.head * p.q_head_step, item.batch * p.q_batch_step);
  }
}

template <class T, int kDim>
__device__ __forceinline__ void load_values(const FwdParams& p, Smem<T, kDim>& smem, TileTurn& turn,
                                            const Item& item, int32_t kv_head) {
  device::mbarrier_wait(smem.v_empty[turn.slot], turn.parity ^ 1);
  load_tile<T, kDim>(smem.v[turn.slot], p.v, smem.v_full[turn.slot], smem.tiles[turn.slot],
                     piece_rows(p.attention.mask.block_kv), kv_head * p.v_head_step,
                     item.batch * p.v_batch_step);
  turn.advance();
}

// The keys of a tile go before the values of the one before: that is how they are used, and a slot of keys is
// free sooner.
template <class T, int kDim>
__device__ __forceinline__ void load_keys_and_values(const FwdParams& p, Smem<T, kDim>& smem, KeyWalk& walk,
                                                     TileTurn& k, TileTurn& v, const Item& item) {
  const int32_t kv_head = item.head / (p.attention.heads / p.attention.kv_heads);
  for (bool first = true; !walk.is_done(); first = false) {
    device::mbarrier_wait(smem.k_empty[k.slot], k.parity ^ 1);
    walk.take(smem.tiles[k.slot]);
    load_tile<T, kDim>(smem.k[k.slot], p.k, smem.k_full[k.slot], smem.tiles[k.slot],
                       piece_rows(p.attention.mask.block_kv), kv_head * p.k_head_step,
                       item.batch * p.k_batch_step);
    k.advance();
    if (!first) load_values(p, smem, v, item, kv_head);
  }
  if (item.has_keys) load_values(p, smem, v, item, kv_head);
}

template <class T, int kDim>
__device__ __forceinline__ void produce(const FwdParams& p, Smem<T, kDim>& smem) {
  device::tma_prefetch_map(p.q);
  device::tma_prefetch_map(p.k);
  device::tma_prefetch_map(p.v);
  ItemTurn items;
  TileTurn k, v;
  for (;; items.advance()) {
    const uint32_t place = device::atomic_add(p.next_item, 1u);
    device::mbarrier_wait(smem.q_empty[items.slot], items.parity ^ 1);
    if (place >= uint32_t(p.items)) {
      smem.items[items.slot].tile = -1;
      return device::mbarrier_arrive(smem.q_full[items.slot]);
    }
    Item item = item_at(p.attention, p.q_tiles, p.order == nullptr ? int32_t(place) : p.order[place]);
    KeyWalk walk(p.attention, item, smem.open);
    item.has_keys = !walk.is_done();
    item.in_turns = kInTurns && walk.is_shared();
    load_queries(p, smem, items, item);
    load_keys_and_values(p, smem, walk, k, v, item);
  }
}

// ---- the consumers ----

template <class T, int kDim>
__device__ __forceinline__ void begin_scores(Scores& s, const Smem<T, kDim>& smem, int q_slot, int k_slot,
                                             int group) {
  const uint64_t q = device::wgmma_descriptor(smem.q[q_slot][0][group * kGroupRows]);
  const uint64_t k = device::wgmma_descriptor(smem.k[k_slot]);
#pragma unroll
  for (int step = 0; step < kDim / device::kWgmmaDepth; ++step) {
    const int panel = step * device::kWgmmaDepth / kPanel;
    const int within = step * device::kWgmmaDepth % kPanel * int(sizeof(T));
    device::wgmma<T, Major::kAlong, kKeys>(
        s, device::wgmma_advance(q, panel * int(sizeof smem.q[0][0]) + within),
        device::wgmma_advance(k, panel * int(sizeof smem.k[0][0]) + within), step != 0);
  }
  device::wgmma_commit();
}

template <class T, int kDim>
__device__ __forceinline__ void begin_values(float (&o)[kDim / 2], const Powers& powers,
                                             const Smem<T, kDim>& smem, int slot) {
  const uint64_t v = device::wgmma_descriptor(smem.v[slot], sizeof smem.v[0][0]);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    device::wgmma<T, Major::kAcross, kDim>(
        o, powers[step], device::wgmma_advance(v, step * device::kWgmmaDepth * device::kSwizzleBytes), true);
  }
  device::wgmma_commit();
}

// What a warpgroup carries from tile to tile: the sums, and the powers of a tile whose values they lack,
// and its turn.
template <class T, int kDim>
struct Sums {
  float o[kDim / 2] = {};
  Rows rows;
  Powers powers;
  TileTurn owed_turn;
  bool owed = false;
};

// Adds the values that are owed.
template <class T, int kDim>
__device__ __forceinline__ void settle(Sums<T, kDim>& sums, Smem<T, kDim>& smem) {
  if (!sums.owed) return;
  const TileTurn v = sums.owed_turn;
  device::mbarrier_wait(smem.v_full[v.slot], v.parity);
  device::wgmma_fence(sums.o, sums.powers);
  begin_values<T, kDim>(sums.o, sums.powers, smem, v.slot);
  device::wgmma_wait<0>(sums.o);
  release(smem.v_empty[v.slot]);
  sums.owed = false;
}

// A tile that this warpgroup does not see, but the other does. What is owed can wait, until its slot is that
// of the values here.
template <class T, int kDim>
__device__ __forceinline__ void pass_over(Sums<T, kDim>& sums, Smem<T, kDim>& smem, const Item& item,
                                          const TileTurn& turn, int group) {
  if (item.in_turns) {
    take_turn(group);
    pass_turn(group);
  }
  release(smem.k_empty[turn.slot]);
  if (sums.owed_turn.slot == turn.slot) settle(sums, smem);
  device::mbarrier_wait(smem.v_full[turn.slot], turn.parity);
  release(smem.v_empty[turn.slot]);
}

template <class T, int kDim>
__device__ __forceinline__ void attend(const FwdParams& p, Sums<T, kDim>& sums, Smem<T, kDim>& smem,
                                       const Item& item, int q_slot, const TileTurn& turn, int group,
                                       int32_t row) {
  const KeyTile& tile = smem.tiles[turn.slot];
  const bool masked = tile.seen[group] == Seen::kMasked;
  uint32_t words[2];
  Scores s;
  if (sums.owed) {
    const TileTurn v = sums.owed_turn;
    device::mbarrier_wait(smem.v_full[v.slot], v.parity);
    if (item.in_turns) take_turn(group);
    device::wgmma_fence(sums.o, sums.powers);
    begin_scores<T, kDim>(s, smem, q_slot, turn.slot, group);
    begin_values<T, kDim>(sums.o, sums.powers, smem, v.slot);
    if (item.in_turns) pass_turn(group);
    if (masked) visible_words(p.attention, tile, group, row, words);
    device::wgmma_wait<1>(s);
    release(smem.k_empty[turn.slot]);
    softmax(p.scale, s, masked, words, sums.rows);
    device::wgmma_wait<0>(sums.o);
    release(smem.v_empty[v.slot]);
  } else {
    if (item.in_turns) take_turn(group);
    device::wgmma_fence();
    begin_scores<T, kDim>(s, smem, q_slot, turn.slot, group);
    if (item.in_turns) pass_turn(group);
    if (masked) visible_words(p.attention, tile, group, row, words);
    device::wgmma_wait<0>(s);
    release(smem.k_empty[turn.slot]);
    softmax(p.scale, s, masked, words, sums.rows);
  }
  scale_rows(sums.o, sums.rows);
  narrow<T>(sums.powers, s);
  sums.owed = true;
  sums.owed_turn = turn;
}

template <class T, int kDim>
__device__ __forceinline__ void write_rows(const FwdParams& p, const Item& item, int32_t row,
                                           const Sums<T, kDim>& sums) {
  const BlockSparseParams& a = p.attention;
  const int lane = device::lane_id();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float sum = sums.rows.sum[i];
    const int64_t at = int64_t{row} + 8 * i;
    if (at >= a.q_len) continue;
    const float scale = sum == 0.0f ? 0.0f : device::div_rn(1.0f, sum);
    T* out = static_cast<T*>(a.out.data) + item.batch * a.out.batch + item.head * a.out.head + at * a.out.row;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      const int column = 8 * j + lane % 4 * 2;
      if (column >= a.value_dim) continue;
      const device::Vector<float, 2> pair{sums.o[4 * j + 2 * i] * scale, sums.o[4 * j + 2 * i + 1] * scale};
      device::store(reinterpret_cast<device::Vector<T, 2>*>(out + column), device::from_float2<T>(pair));
    }
    if (lane % 4 != 0) continue;
    constexpr float kLn2 = 0.693147180559945309f;
    const float lse = sum == 0.0f ? -INFINITY : sums.rows.max[i] * p.scale.unit * kLn2 + device::log(sum);
    static_cast<float*>(a.lse)[(int64_t{item.batch} * a.heads + item.head) * a.q_len + at] = lse;
  }
}

template <class T, int kDim>
__device__ __forceinline__ void consume(const FwdParams& p, Smem<T, kDim>& smem, int group) {
  const int within = group * kGroupRows + device::warp_id() % 4 * 16 + device::lane_id() / 4;
  ItemTurn items;
  TileTurn turn;
  if (group != 0) pass_turn(group);
  for (;; items.advance()) {
    device::mbarrier_wait(smem.q_full[items.slot], items.parity);
    const Item item = smem.items[items.slot];
    if (item.tile < 0) break;
    const int32_t row = item.tile * kQueries + within;
    Sums<T, kDim> sums;
    for (bool more = item.has_keys; more; turn.advance()) {
      device::mbarrier_wait(smem.k_full[turn.slot], turn.parity);
      const KeyTile& tile = smem.tiles[turn.slot];
      more = !tile.is_last;
      if (tile.seen[group] == Seen::kNothing) {
        pass_over(sums, smem, item, turn, group);
      } else {
        attend(p, sums, smem, item, items.slot, turn, group, row);
      }
    }
    release(smem.q_empty[items.slot]);
    settle(sums, smem);
    write_rows(p, item, row, sums);
  }
  if (group == 0) take_turn(group);  // which nobody takes any more
}

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, 1) fwd_kernel(const __grid_constant__ FwdParams p) {
  if constexpr (device::kHasWgmma) {
    Smem<T, kDim>& smem = device::shared_memory<Smem<T, kDim>>();
    make_barriers(smem);
    const int warpgroup = device::warp_id() * device::kWarpSize / device::kWarpgroup;
    if (warpgroup == 0) {
      device::give_registers<kProducerRegisters>();
      if (threadIdx.x == 0) produce(p, smem);
    } else {
      device::take_registers<kConsumerRegisters>();
      consume(p, smem, warpgroup - 1);
    }
  }
}

// ---- the host's side ----

int32_t tiles_of(const BlockSparseParams& p) { return int32_t((p.q_len + kQueries - 1) / kQueries); }
int64_t items_of(const BlockSparseParams& p) { return p.batch * p.heads * tiles_of(p); }

// A stride that the copy engine takes, of rows that do not overlap; that of an axis of one element does not
// matter, and 0 is made up for.
bool stride_fits(int64_t stride, int64_t size, int64_t dim, bool may_be_zero) {
  constexpr int64_t kMaxElements = (int64_t{1} << 40) / 2;
  if (size == 1 || (stride == 0 && may_be_zero)) return true;
  return stride >= dim && stride % 8 == 0 && stride < kMaxElements;
}

bool tensor_fits(const HeadsTensor& t, int64_t batch, int64_t heads, int64_t rows, int64_t dim) {
  return device::is_aligned(t.data, 16) && t.inner == 1 && stride_fits(t.row, rows, dim, false) &&
         stride_fits(t.head, heads, dim, true) && stride_fits(t.batch, batch, dim, true);
}

template <class T>
device::TensorMap heads_map(const HeadsTensor& t, int64_t batch, int64_t heads, int64_t rows, int64_t dim,
                            int32_t box_rows) {
  const auto axis = [dim](int64_t size, int64_t stride) {
    const bool is_one = size == 1 || stride == 0;
    return device::TensorAxis{is_one ? 1 : size, is_one ? dim : stride, 1};
  };
  device::TensorAxis row = axis(rows, t.row);
  row.box = box_rows;
  return device::tensor_map<T>(t.data, {{dim, 1, kPanel}, row, axis(heads, t.head), axis(batch, t.batch)});
}

template <class T>
FwdParams fwd_params(const BlockSparseParams& p) {
  constexpr double kLog2e = 1.44269504088896340736;
  const int rows = piece_rows(p.mask.block_kv);
  FwdParams f{};
  f.q = heads_map<T>(p.q, p.batch, p.heads, p.q_len, p.head_dim, kQueries);
  f.k = heads_map<T>(p.k, p.batch, p.kv_heads, p.kv_len, p.head_dim, rows);
  f.v = heads_map<T>(p.v, p.batch, p.kv_heads, p.kv_len, p.value_dim, rows);
  f.q_batch_step = p.q.batch != 0;
  f.q_head_step = p.q.head != 0;
  f.k_batch_step = p.k.batch != 0;
  f.k_head_step = p.k.head != 0;
  f.v_batch_step = p.v.batch != 0;
  f.v_head_step = p.v.head != 0;
  f.attention = p;
  f.q_tiles = tiles_of(p);
  f.items = int32_t(items_of(p));
  const bool is_plain = p.softcap == 0 && float(p.scale * kLog2e) > 0;
  f.scale.unit = is_plain ? float(p.scale * kLog2e) : 1.0f;
  f.scale.factor = float(p.scale * kLog2e);
  f.scale.cap = float(p.softcap * kLog2e);
  f.scale.slope = p.softcap == 0 ? 0.0f : float(2 * kLog2e * p.scale / p.softcap);
  return f;
}

template <class T, int kDim>
void run(const BlockSparseParams& p, int device, Stream stream) {
  const auto kernel = fwd_kernel<T, kDim>;
  FwdParams f = fwd_params<T>(p);
  const OrderWorkspace workspace(p.workspace, f.items);
  device::fill_zero(p.workspace, OrderWorkspace::kZeroBytes, stream);
  f.next_item = workspace.next_item;
  const int32_t blocks = std::min(f.items, int32_t(device::multiprocessor_count(device)));
  if (f.items > blocks) {
    order_items(p, workspace, f.q_tiles, f.items, stream);
    f.order = workspace.order;
  }
  device::launch(kernel, unsigned(blocks), kThreads, sizeof(Smem<T, kDim>), stream, f);
}

template <class T>
void run(const BlockSparseParams& p, int device, Stream stream) {
  p.head_dim <= 64 && p.value_dim <= 64 ? run<T, 64>(p, device, stream) : run<T, 128>(p, device, stream);
}

}  // namespace

bool block_sparse_sm90_available(int device) {
  if (device::compute_capability(device) != 90) return false;
  static const bool is_built = [device] {
    const device::DeviceGuard guard(device);
    return device::is_native(fwd_kernel<bf16, 128>, 90);
  }();
  return is_built;
}

bool block_sparse_fwd_sm90_fits(const BlockSparseParams& p) {
  constexpr int64_t kMaxLength = int64_t{1} << 30;
  const bool sizes = p.batch > 0 && p.q_len > 0 && p.kv_len > 0 && p.q_len < kMaxLength &&
                     p.kv_len < kMaxLength && items_of(p) < kMaxLength && p.head_dim % 8 == 0 &&
                     p.value_dim % 8 == 0 && p.head_dim > 0 && p.value_dim > 0 && p.head_dim <= 128 &&
                     p.value_dim <= 128;
  const bool blocks = p.mask.block_q % kGroupRows == 0 && p.mask.block_kv % 16 == 0;
  const bool out =
      p.out.data == nullptr || (p.out.inner == 1 && device::is_aligned(p.out.data, 4) && p.out.row % 2 == 0 &&
                                p.out.head % 2 == 0 && p.out.batch % 2 == 0);
  return (p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16) && sizes && blocks && out &&
         tensor_fits(p.q, p.batch, p.heads, p.q_len, p.head_dim) &&
         tensor_fits(p.k, p.batch, p.kv_heads, p.kv_len, p.head_dim) &&
         tensor_fits(p.v, p.batch, p.kv_heads, p.kv_len, p.value_dim);
}

int64_t block_sparse_fwd_workspace_sm90(const BlockSparseParams& p) {
  return OrderWorkspace::bytes(items_of(p));
}

void block_sparse_fwd_sm90(const BlockSparseParams& p, int device, Stream stream) {
  const device::DeviceGuard guard(device);
  p.dtype == DType::kBFloat16 ? run<bf16>(p, device, stream) : run<fp16>(p, device, stream);
}

}  // namespace tilewright::attention
