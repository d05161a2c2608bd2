// One token of a Mamba language model for a few sequences, or a few tokens of each, from their
// vectors to the logits, in one call. Plain C interface.
//
//     h = gain x / rms(x) ;  u, z = in_proj h ;  u = silu(conv(u)) ;  dt, B, C = x_proj u
//     s = exp(dt A) s + dt B u ;  x += out_proj ((C . s + D u) silu(z))
//
// A token is bound by reading the weights, so they are read once, as a stream, for all sequences,
// and everything else is done in between: a layer has four phases (phases.h), one for each matrix
// that is too large for a core of its own.
//
//   in_proj    the norm before it; behind it convolution and SiLU of the rows that belong to u,
//              SiLU of those that belong to z
//   x_proj
//   scan       dt_proj, softplus, the states, the gate
//   out_proj   and the sum into the stream x
//
// Tokens of one sequence lie in succession, and each goes on from the state that the one before it
// leaves: where the matrices are concerned, they are as good as tokens of other sequences.
//
// What a thread needs before its first chunk of a phase (the normalised vectors, for instance)
// each thread computes for itself: that costs less than another phase.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../../ops/_threads.h"
#include "digits.h"
#include "phases.h"
#include "product.h"

namespace mambakit {

// What Python passes, field by field (library.py has the same lists). Pointers without a type
// are to weights of the storage that `storage` names; all others are to dense float arrays, and
// null where the model has no such thing.
struct StepMatrix {
  const void* weights;
  const float* scales;
  int64_t rows, columns;
};

struct StepLayer {
  const float* gain;                   // (m)
  double eps;
  StepMatrix in_proj;                  // (2 d, m)
  const float *in_bias;                // (2 d)
  const float *conv, *conv_bias;       // (w, d), (d)
  StepMatrix x_proj;                   // (r + 2 n, d)
  double selection_eps;                // 0: dt, B and C are not normalised
  StepMatrix dt_proj;                  // (r, d): the transpose, its scales along d
  const float *dt_bias, *A, *D;        // (d), (d, n) times log2(e), (d)
  StepMatrix out_proj;                 // (m, d)
  const float* out_bias;               // (m)
};

struct StepModel {
  int64_t storage, layers, m, d, n, r, w;
  const StepLayer* layer;
  const float* gain;
  double eps;
  StepMatrix head;
};

struct StepCall {
  int64_t b, threads;                        // tokens of all sequences
  float* x;                                  // (b, m), used up
  const float *const *conv, *const *ssm;     // for each layer (b / l, w - 1, d), (b / l, d, n)
  float *new_conv, *new_ssm;                 // (layers, b, w - 1, d), (layers, b, d, n)
  float* logits;                             // (b, rows of the head)
  float* scratch;
  int64_t l;                                 // tokens of one sequence
};

namespace {

constexpr int width = lanes<float>;
constexpr int64_t chunk_bytes = 65536;  // of weights, in one chunk

enum Storage : int64_t { float32 = 0, bfloat16 = 1, float16 = 2, int8 = 4 };

// Numbers between two vectors that are read together. One line more than a whole number of them:
// a power of 2 would put all vectors into the same places of the cache.
int64_t stride_of(int64_t size) { return (size + 15) / 16 * 16 + 16; }

// ---------------------------------------------------------------- functions

// log(1 + e^v); the polynomial is log(1 + e) / e, minimax on [0, 1], as in the scan.
MAMBAKIT_INLINE Vec<float> softplus(Vec<float> v) {
  const Vec<float> e =
      exp2_product((Vec<float>)(bits_of<float>(v) | 0x80000000u), splat(1.44269504088896341f));
  Vec<float> p = splat(0.005232675466686487f);
  p = p * e - 0.029505161568522453f;
  p = p * e + 0.07822582125663757f;
  p = p * e - 0.13663235306739807f;
  p = p * e + 0.19106000661849976f;
  p = p * e - 0.2484298050403595f;
  p = p * e + 0.3331909775733948f;
  p = p * e - 0.4999949336051941f;
  p = p * e + 0.9999999403953552f;
  return p * e + (v > 0.0f ? v : Vec<float>{});
}

// A vector of `count` numbers, or of all lanes where there are as many.
template <typename T>
MAMBAKIT_INLINE Vec<float> load_up_to(const T* p, int64_t count) {
  return count >= width ? widen(p) : widen_first(p, count);
}

MAMBAKIT_INLINE void store_up_to(float* p, Vec<float> v, int64_t count) {
  if (count >= width) {
    store(p, v);
  } else {
    store_part(p, v, static_cast<int>(count));
  }
}

// y = gain x / sqrt(mean(x^2) + eps); without gain, all its elements are 1.
void normalise(const float* x, const float* gain, double eps, int64_t size, float* y) {
  Vec<float> squares{};
  for (int64_t i = 0; i < size; i += width) {
    const Vec<float> v = load_up_to(x + i, size - i);
    squares = multiply_add(v, v, squares);
  }
  float sum;
  sum_lanes<1>(&squares, &sum);
  const float scale =
      1.0f / std::sqrt(sum / static_cast<float>(size) + static_cast<float>(eps));
  for (int64_t i = 0; i < size; i += width) {
    const Vec<float> v = load_up_to(x + i, size - i) * scale;
    store_up_to(y + i, gain ? v * load_up_to(gain + i, size - i) : v, size - i);
  }
}

// ---------------------------------------------------------------- one thread's token

// Rows in a chunk of a matrix: some 64 KB of it, but not so few chunks that threads wait for one
// another, and whole vectors of results.
int64_t chunk_rows(int64_t rows, int64_t columns, int64_t bytes, int64_t threads) {
  int64_t some = chunk_bytes / (columns * bytes);
  const int64_t share = rows / (8 * threads);
  if (some > share) some = share;
  const int64_t unit = some >= 48 ? 48 : some >= 16 ? 16 : 4;
  return some < unit ? unit : some / unit * unit;
}

int64_t chunks_of(int64_t size, int64_t chunk) { return (size + chunk - 1) / chunk; }

struct Shared {
  const StepModel& model;
  const StepCall& call;
  Counter* counters;
  std::atomic<int> arrived;
};

template <typename T>
class Token {
 public:
  Token(Shared& shared, int own)
      : model_(shared.model),
        call_(shared.call),
        phases_(shared.counters, static_cast<int>(call_.threads), own),
        b_(call_.b),
        m_(model_.m),
        d_(model_.d),
        n_(model_.n),
        r_(model_.r),
        inner_(stride_of(d_)),
        outer_(stride_of(m_)),
        selection_(stride_of(r_ + 2 * n_)) {
    float* next = call_.scratch;
    const auto take = [&](int64_t stride) {
      float* piece = next;
      next += b_ * stride;
      return piece;
    };
    u_ = take(inner_);
    gate_ = take(inner_);
    y_ = take(inner_);
    low_ = take(selection_);
    next += own * own_scratch(model_, b_);
    own_vectors_ = take(outer_);
    own_selection_ = take(selection_);
    digits_ = reinterpret_cast<int8_t*>(next);
  }

