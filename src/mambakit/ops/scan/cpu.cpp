// The selective scan on CPU, forward and backward. Plain C interface.
//
//     h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t ;   y_t = (C_t . h_t + D x_t) silu(gate_t)
//
// The lanes of a vector are neighbouring channels (a block). Time is walked in tiles of 24 steps.
// Within a tile, softplus, the products with dt and the gate are loops of their own over small
// arrays; the recurrence then takes 4 states at a time and keeps them and their rates in
// registers from the tile's first step to its last. Nothing of size (b, l, d, n) exists: backward
// starts from the state before each tile (a checkpoint), runs the tile again, keeping the decays
// and states of 4 state indices in the L1 cache, and walks back over them.
//
// Work is cut into spans: some blocks of one group of channels in one sequence. Where those are
// too few for the threads, a span covers a chunk of the sequence only: a first pass finds what
// each chunk does to a state of zeros, chunks are joined by exp(A sum dt), the decay over a whole
// chunk, and the second pass knows where each chunk starts.
//
// A pack, sequences that lie end to end, is one row of the batch whose tiles end where a sequence
// does. A span walks it as it walks one sequence, and where a tile belongs to another sequence than
// the tile before, it puts one state down and takes up the other.
//
// Sums over channels and sequences are made within a span first and then from span to span in
// their order, whichever thread ran them: results repeat bit for bit for a given thread count.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "../_pages.h"
#include "../_simd.h"
#include "../_threads.h"

namespace mambakit {
namespace {

// Short enough for what backward touches for a block to stay about in a 48 KB L1 cache: the trail
// of 4 states (12 KB), the sums of their tokens (12 KB), the tile's arrays (14 KB) and its rows.
// 32 steps took a tenth more time backward; 16 hardly less, but more forward.
constexpr int tile_steps = 24;
constexpr int group_of_states = 4;
constexpr double log2e = 1.44269504088896340736;
constexpr double ln2 = 0.693147180559945309417;

enum Dtype : int64_t { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

// A tensor (b, l, d) or (b, l, g, n) whose last axis is dense; strides count elements.
struct Rows {
  void* data;  // null: there is no such tensor
  int64_t batch, time, group;
  int64_t dtype;
};

}  // namespace

// What Python passes, field by field (cpu.py has the same list). Pointers without a type are to
// dense arrays of the scalar that is computed in: float, or double if x is double.
struct ScanArguments {
  int64_t b, l, d, n, g;
  int64_t softplus, threads;
  int64_t sequences;                         // b, or how many a pack holds
  const int64_t* starts;                     // null, or where each of a pack begins; then l
  Rows x, dt, gate, B, C;
  const void *A, *D, *dt_bias;               // (d, n), (d), (d)
  const void *B_constant, *C_constant;       // (d, n) in place of B, C
  const void* state;                         // (sequences, d, n)
  void* checkpoints;                         // (b, tiles, n, d), but see write_packed()
  Rows y;
  void* last_state;                          // (sequences, d, n)
  Rows dy;
  const void* dlast_state;
  Rows dx, ddt, dgate, dB, dC;
  void *dA, *dD, *ddt_bias, *dB_constant, *dC_constant, *dstate;
};

namespace {

using Arguments = ScanArguments;

// ---------------------------------------------------------------- memory

// One allocation, handed out in pieces that start on cache lines.
class Workspace {
 public:
  Workspace(size_t bytes, int pieces) {
    const size_t whole = bytes + (pieces + 1) * 2 * line;
    memory_ = std::malloc(whole);
    next_ = (reinterpret_cast<uintptr_t>(memory_) + line) / line * line;
  }
  ~Workspace() { std::free(memory_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  explicit operator bool() const { return memory_ != nullptr; }

  template <typename T>
  T* take(size_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + line - 1) / line * line;
    return piece;
  }

  template <typename T>
  T* take_zeros(size_t count) {
    T* piece = take<T>(count);
    std::memset(static_cast<void*>(piece), 0, count * sizeof(T));
    return piece;
  }

 private:
  static constexpr size_t line = 64;
  void* memory_;
  uintptr_t next_;
};

// Calls body(pointer) with the type that the tensor is stored in.
template <typename S, typename Body>
MAMBAKIT_INLINE void with_storage(const Rows& rows, const Body& body) {
  if constexpr (std::is_same_v<S, double>) {
    body(static_cast<double*>(rows.data));
  } else if (rows.dtype == bfloat16) {
    body(static_cast<BFloat16*>(rows.data));
  } else if (rows.dtype == float16) {
    body(static_cast<Float16*>(rows.data));
  } else {
    body(static_cast<float*>(rows.data));
  }
}

// ---------------------------------------------------------------- where a span is

// A block is one vector of channels; `count` of its lanes are channels that exist. The other
// lanes read zeros everywhere, stay at zero and are never written.
struct Block {
  int64_t channel;
  int count;
};

struct Span {
  int64_t batch, group, index;          // index counts (batch, chunk)
  int64_t first_block, blocks;
  int64_t first_tile, last_tile;        // [first, last)
  int64_t chunk, part;                  // part: which of its group's spans of channels
};

// The sequence and the steps of a tile.
struct Place {
  int64_t sequence, t0;
  int steps;
};

// How the work is cut: each group's channels into `blocks` blocks and `parts` spans of them, and
// each row of the batch into `chunks`.
struct Plan {
  int64_t blocks, parts, chunks, tiles;
  int width, threads;
  // of each tile of a pack: its sequence and its first step
  const int64_t *sequences = nullptr, *steps = nullptr;

  int64_t tasks(const Arguments& a) const { return a.b * a.g * parts * chunks; }

  Span span(const Arguments& a, int64_t task) const {
    Span s;
    s.part = task % parts, task /= parts;
    s.chunk = task % chunks, task /= chunks;
    s.group = task % a.g, task /= a.g;
    s.batch = task;
    s.index = s.batch * chunks + s.chunk;
    s.first_block = blocks * s.part / parts;
    s.blocks = blocks * (s.part + 1) / parts - s.first_block;
    s.first_tile = cut(a, s.chunk);
    s.last_tile = cut(a, s.chunk + 1);
    return s;
  }

  // The first tile of a chunk. Those of a pack have about as many steps each, for its tiles are
  // of any length.
  int64_t cut(const Arguments& a, int64_t chunk) const {
    if (!a.starts) return tiles * chunk / chunks;
    return std::lower_bound(steps, steps + tiles, a.l * chunk / chunks) - steps;
  }

  Place place(const Arguments& a, int64_t batch, int64_t tile) const {
    const int64_t sequence = a.starts ? sequences[tile] : batch;
    const int64_t t0 = a.starts ? steps[tile] : tile * tile_steps;
    const int64_t end = a.starts ? a.starts[sequence + 1] : a.l;
    return {sequence, t0, static_cast<int>(std::min<int64_t>(tile_steps, end - t0))};
  }

  // Whether a sequence ends before the tile, so that no state crosses.
  bool is_edge(const Arguments& a, int64_t tile) const {
    if (tile == 0 || tile == tiles) return true;
    return a.starts && sequences[tile] != sequences[tile - 1];
  }

  // What the first pass walks of a chunk: its part of the sequence that goes on in the next chunk
  // in `direction`.
  Span handed_on(const Arguments& a, Span s, int direction) const {
    if (!a.starts) return s;
    const int64_t* end = sequences + tiles;
    if (direction > 0) {
      const int64_t* from = std::lower_bound(sequences, end, sequences[s.last_tile - 1]);
      s.first_tile = std::max<int64_t>(s.first_tile, from - sequences);
    } else {
      const int64_t* to = std::upper_bound(sequences, end, sequences[s.first_tile]);
      s.last_tile = std::min<int64_t>(s.last_tile, to - sequences);
    }
    return s;
  }

