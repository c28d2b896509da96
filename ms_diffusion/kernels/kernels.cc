// Convolution, linear layers, normalisation, linear attention for MindSpore on the CPU: float32, NCHW as it lies in memory.
// Each exported function is an operator of ops.Custom(..., func_type="aot"): (number of tensors, their data, their numbers
// of dimensions, their shapes, ...), inputs first, outputs last; 0 says that all went well. GNU vectors, C++17, no library.
//
// Sizes: n images, c channels, h x w pixels; o, oh, ow of the output; k x k kernel, stride s, padding p.

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int L = 16;  // floats in a vector
constexpr int REGISTERS = 24;  // vectors that accumulate in an inner loop; the rest hold the operands
#elif defined(__AVX__)
constexpr int L = 8;
constexpr int REGISTERS = 12;
#else
constexpr int L = 4;
constexpr int REGISTERS = 24;
#endif
typedef float V __attribute__((vector_size(4 * L), aligned(4), may_alias));

inline V load(const float* p) { return *reinterpret_cast<const V*>(p); }
inline void store(float* p, V v) { *reinterpret_cast<V*>(p) = v; }
inline float sum(V v) {
  float s = 0;
  for (int i = 0; i < L; ++i) s += v[i];
  return s;
}
inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}
inline long round_up(long n, long to) { return (n + to - 1) / to * to; }

// Threads: one pool for all operators, so that no two of them compete for the cores.

class Pool {
 public:
  Pool() {
    cpu_set_t set;
    size_ = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    for (int t = 1; t < size_; ++t) std::thread([this] { work(); }).detach();
  }
  int size() const { return size_; }

  // Calls f(0) .. f(size - 1), one operator at a time. A thread takes the next share when it is free: where another program
  // has its core, the caller does its share too instead of waiting for it.
  void run(const std::function<void(int)>& f) {
    std::lock_guard<std::mutex> one(caller_);
    long round;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = &f;
      finished_.store(0);
      round = ++round_;
      next_.store(round * MOST);
    }
    wake_.notify_all();
    take_shares(round);
    for (int spin = 0; finished_.load(std::memory_order_acquire) < size_ && spin < 20000; ++spin) pause();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return finished_.load() == size_; });
  }

 private:
  void take_shares(long round) {
    for (;;) {
      long share = next_.load(std::memory_order_acquire);
      if (share < round * MOST || share >= round * MOST + size_) return;  // none is left, or the round is over
      if (!next_.compare_exchange_weak(share, share + 1)) continue;
      (*task_)(static_cast<int>(share - round * MOST));
      if (finished_.fetch_add(1) + 1 == size_) {
        std::lock_guard<std::mutex> last(mutex_);
        done_.notify_one();
      }
    }
  }

  void work() {
    for (long seen = 0;;) {
      for (int spin = 0; round_.load(std::memory_order_acquire) == seen && spin < 2000; ++spin) pause();
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_ != seen; });
        seen = round_;
      }
      take_shares(seen);
    }
  }

  static constexpr long MOST = 1 << 16;  // threads
  int size_;
  std::mutex caller_, mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int)>* task_ = nullptr;
  std::atomic<long> round_{0}, next_{0};  // the next share of a round, counted from MOST times the round
  std::atomic<int> finished_{0};
};

Pool& pool() {
  static Pool* p = new Pool;  // never destroyed: its threads outlive main
  return *p;
}

// f(begin, end) on each thread, for its share of 0 .. n - 1.
template <class F>
void share_out(long n, F f) {
  pool().run([&](int t) { f(n * t / pool().size(), n * (t + 1) / pool().size()); });
}

// Scratch memory of this thread, of at least `floats`, one block for each use.
float* scratch(int use, long floats) {
  thread_local std::vector<float> blocks[8];
  auto& block = blocks[use];
  if (static_cast<long>(block.size()) < floats + 2 * L) block.assign(floats + 2 * L, 0.f);
  return block.data();
}

// Convolution. Every kind becomes out[o, q] = bias[o] + sum_k weight[o, k] * planes[offset[k] + q] over padded planes, where
// q runs over whole rows of the plane, padding included: one multiplication of matrices whose rows are shifted views.

struct Shape {
  long n, c, h, w, o, oh, ow, k, s, p;  // of one group; a transposed convolution is the gradient of the one described
  long x_image, y_image;                // floats from one image to the next, all groups
};

// Images of c channels copied into planes with zeros around, several images one below the other. The zeros to the right
// of a row are those to the left of the next. Stride s > 1: s x s planes a channel, plane (a, b) of every s-th pixel.
struct Planes {
  long h, w, s, before;         // before: zeros ahead of the first row and column, in pixels
  long pitch, rows, first = 0;  // of one image in a plane; where pixel (0, 0) lies (s = 1)
  long images = 1, length = 0;  // in one block; floats of a plane

  Planes(long h, long w, long s, long before, long after, long oh, long ow, long k) : h(h), w(w), s(s), before(before) {
    if (s == 1) {
      pitch = w + std::max(before, after);
      rows = h + std::max(before, after);
      first = before * pitch + before;
    } else {
      pitch = ow + (k - 1) / s;
      rows = oh + (k - 1) / s;
    }
  }
  void stack(long channels, long most) {  // as many images as stay in the second-level cache
    images = std::clamp(65536 / std::max(1L, channels * s * s * rows * pitch), 1L, most);
    length = round_up(images * rows * pitch + 2 * first + (s > 1 ? pitch : 0) + REGISTERS * L, L);
  }
  // x: the first of `count` images, `image` floats apart. The zeros must have been set.
  void fill(const float* x, long image, long channels, long count, float* to) const {
    for (long c = 0; c < channels; ++c)
      for (long i = 0; i < count; ++i) {
        const float* from = x + i * image + c * h * w;
        if (s == 1) {
          float* plane = to + c * length + i * rows * pitch + first;
          for (long y = 0; y < h; ++y) std::memcpy(plane + y * pitch, from + y * w, w * sizeof(float));
          continue;
        }
        for (long y = 0; y < h; ++y) {
          long py = y + before, a = py % s, r = py / s;
          if (r >= rows) continue;
          for (long b = 0; b < s; ++b) {
            float* row = to + ((c * s + a) * s + b) * length + (i * rows + r) * pitch;
            for (long q = (std::max(0L, before - b) + s - 1) / s; q < pitch && q * s + b - before < w; ++q)
              row[q] = from[y * w + q * s + b - before];
          }
        }
      }
  }
};

