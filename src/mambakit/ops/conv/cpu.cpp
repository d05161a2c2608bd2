// The causal depthwise convolution on CPU, forward and backward. Plain C interface.
//
//     pre_t = bias + sum_k weight[:, k] x_{t-w+1+k} ;  y_t = pre_t  or  pre_t * sigmoid(pre_t)
//
// The lanes of a vector are neighbouring channels, and time is walked in blocks of `rows_at_once`
// rows, so that each row of x crosses from memory once and each product finds its operands in
// registers. The arithmetic is small: what is paid for is the memory.
//
// Time -1, -2, ... lies in the state: row r of the state is time r - (w - 1). Functions that take
// a time therefore see one sequence from -(w - 1) to its end, wherever its rows are stored.
//
// Work is cut into strips (row of the batch, span of time, block of channels). In a pack, one row
// of the batch whose sequences lie end to end, a strip holds pieces of several. Where the cuts in
// time lie depends on the sizes alone, and sums over time are made within a strip first and then
// from strip to strip in their order: the gradients are the same for any number of threads.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "../_pages.h"
#include "../_simd.h"
#include "../_threads.h"

#define MAMBAKIT_INLINE_LAMBDA __attribute__((always_inline))

namespace mambakit {
namespace {

constexpr int rows_at_once = 8;

// 512 channels of the w + 1 sums, the weights and the rows at work stay in the L1 cache.
constexpr int64_t block_channels = 512;

enum Dtype : int32_t { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

// A tensor (b, rows, d) whose channels are neighbours in memory; strides count elements.
struct Rows {
  void* data;
  int64_t batch, row;

  template <typename T>
  T* at(int64_t b, int64_t r) const {
    return static_cast<T*>(data) + b * batch + r * row;
  }
};

// Where a sequence lies: its row of the batch, of the states, and its first step in the batch.
struct Sequence {
  int64_t batch, row, start, length;
};

// Steps [from, to) of a sequence, counted from its first.
struct Piece {
  Sequence sequence;
  int64_t from, to;
};

struct Problem {
  int64_t b, l, d, w;
  int64_t sequences;     // b, or how many a pack holds
  const int64_t* starts; // null, or where each of a pack begins; then l
  Rows x, state;         // state.data may be null: zeros
  const void* zeros;     // a row of d zeros
  const void* weight;    // (w, d_padded) scalars, then d_padded of the bias
  int64_t d_padded;
  int64_t span;          // length of a strip in time
  int64_t spans, blocks;

  Sequence sequence(int64_t k) const {
    if (!starts) return {k, k, 0, l};
    return {0, k, starts[k], starts[k + 1] - starts[k]};
  }

  template <typename T>
  const T* input(const Sequence& s, int64_t time) const {
    if (time >= 0) return x.at<T>(s.batch, s.start + time);
    if (state.data) return state.at<T>(s.row, time + w - 1);
    return static_cast<const T*>(zeros);
  }
};

// Memory that is given back when it goes out of scope; false if there was none to have.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : data_(static_cast<char*>(std::malloc(bytes + alignment))) {
    if (data_) first_ = data_ + alignment - reinterpret_cast<uintptr_t>(data_) % alignment;
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  explicit operator bool() const { return data_ != nullptr; }

  template <typename T>
  T* at(size_t byte) const {
    return reinterpret_cast<T*>(first_ + byte);
  }