  // Floats of scratch for all threads.
  static int64_t scratch(const StepModel& model, int64_t b, int64_t threads) {
    const int64_t selection = stride_of(model.r + 2 * model.n);
    return b * (3 * stride_of(model.d) + selection) + threads * own_scratch(model, b);
  }

  void run() {
    for (int64_t i = 0; i < model_.layers; ++i) {
      const StepLayer& layer = model_.layer[i];
      const StepMatrix& next = i + 1 < model_.layers ? model_.layer[i + 1].in_proj : model_.head;
      project_in(layer, i);
      project_selection(layer);
      scan(layer, i);
      project_out(layer, next);
    }
    score();
  }

 private:
  // Floats of scratch for one thread alone.
  static int64_t own_scratch(const StepModel& model, int64_t b) {
    int64_t size = stride_of(model.m) + stride_of(model.r + 2 * model.n);
#if defined(__AVX512BW__)
    const int64_t columns = model.m > model.d ? model.m : model.d;
    if (model.storage == int8) {
      size += DigitVectors::bytes_for(columns) / static_cast<int64_t>(sizeof(float));
    }
#endif
    return b * size;
  }

  int64_t rows_of(const StepMatrix& m) const {
    return chunk_rows(m.rows, m.columns, sizeof(T), call_.threads);
  }

  // Ask for the beginning of this thread's share of a matrix, while other threads still work on
  // the phase before it and memory has nothing to do.
  void ask_for(const StepMatrix& m) const {
    const int64_t chunk = rows_of(m), row = phases_.first_own(chunks_of(m.rows, chunk)) * chunk;
    const char* const start =
        reinterpret_cast<const char*>(static_cast<const T*>(m.weights) + row * m.columns);
    for (int64_t at = 0; at < prefetch_distance; at += cache_line) {
      __builtin_prefetch(start + at);
    }
  }