// out[m][q] for m < M, q < NV * L
template <int M, int NV>
void tile(const float* planes, const int* offset, long count, const float* weight, float* out, long pitch) {
  V sums[M][NV] = {};
  for (long k = 0; k < count; ++k) {
    V x[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) x[v] = load(planes + offset[k] + v * L);
#pragma GCC unroll 24
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sums[m][v] += x[v] * weight[k * M + m];
  }
#pragma GCC unroll 24
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(out + m * pitch + v * L, sums[m][v]);
}

constexpr int NV = 3, MAX_M = REGISTERS / NV;

template <int M>
void tiles(const float* planes, const std::vector<int>& offset, const float* weight, float* out, long pitch, long length) {
  long q = 0;
  const long k = offset.size();
  for (; q + (NV - 1) * L < length; q += NV * L) tile<M, NV>(planes + q, offset.data(), k, weight, out + q, pitch);
  for (; q < length; q += L) tile<M, 1>(planes + q, offset.data(), k, weight, out + q, pitch);
}
using Tiles = void (*)(const float*, const std::vector<int>&, const float*, float*, long, long);
template <int... M>
Tiles choose_tiles(int m, std::integer_sequence<int, M...>) {
  static constexpr Tiles all[] = {tiles<M + 1>...};
  return all[m - 1];
}

// o output channels as `count` blocks of m, the last perhaps shorter
struct Blocks {
  long o, count = (o + MAX_M - 1) / MAX_M, m = (o + count - 1) / count;

  // weight[o, k] as `tiles` wants it, (blocks, k, m), from at(o, k)
  template <class At>
  std::vector<float> pack(long taps, At at) const {
    std::vector<float> packed(count * m * taps, 0.f);
    for (long i = 0; i < o; ++i)
      for (long k = 0; k < taps; ++k) packed[(i / m * taps + k) * m + i % m] = at(i, k);
    return packed;
  }
  Tiles tiles() const { return choose_tiles(m, std::make_integer_sequence<int, MAX_M>()); }
};

// One sum over shifted planes and where its results go: rows x columns pixels, from (y0, x0) in steps of s.
struct Pass {
  std::vector<int> offset;
  std::vector<float> weight;  // (blocks of channels, k, channels in a block)
  long start, rows, columns, y0, x0, s;
};

void run_passes(const std::vector<Pass>& passes, const Planes& planes, long plane_channels, const float* x, long x_image,
                long n, long o, long oh, long ow, const float* bias, float* y, long y_image) {
  if (n == 0) return;
  const Blocks blocks{o};
  const long m = blocks.m, threads = pool().size(), parts = std::min(blocks.count, n < threads ? (threads + n - 1) / n : 1);
  const Tiles tiles = blocks.tiles();
  share_out(n * parts, [&](long begin, long end) {
    float* buffer = scratch(0, plane_channels * planes.s * planes.s * planes.length);
    float* result = scratch(1, m * planes.length);
    std::memset(buffer, 0, plane_channels * planes.s * planes.s * planes.length * sizeof(float));
    for (long task = begin; task < end;) {
      const long image = task / parts, part = task % parts;
      const long count = parts > 1 ? 1 : std::min(planes.images, end - task);
      task += count;
      planes.fill(x + image * x_image, x_image, plane_channels, count, buffer);
      for (long block = blocks.count * part / parts; block < blocks.count * (part + 1) / parts; ++block) {
        const long channels = std::min(m, o - block * m);
        if (channels <= 0) continue;
        for (const Pass& pass : passes) {
          const long length = (count - 1) * planes.rows * planes.pitch + (pass.rows - 1) * planes.pitch + pass.columns;
          const float* weight = pass.weight.data() + block * m * pass.offset.size();
          tiles(buffer + pass.start, pass.offset, weight, result, planes.length, length);
          for (long i = 0; i < count; ++i)
            for (long j = 0; j < channels; ++j) {
              const float add = bias ? bias[block * m + j] : 0.f;
              float* to = y + (image + i) * y_image + (block * m + j) * oh * ow;
              for (long r = 0; r < pass.rows; ++r) {
                const float* from = result + j * planes.length + (i * planes.rows + r) * planes.pitch;
                float* row = to + (pass.y0 + r * pass.s) * ow + pass.x0;
                if (pass.s == 1)
                  for (long q = 0; q < pass.columns; ++q) row[q] = from[q] + add;
                else
                  for (long q = 0; q < pass.columns; ++q) row[q * pass.s] = from[q] + add;
              }
            }
        }
      }
    }
  });
}

Planes input_planes(const Shape& z) { return {z.h, z.w, z.s, z.p, (z.ow - 1) + z.k - z.p - z.w, z.oh, z.ow, z.k}; }

std::vector<int> input_offsets(const Shape& z, const Planes& planes) {
  std::vector<int> offset;
  for (long c = 0; c < z.c; ++c)
    for (long ky = 0; ky < z.k; ++ky)
      for (long kx = 0; kx < z.k; ++kx)
        offset.push_back(((c * z.s + ky % z.s) * z.s + kx % z.s) * planes.length + ky / z.s * planes.pitch + kx / z.s);
  return offset;
}

// y (n, o, oh, ow) = x (n, c, h, w) * w (o, c, k, k) + bias (o)
void convolve(const Shape& z, const float* x, const float* w, const float* bias, float* y) {
  Planes planes = input_planes(z);
  planes.stack(z.c, std::max(1L, z.n / pool().size()));
  const long taps = z.c * z.k * z.k;
  auto packed = Blocks{z.o}.pack(taps, [&](long o, long k) { return w[o * taps + k]; });
  const Pass pass{input_offsets(z, planes), std::move(packed), 0, z.oh, z.ow, 0, 0, 1};
  run_passes({pass}, planes, z.c, x, z.x_image, z.n, z.o, z.oh, z.ow, bias, y, z.y_image);
}

