// The selective scan on the CPU in plain loops, one channel at a time: float64, and complex A. Right rather
// than fast. See selective_scan_cpu.cpp and selective_scan_backward_cpu.cpp for the formulas; with complex A
//
//   y = 2 Re(sum_n C h) + D u          l[t] = 2 g conj(C) + conj(a[t+1]) l[t+1]
//   dC = 2 g conj(h)   dB = l dt u   du = D g + dt Re(sum_n l conj(B))   dA = sum_t l dt conj(a h[t-1])
//   ddt = u Re(sum_n l conj(B)) + Re(sum_n l conj(A a h[t-1]))
//
// where the gradient of a complex number is that of its real part plus i times that of its imaginary part.
#include "scan/selective_scan_simd.h"

namespace tilewright::TW_ISA::selective {
namespace {

constexpr int64_t kParts =
    8;  // a group's channels are taken in so many parts, each with sums dB, dC of its own

template <class R>
struct Complex {
  R re, im;

  friend Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
  friend Complex operator*(Complex a, Complex b) {
    return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
  }
  friend Complex operator*(R a, Complex b) { return {a * b.re, a * b.im}; }
};

// What differs between real and complex states.
template <class R>
struct RealState {
  using Real = R;
  using Value = R;
  static constexpr int kReals = 1;  // reals a value of B or C takes
  static constexpr R kWeight = 1;   // y = kWeight Re(sum_n C h)
  static R exp(R x) { return std::exp(x); }
  static R conj(R x) { return x; }
  static R real(R x) { return x; }
};

template <class R>
struct ComplexState {
  using Real = R;
  using Value = Complex<R>;
  static constexpr int kReals = 2;
  static constexpr R kWeight = 2;
  static Value exp(Value x) {
    const R scale = std::exp(x.re);
    return {scale * std::cos(x.im), scale * std::sin(x.im)};
  }
  static Value conj(Value x) { return {x.re, -x.im}; }
  static R real(Value x) { return x.re; }
};

void write(double* p, double x) { *p = x; }
void write(float* p, float x) { *p = x; }
void write(bf16* p, float x) { *p = narrow_bf16(x); }
void write(fp16* p, float x) { *p = narrow_fp16(x); }

template <class T, class R>
void read_value(const T* p, int64_t, R& x) {
  x = widen(*p);
}
template <class T, class R>
void read_value(const T* p, int64_t next, Complex<R>& x) {
  x = {R(widen(p[0])), R(widen(p[next]))};
}
template <class T, class R>
void write_value(T* p, int64_t, R x) {
  write(p, x);
}
template <class T, class R>
void write_value(T* p, int64_t next, Complex<R> x) {
  write(p, x.re);
  write(p + next, x.im);
}

template <class R>
R softplus_of(R x) {
  return x > R(20) ? x : std::log1p(std::exp(x));
}
template <class R>
R sigmoid_of(R x) {
  return R(1) / (R(1) + std::exp(-x));
}

template <class T, class S>
struct Scan {
  using Real = typename S::Real;
  using Value = typename S::Value;

  const SelectiveScanParams& p;

  // ---- where things lie ----

  static T* at(const Strided& x, const Sequence& sequence, int64_t channel, int64_t token) {
    return static_cast<T*>(x.data) + sequence.batch * x.batch + channel * x.channel + token * x.step;
  }
  static Real value_at(const Strided& x, const Sequence& sequence, int64_t channel, int64_t token) {
    return widen(*at(x, sequence, channel, token));
  }
  static Value& weight_at(const Strided& x, int64_t channel, int64_t n) {
    return static_cast<Value*>(x.data)[channel * x.channel + n * x.state];
  }
  Value& state_at(const void* states, int64_t sequence, int64_t channel, int64_t n) const {
    return static_cast<Value*>(const_cast<void*>(states))[(sequence * p.dim + channel) * p.states + n];
  }
  Value& kept_at(int64_t slot, int64_t channel, int64_t n) const {
    return static_cast<Value*>(p.chunk_states)[(slot * p.states + n) * p.dim + channel];
  }
  static Real real_weight(const void* x, int64_t channel) {
    return x == nullptr ? Real(0) : static_cast<const Real*>(x)[channel];
  }
  int64_t group_of(int64_t channel) const { return channel / (p.dim / p.groups); }

  // B or C of a step.
  Value operand(const Strided& x, bool variable, const Sequence& sequence, int64_t channel, int64_t n,
                int64_t token) const {
    if (!variable) return weight_at(x, channel, n);
    Value value;
    read_value(at(x, sequence, group_of(channel), S::kReals * token) + n * x.state, x.step, value);
    return value;
  }

  // ---- forward ----