  // A phase: prepare() once on each thread that takes part, then out(j, row, m[row] . x_j) for
  // all rows of a matrix and all sequences j, and behind(begin, end) after some rows of them.
  template <typename Prepare, typename Out, typename Behind>
  void project(const StepMatrix& m, const StepMatrix& next, const float* x, int64_t stride,
               const Prepare& prepare, const Out& out, const Behind& behind) {
    const Matrix<T> matrix{static_cast<const T*>(m.weights), m.scales, m.rows, m.columns};
    const int64_t chunk = rows_of(m);
    bool prepared = false;
    phases_.run(
        chunks_of(m.rows, chunk),
        [&](int64_t i) {
          if (!prepared) {
            prepare();
            split(x, stride, m.columns);
            prepared = true;
          }
          const int64_t begin = i * chunk, end = begin + chunk < m.rows ? begin + chunk : m.rows;
#if defined(__AVX512BW__)
          if constexpr (std::is_same_v<T, int8_t>) {
            if (in_digits_) {
              multiply(matrix, begin, end, DigitVectors(digits_, m.columns), b_, out);
              return behind(begin, end);
            }
          }
#endif
          multiply(matrix, begin, end, FloatVectors{x, stride}, b_, out);
          behind(begin, end);
        },
        [&] { ask_for(next); });
  }

  // Write the vectors of a product in digits, if that is how it is computed.
  void split(const float* x, int64_t stride, int64_t columns) {
#if defined(__AVX512BW__)
    if (!in_digits_) return;
    const DigitVectors digits(digits_, columns);
    for (int64_t j = 0; j < b_; ++j) digits.set(j, x + j * stride, columns);
#else
    (void)x, (void)stride, (void)columns;
#endif
  }

  void normalise_stream(const float* gain, double eps) {
    for (int64_t j = 0; j < b_; ++j) {
      normalise(call_.x + j * m_, gain, eps, m_, own_vectors_ + j * outer_);
    }
  }

  void project_in(const StepLayer& layer, int64_t index) {
    project(
        layer.in_proj, layer.x_proj, own_vectors_, outer_,
        [&] { normalise_stream(layer.gain, layer.eps); },
        [&](int64_t j, int64_t row, float sum) {
          if (layer.in_bias) sum += layer.in_bias[row];
          float* const half = row < d_ ? u_ : gate_ - d_;
          half[j * inner_ + row] = sum;
        },
        [&](int64_t begin, int64_t end) {
          if (begin < d_) convolve(layer, index, begin, end < d_ ? end : d_);
          if (end > d_) open_gate(begin > d_ ? begin - d_ : 0, end - d_);
        });
  }

  // One part of the state that token j goes on from, of so many floats; null if there is none.
  const float* before(const float* const* first, const float* made, int64_t index, int64_t j,
                      int64_t size) const {
    if (j % call_.l != 0) return made + (index * b_ + j - 1) * size;
    return first ? first[index] + j / call_.l * size : nullptr;
  }

  // u = silu(conv(u)) for some channels.
  void convolve(const StepLayer& layer, int64_t index, int64_t begin, int64_t end) {
    const int64_t past = model_.w - 1;
    for (int64_t j = 0; j < b_; ++j) {
      const float* old = before(call_.conv, call_.new_conv, index, j, past * d_);
      float* kept = call_.new_conv + (index * b_ + j) * past * d_;
      float* u = u_ + j * inner_;
      for (int64_t c = begin; c < end; c += width) {
        const int64_t count = end - c;
        const Vec<float> x = load_up_to(u + c, count);
        Vec<float> sum = layer.conv_bias ? load_up_to(layer.conv_bias + c, count) : Vec<float>{};
        for (int64_t k = 0; k < past; ++k) {
          const Vec<float> v = old ? load_up_to(old + k * d_ + c, count) : Vec<float>{};
          sum = multiply_add(load_up_to(layer.conv + k * d_ + c, count), v, sum);
          if (k > 0) store_up_to(kept + (k - 1) * d_ + c, v, count);
        }
        if (past > 0) store_up_to(kept + (past - 1) * d_ + c, x, count);
        sum = multiply_add(load_up_to(layer.conv + past * d_ + c, count), x, sum);
        store_up_to(u + c, sum * sigmoid<float>(sum), count);
      }
    }
  }