  Block block(const Arguments& a, const Span& s, int64_t k) const {
    const int64_t size = a.d / a.g, within = (s.first_block + k) * width;
    return {s.group * size + within,
            static_cast<int>(std::min<int64_t>(width, size - within))};
  }
};

// `least_chunks`: the first pass over the chunks costs nearly a second forward and a third of a
// backward, so fewer chunks than this would not pay for it.
Plan plan(const Arguments& a, int width, int64_t least_chunks) {
  Plan p;
  p.width = width;
  const int64_t size = a.d / a.g;
  p.blocks = (size + width - 1) / width;
  const auto in_tiles = [](int64_t steps) { return (steps + tile_steps - 1) / tile_steps; };
  p.tiles = a.starts ? 0 : in_tiles(a.l);
  for (int64_t k = 0; a.starts && k < a.sequences; ++k) {
    p.tiles += in_tiles(a.starts[k + 1] - a.starts[k]);
  }
  p.parts = p.chunks = 1;
  // A second thread pays when each has some ten microseconds of work.
  const int64_t rows = a.b * a.g, vectors = rows * p.blocks * a.l * (a.n + 4);
  p.threads = vectors < 1 << 13 ? 1 : static_cast<int>(a.threads);
  if (p.threads == 1) return p;
  if (rows * p.blocks >= p.threads) {
    // Twice as many spans as threads: a thread that the system delays is helped by the others.
    p.parts = std::min(p.blocks, (2 * p.threads + rows - 1) / rows);
    return p;
  }
  p.parts = p.blocks;
  int64_t chunks = std::min(p.tiles, p.threads / (rows * p.blocks));
  if (a.starts) {
    chunks = std::min(chunks, a.l / tile_steps);  // a tile for each
    // of short sequences little is handed on, and the first pass has little to do
    if (a.sequences >= 4 * chunks) least_chunks = 2;
  }
  if (chunks >= least_chunks) p.chunks = chunks;
  return p;
}

// Fills in the tiles of a pack: `table` has room for two numbers a tile.
void list_tiles(const Arguments& a, Plan& p, int64_t* table) {
  int64_t *sequences = table, *steps = table + p.tiles;
  p.sequences = sequences, p.steps = steps;
  for (int64_t k = 0; k < a.sequences; ++k) {
    for (int64_t t = a.starts[k]; t < a.starts[k + 1]; t += tile_steps) {
      *sequences++ = k, *steps++ = t;
    }
  }
}

// ---------------------------------------------------------------- rows in and out

// The tile of one block, from the tensor to `tile` and back. What lies beyond the block's
// channels reads as zero and is not written.
template <typename S>
void read_tile(Vec<S>* tile, const Rows& rows, int64_t batch, int64_t t0, int steps,
               Block block) {
  with_storage<S>(rows, [&](auto* data) {
    const auto* from = data + batch * rows.batch + t0 * rows.time + block.channel;
    if (block.count == lanes<S>) {
      for (int t = 0; t < steps; ++t) tile[t] = load(from + t * rows.time);
    } else {
      for (int t = 0; t < steps; ++t) tile[t] = load_part(from + t * rows.time, block.count);
    }
  });
}

// Whether every row of a block's tile is a cache line of its own, which stream() can write.
template <typename S>
bool is_lines(const Rows& rows, int64_t batch, Block block) {
  bool lines = false;
  with_storage<S>(rows, [&](auto* data) {
    using T = std::remove_pointer_t<decltype(data)>;
    const auto address = reinterpret_cast<uintptr_t>(data + batch * rows.batch + block.channel);
    lines = fills_line<T> && block.count == lanes<S> && address % vector_bytes == 0 &&
            rows.time * sizeof(T) % vector_bytes == 0;
  });
  return lines;
}

// Before another thread reads what was written, finish_streams() must be called.
template <typename S>
void write_tile(const Vec<S>* tile, const Rows& rows, int64_t batch, int64_t t0, int steps,
                Block block) {
  const bool lines = is_lines<S>(rows, batch, block);
  with_storage<S>(rows, [&](auto* data) {
    auto* to = data + batch * rows.batch + t0 * rows.time + block.channel;
    if (lines) {
      for (int t = 0; t < steps; ++t) stream(to + t * rows.time, tile[t]);
    } else if (block.count == lanes<S>) {
      for (int t = 0; t < steps; ++t) store(to + t * rows.time, tile[t]);
    } else {
      for (int t = 0; t < steps; ++t) store_part(to + t * rows.time, tile[t], block.count);
    }
  });
}

// n numbers of each of the block's channels, out of or into a dense (d, n) array.
template <typename S>
void read_channels(Vec<S>* out, const void* array, int64_t n, Block block, S factor = 1) {
  const S* from = static_cast<const S*>(array) + block.channel * n;
  for (int64_t i = 0; i < n; ++i) {
    Vec<S> v{};
    for (int c = 0; c < block.count; ++c) v[c] = from[c * n + i] * factor;
    out[i] = v;
  }
}

template <typename S>
void write_channels(void* array, const Vec<S>* in, int64_t n, Block block) {
  S* to = static_cast<S*>(array) + block.channel * n;
  for (int c = 0; c < block.count; ++c) {
    for (int64_t i = 0; i < n; ++i) to[c * n + i] = in[i][c];
  }
}

// The same out of or into a dense (n, d) array, which needs no transposition.
template <typename S>
void read_plane(Vec<S>* out, const S* plane, int64_t n, int64_t d, Block block) {
  for (int64_t i = 0; i < n; ++i) {
    const S* from = plane + i * d + block.channel;
    out[i] = block.count == lanes<S> ? load(from) : load_part(from, block.count);
  }
}

template <typename S>
void write_plane(S* plane, const Vec<S>* in, int64_t n, int64_t d, Block block) {
  for (int64_t i = 0; i < n; ++i) {
    S* to = plane + i * d + block.channel;
    if (block.count == lanes<S>) {
      store(to, in[i]);
    } else {
      store_part(to, in[i], block.count);
    }
  }
}

// The same out of or into an array that the kernel alone reads: block after block, so that one
// block's numbers are one piece of memory.
template <typename S>
void read_packed(Vec<S>* out, const S* array, int64_t n, Block block) {
  const S* from = array + block.channel * n;
  if (block.count == lanes<S>) {
    std::memcpy(static_cast<void*>(out), from, n * sizeof(Vec<S>));
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = load_part(from + i * block.count, block.count);
  }
}

template <typename S>
void write_packed(S* array, const Vec<S>* in, int64_t n, Block block) {
  S* to = array + block.channel * n;
  if (block.count == lanes<S>) {
    std::memcpy(to, static_cast<const void*>(in), n * sizeof(Vec<S>));
  } else {
    for (int64_t i = 0; i < n; ++i) store_part(to + i * block.count, in[i], block.count);
  }
}

// One number of each of the block's channels; zeros if there is no array.
template <typename S>
Vec<S> read_vector(const void* array, Block block) {
  if (!array) return Vec<S>{};
  return load_part(static_cast<const S*>(array) + block.channel, block.count);
}

template <typename S>
void write_vector(void* array, Vec<S> v, Block block) {
  store_part(static_cast<S*>(array) + block.channel, v, block.count);
}

// B or C of one group for a tile of time, as scalars (steps, n).
template <typename S>
void read_tokens(S* out, const Rows& rows, int64_t n, const Span& span, int64_t t0, int steps) {
  with_storage<S>(rows, [&](auto* data) {
    const auto* from = data + span.batch * rows.batch + t0 * rows.time + span.group * rows.group;
    for (int t = 0; t < steps; ++t, from += rows.time, out += n) {
      int64_t i = 0;
      for (; i + lanes<S> <= n; i += lanes<S>) store(out + i, load(from + i));
      if (i < n) store_part(out + i, load_part(from + i, n - i), n - i);
    }
  });
}

// ---------------------------------------------------------------- functions of a step

// e = exp(-|v|), from which softplus and its slope are both made.
struct SoftplusFloat {
  Vec<float> v, e;