  struct Steps {
    Real u[kScanChunk], x[kScanChunk], dt[kScanChunk], y[kScanChunk];  // x: delta + bias
  };

  [[gnu::noinline]] void read_steps(const Sequence& sequence, int64_t channel, const Chunk& chunk,
                                    Steps& s) const {
    const Real D = real_weight(p.D, channel), bias = real_weight(p.delta_bias, channel);
    for (int64_t t = 0; t < chunk.count; ++t) {
      s.u[t] = value_at(p.u, sequence, channel, chunk.token[t]);
      s.x[t] = value_at(p.delta, sequence, channel, chunk.token[t]) + bias;
      s.dt[t] = p.softplus ? softplus_of(s.x[t]) : s.x[t];
      s.y[t] = p.D == nullptr ? Real(0) : D * s.u[t];
    }
  }

  [[gnu::noinline]] void forward_channel(const Sequence& sequence, int64_t channel) const {
    Value h[kMaxStates] = {};
    for (int64_t n = 0; n < p.states && p.initial_state != nullptr; ++n) {
      h[n] = state_at(p.initial_state, sequence.index, channel, n);
    }
    Steps s;
    for (int64_t index = 0; index < sequence.chunks(); ++index) {
      const Chunk chunk = chunk_of(p, sequence, index);
      read_steps(sequence, channel, chunk, s);
      for (int64_t n = 0; n < p.states; ++n) {
        if (p.chunk_states != nullptr) kept_at(sequence.slot + index, channel, n) = h[n];
        const Value A = weight_at(p.A, channel, n);
        for (int64_t t = 0; t < chunk.count; ++t) {
          const Value B = operand(p.B, p.variable_B, sequence, channel, n, chunk.token[t]);
          const Value C = operand(p.C, p.variable_C, sequence, channel, n, chunk.token[t]);
          h[n] = S::exp(s.dt[t] * A) * h[n] + (s.dt[t] * s.u[t]) * B;
          s.y[t] += S::kWeight * S::real(C * h[n]);
        }
      }
      for (int64_t t = 0; t < chunk.count; ++t) {
        Real gate = 1;
        if (p.z.data != nullptr) {
          const Real z = value_at(p.z, sequence, channel, chunk.token[t]);
          gate = z * sigmoid_of(z);
        }
        write(at(p.out, sequence, channel, chunk.token[t]), s.y[t] * gate);
      }
    }
    for (int64_t n = 0; n < p.states && p.last_state != nullptr; ++n) {
      state_at(p.last_state, sequence.index, channel, n) = h[n];
    }
  }

  // ---- backward ----

  // Parts of sums: dA (and dB, dC of constant B, C) per (sequence, channel, state), dD and ddelta_bias per
  // (sequence, channel), dB and dC per (group, part, row, state).
  struct Sums {
    Value *dA, *dB, *dC;
    Real *dD, *dbias;
    int64_t bytes;
  };

  int64_t rows() const { return p.cu_seqlens != nullptr ? p.length : p.batch * p.length; }
  int64_t parts() const { return smaller(kParts, larger(1, p.dim / p.groups)); }
  int64_t sum_at(bool variable, const Sequence& sequence, int64_t channel, int64_t part, int64_t t,
                 int64_t n) const {
    if (!variable) return (sequence.index * p.dim + channel) * p.states + n;
    return ((group_of(channel) * parts() + part) * rows() + sequence.row + t) * p.states + n;
  }
  int64_t sum_count(bool variable) const {
    return (variable ? p.groups * parts() * rows() : p.sequences * p.dim) * p.states;
  }

  Sums sums() const {
    char* next = static_cast<char*>(p.workspace);
    int64_t bytes = 0;
    const auto take = [&](int64_t size) {
      char* const taken = next == nullptr ? nullptr : next + bytes;
      bytes += size;
      return static_cast<void*>(taken);
    };
    Sums s;
    s.dA = static_cast<Value*>(take(sum_count(false) * int64_t(sizeof(Value))));
    s.dB = static_cast<Value*>(take(sum_count(p.variable_B) * int64_t(sizeof(Value))));
    s.dC = static_cast<Value*>(take(sum_count(p.variable_C) * int64_t(sizeof(Value))));
    s.dD = static_cast<Real*>(take(p.sequences * p.dim * int64_t(sizeof(Real))));
    s.dbias = static_cast<Real*>(take(p.sequences * p.dim * int64_t(sizeof(Real))));
    s.bytes = bytes;
    return s;
  }

  struct BackwardSteps : Steps {
    Real g[kScanChunk], gate[kScanChunk];         // gate: dout silu'(z)
    Real from_B[kScanChunk], from_A[kScanChunk];  // Re(sum_n l conj(B)), Re(sum_n l conj(A a h[t-1]))
  };

