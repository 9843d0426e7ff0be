// Block-sparse attention in float64, for gradcheck and references: the formula, one query at a time.
#include <cmath>

#include "attention/block_sparse.h"
#include "core/threads.h"

namespace tilewright::TW_ISA {
namespace {

using attention::BlockLists;
using attention::BlockSparseParams;
using attention::HeadsTensor;
using attention::KeyRange;

double* at(const HeadsTensor& t, int64_t batch, int64_t head, int64_t row) {
  return static_cast<double*>(t.data) + batch * t.batch + head * t.head + row * t.row;
}

double dot(const double* a, int64_t a_step, const double* b, int64_t b_step, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += a[i * a_step] * b[i * b_step];
  return sum;
}

void add(double* to, int64_t to_step, double factor, const double* from, int64_t from_step, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i * to_step] += factor * from[i * from_step];
}

void clear(double* row, int64_t step, int64_t count) {
  for (int64_t i = 0; i < count; ++i) row[i * step] = 0;
}

// body(other) for every row of the other side that lists and tables show; the caller looks at the range.
template <class Body>
void each_listed(const BlockSparseParams& p, const BlockLists& lists, int64_t batch, int64_t head,
                 int64_t row, bool row_is_query, const Body& body) {
  const int32_t mine = row_is_query ? p.mask.block_q : p.mask.block_kv;
  const int32_t others = row_is_query ? p.mask.block_kv : p.mask.block_q;
  const int64_t length = row_is_query ? p.kv_len : p.q_len;
  const int64_t list = row_of(lists, batch, head, row / mine);
  for (int64_t i = 0; i < lists.counts[list]; ++i) {
    const int64_t start = int64_t{lists.indices[list * lists.capacity + i]} * others;
    const int64_t table = lists.bits == nullptr ? -1 : lists.bits[list * lists.capacity + i];
    for (int32_t j = 0; j < others && start + j < length; ++j) {
      const int64_t query = row_is_query ? row % mine : j;
      const int32_t key = int32_t(row_is_query ? j : row % mine);
      if (table < 0 || table_bits(p.mask, table, query, key, 1) != 0) body(start + j);
    }
  }
}

bool in_range(const BlockSparseParams& p, int64_t query, int64_t key) {
  const KeyRange range = key_range(p, query);
  return range.from <= key && key < range.to;
}

struct Score {
  double value, slope;  // slope: by the product of q and k
};

Score score(const BlockSparseParams& p, int64_t batch, int64_t head, int64_t query, int64_t key) {
  const double* q = at(p.q, batch, head, query);
  const double* k = at(p.k, batch, head / (p.heads / p.kv_heads), key);
  const double s = dot(q, p.q.inner, k, p.k.inner, p.head_dim) * p.scale;
  if (p.softcap == 0) return {s, p.scale};
  const double t = std::tanh(s / p.softcap);
  return {t * p.softcap, p.scale * (1 - t * t)};
}

void forward_row(const BlockSparseParams& p, int64_t batch, int64_t head, int64_t query) {
  const int64_t kv_head = head / (p.heads / p.kv_heads);
  double* out = at(p.out, batch, head, query);
  double highest = -__builtin_inf(), sum = 0;
  const auto each = [&](const auto& body) {
    each_listed(p, p.mask.q2k, batch, head, query, true, [&](int64_t key) {
      if (in_range(p, query, key)) body(key, score(p, batch, head, query, key).value);
    });
  };
  each([&](int64_t, double s) { highest = s > highest ? s : highest; });
  if (highest == -__builtin_inf()) highest = 0;
  clear(out, p.out.inner, p.value_dim);
  each([&](int64_t key, double s) {
    const double power = std::exp(s - highest);
    sum += power;
    add(out, p.out.inner, power, at(p.v, batch, kv_head, key), p.v.inner, p.value_dim);
  });
  for (int64_t d = 0; d < p.value_dim; ++d) {
    double& x = out[d * p.out.inner];
    x = sum == 0 ? 0 : x / sum;
  }
  const double lse = sum == 0 ? -__builtin_inf() : highest + std::log(sum);
  static_cast<double*>(p.lse)[(batch * p.heads + head) * p.q_len + query] = lse;
}

struct PairGradient {
  double power, by_product;  // softmax's weight, and the gradient of q . k
};

PairGradient pair_gradient(const BlockSparseParams& p, int64_t batch, int64_t head, int64_t query,
                           int64_t key) {
  const int64_t row = (batch * p.heads + head) * p.q_len + query;
  const double* dout = at(p.dout, batch, head, query);
  const double* v = at(p.v, batch, head / (p.heads / p.kv_heads), key);
  const Score s = score(p, batch, head, query, key);
  const double power = std::exp(s.value - static_cast<const double*>(p.lse)[row]);
  const double dpower = dot(dout, p.dout.inner, v, p.v.inner, p.value_dim);
  double delta = dot(dout, p.dout.inner, at(p.out, batch, head, query), p.out.inner, p.value_dim);
  if (p.dlse != nullptr) delta -= static_cast<const double*>(p.dlse)[row];
  return {power, power * (dpower - delta) * s.slope};
}

void query_gradient(const BlockSparseParams& p, int64_t batch, int64_t head, int64_t query) {
  double* dq = at(p.dq, batch, head, query);
  clear(dq, p.dq.inner, p.head_dim);
  each_listed(p, p.mask.q2k, batch, head, query, true, [&](int64_t key) {
    if (!in_range(p, query, key)) return;
    const double* k = at(p.k, batch, head / (p.heads / p.kv_heads), key);
    add(dq, p.dq.inner, pair_gradient(p, batch, head, query, key).by_product, k, p.k.inner, p.head_dim);
  });
}

void key_gradient(const BlockSparseParams& p, int64_t batch, int64_t kv_head, int64_t key) {
  double* dk = at(p.dk, batch, kv_head, key);
  double* dv = at(p.dv, batch, kv_head, key);
  clear(dk, p.dk.inner, p.head_dim);
  clear(dv, p.dv.inner, p.value_dim);
  const int64_t group = p.heads / p.kv_heads;
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    each_listed(p, p.mask.k2q, batch, head, key, false, [&](int64_t query) {
      if (!in_range(p, query, key)) return;
      const PairGradient gradient = pair_gradient(p, batch, head, query, key);
      add(dk, p.dk.inner, gradient.by_product, at(p.q, batch, head, query), p.q.inner, p.head_dim);
      add(dv, p.dv.inner, gradient.power, at(p.dout, batch, head, query), p.dout.inner, p.value_dim);
    });
  }
}

}  // namespace

void block_sparse_fwd_float64_cpu(const BlockSparseParams& p, int threads) {
  parallel_chunks(p.batch * p.heads * p.q_len, threads, [&](int64_t i) {
    forward_row(p, i / p.q_len / p.heads, i / p.q_len % p.heads, i % p.q_len);
  });
}

void block_sparse_bwd_float64_cpu(const BlockSparseParams& p, int threads) {
  parallel_chunks(p.batch * p.heads * p.q_len, threads, [&](int64_t i) {
    query_gradient(p, i / p.q_len / p.heads, i / p.q_len % p.heads, i % p.q_len);
  });
  parallel_chunks(p.batch * p.kv_heads * p.kv_len, threads, [&](int64_t i) {
    key_gradient(p, i / p.kv_len / p.kv_heads, i / p.kv_len % p.kv_heads, i % p.kv_len);
  });
}

}  // namespace tilewright::TW_ISA