  explicit SoftplusFloat(Vec<float> raw)
      : v(raw), e(exp2_product((Vec<float>)(bits_of<float>(raw) | 0x80000000u),
                              splat(static_cast<float>(log2e)))) {}

  // max(v, 0) + log(1 + e); the polynomial is log(1 + e) / e, minimax on [0, 1], error 3e-8.
  Vec<float> value() const {
    Vec<float> p = splat(0.005232675466686487f);
    p = p * e - 0.029505161568522453f;
    p = p * e + 0.07822582125663757f;
    p = p * e - 0.13663235306739807f;
    p = p * e + 0.19106000661849976f;
    p = p * e - 0.2484298050403595f;
    p = p * e + 0.3331909775733948f;
    p = p * e - 0.4999949336051941f;
    p = p * e + 0.9999999403953552f;
    return p * e + at_least(v, 0.0f);
  }

  // 1 / (1 + exp(-v)) without an overflow for any sign of v.
  Vec<float> slope() const {
    const Vec<float> r = reciprocal(1.0f + e);
    return v > 0.0f ? r : e * r;
  }
};

struct SoftplusDouble {
  Vec<double> v, e;

  explicit SoftplusDouble(Vec<double> raw) : v(raw), e{} {
    for (int i = 0; i < lanes<double>; ++i) e[i] = std::exp(-std::fabs(v[i]));
  }
  Vec<double> value() const {
    Vec<double> out{};
    for (int i = 0; i < lanes<double>; ++i) {
      out[i] = (v[i] > 0 ? v[i] : 0.0) + std::log1p(e[i]);
    }
    return out;
  }
  Vec<double> slope() const { return (v > 0.0 ? splat(1.0) : e) / (1.0 + e); }
};

template <typename S>
using Softplus = std::conditional_t<std::is_same_v<S, double>, SoftplusDouble, SoftplusFloat>;

// Lines to ask for ahead of time, one for each step: those of some rows of a tensor.
struct Ahead {
  const char* rows;
  const int64_t* offsets;

  // Into the L2 cache: rows are a multiple of 4 KB apart more often than not, and would displace
  // one another in L1.
  void fetch(int64_t t) const { __builtin_prefetch(rows + offsets[t], 0, 2); }
};

// Asks for what comes after the 8 blocks that are at work, an eighth of its rows during each of
// them. A row is asked for 8 blocks at once: rows lie on different pages, and to find a page
// takes longer than to fetch a line. The lines are dealt out evenly to a block's passes over its
// tile, since the processor can wait for a dozen of them at a time and no more.
class Fetcher {
 public:
  static constexpr int blocks = 8;

  // `passes`: how often a block's recurrence walks its tile.
  Fetcher(int64_t batch, int width, int64_t passes)
      : batch_(batch), width_(width), passes_(passes) {}

  void add(const Rows& rows) {
    if (!rows.data) return;
    Source& source = sources_[size_++];
    source.bytes = rows.dtype == float64 ? 8 : rows.dtype == float32 ? 4 : 2;
    source.data = static_cast<const char*>(rows.data) + batch_ * rows.batch * source.bytes;
    source.time = rows.time * source.bytes;
  }

  // The same for rows that will be written, unless they are not read for that.
  template <typename S>
  void add_output(const Rows& rows, Block block) {
    if (!is_lines<S>(rows, batch_, block)) add(rows);
  }

  // To be called once all are added.
  void deal() {
    spread_ = size_ > 0 && passes_ >= 2 * size_ ? 2 : 1;
    for (int i = 0; i < size_; ++i) {
      const int64_t lines = (blocks * width_ * sources_[i].bytes + 63) / 64;
      for (int t = 0; t < spread_ * tile_steps; ++t) {
        const int64_t line = t / spread_;
        sources_[i].offsets[t] = line / lines * sources_[i].time + line % lines * 64;
      }
    }
  }

  // Takes aim at the 8 blocks from `channel` in the tile that starts at t0; `turn` of the 8 blocks
  // before them is at work. What does not fit its passes is asked for at once.
  void aim(int64_t t0, int64_t channel, int64_t turn) {
    const int64_t t = t0 + turn * tile_steps / blocks;
    for (int i = 0; i < size_; ++i) {
      const Source& source = sources_[i];
      rows_[i] = source.data + t * source.time + channel * source.bytes;
    }
    for (int64_t i = passes_; i < size_; ++i) {
      for (int step = 0; step < tile_steps; ++step) pass(i).fetch(step);
    }
  }

  // What to fetch during pass `i`; where there is nothing left, one address over and over.
  Ahead pass(int64_t i) const {
    static const char nothing[64] = {};
    static const int64_t nowhere[tile_steps] = {};
    const int64_t source = i / spread_;
    if (source >= size_) return {nothing, nowhere};
    return {rows_[source], sources_[source].offsets + i % spread_ * tile_steps};
  }

 private:
  struct Source {
    const char* data;
    int64_t bytes, time;
    int64_t offsets[2 * tile_steps];
  };

  int64_t batch_;
  int width_;
  int64_t passes_;
  int size_ = 0, spread_ = 1;
  Source sources_[8];
  const char* rows_[8];
};

// Finished vectors to write past the caches, one for each step or for every other.
template <typename S>
struct Behind {
  const Vec<S>* values;
  S* to;
  int64_t stride;
  int mask, parity;  // the steps whose number ends in these bits

  void write(int64_t t) const {
    if constexpr (fills_line<S>) {
      if ((t & mask) == parity) stream(to + t * stride, values[t]);
    }
  }
};

// Keeps the finished tiles of a block until they are written, one line at a time, amid the
// arithmetic of the block that follows. All at once they are more than the processor can have
// under way, and whatever it stores after them has to wait.
template <typename S>
class Outbox {
 public:
  // `passes`: how often a block's recurrence walks its tile.
  explicit Outbox(int64_t passes) : passes_(passes) {}

  // `tile` must stay as it is until aim() is called for the second time from now. What is not
  // whole lines is written at once.
  void put(const Vec<S>* tile, const Rows& rows, int64_t batch, int64_t t0, int steps,
           Block block) {
    if (!is_lines<S>(rows, batch, block)) {
      write_tile<S>(tile, rows, batch, t0, steps, block);
      return;
    }
    S* to = static_cast<S*>(rows.data) + batch * rows.batch + t0 * rows.time + block.channel;
    list_[size_++] = {tile, to, rows.time, 0, 0};
    steps_ = steps;
  }

  // Leaves to the passes over a tile of `steps` what they can write, and writes the rest.
  void aim(int steps) {
    flush(steps == steps_ ? passes_ : 0);
    spread_ = passes_ >= 2 * size_ ? 2 : 1;
    left_ = size_;
    size_ = 0;
  }