  [[gnu::noinline]] void read_gradients(const Sequence& sequence, int64_t channel, const Chunk& chunk,
                                        BackwardSteps& s) const {
    for (int64_t t = 0; t < chunk.count; ++t) {
      const Real dout = value_at(p.dout, sequence, channel, chunk.token[t]);
      s.g[t] = dout;
      s.from_B[t] = s.from_A[t] = 0;
      if (p.z.data == nullptr) continue;
      const Real z = value_at(p.z, sequence, channel, chunk.token[t]), sigma = sigmoid_of(z);
      s.g[t] = dout * z * sigma;
      s.gate[t] = dout * sigma * (1 + z * (1 - sigma));
    }
  }

  // One state over one chunk; carry is conj(a) l of the step that follows.
  [[gnu::noinline]] void backward_state(const Sequence& sequence, int64_t channel, int64_t part,
                                        const Chunk& chunk, int64_t index, int64_t n, Value& carry,
                                        BackwardSteps& s, const Sums& sums) const {
    Value h[kScanChunk + 1], a[kScanChunk];
    const Value A = weight_at(p.A, channel, n);
    h[0] = kept_at(sequence.slot + index, channel, n);
    for (int64_t t = 0; t < chunk.count; ++t) {
      const Value B = operand(p.B, p.variable_B, sequence, channel, n, chunk.token[t]);
      const Value C = operand(p.C, p.variable_C, sequence, channel, n, chunk.token[t]);
      a[t] = S::exp(s.dt[t] * A);
      h[t + 1] = a[t] * h[t] + (s.dt[t] * s.u[t]) * B;
      s.y[t] += S::kWeight * S::real(C * h[t + 1]);
    }
    for (int64_t t = chunk.count - 1; t >= 0; --t) {
      const Value B = operand(p.B, p.variable_B, sequence, channel, n, chunk.token[t]);
      const Value C = operand(p.C, p.variable_C, sequence, channel, n, chunk.token[t]);
      const Value l = (S::kWeight * s.g[t]) * S::conj(C) + carry;
      const int64_t step = index * kScanChunk + t;
      Value& dB = sums.dB[sum_at(p.variable_B, sequence, channel, part, step, n)];
      Value& dC = sums.dC[sum_at(p.variable_C, sequence, channel, part, step, n)];
      dB = dB + (s.dt[t] * s.u[t]) * l;
      dC = dC + (S::kWeight * s.g[t]) * S::conj(h[t + 1]);
      carry = S::conj(a[t]) * l;
      const Value into_rate = carry * S::conj(h[t]);
      s.from_B[t] += S::real(l * S::conj(B));
      s.from_A[t] += S::real(into_rate * S::conj(A));
      Value& dA = sums.dA[sum_at(false, sequence, channel, 0, 0, n)];
      dA = dA + s.dt[t] * into_rate;
    }
  }

  [[gnu::noinline]] void write_gradients(const Sequence& sequence, int64_t channel, const Chunk& chunk,
                                         const BackwardSteps& s, const Sums& sums) const {
    const Real D = real_weight(p.D, channel);
    const auto write_to = [&](const Strided& x, int64_t t, Real value) {
      if (x.data != nullptr) write(at(x, sequence, channel, chunk.token[t]), value);
    };
    for (int64_t t = 0; t < chunk.count; ++t) {
      const Real ddt = s.u[t] * s.from_B[t] + s.from_A[t];
      const Real ddelta = !p.softplus || s.x[t] > Real(20) ? ddt : ddt * sigmoid_of(s.x[t]);
      const Real through_dt = s.dt[t] * s.from_B[t];
      write_to(p.du, t, p.D == nullptr ? through_dt : D * s.g[t] + through_dt);
      write_to(p.ddelta, t, ddelta);
      if (p.z.data != nullptr) write_to(p.dz, t, s.gate[t] * s.y[t]);
      sums.dD[sequence.index * p.dim + channel] += s.g[t] * s.u[t];
      sums.dbias[sequence.index * p.dim + channel] += ddelta;
    }
  }

  [[gnu::noinline]] void backward_channel(const Sequence& sequence, int64_t channel, int64_t part,
                                          const Sums& sums) const {
    Value carry[kMaxStates] = {};
    for (int64_t n = 0; n < p.states && p.dlast_state != nullptr; ++n) {
      carry[n] = state_at(p.dlast_state, sequence.index, channel, n);
    }
    BackwardSteps s;
    for (int64_t index = sequence.chunks() - 1; index >= 0; --index) {
      const Chunk chunk = chunk_of(p, sequence, index);
      read_steps(sequence, channel, chunk, s);
      read_gradients(sequence, channel, chunk, s);
      for (int64_t n = 0; n < p.states; ++n) {
        backward_state(sequence, channel, part, chunk, index, n, carry[n], s, sums);
      }
      write_gradients(sequence, channel, chunk, s, sums);
    }
    for (int64_t n = 0; n < p.states && p.dinitial_state != nullptr; ++n) {
      state_at(p.dinitial_state, sequence.index, channel, n) = carry[n];
    }
  }