// x (n, c, h, w) = the transpose of `convolve` applied to y (n, o, oh, ow), + bias (c). The pixels whose row + p leaves the
// remainder a and column + p the remainder b in a division by s see the weights (a + s i, b + s j) only: s x s passes.
void convolve_transposed(const Shape& z, const float* y, const float* w, const float* bias, float* x) {
  const long most = (z.k - 1) / z.s, after = std::max((z.h - 1 + z.p) / z.s - z.oh + 1, (z.w - 1 + z.p) / z.s - z.ow + 1);
  Planes planes(z.oh, z.ow, 1, most, std::max(0L, after), 0, 0, 0);
  planes.stack(z.o, std::max(1L, z.n / pool().size()));
  std::vector<Pass> passes;
  for (long a = 0; a < z.s; ++a)
    for (long b = 0; b < z.s; ++b) {
      const long u0 = std::max(0L, (z.p - a + z.s - 1) / z.s), v0 = std::max(0L, (z.p - b + z.s - 1) / z.s);
      Pass pass{{}, {}, 0, 0, 0, z.s * u0 + a - z.p, z.s * v0 + b - z.p, z.s};
      pass.rows = (z.h - pass.y0 + z.s - 1) / z.s;
      pass.columns = (z.w - pass.x0 + z.s - 1) / z.s;
      if (pass.rows <= 0 || pass.columns <= 0) continue;
      pass.start = planes.first + (u0 - most) * planes.pitch + v0 - most;  // offsets count from the last tap's row
      std::vector<long> tap;
      for (long o = 0; o < z.o; ++o)
        for (long ky = a; ky < z.k; ky += z.s)
          for (long kx = b; kx < z.k; kx += z.s) {
            pass.offset.push_back(o * planes.length + (most - ky / z.s) * planes.pitch + most - kx / z.s);
            tap.push_back((o * z.c * z.k + ky) * z.k + kx);
          }
      pass.weight = Blocks{z.c}.pack(tap.size(), [&](long c, long k) { return w[tap[k] + c * z.k * z.k]; });
      passes.push_back(std::move(pass));
    }
  run_passes(passes, planes, z.o, y, z.y_image, z.n, z.c, z.h, z.w, bias, x, z.x_image);
}

// sums (M, N * L) += planes[offset[m] + pixel] * y[pixel][...] over the pixels of `images` images
template <int M, int N>
void weight_tile(const float* planes, const int* offset, const float* y, long y_pitch, long images, long rows, long columns,
                 long image_floats, long pitch, float* sums, long sums_pitch) {
  V acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) acc[m][v] = load(sums + m * sums_pitch + v * L);
  for (long i = 0; i < images; ++i)
    for (long r = 0; r < rows; ++r) {
      const float* from = planes + i * image_floats + r * pitch;
      for (long q = 0; q < columns; ++q, y += y_pitch) {
        V g[N];
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) g[v] = load(y + v * L);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const float x = from[offset[m] + q];
#pragma GCC unroll 8
          for (int v = 0; v < N; ++v) acc[m][v] += x * g[v];
        }
      }
    }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) store(sums + m * sums_pitch + v * L, acc[m][v]);
}

// dw (o, c, k, k) = sum over images and pixels of dy (n, o, oh, ow) times the x (n, c, h, w) that each weight met
void weight_gradient(const Shape& z, const float* x, const float* dy, float* dw) {
  constexpr int N = 4, M = REGISTERS / N;
  Planes planes = input_planes(z);
  planes.stack(z.c, std::max(1L, z.n / pool().size()));
  std::vector<int> offset = input_offsets(z, planes);
  const long taps = offset.size(), padded = round_up(taps, M), o = round_up(z.o, L), pixels = z.oh * z.ow;
  const long threads = std::min<long>(pool().size(), z.n);
  offset.resize(padded, 0);
  std::vector<std::vector<float>> sums(threads);
  pool().run([&](int t) {
    if (t >= threads) return;
    sums[t].assign(padded * o, 0.f);
    const long size = z.c * z.s * z.s * planes.length;
    float* buffer = scratch(0, size);
    float* y = scratch(1, planes.images * pixels * N * L);
    std::memset(buffer, 0, size * sizeof(float));
    const long end = z.n * (t + 1) / threads;
    for (long image = z.n * t / threads; image < end; image += planes.images) {
      const long count = std::min(planes.images, end - image);
      planes.fill(x + image * z.x_image, z.x_image, z.c, count, buffer);
      for (long j = 0, width; j < o; j += width) {
        width = std::min<long>(o - j, N * L);
        const long channels = std::min(width, z.o - j);
        float* to = y;  // these channels of dy, innermost
        for (long i = 0; i < count; ++i) {
          const float* from = dy + (image + i) * z.y_image + j * pixels;
          for (long q = 0; q < pixels; ++q, to += width) {
            for (long m = 0; m < channels; ++m) to[m] = from[m * pixels + q];
            for (long m = channels; m < width; ++m) to[m] = 0;
          }
        }
        const auto f = width == 4 * L   ? weight_tile<M, 4>
                       : width == 3 * L ? weight_tile<M, 3>
                       : width == 2 * L ? weight_tile<M, 2>
                                        : weight_tile<M, 1>;
        const long plane_image = planes.rows * planes.pitch;
        for (long k = 0; k < padded; k += M)
          f(buffer, &offset[k], y, width, count, z.oh, z.ow, plane_image, planes.pitch, &sums[t][k * o + j], o);
      }
    }
  });
  for (long j = 0; j < z.o; ++j)
    for (long k = 0; k < taps; ++k) {
      float total = 0;
      for (auto& s : sums) total += s[k * o + j];
      dw[j * taps + k] = total;
    }
}

// Depthwise: each channel has its own k x k weights, stride 1. `flip` gives the gradient of the input.

Planes depthwise_planes(const Shape& z, bool of_output) {
  const long h = of_output ? z.oh : z.h, w = of_output ? z.ow : z.w, before = of_output ? z.k - 1 - z.p : z.p;
  const long after = (of_output ? z.w : z.ow) - 1 + z.k - before - w;
  Planes planes(h, w, 1, before, after, 0, 0, z.k);
  planes.stack(1, 1);
  return planes;
}

void depthwise(const Shape& z, long channels, const float* x, const float* w, const float* bias, float* y, bool flip) {
  constexpr int N = 8;
  const Planes planes = depthwise_planes(z, flip);
  const long oh = flip ? z.h : z.oh, ow = flip ? z.w : z.ow, taps = z.k * z.k, length = (oh - 1) * planes.pitch + ow;
  share_out(z.n * channels, [&](long begin, long end) {
    float* plane = scratch(0, planes.length);
    float* result = scratch(1, planes.length);
    std::memset(plane, 0, planes.length * sizeof(float));
    for (long i = begin; i < end; ++i) {
      const long c = i % channels;
      planes.fill(x + i * planes.h * planes.w, 0, 1, 1, plane);
      for (long q = 0; q < length; q += N * L) {
        V acc[N] = {};
        for (long tap = 0; tap < taps; ++tap) {
          const float weight = w[c * taps + (flip ? taps - 1 - tap : tap)];
          const float* from = plane + q + tap / z.k * planes.pitch + tap % z.k;
#pragma GCC unroll 8
          for (int v = 0; v < N; ++v) acc[v] += weight * load(from + v * L);
        }
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) store(result + q + v * L, acc[v]);
      }
      const float add = bias ? bias[c] : 0.f;
      for (long r = 0; r < oh; ++r)
        for (long q = 0; q < ow; ++q) y[(i * oh + r) * ow + q] = result[r * planes.pitch + q] + add;
    }
  });
}

