// The row passes of `rows.py` on a CPU: row by row, in blocks of columns that stay in the first-level cache.
//
// What makes it fast, and why it is laid out like this:
// - An exponential per logit and no more. STATISTICS keeps exp((logit - m) / T) with the maximum m as it stood at that
//   block, so later passes of the same call get q = kept * factor with one factor per block. Passes that come alone (a
//   tile of the vocabulary) compute the block's exponentials anew; what follows is the same code.
// - The mixtures need no logarithms of their terms: log(p/m) is the logarithm of one quotient. Only codes in whose terms
//   d = log q - log p stands read the logits again.
// - exp and log are inlined polynomials: a call into a library would spill all vector registers.
// - A block that has to change (bf16, bias, scale, cap, an odd end) is written to scratch first and filled up to whole
//   vectors with minus infinity, whose exponential is 0 and which therefore adds nothing to any sum. So no loop has a
//   tail or a branch; they are instantiated per divergence.
// - Sums run in vectors within a block and in double from block to block: the error does not grow with the vocabulary.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>

namespace {

using Vec = at::vec::Vectorized<float>;
using IntVec = at::vec::Vectorized<int32_t>;
using Half = c10::BFloat16;
using HalfVec = at::vec::Vectorized<Half>;

constexpr int64_t LANES = Vec::size();
constexpr int64_t BLOCK = 1024;  // columns; seven buffers of this size fit a cache of 32 KiB
constexpr float LOG_ZERO = -1e30f;
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

// As in rows.py. NEAR: of a mixture that is mostly one of the two, with which logarithms of shares are all near 0.
enum Pass { STATISTICS = 1, SUMS = 2, GRADIENT = 4 };
enum Code {
  NONE, TOP_K, FKL, RKL, SYMMETRIC_KL, TVD, SKL, SRKL, JSD, ABKD, AKL, TAID, NEAR_SKL, NEAR_SRKL, NEAR_JSD
};
enum Row {
  STUDENT_MAX, STUDENT_SUM, STUDENT_SUM_T, TEACHER_MAX, TEACHER_SUM_T, MIXED_MAX, MIXED_SUM_T, AT_TEACHER_CHOICE,
  AT_TARGET, SUM_0, SUM_1, SUM_2, SUM_3
};

// A tile's products. Rows may lie apart.
struct Tile {
  void* data;  // null: none
  int64_t stride;
  int64_t is_half;

  const void* at(int64_t row, int64_t column) const {
    const int64_t offset = row * stride + column;
    return is_half ? static_cast<const void*>(static_cast<const Half*>(data) + offset)
                   : static_cast<const void*>(static_cast<const float*>(data) + offset);
  }
};

// A `Head` at the columns of a tile, without its weight.
struct Head {
  const float* bias;  // null: none
  float scale;
  float cap;  // 0: none

  bool changes() const { return bias != nullptr || scale != 1.0f || cap != 0.0f; }
};

}  // namespace

// Filled by `rows_cpp`, field by field.
struct Task {
  Tile student, teacher, out;
  Head student_head, teacher_head;
  int64_t n, columns, first_column, code, passes;
  float* state;
  int64_t state_row_stride, state_token_stride;
  const float *alpha, *weights, *threshold;  // null: none
  const int64_t* targets;                    // null: none
  float temperature, cross_entropy_weight, abkd_alpha, beta;
};