  void open_gate(int64_t begin, int64_t end) {
    for (int64_t j = 0; j < b_; ++j) {
      for (int64_t c = begin; c < end; c += width) {
        float* z = gate_ + j * inner_ + c;
        const Vec<float> v = load_up_to(z, end - c);
        store_up_to(z, v * sigmoid<float>(v), end - c);
      }
    }
  }

  void project_selection(const StepLayer& layer) {
    project(
        layer.x_proj, layer.out_proj, u_, inner_, [] {},
        [&](int64_t j, int64_t row, float sum) { low_[j * selection_ + row] = sum; },
        [](int64_t, int64_t) {});
  }

  void scan(const StepLayer& layer, int64_t index) {
    int64_t chunk = d_ / (8 * call_.threads) / width * width;
    if (chunk < width) chunk = width;
    bool prepared = false;
    phases_.run(
        chunks_of(d_, chunk),
        [&](int64_t i) {
          if (!prepared) select(layer);
          prepared = true;
          for (int64_t c = i * chunk; c < d_ && c < (i + 1) * chunk; c += width) {
            for (int64_t j = 0; j < b_; ++j) {
              if (n_ % width == 0 && d_ - c >= width) {
                scan_block<true>(layer, index, j, c);
              } else {
                scan_block<false>(layer, index, j, c);
              }
            }
          }
        },
        [&] { ask_for(layer.out_proj); });
  }

  // The vectors (dt, B, C) of all sequences, as the scan uses them.
  void select(const StepLayer& layer) {
    if (layer.selection_eps == 0) {
      own_low_ = low_;
      return;
    }
    own_low_ = own_selection_;
    for (int64_t j = 0; j < b_; ++j) {
      const float* from = low_ + j * selection_;
      float* to = own_selection_ + j * selection_;
      normalise(from, nullptr, layer.selection_eps, r_, to);
      normalise(from + r_, nullptr, layer.selection_eps, n_, to + r_);
      normalise(from + r_ + n_, nullptr, layer.selection_eps, n_, to + r_ + n_);
    }
  }

  // One vector of channels of one sequence; whole: all its lanes are channels, and the states of
  // a channel are a whole number of vectors.
  template <bool whole>
  void scan_block(const StepLayer& layer, int64_t index, int64_t j, int64_t c) {
    const int64_t count = whole || d_ - c >= width ? width : d_ - c;
    const float *low = own_low_ + j * selection_, *B = low + r_, *C = B + n_;
    const Vec<float> dt = step_size(layer, low, c, count);
    const Vec<float> u = load_up_to(u_ + j * inner_ + c, count);
    float steps[width], inputs[width];
    store(steps, dt);
    store(inputs, dt * u);

    const float* old = before(call_.ssm, call_.new_ssm, index, j, d_ * n_);
    if (old) old += c * n_;
    float* kept = call_.new_ssm + ((index * b_ + j) * d_ + c) * n_;
    const float* A = layer.A + c * n_;
    Vec<float> sum[width] = {};
    for (int64_t i = 0; i < count; ++i) {
      const Vec<float> step = splat(steps[i]);
      for (int64_t k = 0; k < n_; k += width) {
        const int64_t at = i * n_ + k, states = whole ? width : n_ - k;
        Vec<float> s = load_up_to(B + k, states) * inputs[i];
        if (old) {
          s += exp2_product(load_up_to(A + at, states), step) * load_up_to(old + at, states);
        }
        store_up_to(kept + at, s, states);
        sum[i] += load_up_to(C + k, states) * s;
      }
    }
    float sums[width];
    sum_lanes<width>(sum, sums);
    const Vec<float> y = load(sums) + load_up_to(layer.D + c, count) * u;
    store_up_to(y_ + j * inner_ + c, y * load_up_to(gate_ + j * inner_ + c, count), count);
  }

  Vec<float> step_size(const StepLayer& layer, const float* low, int64_t c, int64_t count) const {
    const T* weights = static_cast<const T*>(layer.dt_proj.weights) + c;
    // In four sums: each addition waits for the one before it.
    Vec<float> sum[4] = {};
    int64_t k = 0;
    for (; k + 4 <= r_; k += 4) {
      for (int i = 0; i < 4; ++i) {
        sum[i] += load_up_to(weights + (k + i) * d_, count) * low[k + i];
      }
    }
    for (; k < r_; ++k) sum[0] += load_up_to(weights + k * d_, count) * low[k];
    Vec<float> raw = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    if (layer.dt_proj.scales) raw *= load_up_to(layer.dt_proj.scales + c, count);
    return softplus(raw + load_up_to(layer.dt_bias + c, count));
  }