  // What to write during pass `i`.
  Behind<S> pass(int64_t i) const {
    if (i >= spread_ * left_) return {nullptr, nullptr, 0, 0, 1};
    Behind<S> behind = list_[i / spread_];
    behind.mask = spread_ - 1, behind.parity = i % spread_;
    return behind;
  }

  // Writes all but the first `kept` tiles.
  void flush(int64_t kept = 0) {
    for (; size_ > kept; --size_) {
      for (int t = 0; t < steps_; ++t) list_[size_ - 1].write(t);
    }
  }

 private:
  int64_t passes_;
  int size_ = 0, left_ = 0, steps_ = 0, spread_ = 1;
  Behind<S> list_[3];
};

// B or C as the recurrence reads it: a number for each token, or a vector for all time.
template <typename S, bool per_token>
struct Coefficient;

template <typename S>
struct Coefficient<S, true> {
  const S* values;
  int64_t n;
  S at(int64_t t, int i) const { return values[t * n + i]; }
  Coefficient from(int64_t i) const { return {values + i, n}; }
};

template <typename S>
struct Coefficient<S, false> {
  const Vec<S>* values;
  int64_t n;
  Vec<S> at(int64_t, int i) const { return values[i]; }
  Coefficient from(int64_t i) const { return {values + i, n}; }
};

// ---------------------------------------------------------------- the recurrence

template <typename S, bool token_B, bool token_C>
struct Kernel {
  using V = Vec<S>;
  using BTerm = Coefficient<S, token_B>;
  using CTerm = Coefficient<S, token_C>;
  static constexpr int K = group_of_states;

  // Rates are multiplied by log2(e) once, so that the recurrence needs exp2 only.
  static void read_rates(V* rates, const Arguments& a, Block block) {
    read_channels<S>(rates, a.A, a.n, block, static_cast<S>(log2e));
  }

  // k states through a tile; y gains what they are read as.
  template <int k>
  static void advance(V* state, const V* rates, BTerm B, CTerm C, const V* dt, const V* input,
                      V* y, int steps, Ahead ahead, Behind<S> behind) {
    V h[k], rate[k];
    for (int i = 0; i < k; ++i) h[i] = state[i], rate[i] = rates[i];
    for (int t = 0; t < steps; ++t) {
      ahead.fetch(t);
      behind.write(t);
      const V d = dt[t], u = input[t];
      V sum = y[t];
#pragma GCC unroll 8
      for (int i = 0; i < k; ++i) {
        h[i] = exp2_product(d, rate[i]) * h[i] + u * B.at(t, i);
        sum += h[i] * C.at(t, i);
      }
      y[t] = sum;
    }
    for (int i = 0; i < k; ++i) state[i] = h[i];
  }

  // The trail and the tokens have records of 4k vectors for each step. A trail uses the first
  // half of its records (decays, states) and tokens the last half of theirs (dB, dC), so that no
  // two of them agree in the low 12 bits of their addresses: the processor would take a load for
  // one of a store that is under way.
  static constexpr int record = 4;

  // What backward adds to. `tokens` holds dB and dC of each step, k vectors each. A long sequence
  // has many tiles, so what the sum over them loses of dA is kept and given back (Kahan's sum).
  struct Sums {
    V *rates, *rates_lost, *B, *C, *tokens;
  };

  // The same, leaving the decay of each step and the state before it in `trail`, and adding to dC
  // while the state is there.
  template <int k>
  static void replay(const V* state, const V* rates, BTerm B, CTerm C, const V* dt,
                     const V* input, const V* dy, V* y, V* trail, Sums sums, int steps,
                     Ahead ahead, Behind<S> behind) {
    V h[k], rate[k], dC[k];
    for (int i = 0; i < k; ++i) {
      h[i] = state[i], rate[i] = rates[i];
      if (!token_C) dC[i] = V{};
    }
    V* tokens = sums.tokens + k;
    for (int t = 0; t < steps; ++t, trail += record * k, tokens += record * k) {
      ahead.fetch(t);
      behind.write(t);
      const V d = dt[t], u = input[t], gradient = dy[t];
      V sum = y[t];
#pragma GCC unroll 8
      for (int i = 0; i < k; ++i) {
        const V decay = exp2_product(d, rate[i]);
        trail[i] = decay;
        trail[k + i] = h[i];
        h[i] = decay * h[i] + u * B.at(t, i);
        sum += h[i] * C.at(t, i);
        if constexpr (token_C) {
          tokens[i] += gradient * h[i];
        } else {
          dC[i] += gradient * h[i];
        }
      }
      y[t] = sum;
    }
    if (!token_C) {
      for (int i = 0; i < k; ++i) sums.C[i] += dC[i];
    }
  }

  // Back over the tile that replay() left a trail of. `carry` is the gradient of the state after
  // the tile on entry and before it on return; by_rate gains sum m A and by_input sum g B.
  template <int k>
  static void walk_back(V* carry, const V* rates, BTerm B, CTerm C, const V* dt, const V* input,
                        const V* dy, const V* trail, Sums sums, V* by_rate, V* by_input,
                        int steps, Ahead ahead, Behind<S> behind) {
    V c[k], rate[k], drate[k], dB[k];
    trail += record * k * steps;
    V* tokens = sums.tokens + record * k * steps;
    for (int i = 0; i < k; ++i) {
      c[i] = carry[i], rate[i] = rates[i], drate[i] = V{};
      if (!token_B) dB[i] = V{};
    }
    for (int t = steps - 1; t >= 0; --t) {
      trail -= record * k;
      tokens -= record * k;
      ahead.fetch(t);
      behind.write(t);
      const V d = dt[t], u = input[t], gradient = dy[t];
      V along_rate = by_rate[t], along_input = by_input[t];
#pragma GCC unroll 8
      for (int i = 0; i < k; ++i) {
        const V g = c[i] + gradient * C.at(t, i);
        if constexpr (token_B) {
          tokens[i] += g * u;
        } else {
          dB[i] += g * u;
        }
        along_input += g * B.at(t, i);
        c[i] = g * trail[i];
        const V m = c[i] * trail[k + i];
        drate[i] += m * d;
        along_rate += m * rate[i];
      }
      by_rate[t] = along_rate;
      by_input[t] = along_input;
    }
    for (int i = 0; i < k; ++i) {
      carry[i] = c[i];
      const V more = drate[i] - sums.rates_lost[i], before = sums.rates[i];
      sums.rates[i] = before + more;
      sums.rates_lost[i] = (sums.rates[i] - before) - more;
      if (!token_B) sums.B[i] += dB[i];
    }
  }

  // Back over a tile for the carry alone.
  static void retreat(V* carry, const V* rates, CTerm C, const V* dt, const V* dy, int64_t n,
                      int steps) {
    for (int64_t i = 0; i < n; ++i) {
      V c = carry[i];
      const V rate = rates[i];
      const CTerm Ci = C.from(i);
      for (int t = steps - 1; t >= 0; --t) {
        c = exp2_product(dt[t], rate) * (c + dy[t] * Ci.at(t, 0));
      }
      carry[i] = c;
    }
  }