void depthwise_weight_gradient(const Shape& z, long channels, const float* x, const float* dy, float* dw) {
  constexpr int N = 7;
  const Planes planes = depthwise_planes(z, false);
  const long taps = z.k * z.k, length = (z.oh - 1) * planes.pitch + z.ow;
  share_out(channels, [&](long begin, long end) {
    float* plane = scratch(0, planes.length);
    float* y = scratch(1, planes.length);  // dy in the plane's rows, zero between them
    std::memset(plane, 0, planes.length * sizeof(float));
    std::memset(y, 0, planes.length * sizeof(float));
    V* sums = reinterpret_cast<V*>(scratch(2, round_up(taps, N) * L));
    for (long c = begin; c < end; ++c) {
      std::fill(sums, sums + round_up(taps, N), V{});
      for (long i = c; i < z.n * channels; i += channels) {
        planes.fill(x + i * z.h * z.w, 0, 1, 1, plane);
        for (long r = 0; r < z.oh; ++r) std::memcpy(y + r * planes.pitch, dy + (i * z.oh + r) * z.ow, z.ow * sizeof(float));
        for (long k = 0; k < taps; k += N) {
          const float* from[N];
          V acc[N];
          for (int j = 0; j < N; ++j) {
            const long tap = std::min(k + j, taps - 1);
            from[j] = plane + tap / z.k * planes.pitch + tap % z.k;
            acc[j] = sums[k + j];
          }
          for (long q = 0; q < length; q += L) {
            const V g = load(y + q);
#pragma GCC unroll 8
            for (int j = 0; j < N; ++j) acc[j] += g * load(from[j] + q);
          }
          for (int j = 0; j < N; ++j) sums[k + j] = acc[j];
        }
      }
      for (long k = 0; k < taps; ++k) dw[c * taps + k] = sum(sums[k]);
    }
  });
}

// Elementwise functions, written so that loops over them become vector instructions.