 private:
  static constexpr size_t alignment = 64;
  char* data_;
  char* first_ = nullptr;
};

struct Strip {
  int64_t b, index, from, to;         // steps [from, to) of row b; index counts (b, span)
  int64_t first_channel, channels;
};

Strip strip_of(const Problem& p, int64_t task) {
  const int64_t block = task % p.blocks, index = task / p.blocks;
  const int64_t b = index / p.spans, span = index % p.spans;
  Strip s;
  s.b = b;
  s.index = index;
  s.from = span * p.span;
  s.to = std::min(p.l, s.from + p.span);
  s.first_channel = block * block_channels;
  s.channels = std::min(block_channels, p.d - s.first_channel);
  return s;
}

// Calls body(piece) for what each sequence has of a strip, in the order of time.
template <typename Body>
void for_each_piece(const Problem& p, const Strip& s, const Body& body) {
  if (!p.starts) {
    body(Piece{p.sequence(s.b), s.from, s.to});
    return;
  }
  const int64_t* starts = p.starts;
  int64_t k = std::upper_bound(starts, starts + p.sequences, s.from) - starts - 1;
  for (; k < p.sequences && starts[k] < s.to; ++k) {
    body(Piece{p.sequence(k), std::max(s.from, starts[k]) - starts[k],
               std::min(s.to, starts[k + 1]) - starts[k]});
  }
}

int64_t padded(int64_t d) {
  const int64_t most = vector_bytes / 4;
  return (d + most - 1) / most * most;
}

// Calls body(channel, count) for each vector of channels, where count is a constant for all but
// the last.
template <typename S, typename Body>
MAMBAKIT_INLINE void for_each_vector(int64_t channels, const Body& body) {
  constexpr int width = lanes<S>;
  int64_t c = 0;
  for (; c + width <= channels; c += width) body(c, std::integral_constant<int, width>{});
  if (c < channels) body(c, static_cast<int>(channels - c));
}

template <typename T, typename Count>
MAMBAKIT_INLINE Vec<Compute<T>> get(const T* p, Count count) {
  if constexpr (std::is_same_v<Count, int>) {
    return load_part(p, count);
  } else {
    return load(p);
  }
}

template <typename T, typename Count>
MAMBAKIT_INLINE void put(T* p, Vec<Compute<T>> v, Count count) {
  if constexpr (std::is_same_v<Count, int>) {
    store_part(p, v, count);
  } else {
    store(p, v);
  }
}

// ---------------------------------------------------------------- forward

// x[i] is the row of time t - (w - 1) + i, y[i] the row of time t + i. W is w, or 0 for any.
template <typename T, int W, bool silu, int rows>
MAMBAKIT_INLINE void forward_rows(const T* const* x, T* const* y, const Compute<T>* weight,
                                  int64_t d_padded, int64_t w, int64_t channels) {
  using S = Compute<T>;
  using V = Vec<S>;
  for_each_vector<S>(channels, [&](int64_t c, auto count) MAMBAKIT_INLINE_LAMBDA {
    const V bias = load(weight + w * d_padded + c);
    V out[rows];
    if constexpr (W > 0) {
      V tap[W], in[rows + W - 1];
      for (int k = 0; k < W; ++k) tap[k] = load(weight + k * d_padded + c);
      for (int i = 0; i < rows + W - 1; ++i) in[i] = get(x[i] + c, count);
      for (int i = 0; i < rows; ++i) {
        out[i] = bias;
        for (int k = 0; k < W; ++k) out[i] += tap[k] * in[i + k];
      }
    } else {
      for (int i = 0; i < rows; ++i) out[i] = bias;
      for (int64_t k = 0; k < w; ++k) {
        const V tap = load(weight + k * d_padded + c);
        for (int i = 0; i < rows; ++i) out[i] += tap * get(x[i + k] + c, count);
      }
    }
    for (int i = 0; i < rows; ++i) {
      if constexpr (silu) out[i] *= sigmoid<S>(out[i]);
      put(y[i] + c, out[i], count);
    }
  });
}

template <typename T, int W, bool silu>
bool forward_strip(const Problem& p, const Strip& s, const Rows& y) {
  using S = Compute<T>;
  const FlushDenormals flush;
  const S* weight = static_cast<const S*>(p.weight) + s.first_channel;
  const Scratch memory((rows_at_once + p.w - 1) * sizeof(T*));
  if (!memory) return false;
  const T** in = memory.at<const T*>(0);
  T* out[rows_at_once];
  for_each_piece(p, s, [&](const Piece& piece) {
    const Sequence& sequence = piece.sequence;
    int64_t t = piece.from;
    const auto point = [&](int rows) {
      for (int64_t i = 0; i < rows + p.w - 1; ++i)
        in[i] = p.input<T>(sequence, t - (p.w - 1) + i) + s.first_channel;
      for (int i = 0; i < rows; ++i)
        out[i] = y.at<T>(s.b, sequence.start + t + i) + s.first_channel;
    };
    for (; t + rows_at_once <= piece.to; t += rows_at_once) {
      point(rows_at_once);
      forward_rows<T, W, silu, rows_at_once>(in, out, weight, p.d_padded, p.w, s.channels);
    }
    for (; t < piece.to; ++t) {
      point(1);
      forward_rows<T, W, silu, 1>(in, out, weight, p.d_padded, p.w, s.channels);
    }
  });
  return true;
}

template <typename T>
void copy_last_state(const Problem& p, const Sequence& s, const Rows& last) {
  for (int64_t r = 0; r < p.w - 1; ++r)
    std::memcpy(last.at<T>(s.row, r), p.input<T>(s, s.length - (p.w - 1) + r), p.d * sizeof(T));
}

// ---------------------------------------------------------------- backward

// With g_t the gradient of pre_t,
//
//     dx_s = sum_k weight[:, k] g_{s + w - 1 - k},
//
// so the row of time t - (w - 1) is complete when g_t is known. `window` holds, as scalars, the
// w - 1 rows of g before time t and has room for the rows made here; x as in the forward, dx[i] is
// the row of time t - (w - 1) + i or null where nobody wants it, sums are w rows of the weight's
// gradient and one of the bias's. Only sums of rows that are the strip's own are kept: `own`.
template <typename T, int W, bool silu, int rows>
MAMBAKIT_INLINE void backward_rows(const T* const* x, const T* const* dy, T* const* dx,
                                   const Compute<T>* weight, int64_t d_padded, int64_t w,
                                   int64_t channels, Compute<T>* window, Compute<T>* sums,
                                   bool own) {
  using S = Compute<T>;
  using V = Vec<S>;
  for_each_vector<S>(channels, [&](int64_t c, auto count) MAMBAKIT_INLINE_LAMBDA {
    const V bias = load(weight + w * d_padded + c);
    const auto gradient = [&](V pre, int i) {
      const V g = get(dy[i] + c, count);
      if constexpr (!silu) return g;
      const V sig = sigmoid<S>(pre);
      return V(g * (sig + sig * pre * (S(1) - sig)));
    };
    if constexpr (W > 0) {
      V tap[W], in[rows + W - 1], g[rows + W - 1];
      for (int k = 0; k < W; ++k) tap[k] = load(weight + k * d_padded + c);
      for (int i = 0; i < rows + W - 1; ++i) in[i] = get(x[i] + c, count);
      for (int i = 0; i < W - 1; ++i) g[i] = load(window + i * block_channels + c);
      for (int i = 0; i < rows; ++i) {
        V pre = bias;
        for (int k = 0; k < W; ++k) pre += tap[k] * in[i + k];
        g[i + W - 1] = gradient(pre, i);
        if (dx[i]) {
          V out{};
          for (int k = 0; k < W; ++k) out += tap[k] * g[i + W - 1 - k];
          put(dx[i] + c, out, count);
        }
      }
      if (own) {
        for (int k = 0; k < W; ++k) {
          V sum = load(sums + k * d_padded + c);
          for (int i = 0; i < rows; ++i) sum += g[i + W - 1] * in[i + k];
          store(sums + k * d_padded + c, sum);
        }
        V sum = load(sums + w * d_padded + c);
        for (int i = 0; i < rows; ++i) sum += g[i + W - 1];
        store(sums + w * d_padded + c, sum);
      }
      for (int i = 0; i < W - 1; ++i) store(window + i * block_channels + c, g[rows + i]);
    } else {
      V pre[rows];
      for (int i = 0; i < rows; ++i) pre[i] = bias;
      if constexpr (silu) {
        for (int64_t k = 0; k < w; ++k) {
          const V tap = load(weight + k * d_padded + c);
          for (int i = 0; i < rows; ++i) pre[i] += tap * get(x[i + k] + c, count);
        }
      }
      V g[rows], out[rows];
      for (int i = 0; i < rows; ++i) {
        g[i] = gradient(pre[i], i);
        store(window + (i + w - 1) * block_channels + c, g[i]);
        out[i] = V{};
      }
      for (int64_t k = 0; k < w; ++k) {
        const V tap = load(weight + k * d_padded + c);
        for (int i = 0; i < rows; ++i)
          out[i] += tap * load(window + (i + w - 1 - k) * block_channels + c);
      }
      for (int i = 0; i < rows; ++i)
        if (dx[i]) put(dx[i] + c, out[i], count);
      if (own) {
        for (int64_t k = 0; k < w; ++k) {
          V sum = load(sums + k * d_padded + c);
          for (int i = 0; i < rows; ++i) sum += g[i] * get(x[i + k] + c, count);
          store(sums + k * d_padded + c, sum);
        }
        V sum = load(sums + w * d_padded + c);
        for (int i = 0; i < rows; ++i) sum += g[i];
        store(sums + w * d_padded + c, sum);
      }
      for (int64_t i = 0; i < w - 1; ++i)
        store(window + i * block_channels + c, load(window + (i + rows) * block_channels + c));
    }
  });
}

// The last w - 1 rows of a sequence's dx: no g lies beyond its end, and these inputs are also the
// last state, whose gradient joins here.
template <typename T>
void backward_end(const Problem& p, const Strip& s, int64_t row, const Rows& dlast, T* const* dx,
                  const Compute<T>* weight, const Compute<T>* window) {
  using S = Compute<T>;
  for (int64_t r = 0; r < p.w - 1; ++r) {
    if (!dx[r]) continue;
    for_each_vector<S>(s.channels, [&](int64_t c, auto count) MAMBAKIT_INLINE_LAMBDA {
      Vec<S> out{};
      for (int64_t k = r + 1; k < p.w; ++k)
        out += load(weight + k * p.d_padded + c) *
               load(window + (r + p.w - 1 - k) * block_channels + c);
      if (dlast.data) out += get(dlast.at<T>(row, r) + s.first_channel + c, count);
      put(dx[r] + c, out, count);
    });
  }
}

struct Gradients {
  Rows dy, dlast;      // dlast.data may be null: zeros
  Rows dx, dstate;     // dstate.data may be null: not wanted
  void* sums;          // (strips in time of all sequences, w + 1, d_padded) scalars