  // Aims at what comes after the 8 blocks that block k is of, in this tile or at the start of the
  // next one in `direction`.
  static void aim(Fetcher& fetcher, const Arguments& a, const Plan& p, const Span& span,
                  int64_t tile, int64_t k, int direction) {
    int64_t next = k - k % Fetcher::blocks + Fetcher::blocks;
    if (next >= span.blocks) {
      next = 0;
      tile += direction;
    }
    tile = std::clamp(tile, span.first_tile, span.last_tile - 1);
    const int64_t t0 = p.place(a, span.batch, tile).t0;
    fetcher.aim(t0, p.block(a, span, next).channel, k % Fetcher::blocks);
  }

  // What each block of the span has where the walk enters a sequence, out of (sequences, d, n) or
  // zeros if that is null; and what it has where the walk leaves it, into such an array if there
  // is one.
  static void take_up(V* states, const void* given, int64_t sequence, const Arguments& a,
                      const Plan& p, const Span& span) {
    if (!given) {
      std::memset(static_cast<void*>(states), 0, span.blocks * a.n * sizeof(V));
      return;
    }
    const S* from = static_cast<const S*>(given) + sequence * a.d * a.n;
    for (int64_t k = 0; k < span.blocks; ++k) {
      read_channels<S>(states + k * a.n, from, a.n, p.block(a, span, k));
    }
  }

  static void put_down(const V* states, void* array, int64_t sequence, const Arguments& a,
                       const Plan& p, const Span& span) {
    if (!array) return;
    S* to = static_cast<S*>(array) + sequence * a.d * a.n;
    for (int64_t k = 0; k < span.blocks; ++k) {
      write_channels<S>(to, states + k * a.n, a.n, p.block(a, span, k));
    }
  }

  // ---------------------------------------------------------------- forward

  // How the chunks of a sequence meet. A first pass leaves, for each chunk, what it makes of
  // zeros and the sum of its dt; join() turns that into where the second pass starts.
  struct Chunks {
    S* edges = nullptr;    // (b, chunks, n, d): the state (or its gradient) that a chunk is given
    S* elapsed = nullptr;  // (b, chunks, d): the sum of dt
  };

  // Runs a span; if `first`, for what it makes of zeros alone.
  static bool forward_span(const Arguments& a, const Plan& p, const Span& span, bool first,
                           Chunks chunks) {
    const FlushDenormals flush;
    const int64_t n = a.n, kn = span.blocks * n;
    Workspace memory((2 * kn + 4 * tile_steps + 2 * n + span.blocks) * sizeof(V) +
                         2 * tile_steps * n * sizeof(S),
                     11);
    if (!memory) return false;
    V* states = memory.template take<V>(kn);
    V* rates = memory.template take<V>(kn);
    V* dt = memory.template take<V>(tile_steps);
    V* input = memory.template take<V>(tile_steps);
    V* y = memory.template take<V>(tile_steps);
    V* last_y = memory.template take<V>(tile_steps);  // of the block before
    V* B_fixed = memory.template take<V>(n);
    V* C_fixed = memory.template take<V>(n);
    V* elapsed = memory.template take_zeros<V>(span.blocks);
    S* B_tile = memory.template take<S>(tile_steps * n);
    S* C_tile = memory.template take<S>(tile_steps * n);

    for (int64_t k = 0; k < span.blocks; ++k) {
      const Block block = p.block(a, span, k);
      read_rates(rates + k * n, a, block);
      if (p.chunks > 1 && !first) {
        read_plane(states + k * n, chunks.edges + span.index * n * a.d, n, a.d, block);
      }
    }
    int64_t sequence = p.place(a, span.batch, span.first_tile).sequence;
    if (p.chunks == 1 || first) {
      take_up(states, first ? nullptr : a.state, sequence, a, p, span);
    }

    const int64_t passes = n / K + n % K;
    Fetcher fetcher(span.batch, lanes<S>, passes);
    Outbox<S> outbox(passes);
    if (!first) {
      for (const Rows* rows : {&a.x, &a.dt, &a.gate}) fetcher.add(*rows);
      fetcher.template add_output<S>(a.y, p.block(a, span, 0));
    }
    fetcher.deal();

    for (int64_t tile = span.first_tile; tile < span.last_tile; ++tile) {
      const Place place = p.place(a, span.batch, tile);
      const int64_t t0 = place.t0;
      const int steps = place.steps;
      if (place.sequence != sequence) {
        put_down(states, a.last_state, sequence, a, p, span);
        sequence = place.sequence;
        take_up(states, a.state, sequence, a, p, span);
      }
      if (token_B) read_tokens(B_tile, a.B, n, span, t0, steps);
      if (token_C) read_tokens(C_tile, a.C, n, span, t0, steps);

      for (int64_t k = 0; k < span.blocks; ++k) {
        const Block block = p.block(a, span, k);
        V* h = states + k * n;
        if (a.checkpoints && !first) {
          S* plane = static_cast<S*>(a.checkpoints) + (span.batch * p.tiles + tile) * n * a.d;
          write_packed(plane, h, n, block);
        }
        aim(fetcher, a, p, span, tile, k, 1);
        outbox.aim(steps);

        prepare(a, span.batch, t0, steps, block, dt, input, y);
        if (first) {
          for (int t = 0; t < steps; ++t) elapsed[k] += dt[t];
        }
        const BTerm B = term<token_B>(B_tile, B_fixed, a.B_constant, n, block);
        const CTerm C = term<token_C>(C_tile, C_fixed, a.C_constant, n, block);
        int64_t i = 0;
        int pass = 0;
        for (; i + K <= n; i += K, ++pass) {
          advance<K>(h + i, rates + k * n + i, B.from(i), C.from(i), dt, input, y, steps,
                     fetcher.pass(pass), outbox.pass(pass));
        }
        for (; i < n; ++i, ++pass) {
          advance<1>(h + i, rates + k * n + i, B.from(i), C.from(i), dt, input, y, steps,
                     fetcher.pass(pass), outbox.pass(pass));
        }
        if (!first) {
          if (a.gate.data) {
            V* gate = dt;
            read_tile<S>(gate, a.gate, span.batch, t0, steps, block);
            for (int t = 0; t < steps; ++t) y[t] *= gate[t] * sigmoid<S>(gate[t]);
          }
          outbox.put(y, a.y, span.batch, t0, steps, block);
          std::swap(y, last_y);
        }
      }
    }

    outbox.flush();
    finish_streams();

    for (int64_t k = 0; k < span.blocks; ++k) {
      const Block block = p.block(a, span, k);
      if (first) {
        // The state that this chunk makes of zeros; join() turns it into the next one's.
        write_plane(chunks.edges + (span.index + 1) * n * a.d, states + k * n, n, a.d, block);
        write_vector<S>(chunks.elapsed + span.index * a.d, elapsed[k], block);
      }
    }
    if (!first && p.is_edge(a, span.last_tile)) {
      put_down(states, a.last_state, sequence, a, p, span);
    }
    return true;
  }

  // dt after bias and softplus, what drives the states (dt x), and the direct path (D x).
  static void prepare(const Arguments& a, int64_t batch, int64_t t0, int steps, Block block,
                      V* dt, V* input, V* y) {
    const V bias = read_vector<S>(a.dt_bias, block), D = read_vector<S>(a.D, block);
    read_tile<S>(dt, a.dt, batch, t0, steps, block);
    read_tile<S>(input, a.x, batch, t0, steps, block);
    if (a.softplus) {
      for (int t = 0; t < steps; ++t) {
        dt[t] = Softplus<S>(dt[t] + bias).value();
        y[t] = D * input[t];
        input[t] *= dt[t];
      }
    } else {
      for (int t = 0; t < steps; ++t) {
        dt[t] += bias;
        y[t] = D * input[t];
        input[t] *= dt[t];
      }
    }
  }