inline float exponential(float y) {  // 2 units in the last place; beyond -87 and 88, 0 and infinity
  const float x = y < -87.f ? -87.f : y > 88.f ? 88.f : y;
  const float n = std::floor(x * 1.44269504f + 0.5f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  p = (p * r * r + r + 1.f) * power;
  return y < -87.f ? 0.f : y > 88.f ? INFINITY : p;
}

inline float normal_cdf(float x) {  // by a rational function for erf (as in Eigen), beyond 4 the limit
  float z = x * 0.70710678f;
  z = z < -4.f ? -4.f : z > 4.f ? 4.f : z;
  const float s = z * z;
  float p = -2.72614225801306e-10f;
  p = p * s + 2.77068142495902e-08f;
  p = p * s - 2.10102402082508e-06f;
  p = p * s - 5.69250639462346e-05f;
  p = p * s - 7.34990630326855e-04f;
  p = p * s - 2.95459980854025e-03f;
  p = p * s - 1.60960333262415e-02f;
  float q = -1.45660718464996e-05f;
  q = q * s - 2.13374055278905e-04f;
  q = q * s - 1.68282697438203e-03f;
  q = q * s - 7.37332916720468e-03f;
  q = q * s - 1.42647390514189e-02f;
  return 0.5f + 0.5f * z * p / q;
}

inline float gelu(float x) { return x * normal_cdf(x); }
inline float gelu_slope(float x) { return normal_cdf(x) + x * 0.39894228f * exponential(-0.5f * x * x); }
inline float silu(float x) { return x / (1.f + exponential(-x)); }
inline float silu_slope(float x) {
  const float s = 1.f / (1.f + exponential(-x));
  return s * (1.f + x * (1.f - s));
}

template <class F>
void elementwise(long n, F f) {  // f(i) for all i < n, in vectors
  share_out(n, [&](long begin, long end) {
#pragma omp simd
    for (long i = begin; i < end; ++i) f(i);
  });
}

// Linear layers, as products of matrices: a (m, k) with the columns of b (k, n), N vectors of them at a time, packed.

template <int N, class Use>
void product_columns(long m, long k, const float* a, const float* b, Use use) {
  constexpr int M = REGISTERS / N;
  int row[M];
  for (int j = 0; j < M; ++j) row[j] = j * k;
  float c[M * N * L];
  for (long i = 0; i < m;) {
    const int rows = m - i < M ? 1 : M;
    std::fill(c, c + rows * N * L, 0.f);
    const auto tile = rows == M ? weight_tile<M, N> : weight_tile<1, N>;
    tile(a + i * k, row, b, N * L, 1, 1, k, 0, 0, c, N * L);
    for (int j = 0; j < rows; ++j, ++i) use(i, c + j * N * L);
  }
}

// use(i, j, count, values) for row i of a b and its columns j .. j + count - 1; b(q, j) is an element. Threads share columns.
template <class B, class Use>
void product(long m, long n, long k, const float* a, B b, Use use) {
  share_out((n + L - 1) / L, [&](long begin, long end) {
    for (long v = begin, wide; v < end; v += wide) {
      wide = std::min(4L, end - v);
      const long j = v * L, width = wide * L, count = std::min(n - j, width);
      float* packed = scratch(0, k * width);
      for (long q = 0; q < k; ++q) {
#pragma omp simd
        for (long c = 0; c < count; ++c) packed[q * width + c] = b(q, j + c);
        for (long c = count; c < width; ++c) packed[q * width + c] = 0;
      }
      const auto row = [&](long i, const float* c) { use(i, j, count, c); };
      if (wide == 1) product_columns<1>(m, k, a, packed, row);
      if (wide == 2) product_columns<2>(m, k, a, packed, row);
      if (wide == 3) product_columns<3>(m, k, a, packed, row);
      if (wide == 4) product_columns<4>(m, k, a, packed, row);
    }
  });
}

// What x goes through before it meets the weights; `choose` calls f with it as a constant, so that loops need not ask.
enum class Before { NOTHING, RELU, SILU };
template <class F>
void choose(int before, F f) {
  if (before == 1) return f(std::integral_constant<Before, Before::RELU>());
  if (before == 2) return f(std::integral_constant<Before, Before::SILU>());
  f(std::integral_constant<Before, Before::NOTHING>());
}
template <Before F>
inline float before(float x) {
  return F == Before::RELU ? std::max(x, 0.f) : F == Before::SILU ? silu(x) : x;
}
template <Before F>
inline float before_slope(float x) {
  return F == Before::RELU ? (x > 0 ? 1.f : 0.f) : F == Before::SILU ? silu_slope(x) : 1.f;
}

// y (n, o) = F(x) (n, c) w (o, c)^T + bias (o) + more (n, o)
template <Before F>
void linear(long n, long c, long o, const float* x, const float* w, const float* bias, const float* more, float* y) {
  const float* a = x;
  if (F != Before::NOTHING) {
    float* activated = scratch(1, n * c);
    elementwise(n * c, [=](long i) { activated[i] = before<F>(x[i]); });
    a = activated;
  }
  product(n, o, c, a, [=](long q, long j) { return w[j * c + q]; }, [=](long i, long j, long count, const float* v) {
    for (long l = 0; l < count; ++l) y[i * o + j + l] = v[l] + bias[j + l] + (more ? more[i * o + j + l] : 0.f);
  });
}

template <Before F>
void linear_gradient(long n, long c, long o, const float* dy, const float* x, const float* w, float* dx, float* dw,
                     float* dbias) {
  product(n, c, o, dy, [=](long q, long j) { return w[q * c + j]; }, [=](long i, long j, long count, const float* v) {
#pragma omp simd
    for (long l = 0; l < count; ++l) dx[i * c + j + l] = v[l] * before_slope<F>(x[i * c + j + l]);
  });
  float* transposed = scratch(1, o * n);  // read along n, dy would have a row of the cache for each of its numbers
  share_out(o, [=](long begin, long end) {
    for (long j = begin; j < end; ++j) {
      float total = 0;
      for (long i = 0; i < n; ++i) total += transposed[j * n + i] = dy[i * o + j];
      dbias[j] = total;
    }
  });
  product(o, c, n, transposed, [=](long q, long j) { return before<F>(x[q * c + j]); },
          [=](long i, long j, long count, const float* v) { std::memcpy(dw + i * c + j, v, count * sizeof(float)); });
}

// Group normalisation: y = (x - mean) / deviation * weight + bias over each of `groups` runs of channels of an image; GELU
// may come before it, SiLU after it.

enum Activation { NONE, GELU_BEFORE, SILU_AFTER };

struct Norm {
  long n, c, groups, pixels;
  long own;  // c where each image has a weight and bias of its own, (n, c), else 0
  float eps;
  Activation activation;
  long channels() const { return c / groups; }
  long block() const { return channels() * pixels; }
};

// The block x, or its GELU in scratch memory; its mean and 1 / deviation.
const float* normalise(const Norm& z, const float* x, float* mean, float* scale) {
  const long n = z.block();
  if (z.activation == GELU_BEFORE) {
    float* to = scratch(0, n);
#pragma omp simd
    for (long i = 0; i < n; ++i) to[i] = gelu(x[i]);
    x = to;
  }
  float s = 0, v = 0;
#pragma omp simd reduction(+ : s)
  for (long i = 0; i < n; ++i) s += x[i];
  const float m = s / n;
#pragma omp simd reduction(+ : v)
  for (long i = 0; i < n; ++i) v += (x[i] - m) * (x[i] - m);
  *mean = m;
  *scale = 1 / std::sqrt(v / n + z.eps);
  return x;
}

void group_norm(const Norm& z, const float* x, const float* weight, const float* bias, float* y) {
  share_out(z.n * z.groups, [&](long begin, long end) {
    for (long i = begin; i < end; ++i) {
      float mean, scale;
      const float* from = normalise(z, x + i * z.block(), &mean, &scale);
      for (long j = 0; j < z.channels(); ++j, from += z.pixels) {
        const long c = i / z.groups * z.own + i % z.groups * z.channels() + j;
        const float a = scale * weight[c], b = bias[c] - mean * a;
        float* to = y + i * z.block() + j * z.pixels;
        if (z.activation == SILU_AFTER)
#pragma omp simd
          for (long q = 0; q < z.pixels; ++q) to[q] = silu(from[q] * a + b);
        else
#pragma omp simd
          for (long q = 0; q < z.pixels; ++q) to[q] = from[q] * a + b;
      }
    }
  });
}

void group_norm_gradient(const Norm& z, const float* dy, const float* x, const float* weight, const float* bias, float* dx,
                         float* dweight, float* dbias) {
  std::vector<float> sums(2 * z.n * z.c);  // of dy and of dy times the normalised x, for each image and channel
  share_out(z.n * z.groups, [&](long begin, long end) {
    for (long i = begin; i < end; ++i) {
      float mean, scale, mean_g = 0, mean_gx = 0;  // g = dy * weight
      const float *in = normalise(z, x + i * z.block(), &mean, &scale), *slope = dy + i * z.block();
      const long first = i % z.groups * z.channels(), at = i / z.groups * z.own + first;
      if (z.activation == SILU_AFTER) {
        float* to = scratch(1, z.block());
        for (long j = 0; j < z.channels(); ++j) {
          const float a = scale * weight[at + j], b = bias[at + j] - mean * a;
#pragma omp simd
          for (long q = j * z.pixels; q < (j + 1) * z.pixels; ++q) to[q] = slope[q] * silu_slope(in[q] * a + b);
        }
        slope = to;
      }
      for (long j = 0; j < z.channels(); ++j) {
        float s = 0, sx = 0;
#pragma omp simd reduction(+ : s, sx)
        for (long q = j * z.pixels; q < (j + 1) * z.pixels; ++q) {
          s += slope[q];
          sx += slope[q] * (in[q] - mean);
        }
        sx *= scale;
        const long to = i / z.groups * z.c + first + j;
        sums[2 * to] = s, sums[2 * to + 1] = sx;
        mean_g += s * weight[at + j] / z.block(), mean_gx += sx * weight[at + j] / z.block();
      }
      // dx = scale (g - mean(g) - normalised x mean(g normalised x)) (Wu & He 2018, differentiated)
      float* to = dx + i * z.block();
      for (long j = 0; j < z.channels(); ++j) {
        const float a = scale * weight[at + j], b = -scale * scale * mean_gx, c = -scale * mean_g - b * mean;
#pragma omp simd
        for (long q = j * z.pixels; q < (j + 1) * z.pixels; ++q) to[q] = slope[q] * a + in[q] * b + c;
      }
      if (z.activation == GELU_BEFORE)
#pragma omp simd
        for (long q = 0; q < z.block(); ++q) to[q] *= gelu_slope(x[i * z.block() + q]);
    }
  });
  const long weights = z.own ? z.n * z.c : z.c;
  std::fill(dweight, dweight + weights, 0.f);
  std::fill(dbias, dbias + weights, 0.f);
  for (long i = 0; i < z.n * z.c; ++i) dbias[i % weights] += sums[2 * i], dweight[i % weights] += sums[2 * i + 1];
}

// Linear attention (Shen et al. 2018, eq. 4) of one image and head: out (d, n) = context^T softmax_d(q) / sqrt(d) with
// context (d, d) = softmax_n(k) v^T. Rows are padded with zeros to `pitch` floats.

struct Head {
  long d, n, pitch;
  long size() const { return d * pitch; }

  void copy(const float* from, float* to) const {
    for (long i = 0; i < d; ++i) {
      std::memcpy(to + i * pitch, from + i * n, n * sizeof(float));
      std::fill(to + i * pitch + n, to + (i + 1) * pitch, 0.f);
    }
  }
  void softmax_positions(const float* k, float* to) const {
    for (long i = 0; i < d; ++i) {
      const float* row = k + i * n;
      float* out = to + i * pitch;
      float most = row[0], total = 0;
#pragma omp simd reduction(max : most)
      for (long j = 0; j < n; ++j) most = row[j] > most ? row[j] : most;
#pragma omp simd reduction(+ : total)
      for (long j = 0; j < n; ++j) total += out[j] = exponential(row[j] - most);
#pragma omp simd
      for (long j = 0; j < n; ++j) out[j] /= total;
      std::fill(out + n, out + pitch, 0.f);
    }
  }
  void softmax_channels(const float* q, float* to, float* most, float* total) const {
    std::copy(q, q + n, most);
    std::fill(total, total + n, 0.f);
    for (long i = 1; i < d; ++i)
#pragma omp simd
      for (long j = 0; j < n; ++j) most[j] = q[i * n + j] > most[j] ? q[i * n + j] : most[j];
    for (long i = 0; i < d; ++i) {
#pragma omp simd
      for (long j = 0; j < n; ++j) total[j] += to[i * pitch + j] = exponential(q[i * n + j] - most[j]);
      std::fill(to + i * pitch + n, to + (i + 1) * pitch, 0.f);
    }
    for (long i = 0; i < d; ++i)
#pragma omp simd
      for (long j = 0; j < n; ++j) to[i * pitch + j] /= total[j];
  }
  // out (d, d) = a (d, pitch) b (d, pitch)^T * factor
  void outer(const float* a, const float* b, float factor, float* out) const {
    constexpr int M = 4;
    for (long i = 0; i < d; i += M)
      for (long j = 0; j < d; j += M) {
        V acc[M][M] = {};
        for (long q = 0; q < pitch; q += L) {
          V x[M];
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) x[m] = load(a + std::min(i + m, d - 1) * pitch + q);
#pragma GCC unroll 8
          for (int l = 0; l < M; ++l) {
            const V y = load(b + std::min(j + l, d - 1) * pitch + q);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) acc[m][l] += x[m] * y;
          }
        }
        for (int m = 0; m < M && i + m < d; ++m)
          for (int l = 0; l < M && j + l < d; ++l) out[(i + m) * d + j + l] = sum(acc[m][l]) * factor;
      }
  }
  // out (d, n) = w x, or w^T x, with w (d, d), x (d, pitch); `room` (MAX_M pitch)
  void multiply(const float* w, bool transposed, const float* x, float* out, float* room) const {
    const Blocks blocks{d};
    const auto packed = blocks.pack(d, [&](long row, long k) { return transposed ? w[k * d + row] : w[row * d + k]; });
    std::vector<int> offset(d);
    for (long i = 0; i < d; ++i) offset[i] = i * pitch;
    for (long first = 0; first < d; first += blocks.m) {
      blocks.tiles()(x, offset, packed.data() + first * d, room, pitch, n);
      for (long j = 0; j < std::min(blocks.m, d - first); ++j)
        std::memcpy(out + (first + j) * n, room + j * pitch, n * sizeof(float));
    }
  }
};