  template <typename T>
  T* output(const Sequence& s, int64_t time, int64_t w) const {
    if (time >= 0) return dx.at<T>(s.batch, s.start + time);
    return dstate.data ? dstate.at<T>(s.row, time + w - 1) : nullptr;
  }
};

template <typename T, int W, bool silu>
bool backward_strip(const Problem& p, const Strip& s, const Gradients& g) {
  using S = Compute<T>;
  const FlushDenormals flush;
  const S* weight = static_cast<const S*>(p.weight) + s.first_channel;
  S* sums = static_cast<S*>(g.sums) + s.index * (p.w + 1) * p.d_padded + s.first_channel;
  for (int64_t k = 0; k <= p.w; ++k)
    std::fill_n(sums + k * p.d_padded, std::min(block_channels, p.d_padded - s.first_channel),
                S(0));

  const int64_t rows = rows_at_once + p.w - 1;
  const size_t window_bytes = rows * block_channels * sizeof(S);
  const Scratch memory(window_bytes + 2 * rows * sizeof(T*));
  if (!memory) return false;
  S* window = memory.at<S>(0);
  const T** in = memory.at<const T*>(window_bytes);
  T** out = memory.at<T*>(window_bytes + rows * sizeof(T*));
  const T* dy[rows_at_once];
  for_each_piece(p, s, [&](const Piece& piece) {
    const Sequence& sequence = piece.sequence;
    std::fill_n(window, (p.w - 1) * block_channels, S(0));
    // the rows of g that the strip before has, needed again for the first rows of dx here
    int64_t t = std::max<int64_t>(0, piece.from - (p.w - 1));
    const auto point = [&](int count) {
      for (int64_t i = 0; i < count + p.w - 1; ++i)
        in[i] = p.input<T>(sequence, t - (p.w - 1) + i) + s.first_channel;
      for (int i = 0; i < count; ++i) {
        dy[i] = g.dy.at<T>(s.b, sequence.start + t + i) + s.first_channel;
        T* row = t < piece.from ? nullptr : g.output<T>(sequence, t - (p.w - 1) + i, p.w);
        out[i] = row ? row + s.first_channel : nullptr;
      }
    };
    for (; t < piece.from; ++t) {
      point(1);
      backward_rows<T, W, silu, 1>(in, dy, out, weight, p.d_padded, p.w, s.channels, window,
                                   sums, false);
    }
    for (; t + rows_at_once <= piece.to; t += rows_at_once) {
      point(rows_at_once);
      backward_rows<T, W, silu, rows_at_once>(in, dy, out, weight, p.d_padded, p.w, s.channels,
                                              window, sums, true);
    }
    for (; t < piece.to; ++t) {
      point(1);
      backward_rows<T, W, silu, 1>(in, dy, out, weight, p.d_padded, p.w, s.channels, window,
                                   sums, true);
    }
    if (piece.to == sequence.length) {
      for (int64_t r = 0; r < p.w - 1; ++r) {
        T* row = g.output<T>(sequence, sequence.length - (p.w - 1) + r, p.w);
        out[r] = row ? row + s.first_channel : nullptr;
      }
      backward_end<T>(p, s, sequence.row, g.dlast, out, weight, window);
    }
  });
  return true;
}

// Adds the strips' sums in their order, into dweight (d, w) and dbias (d).
template <typename S>
void add_sums(const Problem& p, const S* sums, int64_t block, S* dweight, S* dbias) {
  const int64_t first = block * block_channels, count = std::min(block_channels, p.d - first);
  for (int64_t k = 0; k <= p.w; ++k) {
    S total[block_channels] = {};
    for (int64_t index = 0; index < p.b * p.spans; ++index) {
      const S* row = sums + (index * (p.w + 1) + k) * p.d_padded + first;
      for (int64_t c = 0; c < count; ++c) total[c] += row[c];
    }
    for (int64_t c = 0; c < count; ++c) {
      if (k < p.w) {
        dweight[(first + c) * p.w + k] = total[c];
      } else {
        dbias[first + c] = total[c];
      }
    }
  }
}

// ---------------------------------------------------------------- entry points

// Calls body with a null pointer to the storage type that a code names.
template <typename Body>
bool with_dtype(int32_t dtype, const Body& body) {
  switch (dtype) {
    case float32: return body(static_cast<float*>(nullptr));
    case bfloat16: return body(static_cast<BFloat16*>(nullptr));
    case float16: return body(static_cast<Float16*>(nullptr));
    case float64: return body(static_cast<double*>(nullptr));
  }
  return false;
}

template <typename T, typename Body>
bool with_width(int64_t w, bool silu, const Body& body) {
  if (w == 4) {
    return silu ? body(std::integral_constant<int, 4>{}, std::true_type{})
                : body(std::integral_constant<int, 4>{}, std::false_type{});
  }
  return silu ? body(std::integral_constant<int, 0>{}, std::true_type{})
              : body(std::integral_constant<int, 0>{}, std::false_type{});
}

// Turns a column of a parameter of any dtype into scalars; missing means zeros.
template <typename S>
void fill_column(S* out, int64_t d, int64_t d_padded, const void* from, int32_t dtype,
                 int64_t offset, int64_t stride) {
  if (from) {
    with_dtype(dtype, [&](auto* type) {
      using E = std::remove_pointer_t<decltype(type)>;
      const E* at = static_cast<const E*>(from) + offset;
      for (int64_t c = 0; c < d; ++c) out[c] = static_cast<S>(to_scalar(at[c * stride]));
      return true;
    });
  }
  const int64_t first = from ? d : 0;
  std::fill_n(out + first, d_padded - first, S(0));
}

// A parameter of the convolution as the caller has it.
struct Parameter {
  const void* data;
  int32_t dtype;
  int64_t d_stride, w_stride;
};

// Completes p with the parameters as scalars and a row of zeros, both kept in the memory that
// `prepared_bytes` counts.
template <typename T>
void prepare(Problem& p, const Parameter& weight, const Parameter& bias, const Scratch& memory) {
  using S = Compute<T>;
  S* columns = memory.at<S>(0);
  for (int64_t k = 0; k < p.w; ++k)
    fill_column(columns + k * p.d_padded, p.d, p.d_padded, weight.data, weight.dtype,
                k * weight.w_stride, weight.d_stride);
  fill_column(columns + p.w * p.d_padded, p.d, p.d_padded, bias.data, bias.dtype, 0,
              bias.d_stride);
  T* zeros = memory.at<T>((p.w + 1) * p.d_padded * sizeof(S));
  std::memset(static_cast<void*>(zeros), 0, p.d_padded * sizeof(T));
  p.weight = columns;
  p.zeros = zeros;
}

size_t prepared_bytes(const Problem& p) { return (p.w + 2) * p.d_padded * sizeof(double); }

Problem problem(int64_t b, int64_t l, int64_t d, int64_t w, int64_t sequences,
                const int64_t* starts, Rows x, Rows state) {
  Problem p{};
  p.b = b, p.l = l, p.d = d, p.w = w, p.x = x, p.state = state;
  p.sequences = sequences, p.starts = starts;
  p.d_padded = padded(d);
  p.span = std::max<int64_t>(128, 16 * w);
  p.spans = std::max<int64_t>(1, (l + p.span - 1) / p.span);
  p.blocks = (d + block_channels - 1) / block_channels;
  return p;
}

// A second thread pays when each has some ten microseconds of work.
int worthwhile(const Problem& p, int threads) {
  return p.b * p.l * p.d < 1 << 15 ? 1 : threads;
}

}  // namespace
}  // namespace mambakit