  template <bool per_token>
  static Coefficient<S, per_token> term(const S* tile, V* fixed, const void* constant, int64_t n,
                                        Block block) {
    if constexpr (per_token) {
      return {tile, n};
    } else {
      read_channels<S>(fixed, constant, n, block);
      return {fixed, n};
    }
  }

  // ---------------------------------------------------------------- backward

  // Sums that spans make, added up once all have run.
  struct Partials {
    S *B, *C;              // (parts, b, l, g, n), for coefficients of tokens
    S *rates;              // (b * chunks, d, n): dA
    S *B_fixed, *C_fixed;  // (b * chunks, d, n), for constant coefficients
    S *skip, *bias;        // (b * chunks, d): dD, ddt_bias
  };

  // The arrays of one tile of one block on the way back.
  struct Tile {
    V *x, *dt, *slope, *input, *y, *dy, *dgate, *by_rate, *by_input;
  };

  static bool backward_span(const Arguments& a, const Plan& p, const Span& span, bool first,
                            Chunks chunks, const Partials& partial) {
    const FlushDenormals flush;
    const int64_t n = a.n, kn = span.blocks * n;
    Workspace memory((4 * kn + (token_B ? 0 : kn) + (token_C ? 0 : kn) + 3 * span.blocks +
                      3 * n + 12 * tile_steps + record * tile_steps * (n + 2 * K)) *
                             sizeof(V) +
                         2 * tile_steps * n * sizeof(S),
                     29);
    if (!memory) return false;
    V* carries = memory.template take<V>(kn);
    V* rates = memory.template take<V>(kn);
    V* drates = memory.template take_zeros<V>(kn);
    V* drates_lost = memory.template take_zeros<V>(kn);
    V* dB_fixed = memory.template take_zeros<V>(token_B ? 0 : kn);
    V* dC_fixed = memory.template take_zeros<V>(token_C ? 0 : kn);
    V* dskip = memory.template take_zeros<V>(span.blocks);
    V* dbias = memory.template take_zeros<V>(span.blocks);
    V* elapsed = memory.template take_zeros<V>(span.blocks);
    V* B_fixed = memory.template take<V>(n);
    V* C_fixed = memory.template take<V>(n);
    V* start = memory.template take<V>(n);
    Tile tile;
    for (V** array : {&tile.x, &tile.dt, &tile.slope, &tile.input, &tile.y, &tile.dy,
                      &tile.dgate, &tile.by_rate, &tile.by_input}) {
      *array = memory.template take<V>(tile_steps);
    }
    Tile last = tile;  // of the block before, for what is still to be written
    for (V** array : {&last.dgate, &last.by_rate, &last.by_input}) {
      *array = memory.template take<V>(tile_steps);
    }
    V* trail = memory.template take<V>(record * tile_steps * (n + 2 * K));
    // dB and dC of each token and state, still apart by lane: (state group, step, record).
    V* tokens = trail + record * K * tile_steps;
    if (!first && (token_B || token_C)) {
      std::memset(static_cast<void*>(tokens), 0, record * tile_steps * (n + K) * sizeof(V));
    }
    S* B_tile = memory.template take<S>(tile_steps * n);
    S* C_tile = memory.template take<S>(tile_steps * n);

    for (int64_t k = 0; k < span.blocks; ++k) {
      const Block block = p.block(a, span, k);
      read_rates(rates + k * n, a, block);
      if (!first && p.chunks > 1) {
        read_plane(carries + k * n, chunks.edges + span.index * n * a.d, n, a.d, block);
      }
    }
    int64_t sequence = p.place(a, span.batch, span.last_tile - 1).sequence;
    if (p.chunks == 1 || first) {
      take_up(carries, first ? nullptr : a.dlast_state, sequence, a, p, span);
    }

    const int64_t passes = 2 * (n / K + n % K);
    Fetcher fetcher(span.batch, lanes<S>, passes);
    Outbox<S> outbox(passes);
    if (!first) {
      for (const Rows* rows : {&a.x, &a.dt, &a.gate, &a.dy}) fetcher.add(*rows);
      for (const Rows* rows : {&a.dx, &a.ddt, &a.dgate}) {
        fetcher.template add_output<S>(*rows, p.block(a, span, 0));
      }
    }
    fetcher.deal();

    for (int64_t at = span.last_tile - 1; at >= span.first_tile; --at) {
      const Place place = p.place(a, span.batch, at);
      const int64_t t0 = place.t0;
      const int steps = place.steps;
      if (place.sequence != sequence) {
        put_down(carries, a.dstate, sequence, a, p, span);
        sequence = place.sequence;
        take_up(carries, a.dlast_state, sequence, a, p, span);
      }
      if (token_B) read_tokens(B_tile, a.B, n, span, t0, steps);
      if (token_C) read_tokens(C_tile, a.C, n, span, t0, steps);

      for (int64_t k = 0; k < span.blocks; ++k) {
        const Block block = p.block(a, span, k);
        V* rate = rates + k * n;
        V* carry = carries + k * n;
        const BTerm B = term<token_B>(B_tile, B_fixed, a.B_constant, n, block);
        const CTerm C = term<token_C>(C_tile, C_fixed, a.C_constant, n, block);
        prepare_back(a, span.batch, t0, steps, block, tile);
        if (first) {
          for (int t = 0; t < steps; ++t) elapsed[k] += tile.dt[t];
          retreat(carry, rate, C, tile.dt, tile.dy, n, steps);
          continue;
        }
        aim(fetcher, a, p, span, at, k, -1);
        outbox.aim(steps);
        const S* plane =
            static_cast<const S*>(a.checkpoints) + (span.batch * p.tiles + at) * n * a.d;
        read_packed(start, plane, n, block);

        const auto there_and_back = [&](auto states, int64_t i, int pass) {
          constexpr int k_states = decltype(states)::value;
          const Sums sums{drates + k * n + i, drates_lost + k * n + i, dB_fixed + k * n + i,
                          dC_fixed + k * n + i, tokens + record * tile_steps * i + 2 * k_states};
          replay<k_states>(start + i, rate + i, B.from(i), C.from(i), tile.dt, tile.input,
                           tile.dy, tile.y, trail, sums, steps, fetcher.pass(pass),
                           outbox.pass(pass));
          walk_back<k_states>(carry + i, rate + i, B.from(i), C.from(i), tile.dt, tile.input,
                              tile.dy, trail, sums, tile.by_rate, tile.by_input, steps,
                              fetcher.pass(pass + 1), outbox.pass(pass + 1));
        };
        int64_t i = 0;
        int pass = 0;
        for (; i + K <= n; i += K, pass += 2) {
          there_and_back(std::integral_constant<int, K>{}, i, pass);
        }
        for (; i < n; ++i, pass += 2) {
          there_and_back(std::integral_constant<int, 1>{}, i, pass);
        }
        finish_back(a, span.batch, t0, steps, block, tile, outbox, dskip[k], dbias[k]);
        std::swap(tile, last);
      }
      if (!first) {
        if (token_B) sum_tokens(partial.B, tokens, 0, a, span, t0, steps);
        if (token_C) sum_tokens(partial.C, tokens, 1, a, span, t0, steps);
      }
    }

    outbox.flush();
    finish_streams();

    for (int64_t k = 0; k < span.blocks; ++k) {
      const Block block = p.block(a, span, k);
      if (first) {
        write_plane(chunks.edges + (span.index - 1) * n * a.d, carries + k * n, n, a.d, block);
        write_vector<S>(chunks.elapsed + span.index * a.d, elapsed[k], block);
        continue;
      }
      const int64_t matrix = span.index * a.d * n, vector = span.index * a.d;
      write_channels<S>(partial.rates + matrix, drates + k * n, n, block);
      if (!token_B) write_channels<S>(partial.B_fixed + matrix, dB_fixed + k * n, n, block);
      if (!token_C) write_channels<S>(partial.C_fixed + matrix, dC_fixed + k * n, n, block);
      write_vector<S>(partial.skip + vector, dskip[k], block);
      write_vector<S>(partial.bias + vector, dbias[k], block);
    }
    if (!first && p.is_edge(a, span.first_tile)) {
      put_down(carries, a.dstate, sequence, a, p, span);
    }
    return true;
  }