Head make_head(long d, long n) { return {d, n, round_up(n, L)}; }

void linear_attention(const Head& z, const float* q, const float* k, const float* v, float* out) {
  const float factor = 1 / std::sqrt(static_cast<float>(z.d));
  float *keys = scratch(0, z.size()), *queries = scratch(1, z.size() + NV * L), *values = scratch(2, z.size());
  float *context = scratch(3, z.d * z.d), *room = scratch(4, MAX_M * z.pitch);
  z.softmax_positions(k, keys);
  z.copy(v, values);
  z.outer(keys, values, factor, context);
  z.softmax_channels(q, queries, room, room + z.pitch);
  z.multiply(context, true, queries, out, room);
}

void linear_attention_gradient(const Head& z, const float* dout, const float* q, const float* k, const float* v, float* dq,
                               float* dk, float* dv) {
  const float factor = 1 / std::sqrt(static_cast<float>(z.d));
  float *keys = scratch(0, z.size() + NV * L), *queries = scratch(1, z.size()), *values = scratch(2, z.size() + NV * L);
  float *context = scratch(3, 2 * z.d * z.d), *room = scratch(4, MAX_M * z.pitch);
  float *dcontext = context + z.d * z.d, *douts = scratch(5, z.size() + NV * L);
  z.softmax_positions(k, keys);
  z.softmax_channels(q, queries, room, room + z.pitch);
  z.copy(v, values);
  z.copy(dout, douts);
  z.outer(keys, values, factor, context);
  z.outer(queries, douts, factor, dcontext);
  z.multiply(context, false, douts, dq, room);    // of the queries' softmax
  z.multiply(dcontext, false, values, dk, room);  // of the keys' softmax
  z.multiply(dcontext, true, keys, dv, room);
  // Softmax p: its input's gradient is p (dp - sum(p dp))
  std::fill(room, room + z.n, 0.f);
  for (long i = 0; i < z.d; ++i)
#pragma omp simd
    for (long j = 0; j < z.n; ++j) room[j] += queries[i * z.pitch + j] * dq[i * z.n + j];
  for (long i = 0; i < z.d; ++i) {
    float* row = dq + i * z.n;
#pragma omp simd
    for (long j = 0; j < z.n; ++j) row[j] = queries[i * z.pitch + j] * (row[j] - room[j]);
  }
  for (long i = 0; i < z.d; ++i) {
    float *row = dk + i * z.n, *p = keys + i * z.pitch, total = 0;
#pragma omp simd reduction(+ : total)
    for (long j = 0; j < z.n; ++j) total += p[j] * row[j];
#pragma omp simd
    for (long j = 0; j < z.n; ++j) row[j] = p[j] * (row[j] - total);
  }
}

// From MindSpore's arguments

struct Arguments {
  void** data;
  int64_t** shapes;
  const int* ndims = nullptr;
  const float* in(int i) const { return static_cast<float*>(data[i]); }
  float* out(int i) const { return static_cast<float*>(data[i]); }
  int64_t size(int i, int axis) const { return shapes[i][axis]; }
  // of tensors x (n, c, h, w), weight, y and the settings {stride, padding, groups, frozen}: the shape of one group
  Shape shape(int x, int weight, int y, const int32_t* settings) const {
    const long groups = settings[2], h = size(x, 2), w = size(x, 3), oh = size(y, 2), ow = size(y, 3);
    return {size(x, 0), size(x, 1) / groups, h,        w, size(y, 1) / groups,     oh, ow, size(weight, 2), settings[0],
            settings[1], size(x, 1) * h * w, size(y, 1) * oh * ow};
  }
  const int32_t* settings(int i) const { return static_cast<int32_t*>(data[i]); }
  // of tensors x (n, c, h, w), weight (c) or (n, c), and the settings {groups, eps, activation}
  Norm norm(int x, int weight, const float* settings) const {
    const long n = size(x, 0), c = size(x, 1), own = ndims[weight] == 2 ? c : 0;
    return {n, c, static_cast<long>(settings[0]), size(x, 2) * size(x, 3), own, settings[1],
            static_cast<Activation>(settings[2])};
  }
};