// Both return whether there was memory to work in. Pointers may be null where the text says so.
extern "C" {

// y (b, l, d) and last (sequences, w - 1, d) are dense. state, starts and bias may be null.
MK_EXPORT bool mk_conv_forward(
    int32_t dtype, bool silu, int32_t threads,
    int64_t b, int64_t l, int64_t d, int64_t w, int64_t sequences, const int64_t* starts,
    const void* x, int64_t x_batch, int64_t x_row,
    const void* weight, int32_t weight_dtype, int64_t weight_d, int64_t weight_w,
    const void* bias, int32_t bias_dtype, int64_t bias_d,
    const void* state, int64_t state_batch, int64_t state_row,
    void* y, void* last) {
  using namespace mambakit;
  Problem p = problem(b, l, d, w, sequences, starts, {const_cast<void*>(x), x_batch, x_row},
                      {const_cast<void*>(state), state_batch, state_row});
  const Scratch memory(prepared_bytes(p));
  if (!memory) return false;
  return with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    prepare<T>(p, {weight, weight_dtype, weight_d, weight_w}, {bias, bias_dtype, bias_d, 0},
               memory);
    prefer_large_pages(y, b * l * d * sizeof(T));
    const bool done = with_width<T>(w, silu, [&](auto width, auto with_silu) {
      std::atomic<bool> enough{true};
      for_each_task(p.b * p.spans * p.blocks, worthwhile(p, threads), [&](int64_t task) {
        if (!forward_strip<T, width(), with_silu()>(p, strip_of(p, task), {y, l * d, d}))
          enough = false;
      });
      return enough.load();
    });
    if (!done) return false;
    for_each_task(p.sequences, worthwhile(p, threads), [&](int64_t k) {
      copy_last_state<T>(p, p.sequence(k), {last, (w - 1) * d, d});
    });
    return true;
  });
}