  // What prepare() makes, and: dy before the gate, the gradient of the gate but for the factor y,
  // and the slope of softplus.
  static void prepare_back(const Arguments& a, int64_t batch, int64_t t0, int steps, Block block,
                           const Tile& tile) {
    const V bias = read_vector<S>(a.dt_bias, block), D = read_vector<S>(a.D, block);
    read_tile<S>(tile.dt, a.dt, batch, t0, steps, block);
    read_tile<S>(tile.x, a.x, batch, t0, steps, block);
    read_tile<S>(tile.dy, a.dy, batch, t0, steps, block);
    for (int t = 0; t < steps; ++t) {
      V dt = tile.dt[t] + bias, slope = splat(S(1));
      if (a.softplus) {
        const Softplus<S> softplus(dt);
        dt = softplus.value();
        slope = softplus.slope();
      }
      tile.dt[t] = dt;
      tile.slope[t] = slope;
      tile.input[t] = dt * tile.x[t];
      tile.y[t] = D * tile.x[t];
      tile.by_rate[t] = tile.by_input[t] = V{};
    }
    if (a.gate.data) {
      read_tile<S>(tile.dgate, a.gate, batch, t0, steps, block);
      for (int t = 0; t < steps; ++t) {
        const V z = tile.dgate[t], s = sigmoid<S>(z);
        tile.dgate[t] = tile.dy[t] * (s + z * s * (S(1) - s));
        tile.dy[t] *= z * s;
      }
    }
  }

  static void finish_back(const Arguments& a, int64_t batch, int64_t t0, int steps, Block block,
                          const Tile& tile, Outbox<S>& outbox, V& dskip, V& dbias) {
    const V D = read_vector<S>(a.D, block);
    V skip{}, bias{};
    for (int t = 0; t < steps; ++t) {
      const V x = tile.x[t], dy = tile.dy[t], by_input = tile.by_input[t];
      // The rates that by_rate was summed with carry a factor log2(e).
      const V ddt = (tile.by_rate[t] * static_cast<S>(ln2) + by_input * x) * tile.slope[t];
      bias += ddt;
      skip += dy * x;
      tile.by_rate[t] = ddt;
      tile.by_input[t] = by_input * tile.dt[t] + dy * D;
      tile.dgate[t] *= tile.y[t];
    }
    dskip += skip, dbias += bias;
    outbox.put(tile.by_input, a.dx, batch, t0, steps, block);
    outbox.put(tile.by_rate, a.ddt, batch, t0, steps, block);
    if (a.gate.data) outbox.put(tile.dgate, a.dgate, batch, t0, steps, block);
  }

  // dB (half 0) or dC (half 1) of a tile: the lanes are added up, and the sums start anew.
  static void sum_tokens(S* partial, V* tokens, int half, const Arguments& a,
                         const Span& span, int64_t t0, int steps) {
    const int64_t n = a.n;
    S* out = partial + (((span.part * a.b + span.batch) * a.l + t0) * a.g + span.group) * n;
    for (int t = 0; t < steps; ++t, out += a.g * n) {
      int64_t i = 0;
      for (; i + K <= n; i += K) {
        sum_lanes<K>(out + i, tokens + record * (tile_steps * i + t * K) + (2 + half) * K);
      }
      for (; i < n; ++i) sum_lanes<1>(out + i, tokens + record * (tile_steps * i + t) + 2 + half);
    }
  }