void bias_gradient(const float* dy, long n, long c, long pixels, float* db) {
  share_out(c, [&](long begin, long end) {
    for (long j = begin; j < end; ++j) {
      float total = 0;
      for (long i = 0; i < n; ++i) {
        const float* from = dy + (i * c + j) * pixels;
        float s = 0;
#pragma omp simd reduction(+ : s)
        for (long q = 0; q < pixels; ++q) s += from[q];
        total += s;
      }
      db[j] = total;
    }
  });
}

bool is_depthwise(const Shape& z) { return z.c == 1 && z.o == 1 && z.s == 1 && z.p < z.k; }

void conv(const Shape& z, long groups, const float* x, const float* weight, const float* bias, float* y) {
  if (is_depthwise(z)) return depthwise(z, groups, x, weight, bias, y, false);
  for (long g = 0; g < groups; ++g)
    convolve(z, x + g * z.c * z.h * z.w, weight + g * z.o * z.c * z.k * z.k, bias + g * z.o, y + g * z.o * z.oh * z.ow);
}

// A frozen weight has gradient 0, which saves a third of the time.
void conv_gradient(const Shape& z, long groups, bool frozen, const float* dy, const float* x, const float* weight, float* dx,
                   float* dweight, float* dbias) {
  bias_gradient(dy, z.n, groups * z.o, z.oh * z.ow, dbias);
  if (frozen) std::fill_n(dweight, groups * z.o * z.c * z.k * z.k, 0.f);
  if (is_depthwise(z)) {
    if (!frozen) depthwise_weight_gradient(z, groups, x, dy, dweight);
    return depthwise(z, groups, dy, weight, nullptr, dx, true);
  }
  for (long g = 0; g < groups; ++g) {
    const long in = g * z.c * z.h * z.w, w = g * z.o * z.c * z.k * z.k, out = g * z.o * z.oh * z.ow;
    if (!frozen) weight_gradient(z, x + in, dy + out, dweight + w);
    convolve_transposed(z, dy + out, weight + w, nullptr, dx + in);
  }
}

}  // namespace

// Defines and exports an operator; a tensor that is neither float32 nor int32 makes it fail instead of reading beyond it.
#define OPERATOR(name)                                                                                     \
  static void run_##name(int tensors, void** data, int* ndims, int64_t** shapes);                          \
  extern "C" int name(int tensors, void** data, int* ndims, int64_t** shapes, const char** types, void*, void*) { \
    for (int i = 0; i < tensors; ++i)                                                                      \
      if (std::strcmp(types[i], "float32") && std::strcmp(types[i], "int32")) return 1;                    \
    run_##name(tensors, data, ndims, shapes);                                                              \
    return 0;                                                                                              \
  }                                                                                                        \
  static void run_##name([[maybe_unused]] int tensors, void** data, [[maybe_unused]] int* ndims, int64_t** shapes)

// x, weight (o, c / groups, k, k), bias (o), settings -> y
OPERATOR(conv) {
  const Arguments a{data, shapes};
  conv(a.shape(0, 1, 4, a.settings(3)), a.settings(3)[2], a.in(0), a.in(1), a.in(2), a.out(4));
}

// dy, x, weight, settings -> dx, dweight, dbias
OPERATOR(conv_gradient) {
  const Arguments a{data, shapes};
  const int32_t* settings = a.settings(3);
  conv_gradient(a.shape(1, 2, 0, settings), settings[2], settings[3], a.in(0), a.in(1), a.in(2), a.out(4), a.out(5),
                a.out(6));
}

// Convolution of the normalised x, which is computed again for the gradient instead of kept:
// x, norm weight (c), norm bias (c), norm settings, weight, bias, settings -> y
OPERATOR(norm_conv) {
  const Arguments a{data, shapes, ndims};
  const Shape z = a.shape(0, 4, 7, a.settings(6));
  float* normal = scratch(6, z.n * z.x_image);
  group_norm(a.norm(0, 1, a.in(3)), a.in(0), a.in(1), a.in(2), normal);
  conv(z, a.settings(6)[2], normal, a.in(4), a.in(5), a.out(7));
}

// dy, x, norm weight, norm bias, norm settings, weight, settings -> dx, dnorm weight, dnorm bias, dweight, dbias
OPERATOR(norm_conv_gradient) {
  const Arguments a{data, shapes, ndims};
  const Shape z = a.shape(1, 5, 0, a.settings(6));
  const Norm norm = a.norm(1, 2, a.in(4));
  float *normal = scratch(6, z.n * z.x_image), *slope = scratch(7, z.n * z.x_image);
  group_norm(norm, a.in(1), a.in(2), a.in(3), normal);
  conv_gradient(z, a.settings(6)[2], false, a.in(0), normal, a.in(5), slope, a.out(10), a.out(11));
  group_norm_gradient(norm, slope, a.in(1), a.in(2), a.in(3), a.out(7), a.out(8), a.out(9));
}

// x (n, c, h, w), weight (c, o, k, k), bias (o), settings -> y
OPERATOR(conv_transpose) {
  const Arguments a{data, shapes};
  const Shape z = a.shape(4, 1, 0, a.settings(3));
  convolve_transposed(z, a.in(0), a.in(1), a.in(2), a.out(4));
}

// dy, x, weight, settings -> dx, dweight, dbias
OPERATOR(conv_transpose_gradient) {
  const Arguments a{data, shapes};
  const Shape z = a.shape(0, 2, 1, a.settings(3));
  weight_gradient(z, a.in(0), a.in(1), a.out(5));
  convolve(z, a.in(0), a.in(2), nullptr, a.out(4));
  bias_gradient(a.in(0), z.n, a.size(0, 1), z.h * z.w, a.out(6));
}

// x (n, c), weight (o, c), bias (o), more (n, o) or nothing, {activation before} -> y (n, o)
OPERATOR(linear) {
  const Arguments a{data, shapes};
  const int last = tensors - 1;
  choose(a.settings(last - 1)[0], [&](auto f) {
    linear<f>(a.size(0, 0), a.size(0, 1), a.size(1, 0), a.in(0), a.in(1), a.in(2), last > 4 ? a.in(3) : nullptr, a.out(last));
  });
}