namespace {

// ---- elementary functions ----

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

// exp(x) for x <= 88, to about one unit in the last place. 0 below -87.7: there the exponent's bits come out as 0.
inline Vec exp_of(Vec x) {
  const Vec shift(12582912.0f + 127.0f);  // 1.5 * 2^23: rounds to an integer, left in the low bits; 127: the bias
  x = at::vec::clamp_min(x, Vec(-88.03f));
  const Vec shifted = at::vec::fmadd(x, Vec(1.44269504f), shift);
  const Vec n = shifted - shift;
  Vec r = at::vec::fmadd(n, Vec(-0.693359375f), x);  // ln 2 in two parts, the first one exact in products
  r = at::vec::fmadd(n, Vec(2.12194440e-4f), r);
  Vec y(0.00138146f);  // relative error 3e-9 on abs(r) <= ln(2) / 2
  y = at::vec::fmadd(y, r, Vec(0.00836872f));
  y = at::vec::fmadd(y, r, Vec(0.04166839f));
  y = at::vec::fmadd(y, r, Vec(0.16666521f));
  y = at::vec::fmadd(y, r, Vec(0.49999993f));
  y = at::vec::fmadd(y, r, Vec(1.0f));
  y = at::vec::fmadd(y, r, Vec(1.0f));
  return y * at::vec::cast<float>(at::vec::cast<int32_t>(shifted) << IntVec(23));
}

// log(x) for x >= 0, floored at log(FLT_MIN) = -87.3; relative error of about one unit in the last place (Cephes' logf).
inline Vec log_of(Vec x) {
  const IntVec bits = at::vec::cast<int32_t>(at::vec::clamp_min(x, Vec(FLT_MIN)));
  const IntVec n = (bits - IntVec(0x3f3504f3)) >> IntVec(23);  // so that the rest lies in [sqrt(1/2), sqrt(2))
  const Vec f = at::vec::cast<float>(bits - (n << IntVec(23))) - Vec(1.0f);
  const Vec exponent = at::vec::cast<float>(n + IntVec(0x4b400000)) - Vec(12582912.0f);
  const Vec f2 = f * f;
  Vec y(7.0376836292e-2f);
  y = at::vec::fmadd(y, f, Vec(-1.1514610310e-1f));
  y = at::vec::fmadd(y, f, Vec(1.1676998740e-1f));
  y = at::vec::fmadd(y, f, Vec(-1.2420140846e-1f));
  y = at::vec::fmadd(y, f, Vec(1.4249322787e-1f));
  y = at::vec::fmadd(y, f, Vec(-1.6668057665e-1f));
  y = at::vec::fmadd(y, f, Vec(2.0000714765e-1f));
  y = at::vec::fmadd(y, f, Vec(-2.4999993993e-1f));
  y = at::vec::fmadd(y, f, Vec(3.3333331174e-1f));
  y = y * f;
  y = at::vec::fmadd(exponent, Vec(-2.12194440e-4f), y * f2);
  y = at::vec::fmadd(f2, Vec(-0.5f), y) + f;
  return at::vec::fmadd(exponent, Vec(0.693359375f), y) + (x - x);  // NaN stays NaN
}

#else

inline Vec exp_of(Vec x) { return x.exp(); }
inline Vec log_of(Vec x) { return at::vec::clamp_min(x, Vec(FLT_MIN)).log(); }

#endif

inline double total(Vec x) {
  float lanes[LANES];
  x.store(lanes);
  double sum = 0.0;
  for (float lane : lanes) sum += lane;
  return sum;
}

inline int64_t whole_vectors(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

float largest(const float* x, int64_t n) {
  Vec best(NOTHING), other(NOTHING);
  int64_t j = 0;
  for (; j + 2 * LANES <= n; j += 2 * LANES) {
    best = at::vec::maximum(best, Vec::loadu(x + j));
    other = at::vec::maximum(other, Vec::loadu(x + j + LANES));
  }
  if (j < n) best = at::vec::maximum(best, Vec::loadu(x + j));
  float lanes[LANES];
  at::vec::maximum(best, other).store(lanes);
  return *std::max_element(lanes, lanes + LANES);
}

// e = exp((x - offset) / T); returns its sum.
double exponentials(const float* x, int64_t n, float offset, float temperature, float* e) {
  const Vec minus(-offset), inverse(1.0f / temperature);
  Vec sum(0.0f);
  for (int64_t j = 0; j < n; j += LANES) {
    const Vec y = exp_of((Vec::loadu(x + j) + minus) * inverse);
    y.store(e + j);
    sum = sum + y;
  }
  return total(sum);
}

// ---- logits ----

void widen(const void* source, bool is_half, int64_t count, float* out) {
  if (!is_half) {
    std::memcpy(out, source, count * sizeof(float));
    return;
  }
  const Half* half = static_cast<const Half*>(source);
  for (int64_t j = 0; j < count; j += 2 * LANES) {
    const auto [low, high] = at::vec::convert_bfloat16_float(HalfVec::loadu(half + j, std::min(2 * LANES, count - j)));
    low.store(out + j);
    high.store(out + j + LANES);
  }
}

void narrow(const float* x, int64_t count, Half* out) {
  for (int64_t j = 0; j < count; j += 2 * LANES) {
    const HalfVec half = at::vec::convert_float_bfloat16(Vec::loadu(x + j), Vec::loadu(x + j + LANES));
    half.store(out + j, std::min(2 * LANES, count - j));
  }
}

// The logits of `count` columns, filled up to whole vectors: the tile itself if it can be read as it is, else `scratch`.
const float* logits(const Tile& tile, const Head& head, int64_t row, int64_t column, int64_t count,
                    float* scratch) {
  const void* products = tile.at(row, column);
  if (!tile.is_half && !head.changes() && count % LANES == 0) return static_cast<const float*>(products);
  widen(products, tile.is_half, count, scratch);
  std::fill(scratch + count, scratch + whole_vectors(count), NOTHING);
  if (!head.changes()) return scratch;
  const Vec scale(head.scale), cap(head.cap), nothing(NOTHING);
  for (int64_t j = 0; j < count; j += LANES) {
    Vec x = Vec::loadu(scratch + j);
    if (head.bias != nullptr) x = x + Vec::loadu(head.bias + column + j, std::min(LANES, count - j));
    Vec z = x * scale;
    if (head.cap != 0.0f) z = Vec::blendv((z / cap).tanh() * cap, nothing, x == nothing);
    z.store(scratch + j);
  }
  return scratch;
}

// (1 - a) s + a t, in the form that is exact at both ends.
void interpolate(const float* s, const float* t, int64_t n, float alpha, float* out) {
  const Vec zero(LOG_ZERO);
  const bool from_student = alpha < 0.5f;
  const Vec weight(from_student ? alpha : alpha - 1.0f);
  for (int64_t j = 0; j < n; j += LANES) {
    const Vec x = at::vec::clamp_min(Vec::loadu(s + j), zero), y = at::vec::clamp_min(Vec::loadu(t + j), zero);
    at::vec::fmadd(weight, y - x, from_student ? x : y).store(out + j);
  }
}

// ---- a divergence's terms ----

// q = kept exponential * factor; log q = (logit - max) / T - log_sum.
struct Model {
  const float* kept;
  const float* logit;  // null where the code does not need it
  Vec factor, minus_max, minus_log_sum;

  Vec probability(int64_t j) const { return Vec::loadu(kept + j) * factor; }
  Vec log_probability(int64_t j, Vec inverse_temperature) const {
    const Vec z = Vec::loadu(logit + j) + minus_max;
    return at::vec::clamp_min(at::vec::fmadd(z, inverse_temperature, minus_log_sum), Vec(LOG_ZERO));
  }
};

// a: alpha (skl, srkl), beta (jsd), abkd's alpha, akl's w; b: 1 - a, abkd's beta.
struct Block {
  Model q, p;
  Vec inverse_temperature, a, b, threshold;
};

struct Terms {
  Vec f{0.0f}, g{0.0f}, first{0.0f}, second{0.0f};  // first and second: what SUM_2 and SUM_3 get
};

constexpr bool needs_logits(int64_t code) {
  return code == FKL || code == RKL || code == SYMMETRIC_KL || code == ABKD || code == AKL || code == TAID;
}

// log(share) of share = 1 + x, both rounded. near: where that is small, as exact as log1p(x).
template <bool near>
inline Vec log_of_share(Vec share, Vec x) {
  if constexpr (!near) return log_of(share);
  return log_of(share) + ((x.abs() < Vec(0.5f)) & (Vec(1.0f) - share + x));
}

template <int code, bool in_gradient>
inline Terms terms(const Block& block, int64_t j, Vec q) {
  constexpr bool near = code >= NEAR_SKL;
  Terms out;
  if constexpr (code == NONE || code == TOP_K) return out;
  const Vec half(0.5f), zero(0.0f), tiny(FLT_MIN);
  Vec log_p, log_q, d;
  if constexpr (needs_logits(code)) {
    log_p = block.p.log_probability(j, block.inverse_temperature);
    log_q = block.q.log_probability(j, block.inverse_temperature);
    d = log_q - log_p;
  }
  const Vec p = block.p.probability(j);
  if constexpr (code == FKL || code == TAID) {
    out.f = zero - p * d;
    if constexpr (in_gradient) out.g = q - p;  // its sum is 0, so SUMS leaves it out
  } else if constexpr (code == RKL) {
    out.f = out.g = q * d;
  } else if constexpr (code == SYMMETRIC_KL) {
    const Vec difference = q - p;
    out.f = half * difference * d;
    out.g = half * at::vec::fmadd(q, d, difference);
  } else if constexpr (code == TVD) {
    const Vec difference = q - p, half_q = half * q;
    out.f = half * difference.abs();
    out.g = ((difference > zero) & half_q) - ((difference < zero) & half_q);
  } else if constexpr (code == SKL || code == NEAR_SKL) {
    const Vec other = block.b * q, inverse = Vec(1.0f) / at::vec::clamp_min(at::vec::fmadd(block.a, p, other), tiny);
    out.f = p * log_of_share<near>(p * inverse, block.b * (p - q) * inverse);
    out.g = zero - p * (other * inverse);
  } else if constexpr (code == SRKL || code == NEAR_SRKL) {
    const Vec inverse = Vec(1.0f) / at::vec::clamp_min(at::vec::fmadd(block.a, q, block.b * p), tiny);
    const Vec share = q * inverse, x = block.b * (q - p) * inverse, u = log_of_share<near>(share, x);
    out.f = q * u;
    out.g = q * (u - block.a * (near ? x : share));  // G - (1 - a) q, or G - q
  } else if constexpr (code == JSD || code == NEAR_JSD) {
    const Vec inverse = Vec(1.0f) / at::vec::clamp_min(at::vec::fmadd(block.a, p, block.b * q), tiny);
    const Vec difference = (q - p) * inverse;
    out.g = block.b * q * log_of_share<near>(q * inverse, block.a * difference);
    out.f = at::vec::fmadd(block.a * p, log_of_share<near>(p * inverse, zero - block.b * difference), out.g);
  } else if constexpr (code == ABKD) {
    const Vec a = block.a, b = block.b, sum = a + b;
    const Vec cross = exp_of(at::vec::fmadd(a, log_p, b * log_q)), own_q = exp_of(sum * log_q);
    out.g = (own_q - cross) / a;
    if constexpr (!in_gradient) {
      const Vec own_p = exp_of(sum * log_p);
      out.f = (at::vec::fmadd(a, own_p, b * own_q) / sum - cross) / (a * b);
    }
  } else if constexpr (code == AKL) {
    const Vec difference = q - p;
    if constexpr (in_gradient) {
      out.g = at::vec::fmadd(block.a, difference, block.b * q * d);
    } else {
      const Vec error = difference.abs();
      out.f = zero - p * d;
      out.g = q * d;
      out.first = error & (Vec::loadu(block.p.logit + j) >= block.threshold);
      out.second = error - out.first;
    }
  }
  return out;
}

struct Sums {
  double f = 0.0, g = 0.0, first = 0.0, second = 0.0;
};

template <int code>
void add_sums(const Block& given, int64_t n, float*, Vec, Vec, Sums& sums) {
  const Block block = given;  // a copy of its own: its fields stay in registers
  Terms sum;
  for (int64_t j = 0; j < n; j += LANES) {
    const Terms term = terms<code, false>(block, j, block.q.probability(j));
    sum.f = sum.f + term.f;
    sum.g = sum.g + term.g;
    sum.first = sum.first + term.first;
    sum.second = sum.second + term.second;
  }
  sums.f += total(sum.f);
  sums.g += total(sum.g);
  sums.first += total(sum.first);
  sums.second += total(sum.second);
}

// out = of_g G + of_q q. `out` may be the block's own logits: each vector is read before it is written.
template <int code>
void write_gradient(const Block& given, int64_t n, float* out, Vec of_g, Vec of_q, Sums&) {
  const Block block = given;
  for (int64_t j = 0; j < n; j += LANES) {
    const Vec q = block.q.probability(j);
    at::vec::fmadd(terms<code, true>(block, j, q).g, of_g, q * of_q).store(out + j);
  }
}

using Loop = void (*)(const Block&, int64_t, float*, Vec, Vec, Sums&);
constexpr Loop ADD_SUMS[] = {
    add_sums<NONE>, add_sums<NONE>, add_sums<FKL>, add_sums<RKL>,  add_sums<SYMMETRIC_KL>, add_sums<TVD>,
    add_sums<SKL>,  add_sums<SRKL>, add_sums<JSD>, add_sums<ABKD>, add_sums<AKL>,          add_sums<FKL>,
    add_sums<NEAR_SKL>, add_sums<NEAR_SRKL>, add_sums<NEAR_JSD>,
};
constexpr Loop WRITE_GRADIENT[] = {
    write_gradient<NONE>, write_gradient<NONE>, write_gradient<FKL>,  write_gradient<RKL>,
    write_gradient<SYMMETRIC_KL>, write_gradient<TVD>, write_gradient<SKL>,  write_gradient<SRKL>,
    write_gradient<JSD>,  write_gradient<ABKD>, write_gradient<AKL>,  write_gradient<FKL>,
    write_gradient<NEAR_SKL>, write_gradient<NEAR_SRKL>, write_gradient<NEAR_JSD>,
};

// ---- passes over a row ----

// One thread's memory. `kept` and `maxima` live from STATISTICS to the end of a row.
struct Scratch {
  alignas(64) float s[BLOCK], t[BLOCK], mixed[BLOCK], e_s[BLOCK], e_t[BLOCK], out[BLOCK];
  std::unique_ptr<float[]> kept_q, kept_p, maxima_q, maxima_p;
};

// Running maximum and sum of exponentials.
struct Softmax {
  float max;
  double sum, sum_t;

  // Leaves exp((x - max) / T) in `e`. The sum at temperature 1 is made too where it is asked for.
  void add(const float* x, int64_t n, float temperature, bool at_one, float* e) {
    const float new_max = largest(x, n);
    if (new_max > max) {
      sum *= std::exp(static_cast<double>(max) - new_max);
      sum_t *= std::exp((static_cast<double>(max) - new_max) / temperature);
      max = new_max;
    }
    if (at_one && temperature != 1.0f) sum += exponentials(x, n, max, 1.0f, e);
    sum_t += exponentials(x, n, max, temperature, e);
    if (temperature == 1.0f) sum = sum_t;
  }
};

class RowPasses {
 public:
  RowPasses(const Task& task, int64_t row, Scratch& scratch)
      : task(task), row(row), scratch(scratch), code(task.code), keeps(keeps_exponentials(task)) {
    alpha = task.alpha == nullptr ? 0.0f : task.alpha[row];
    // Without a mixture they are these, which are exact where q underflows as well.
    if (code == SKL && alpha < FLT_MIN) code = FKL;
    if (code == SRKL && alpha < FLT_MIN) code = RKL;
    if (code == SKL && alpha > 0.5f) code = NEAR_SKL;
    if (code == SRKL && alpha > 0.5f) code = NEAR_SRKL;
    if (code == JSD && std::abs(task.beta - 0.5f) > 0.25f) code = NEAR_JSD;
    target = task.targets == nullptr ? -1 : task.targets[row] - task.first_column;
    has_teacher = code != NONE && code != TOP_K;
  }

  void run() {
    if (task.passes & STATISTICS) statistics();
    if ((task.passes & SUMS) && has_teacher) add_row_sums();
    if (task.passes & GRADIENT) gradient();
  }

  static bool keeps_exponentials(const Task& task) {
    return (task.passes & STATISTICS) && (task.passes & (SUMS | GRADIENT));
  }

 private:
  const Task& task;
  const int64_t row;
  Scratch& scratch;
  int64_t code, target;
  const bool keeps;
  bool has_teacher;
  float alpha;

  float& state(Row r) { return task.state[r * task.state_row_stride + row * task.state_token_stride]; }

  const float* student_logits(int64_t column, int64_t count) {
    return logits(task.student, task.student_head, row, column, count, scratch.s);
  }
  const float* teacher_logits(int64_t column, int64_t count) {
    return logits(task.teacher, task.teacher_head, row, column, count, scratch.t);
  }

  void statistics() {
    Softmax student{state(STUDENT_MAX), state(STUDENT_SUM), state(STUDENT_SUM_T)};
    Softmax teacher{state(TEACHER_MAX), 0.0, state(TEACHER_SUM_T)};
    Softmax mixed{state(MIXED_MAX), 0.0, state(MIXED_SUM_T)};
    const float temperature = task.temperature;
    for (int64_t column = 0, b = 0; column < task.columns; column += BLOCK, ++b) {
      const int64_t count = std::min(BLOCK, task.columns - column), n = whole_vectors(count);
      float* e_q = keeps ? scratch.kept_q.get() + column : scratch.e_s;
      float* e_p = keeps && has_teacher ? scratch.kept_p.get() + column : scratch.e_t;
      const float* s = student_logits(column, count);
      student.add(s, n, temperature, true, e_q);
      if (keeps) scratch.maxima_q[b] = student.max;
      if (target >= column && target < column + count) state(AT_TARGET) = std::max(s[target - column], LOG_ZERO);
      if (!has_teacher) continue;
      const float* t = teacher_logits(column, count);
      const float old_max = teacher.max;
      teacher.add(t, n, temperature, false, e_p);
      if (teacher.max > old_max) {
        const int64_t choice = std::find(t, t + count, teacher.max) - t;
        if (choice < count) state(AT_TEACHER_CHOICE) = std::max(s[choice], LOG_ZERO);
      }
      if (code == TAID) {
        interpolate(s, t, n, alpha, scratch.mixed);
        mixed.add(scratch.mixed, n, temperature, false, e_p);
      }
      if (keeps) scratch.maxima_p[b] = code == TAID ? mixed.max : teacher.max;
    }
    state(STUDENT_MAX) = student.max;
    state(STUDENT_SUM) = student.sum;
    state(STUDENT_SUM_T) = student.sum_t;
    if (!has_teacher) return;
    state(TEACHER_MAX) = teacher.max;
    state(TEACHER_SUM_T) = teacher.sum_t;
    if (code == TAID) {
      state(MIXED_MAX) = mixed.max;
      state(MIXED_SUM_T) = mixed.sum_t;
    }
  }

  // A model's exponentials of one block: those kept, or new ones in `e`.
  Model model(const float* logit, int64_t column, int64_t n, float max, float sum, const float* kept,
              const float* maxima, float* e) {
    sum = std::max(sum, FLT_MIN);  // 0 only in a row of minus infinities
    float factor = 1.0f / sum;
    if (!keeps) {
      exponentials(logit, n, max, task.temperature, e);
    } else if (const float old_max = maxima[column / BLOCK]; old_max != max) {
      factor = std::exp((static_cast<double>(old_max) - max) / task.temperature) / sum;
    }
    return {keeps ? kept + column : e, logit, Vec(factor), Vec(-max), Vec(-std::log(sum))};
  }

  // `s`: the student's logits if the caller has them already.
  Block block(int64_t column, int64_t count, const float* s) {
    const bool reads = !keeps || needs_logits(code);
    const int64_t n = whole_vectors(count);
    if (reads && s == nullptr) s = student_logits(column, count);
    Block block;
    block.inverse_temperature = Vec(1.0f / task.temperature);
    block.q = model(s, column, n, state(STUDENT_MAX), state(STUDENT_SUM_T), scratch.kept_q.get(),
                    scratch.maxima_q.get(), scratch.e_s);
    if (!has_teacher) return block;
    const float* t = reads ? teacher_logits(column, count) : nullptr;
    if (reads && code == TAID) {
      interpolate(s, t, n, alpha, scratch.mixed);
      t = scratch.mixed;
    }
    block.p = model(t, column, n, state(code == TAID ? MIXED_MAX : TEACHER_MAX),
                    state(code == TAID ? MIXED_SUM_T : TEACHER_SUM_T), scratch.kept_p.get(), scratch.maxima_p.get(),
                    scratch.e_t);
    float a = alpha, b = 1.0f - alpha;
    if (code == JSD || code == NEAR_JSD) a = task.beta, b = 1.0f - task.beta;
    if (code == ABKD) a = task.abkd_alpha, b = task.beta;
    if (code == AKL) a = forward_weight(), b = 1.0f - a;
    block.a = Vec(a);
    block.b = Vec(b);
    if (code == AKL) block.threshold = Vec(task.threshold[row]);
    return block;
  }

  float forward_weight() {
    const float head = state(SUM_2), all = head + state(SUM_3);
    return all > 0.0f ? head / std::max(all, FLT_MIN) : 0.5f;
  }

  void add_row_sums() {
    Sums sums;
    for (int64_t column = 0; column < task.columns; column += BLOCK) {
      const int64_t count = std::min(BLOCK, task.columns - column);
      ADD_SUMS[code](block(column, count, nullptr), whole_vectors(count), nullptr, Vec(), Vec(), sums);
    }
    state(SUM_0) += sums.f;
    state(SUM_1) += sums.g;
    if (code == AKL) {
      state(SUM_2) += sums.first;
      state(SUM_3) += sums.second;
    }
  }

  void gradient() {
    const Head& head = task.student_head;
    const float weight = (task.weights == nullptr ? 1.0f : task.weights[row]) * head.scale;
    const float of_g = weight / task.temperature;
    const float of_target = task.targets == nullptr ? 0.0f : weight * task.cross_entropy_weight;
    const float sum_of_g = code == AKL ? (1.0f - forward_weight()) * state(SUM_1) : state(SUM_1);
    const bool own_q1 = of_target != 0.0f && task.temperature != 1.0f;  // q1 is not q
    const float of_q = (own_q1 ? 0.0f : of_target) - of_g * sum_of_g;
    for (int64_t column = 0; column < task.columns; column += BLOCK) {
      const int64_t count = std::min(BLOCK, task.columns - column), n = whole_vectors(count);
      const float* s = own_q1 || head.cap != 0.0f ? student_logits(column, count) : nullptr;
      const Block block = this->block(column, count, s);
      float* q1 = scratch.mixed;  // after `block` free, and with a cap the student's logits lie in `s`
      Sums unused;
      const bool direct = !task.out.is_half && count == n && !own_q1;
      float* out = direct ? static_cast<float*>(const_cast<void*>(task.out.at(row, column))) : scratch.out;
      WRITE_GRADIENT[code](block, n, out, Vec(of_g), Vec(of_q), unused);
      if (own_q1) {
        exponentials(s, n, state(STUDENT_MAX), 1.0f, q1);
        const Vec factor(of_target / std::max(state(STUDENT_SUM), FLT_MIN));
        for (int64_t j = 0; j < n; j += LANES) {
          at::vec::fmadd(Vec::loadu(q1 + j), factor, Vec::loadu(out + j)).store(out + j);
        }
      }
      if (target >= column && target < column + count) out[target - column] -= of_target;
      if (head.cap != 0.0f) {  // d logit / d product = scale (1 - (logit / cap)^2), and 0 where the logit is log 0
        const Vec one(1.0f), cap(head.cap);
        for (int64_t j = 0; j < n; j += LANES) {
          const Vec share = Vec::loadu(s + j) / cap;
          (Vec::loadu(out + j) * (one - at::vec::minimum(share * share, one))).store(out + j);
        }
      }
      if (direct) continue;
      void* to = const_cast<void*>(task.out.at(row, column));
      if (task.out.is_half) {
        narrow(out, count, static_cast<Half*>(to));
      } else {
        std::memcpy(to, out, count * sizeof(float));
      }
    }
  }
};

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int64_t distil_rows_task_bytes() { return sizeof(Task); }

__attribute__((visibility("default"))) void distil_rows_run(const Task* task) {
  at::parallel_for(0, task->n, 1, [&](int64_t begin, int64_t end) {
    auto scratch = std::make_unique<Scratch>();
    if (RowPasses::keeps_exponentials(*task)) {
      const int64_t columns = whole_vectors(task->columns), blocks = (columns + BLOCK - 1) / BLOCK;
      for (auto* kept : {&scratch->kept_q, &scratch->kept_p}) kept->reset(new float[columns]);
      for (auto* maxima : {&scratch->maxima_q, &scratch->maxima_p}) maxima->reset(new float[blocks]);
    }
    for (int64_t row = begin; row < end; ++row) RowPasses(*task, row, *scratch).run();
  });
}
}