  // The sum of each of k vectors: 16 bytes at a time, then lane by lane.
  template <int k>
  static void sum_lanes(S* out, V* vectors) {
    using Quarter = typename VectorOf<S, 16>::type;
    constexpr int count = 16 / sizeof(S);
    const S* from = reinterpret_cast<const S*>(vectors);
#pragma GCC unroll 8
    for (int i = 0; i < k; ++i, from += lanes<S>) {
      Quarter sum = read<Quarter>(from);
      for (int j = count; j < lanes<S>; j += count) sum += read<Quarter>(from + j);
      S total = sum[0];
      for (int j = 1; j < count; ++j) total += sum[j];
      out[i] = total;
      vectors[i] = V{};
    }
  }
};

// ---------------------------------------------------------------- between the spans

// Walks the edges from chunk to chunk, forward (direction 1) or backward (-1): what the walk of
// the first pass is given, decayed over that walk, joins what it made of zeros.
template <typename S, typename Chunks>
void join(const Arguments& a, const Plan& p, Chunks chunks, const S* given, int direction) {
  const S* A = static_cast<const S*>(a.A);
  for (int64_t k = 0; k < a.b * p.chunks; ++k) {
    const int64_t batch = k / p.chunks, within = k % p.chunks;
    const int64_t chunk = direction > 0 ? within : p.chunks - 1 - within;
    const auto span = [&](int64_t i) {
      return p.span(a, (batch * a.g * p.chunks + i) * p.parts);
    };
    const auto enters_a_sequence = [&](const Span& s) {
      return p.is_edge(a, direction > 0 ? s.first_tile : s.last_tile);
    };
    const Span here = span(chunk);
    const bool fresh = enters_a_sequence(here);
    const Span walked = fresh ? here : p.handed_on(a, span(chunk - direction), direction);
    const bool from_given = enters_a_sequence(walked);
    const int64_t tile = direction > 0 ? walked.first_tile : walked.last_tile - 1;
    const S* start = given ? given + p.place(a, batch, tile).sequence * a.d * a.n : nullptr;
    for (int64_t i = 0; i < a.n; ++i) {
      S* edges = chunks.edges + (here.index * a.n + i) * a.d;
      const S* entered = chunks.edges + (walked.index * a.n + i) * a.d;
      for (int64_t c = 0; c < a.d; ++c) {
        const S from = !from_given ? entered[c] : start ? start[c * a.n + i] : S(0);
        const S elapsed = chunks.elapsed[walked.index * a.d + c];
        edges[c] = fresh ? from : edges[c] + from * std::exp(A[c * a.n + i] * elapsed);
      }
    }
  }
}

// Adds up `count` arrays of `size` numbers that lie one after another.
template <typename S>
void sum_arrays(S* out, const S* arrays, int64_t count, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    S sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += arrays[k * size + i];
    out[i] = sum;
  }
}

// dB or dC from the parts of one batch row.
template <typename S>
void gather_tokens(const Arguments& a, const Plan& p, const Rows& out, S* partial, int64_t batch) {
  const int64_t row = a.l * a.g * a.n, all = a.b * row;
  S* sum = partial + batch * row;
  for (int64_t part = 1; part < p.parts; ++part) {
    const S* more = sum + part * all;
    for (int64_t i = 0; i < row; ++i) sum[i] += more[i];
  }
  with_storage<S>(out, [&](auto* data) {
    for (int64_t t = 0; t < a.l; ++t) {
      for (int64_t group = 0; group < a.g; ++group) {
        auto* to = data + batch * out.batch + t * out.time + group * out.group;
        const S* from = sum + (t * a.g + group) * a.n;
        int64_t i = 0;
        for (; i + lanes<S> <= a.n; i += lanes<S>) store(to + i, load(from + i));
        if (i < a.n) store_part(to + i, load_part(from + i, a.n - i), a.n - i);
      }
    }
  });
}

void prefer_large_outputs(const Arguments& a, std::initializer_list<const Rows*> outputs) {
  for (const Rows* rows : outputs) {
    const size_t bytes = rows->dtype == float64 ? 8 : rows->dtype == float32 ? 4 : 2;
    if (rows->data) prefer_large_pages(rows->data, a.b * a.l * a.d * bytes);
  }
}

// Runs task(i) for every span and tells whether all of them had memory to work in.
template <typename Task>
bool run(int64_t count, int threads, const Task& task) {
  std::atomic<bool> done{true};
  for_each_task(count, threads, [&](int64_t i) {
    if (!task(i)) done.store(false, std::memory_order_relaxed);
  });
  return done.load();
}

template <typename K, typename S>
bool forward(const Arguments& a) {
  Plan p = plan(a, lanes<S>, 3);
  Workspace table(a.starts ? 2 * p.tiles * sizeof(int64_t) : 0, 1);
  if (!table) return false;
  if (a.starts) list_tiles(a, p, table.take<int64_t>(2 * p.tiles));
  prefer_large_outputs(a, {&a.y});
  prefer_large_pages(a.last_state, a.sequences * a.d * a.n * sizeof(S));
  if (a.checkpoints) {
    prefer_large_pages(a.checkpoints, a.b * p.tiles * a.n * a.d * sizeof(S));
  }
  const int64_t edges = a.b * p.chunks * a.n * a.d, elapsed = a.b * p.chunks * a.d;
  Workspace memory(p.chunks > 1 ? (edges + elapsed) * sizeof(S) : 0, 2);
  if (!memory) return false;
  typename K::Chunks chunks;
  if (p.chunks > 1) {
    chunks = {memory.take_zeros<S>(edges), memory.take_zeros<S>(elapsed)};
    const bool done = run(p.tasks(a), p.threads, [&](int64_t task) {
      const Span span = p.handed_on(a, p.span(a, task), 1);
      return p.is_edge(a, span.last_tile) || K::forward_span(a, p, span, true, chunks);
    });
    if (!done) return false;
    join(a, p, chunks, static_cast<const S*>(a.state), 1);
  }
  return run(p.tasks(a), p.threads, [&](int64_t task) {
    return K::forward_span(a, p, p.span(a, task), false, chunks);
  });
}

template <typename K, typename S>
bool backward(const Arguments& a) {
  Plan p = plan(a, lanes<S>, 2);
  Workspace table(a.starts ? 2 * p.tiles * sizeof(int64_t) : 0, 1);
  if (!table) return false;
  if (a.starts) list_tiles(a, p, table.take<int64_t>(2 * p.tiles));
  prefer_large_outputs(a, {&a.dx, &a.ddt, &a.dgate});
  if (a.dstate) prefer_large_pages(a.dstate, a.sequences * a.d * a.n * sizeof(S));
  const bool token_B = !a.B_constant, token_C = !a.C_constant;
  const int64_t edges = p.chunks > 1 ? a.b * p.chunks * a.n * a.d : 0;
  const int64_t elapsed = p.chunks > 1 ? a.b * p.chunks * a.d : 0;
  const int64_t count = a.b * p.chunks, tokens = p.parts * a.b * a.l * a.g * a.n;
  const int64_t matrix = count * a.d * a.n, vector = count * a.d;
  Workspace memory((edges + elapsed + (token_B ? tokens : matrix) + (token_C ? tokens : matrix) +
                    matrix + 2 * vector) *
                       sizeof(S),
                   9);
  if (!memory) return false;
  typename K::Chunks chunks;
  if (p.chunks > 1) {
    chunks = {memory.take_zeros<S>(edges), memory.take_zeros<S>(elapsed)};
    const bool done = run(p.tasks(a), p.threads, [&](int64_t task) {
      const Span span = p.handed_on(a, p.span(a, task), -1);
      return p.is_edge(a, span.first_tile) || K::backward_span(a, p, span, true, chunks, {});
    });
    if (!done) return false;
    join(a, p, chunks, static_cast<const S*>(a.dlast_state), -1);
  }
  typename K::Partials partial{};
  (token_B ? partial.B : partial.B_fixed) = memory.take<S>(token_B ? tokens : matrix);
  (token_C ? partial.C : partial.C_fixed) = memory.take<S>(token_C ? tokens : matrix);
  partial.rates = memory.take<S>(matrix);
  partial.skip = memory.take<S>(vector);
  partial.bias = memory.take<S>(vector);
  const bool done = run(p.tasks(a), p.threads, [&](int64_t task) {
    return K::backward_span(a, p, p.span(a, task), false, chunks, partial);
  });
  if (!done) return false;

  for_each_task(a.b, p.threads, [&](int64_t batch) {
    if (token_B) gather_tokens(a, p, a.dB, partial.B, batch);
    if (token_C) gather_tokens(a, p, a.dC, partial.C, batch);
  });
  sum_arrays(static_cast<S*>(a.dA), partial.rates, count, a.d * a.n);
  if (!token_B) sum_arrays(static_cast<S*>(a.dB_constant), partial.B_fixed, count, a.d * a.n);
  if (!token_C) sum_arrays(static_cast<S*>(a.dC_constant), partial.C_fixed, count, a.d * a.n);
  if (a.dD) sum_arrays(static_cast<S*>(a.dD), partial.skip, count, a.d);
  if (a.ddt_bias) sum_arrays(static_cast<S*>(a.ddt_bias), partial.bias, count, a.d);
  return true;
}

// Calls body(kernel, scalar) for the kernel that these arguments need.
template <typename Body>
bool with_kernel(const Arguments& a, const Body& body) {
  const auto in = [&](auto scalar) {
    using S = decltype(scalar);
    // Told by the constants: the address of an empty tensor of tokens may be null.
    if (!a.B_constant) {
      return a.C_constant ? body(Kernel<S, true, false>{}, scalar)
                          : body(Kernel<S, true, true>{}, scalar);
    }
    return a.C_constant ? body(Kernel<S, false, false>{}, scalar)
                        : body(Kernel<S, false, true>{}, scalar);
  };
  return a.x.dtype == float64 ? in(double{}) : in(float{});
}

}  // namespace
}  // namespace mambakit

// Both return whether there was memory to work in.
extern "C" {

MK_EXPORT int64_t mk_scan_tile_steps() { return mambakit::tile_steps; }

MK_EXPORT bool mk_scan_forward(const mambakit::ScanArguments* arguments) {
  return mambakit::with_kernel(*arguments, [&](auto kernel, auto scalar) {
    return mambakit::forward<decltype(kernel), decltype(scalar)>(*arguments);
  });
}

MK_EXPORT bool mk_scan_backward(const mambakit::ScanArguments* arguments) {
  return mambakit::with_kernel(*arguments, [&](auto kernel, auto scalar) {
    return mambakit::backward<decltype(kernel), decltype(scalar)>(*arguments);
  });
}

}  // extern "C"