// dy, x, weight, {activation before} -> dx, dweight, dbias
OPERATOR(linear_gradient) {
  const Arguments a{data, shapes};
  choose(a.settings(3)[0], [&](auto f) {
    linear_gradient<f>(a.size(1, 0), a.size(1, 1), a.size(2, 0), a.in(0), a.in(1), a.in(2), a.out(4), a.out(5), a.out(6));
  });
}

// x, weight and bias (c) or (n, c), {groups, eps, activation} -> y
OPERATOR(group_norm) {
  const Arguments a{data, shapes, ndims};
  group_norm(a.norm(0, 1, a.in(3)), a.in(0), a.in(1), a.in(2), a.out(4));
}

// dy, x, weight, bias, {groups, eps, activation} -> dx, dweight, dbias
OPERATOR(group_norm_gradient) {
  const Arguments a{data, shapes, ndims};
  group_norm_gradient(a.norm(1, 2, a.in(4)), a.in(0), a.in(1), a.in(2), a.in(3), a.out(5), a.out(6), a.out(7));
}

#define ELEMENTWISE(name, inputs, expression)               \
  OPERATOR(name) {                                          \
    const Arguments a{data, shapes};                        \
    const float *x = a.in(0), *dy = a.in(inputs - 1);       \
    float* y = a.out(inputs);                               \
    long n = 1;                                             \
    for (int i = 0; i < ndims[0]; ++i) n *= a.size(0, i);   \
    elementwise(n, [=](long i) { y[i] = expression; });     \
    (void)dy;                                               \
  }
ELEMENTWISE(gelu, 1, gelu(x[i]))
ELEMENTWISE(gelu_gradient, 2, gelu_slope(x[i]) * dy[i])
ELEMENTWISE(silu, 1, silu(x[i]))
ELEMENTWISE(silu_gradient, 2, silu_slope(x[i]) * dy[i])

// f(head, where its output begins, where its q begins, how far its k lies behind q and its v behind k) for each head of the
// tensors qkv (n, 3 heads d, h, w) and {heads}
template <class F>
void each_head(const Arguments& a, int qkv, int heads_at, F f) {
  const long heads = a.settings(heads_at)[0];
  const Head z = make_head(a.size(qkv, 1) / (3 * heads), a.size(qkv, 2) * a.size(qkv, 3));
  const long floats = z.d * z.n;
  share_out(a.size(qkv, 0) * heads, [&](long begin, long end) {
    for (long i = begin; i < end; ++i) f(z, i * floats, (i / heads * 3 * heads + i % heads) * floats, heads * floats);
  });
}

// qkv (n, 3 heads d, h, w), {heads} -> out (n, heads d, h, w)
OPERATOR(linear_attention) {
  const Arguments a{data, shapes};
  each_head(a, 0, 1, [&](const Head& z, long out, long first, long part) {
    const float* q = a.in(0) + first;
    linear_attention(z, q, q + part, q + 2 * part, a.out(2) + out);
  });
}

// dout, qkv, {heads} -> dqkv
OPERATOR(linear_attention_gradient) {
  const Arguments a{data, shapes};
  each_head(a, 1, 2, [&](const Head& z, long out, long first, long part) {
    const float* q = a.in(1) + first;
    float* dq = a.out(3) + first;
    linear_attention_gradient(z, a.in(0) + out, q, q + part, q + 2 * part, dq, dq + part, dq + 2 * part);
  });
}

// {n, beta1, beta2, eps, norm to clip at}, learning rate, decay of the averages, the powers of beta1 and of beta2, the count
// of steps; n parameters, n first and n second moments, n gradients, n or no averages -> gradient norm. Clipping, Adam as
// nn.Adam computes it, and average += (1 - decay) (parameter - average), in place.
OPERATOR(adam) {
  constexpr int FIRST = 6;
  const auto value = [&](int i) -> float& { return *static_cast<float*>(data[i]); };
  const float *settings = &value(0), beta1 = settings[1], beta2 = settings[2], eps = settings[3];
  const long n = static_cast<long>(settings[0]), followed = tensors - 1 - FIRST - 4 * n;  // the first of the parameters
  const auto tensor = [&](int kind, long i) { return static_cast<float*>(data[FIRST + kind * n + i]); };
  std::vector<long> end(n + 1, 0);  // of each parameter, as if they lay in a row
  for (long i = 0; i < n; ++i) {
    long size = 1;
    for (int j = 0; j < ndims[FIRST + i]; ++j) size *= shapes[FIRST + i][j];
    end[i + 1] = end[i] + size;
  }
  const auto share = [&](int t, auto f) {  // f(parameter, from, to) for the share of thread t
    const long begin = end[n] * t / pool().size(), stop = end[n] * (t + 1) / pool().size();
    for (long i = 0; i < n; ++i) {
      const long from = std::max(begin, end[i]), to = std::min(stop, end[i + 1]);
      if (from < to) f(i, from - end[i], to - end[i]);
    }
  };

  std::vector<double> squares(pool().size() * 8, 0.);  // one cache line each
  pool().run([&](int t) {
    share(t, [&](long i, long from, long to) {
      const float* g = tensor(3, i);
      float s = 0;
#pragma omp simd reduction(+ : s)
      for (long j = from; j < to; ++j) s += g[j] * g[j];
      squares[8 * t] += s;
    });
  });
  double total = 0;
  for (int t = 0; t < pool().size(); ++t) total += squares[8 * t];
  const float norm = std::sqrt(total), shrink = std::min(1.f, settings[4] / (norm + 1e-6f));
  value(tensors - 1) = norm;

  const float power1 = value(3) *= beta1, power2 = value(4) *= beta2;
  *static_cast<int32_t*>(data[5]) += 1;
  const float rate = value(1) * std::sqrt(1 - power2) / (1 - power1), move = 1 - value(2);
  pool().run([&](int t) {
    share(t, [&](long i, long from, long to) {
      float *p = tensor(0, i), *m = tensor(1, i), *v = tensor(2, i), *average = i < followed ? tensor(4, i) : nullptr;
      const float* gradient = tensor(3, i);
#pragma omp simd
      for (long j = from; j < to; ++j) {
        const float g = gradient[j] * shrink;
        m[j] += (1 - beta1) * (g - m[j]);
        v[j] += (1 - beta2) * (g * g - v[j]);
        p[j] -= rate * m[j] / (std::sqrt(v[j]) + eps);
      }
      if (average)
#pragma omp simd
        for (long j = from; j < to; ++j) average[j] += move * (p[j] - average[j]);
    });
  });
}