// dx (b, l, d), dstate (sequences, w - 1, d), dweight (d, w) and dbias (d) are dense; the last two
// are of the scalar that is computed in. state, starts, bias, dlast and dstate may be null.
MK_EXPORT bool mk_conv_backward(
    int32_t dtype, bool silu, int32_t threads,
    int64_t b, int64_t l, int64_t d, int64_t w, int64_t sequences, const int64_t* starts,
    const void* dy, int64_t dy_batch, int64_t dy_row,
    const void* dlast, int64_t dlast_batch, int64_t dlast_row,
    const void* x, int64_t x_batch, int64_t x_row,
    const void* weight, int32_t weight_dtype, int64_t weight_d, int64_t weight_w,
    const void* bias, int32_t bias_dtype, int64_t bias_d,
    const void* state, int64_t state_batch, int64_t state_row,
    void* dx, void* dweight, void* dbias, void* dstate) {
  using namespace mambakit;
  Problem p = problem(b, l, d, w, sequences, starts, {const_cast<void*>(x), x_batch, x_row},
                      {const_cast<void*>(state), state_batch, state_row});
  const Scratch memory(prepared_bytes(p));
  const Scratch sums(p.b * p.spans * (w + 1) * p.d_padded *
                     (dtype == float64 ? sizeof(double) : sizeof(float)));
  if (!memory || !sums) return false;
  Gradients g{{const_cast<void*>(dy), dy_batch, dy_row},
              {const_cast<void*>(dlast), dlast_batch, dlast_row},
              {dx, l * d, d},
              {dstate, (w - 1) * d, d},
              sums.at<void>(0)};
  return with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using S = Compute<T>;
    prepare<T>(p, {weight, weight_dtype, weight_d, weight_w}, {bias, bias_dtype, bias_d, 0},
               memory);
    prefer_large_pages(dx, b * l * d * sizeof(T));
    const int team = worthwhile(p, threads);
    const bool done = with_width<T>(w, silu, [&](auto width, auto with_silu) {
      std::atomic<bool> enough{true};
      for_each_task(p.b * p.spans * p.blocks, team, [&](int64_t task) {
        if (!backward_strip<T, width(), with_silu()>(p, strip_of(p, task), g)) enough = false;
      });
      return enough.load();
    });
    if (!done) return false;
    for_each_task(p.blocks, team, [&](int64_t block) {
      add_sums(p, static_cast<const S*>(g.sums), block, static_cast<S*>(dweight),
               static_cast<S*>(dbias));
    });
    return true;
  });
}

}  // extern "C"