  // Adds the sequences' parts of what is summed over them.
  [[gnu::noinline]] void write_weights(int64_t channel, const Sums& sums) const {
    const auto total = [&](const auto* parts, int64_t count, int64_t n) {
      std::remove_cvref_t<decltype(*parts)> sum = {};
      for (int64_t s = 0; s < p.sequences; ++s) sum = sum + parts[(s * p.dim + channel) * count + n];
      return sum;
    };
    for (int64_t n = 0; n < p.states; ++n) {
      if (p.dA != nullptr) state_at(p.dA, 0, channel, n) = total(sums.dA, p.states, n);
      if (!p.variable_B && p.dB.data != nullptr) weight_at(p.dB, channel, n) = total(sums.dB, p.states, n);
      if (!p.variable_C && p.dC.data != nullptr) weight_at(p.dC, channel, n) = total(sums.dC, p.states, n);
    }
    if (p.dD != nullptr) static_cast<Real*>(p.dD)[channel] = total(sums.dD, 1, 0);
    if (p.ddelta_bias != nullptr) static_cast<Real*>(p.ddelta_bias)[channel] = total(sums.dbias, 1, 0);
  }

  [[gnu::noinline]] void write_variable(const Strided& x, const Value* sums, const Sequence& sequence,
                                        int64_t index, int64_t group) const {
    if (x.data == nullptr) return;
    const Chunk chunk = chunk_of(p, sequence, index);
    for (int64_t t = 0; t < chunk.count; ++t) {
      const int64_t row = sequence.row + index * kScanChunk + t;
      for (int64_t n = 0; n < p.states; ++n) {
        Value sum = {};
        for (int64_t part = 0; part < parts(); ++part) {
          sum = sum + sums[((group * parts() + part) * rows() + row) * p.states + n];
        }
        write_value(at(x, sequence, group, S::kReals * chunk.token[t]) + n * x.state, x.step, sum);
      }
    }
  }

  void forward(int threads) const {
    parallel_chunks(p.sequences * p.dim, threads,
                    [&](int64_t task) { forward_channel(sequence_at(p, task / p.dim), task % p.dim); });
  }

  void backward(int threads) const {
    const Sums all = sums();
    if (all.bytes > 0) std::memset(p.workspace, 0, size_t(all.bytes));
    const int64_t channels = p.dim / p.groups, per_sequence = p.groups * parts();
    parallel_chunks(p.sequences * per_sequence, threads, [&](int64_t task) {
      const Sequence sequence = sequence_at(p, task / per_sequence);
      const int64_t group = task % per_sequence / parts(), part = task % parts();
      for (int64_t i = part * channels / parts(); i < (part + 1) * channels / parts(); ++i) {
        backward_channel(sequence, group * channels + i, part, all);
      }
    });
    parallel_chunks(p.dim, threads, [&](int64_t channel) { write_weights(channel, all); });
    for_each_chunk(p, p.groups, threads, [&](const Sequence& sequence, int64_t index, int64_t group) {
      if (p.variable_B) write_variable(p.dB, all.dB, sequence, index, group);
      if (p.variable_C) write_variable(p.dC, all.dC, sequence, index, group);
    });
  }
};

// Calls body(Scan) of the storage and the states.
template <class Body>
void with_scan(const SelectiveScanParams& p, const Body& body) {
  if (p.dtype == DType::kFloat64) {
    if (p.weight_dtype == DType::kFloat64) {
      body(Scan<double, RealState<double>>{p});
    } else {
      body(Scan<double, ComplexState<double>>{p});
    }
    return;
  }
  with_storage(p.dtype, [&](auto type) { body(Scan<decltype(type), ComplexState<float>>{p}); });
}

}  // namespace

int64_t general_workspace(const SelectiveScanParams& p, bool backward) {
  int64_t bytes = 0;
  if (backward) with_scan(p, [&](const auto& scan) { bytes = scan.sums().bytes; });
  return bytes;
}

void general_forward(const SelectiveScanParams& p, int threads) {
  with_scan(p, [&](const auto& scan) { scan.forward(threads); });
}

void general_backward(const SelectiveScanParams& p, int threads) {
  with_scan(p, [&](const auto& scan) { scan.backward(threads); });
}

}  // namespace tilewright::TW_ISA::selective