  void project_out(const StepLayer& layer, const StepMatrix& next) {
    project(
        layer.out_proj, next, y_, inner_, [] {},
        [&](int64_t j, int64_t row, float sum) {
          if (layer.out_bias) sum += layer.out_bias[row];
          call_.x[j * m_ + row] += sum;
        },
        [](int64_t, int64_t) {});
  }

  void score() {
    project(
        model_.head, model_.layer[0].in_proj, own_vectors_, outer_,
        [&] { normalise_stream(model_.gain, model_.eps); },
        [&](int64_t j, int64_t row, float sum) {
          call_.logits[j * model_.head.rows + row] = sum;
        },
        [](int64_t, int64_t) {});
  }

  const StepModel& model_;
  const StepCall& call_;
  Phases phases_;
  const int64_t b_, m_, d_, n_, r_, inner_, outer_, selection_;
  float *u_, *gate_, *y_, *low_, *own_vectors_, *own_selection_;
  int8_t* digits_;
  const bool in_digits_ = std::is_same_v<T, int8_t> && has_int8_products();
  const float* own_low_ = nullptr;
};

template <typename T>
void run_token(Shared& shared) {
  run_on_threads(
      static_cast<int>(shared.call.threads),
      [](void* data) {
        Shared& s = *static_cast<Shared*>(data);
        const FlushDenormals flush;
        Token<T>(s, s.arrived.fetch_add(1, std::memory_order_relaxed)).run();
      },
      &shared);
}

// ---------------------------------------------------------------- shorter weights

// weights[k] = round(row[k] / scale), scale = max |row| / 127. A row that is not finite gives the
// scale NaN, and so NaN in every product.
void quantise_row(const float* row, int64_t columns, int8_t* weights, float* scale) {
  float largest = 0, differences = 0;
  for (int64_t k = 0; k < columns; ++k) {
    const float size = std::fabs(row[k]);
    largest = size > largest ? size : largest;
    differences += row[k] - row[k];  // 0, or NaN
  }
  const bool usable = differences == 0 && largest > 0;
  *scale = largest / 127.0f + differences;
  const float inverse = usable ? 127.0f / largest : 0.0f;
  for (int64_t k = 0; k < columns; ++k) {
    weights[k] = usable ? static_cast<int8_t>(std::nearbyint(row[k] * inverse)) : 0;
  }
}

}  // namespace
}  // namespace mambakit

extern "C" {

// Numbers that StepCall.scratch must have room for.
MK_EXPORT int64_t mk_step_scratch(const mambakit::StepModel* model, int64_t b, int64_t threads) {
  return mambakit::Token<float>::scratch(*model, b, threads);
}

// False if there is no memory to work in.
MK_EXPORT bool mk_step(const mambakit::StepModel* model, const mambakit::StepCall* call) {
  using namespace mambakit;
  const int64_t phases = 4 * model->layers + 1;
  const int64_t count = Phases::counters_for(phases, static_cast<int>(call->threads));
  Counter* const counters = new (std::nothrow) Counter[count];
  if (!counters) return false;
  Shared shared{*model, *call, counters, {0}};
  switch (model->storage) {
    case float32: run_token<float>(shared); break;
    case bfloat16: run_token<BFloat16>(shared); break;
    case float16: run_token<Float16>(shared); break;
    case int8: run_token<int8_t>(shared); break;
  }
  delete[] counters;
  return true;
}

// Round rows (rows, columns) to int8 with a scale for each.
MK_EXPORT void mk_step_quantise(const float* values, int64_t rows, int64_t columns,
                                int8_t* weights, float* scales, int32_t threads) {
  using namespace mambakit;
  constexpr int64_t chunk = 64;
  for_each_task((rows + chunk - 1) / chunk, threads, [&](int64_t i) {
    for (int64_t row = i * chunk; row < rows && row < (i + 1) * chunk; ++row) {
      quantise_row(values + row * columns, columns, weights + row * columns, scales + row);
    }
  });
}

// Ask the system for large pages, before the memory is first written: a core that streams
// through small ones spends a fifth of its time on looking up where they are.
MK_EXPORT void mk_step_large_pages(void* start, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(start) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(start) + bytes) / page * page;
  // Advice: where it is not taken, pages stay small.
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)start;
  (void)bytes;
#endif
}

}  // extern "C"
