// Convolutions in NCHW and their gradients: plain, strided, grouped, transposed and depthwise.
//
// Sizes: n images, c channels of h x w pixels in, o channels of oh x ow pixels out; k x k weights, stride s, padding p.

#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

#include "pool.h"
#include "simd.h"
#include "tiles.h"

namespace kernels {

// One group of a convolution. A transposed convolution has the shape of the convolution whose gradient it is.
struct Shape {
  long n, c, h, w, o, oh, ow, k, s, p;
  long x_image, y_image;  // floats from one image to the next, all groups included
};

// Images of c channels, copied into planes with zeros around, several images one below the other. The zeros to the right
// of a row are those to the left of the next row. A stride s > 1 makes s x s planes of each channel: plane (a, b) holds the
// pixels (a + s i, b + s j).
struct Planes {
  long h, w, s, before;         // before: rows and columns of zeros ahead of the first pixel
  long pitch, rows, first = 0;  // of one image in a plane; first: the offset of pixel (0, 0) where s = 1
  long images = 1, length = 0;  // images in a plane; floats in a plane

  Planes(long height, long width, long stride, long zeros_before, long zeros_after, long oh, long ow, long k)
      : h(height), w(width), s(stride), before(zeros_before) {
    if (s == 1) {
      pitch = w + std::max(before, zeros_after);
      rows = h + std::max(before, zeros_after);
      first = before * pitch + before;
    } else {
      pitch = ow + (k - 1) / s;
      rows = oh + (k - 1) / s;
    }
  }

  // Puts as many images in a plane as the second-level cache holds, at most `most`.
  void stack(long channels, long most) {
    images = std::clamp(65536 / std::max(1L, channels * s * s * rows * pitch), 1L, most);
    length = round_up(images * rows * pitch + 2 * first + (s > 1 ? pitch : 0) + REGISTERS * L, L);
    if (size(channels) > std::numeric_limits<int>::max())
      throw std::length_error("an image is too large");  // for int offsets
  }

  long size(long channels) const { return channels * s * s * length; }

  // Copies `count` images, `image` floats apart, into `to`, whose zeros must have been set.
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
          const long py = y + before, a = py % s, r = py / s;
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

// Every convolution becomes out[o][q] = bias[o] + sum_k weight[o][k] * planes[offset[k] + q], where q runs over whole rows
// of the planes, padding included: one matrix product whose second matrix consists of shifted views of the planes. A Pass is
// one such product and the pixels that it writes: rows x columns of them, from (y0, x0) in steps of s.
struct Pass {
  std::vector<int> offset;
  std::vector<float> weight;  // from Blocks::pack
  long start, rows, columns, y0, x0, s;
};

// y (n, o, oh, ow), whose images are y_image floats apart, from the planes of x
inline void run_passes(const std::vector<Pass>& passes, const Planes& planes, long plane_channels, const float* x,
                       long x_image, long n, long o, long oh, long ow, const float* bias, float* y, long y_image) {
  if (n == 0) return;
  const Blocks blocks{o};
  const long m = blocks.m, parts = std::min(blocks.count, n < threads() ? (threads() + n - 1) / n : 1);
  const Tiles tiles = blocks.tiles();
  parallel_for(n * parts, [&](long begin, long end) {
    const Buffer buffer(planes.size(plane_channels)), result(m * planes.length);
    std::memset(buffer, 0, planes.size(plane_channels) * sizeof(float));
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
          const float* weight = pass.weight.data() + block * m * static_cast<long>(pass.offset.size());
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

inline Planes input_planes(const Shape& shape) {
  const long after = (shape.ow - 1) + shape.k - shape.p - shape.w;
  return {shape.h, shape.w, shape.s, shape.p, after, shape.oh, shape.ow, shape.k};
}

// Where each weight (c, ky, kx) meets the input of the first output pixel
inline std::vector<int> input_offsets(const Shape& shape, const Planes& planes) {
  std::vector<int> offset;
  const long s = shape.s;
  for (long c = 0; c < shape.c; ++c)
    for (long ky = 0; ky < shape.k; ++ky)
      for (long kx = 0; kx < shape.k; ++kx) {
        const long plane = (c * s + ky % s) * s + kx % s;
        offset.push_back(static_cast<int>(plane * planes.length + ky / s * planes.pitch + kx / s));
      }
  return offset;
}

// y (n, o, oh, ow) = x (n, c, h, w) * w (o, c, k, k) + bias (o)
inline void convolve(const Shape& shape, const float* x, const float* w, const float* bias, float* y) {
  Planes planes = input_planes(shape);
  planes.stack(shape.c, std::max(1L, shape.n / threads()));
  const long taps = shape.c * shape.k * shape.k;
  auto packed = Blocks{shape.o}.pack(taps, [&](long o, long k) { return w[o * taps + k]; });
  const Pass pass{input_offsets(shape, planes), std::move(packed), 0, shape.oh, shape.ow, 0, 0, 1};
  run_passes({pass}, planes, shape.c, x, shape.x_image, shape.n, shape.o, shape.oh, shape.ow, bias, y, shape.y_image);
}

// x (n, c, h, w) = the transpose of `convolve` applied to y (n, o, oh, ow), + bias (c). The pixels whose row + p has the
// remainder a and whose column + p has the remainder b in a division by s depend on the weights (a + s i, b + s j) only: s x
// s passes.
inline void convolve_transposed(const Shape& shape, const float* y, const float* w, const float* bias, float* x) {
  const long k = shape.k, s = shape.s, p = shape.p, most = (k - 1) / s;
  const long after = std::max((shape.h - 1 + p) / s - shape.oh + 1, (shape.w - 1 + p) / s - shape.ow + 1);
  Planes planes(shape.oh, shape.ow, 1, most, std::max(0L, after), 0, 0, 0);
  planes.stack(shape.o, std::max(1L, shape.n / threads()));
  std::vector<Pass> passes;
  for (long a = 0; a < s; ++a)
    for (long b = 0; b < s; ++b) {
      const long u0 = std::max(0L, (p - a + s - 1) / s), v0 = std::max(0L, (p - b + s - 1) / s);
      Pass pass{{}, {}, 0, 0, 0, s * u0 + a - p, s * v0 + b - p, s};
      pass.rows = (shape.h - pass.y0 + s - 1) / s;
      pass.columns = (shape.w - pass.x0 + s - 1) / s;
      if (pass.rows <= 0 || pass.columns <= 0) continue;
      pass.start = planes.first + (u0 - most) * planes.pitch + v0 - most;  // offsets count from the last weight's row
      std::vector<long> tap;
      for (long o = 0; o < shape.o; ++o)
        for (long ky = a; ky < k; ky += s)
          for (long kx = b; kx < k; kx += s) {
            const long row = most - ky / s, column = most - kx / s;
            pass.offset.push_back(static_cast<int>(o * planes.length + row * planes.pitch + column));
            tap.push_back((o * shape.c * k + ky) * k + kx);
          }
      const long taps = static_cast<long>(tap.size());
      pass.weight = Blocks{shape.c}.pack(taps, [&](long c, long i) { return w[tap[i] + c * k * k]; });
      passes.push_back(std::move(pass));
    }
  run_passes(passes, planes, shape.o, y, shape.y_image, shape.n, shape.c, shape.h, shape.w, bias, x, shape.x_image);
}

// dw (o, c, k, k) = the sum over images and pixels of dy (n, o, oh, ow) times the pixel of x (n, c, h, w) that the weight
// met
inline void weight_gradient(const Shape& shape, const float* x, const float* dy, float* dw) {
  constexpr int N = 4, M = REGISTERS / N;
  Planes planes = input_planes(shape);
  planes.stack(shape.c, std::max(1L, shape.n / threads()));
  std::vector<int> offset = input_offsets(shape, planes);
  const long taps = static_cast<long>(offset.size()), padded = round_up(taps, M);
  const long o = round_up(shape.o, L), pixels = shape.oh * shape.ow, shares = std::min<long>(threads(), shape.n);
  offset.resize(padded, 0);
  std::vector<std::vector<float>> sums(shares);
  parallel([&](int t) {
    if (t >= shares) return;
    sums[t].assign(padded * o, 0.f);
    const long size = planes.size(shape.c);
    const Buffer buffer(size), y(planes.images * pixels * N * L);
    std::memset(buffer, 0, size * sizeof(float));
    const long end = shape.n * (t + 1) / shares;
    for (long image = shape.n * t / shares; image < end; image += planes.images) {
      const long count = std::min(planes.images, end - image);
      const Rows rows{count, shape.oh, shape.ow, planes.rows * planes.pitch, planes.pitch};
      planes.fill(x + image * shape.x_image, shape.x_image, shape.c, count, buffer);
      for (long j = 0, width; j < o; j += width) {
        width = std::min<long>(o - j, N * L);
        const long channels = std::min(width, shape.o - j);
        float* to = y;  // `channels` channels of dy, innermost
        for (long i = 0; i < count; ++i) {
          const float* from = dy + (image + i) * shape.y_image + j * pixels;
          for (long q = 0; q < pixels; ++q, to += width) {
            for (long m = 0; m < channels; ++m) to[m] = from[m * pixels + q];
            for (long m = channels; m < width; ++m) to[m] = 0;
          }
        }
        const auto accumulate = width == 4 * L   ? accumulate_tile<M, 4>
                                : width == 3 * L ? accumulate_tile<M, 3>
                                : width == 2 * L ? accumulate_tile<M, 2>
                                                 : accumulate_tile<M, 1>;
        for (long k = 0; k < padded; k += M) accumulate(buffer, &offset[k], y, width, rows, &sums[t][k * o + j], o);
      }
    }
  });
  for (long j = 0; j < shape.o; ++j)
    for (long k = 0; k < taps; ++k) {
      float total = 0;
      for (const auto& s : sums) total += s[k * o + j];
      dw[j * taps + k] = total;
    }
}

// Depthwise: each channel has k x k weights of its own, stride 1.

inline bool is_depthwise(const Shape& shape) { return shape.c == 1 && shape.o == 1 && shape.s == 1 && shape.p < shape.k; }

inline Planes depthwise_planes(const Shape& shape, bool of_output) {
  const long h = of_output ? shape.oh : shape.h, w = of_output ? shape.ow : shape.w;
  const long before = of_output ? shape.k - 1 - shape.p : shape.p;
  const long after = (of_output ? shape.w : shape.ow) - 1 + shape.k - before - w;
  Planes planes(h, w, 1, before, after, 0, 0, shape.k);
  planes.stack(1, 1);
  return planes;
}

// `transposed`: x has the shape of the output, y that of the input, and y is the gradient of the input.
inline void depthwise(const Shape& shape, long channels, const float* x, const float* w, const float* bias, float* y,
                      bool transposed) {
  constexpr int N = 8;
  const Planes planes = depthwise_planes(shape, transposed);
  const long oh = transposed ? shape.h : shape.oh, ow = transposed ? shape.w : shape.ow, k = shape.k, taps = k * k;
  const long length = (oh - 1) * planes.pitch + ow;
  parallel_for(shape.n * channels, [&](long begin, long end) {
    const Buffer plane(planes.length), result(planes.length);
    std::memset(plane, 0, planes.length * sizeof(float));
    for (long i = begin; i < end; ++i) {
      const long c = i % channels;
      planes.fill(x + i * planes.h * planes.w, 0, 1, 1, plane);
      for (long q = 0; q < length; q += N * L) {
        V acc[N] = {};
        for (long tap = 0; tap < taps; ++tap) {
          const float weight = w[c * taps + (transposed ? taps - 1 - tap : tap)];
          const float* from = plane + q + tap / k * planes.pitch + tap % k;
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

inline void depthwise_weight_gradient(const Shape& shape, long channels, const float* x, const float* dy, float* dw) {
  constexpr int N = 7;
  const Planes planes = depthwise_planes(shape, false);
  const long k = shape.k, taps = k * k, oh = shape.oh, ow = shape.ow, length = (oh - 1) * planes.pitch + ow;
  parallel_for(channels, [&](long begin, long end) {
    const Buffer plane(planes.length), y(planes.length);  // y: dy in the rows of the plane, zero between them
    std::memset(plane, 0, planes.length * sizeof(float));
    std::memset(y, 0, planes.length * sizeof(float));
    const Buffer sums(round_up(taps, N) * L);  // a vector for each weight
    for (long c = begin; c < end; ++c) {
      std::fill_n(static_cast<float*>(sums), round_up(taps, N) * L, 0.f);
      for (long i = c; i < shape.n * channels; i += channels) {
        planes.fill(x + i * shape.h * shape.w, 0, 1, 1, plane);
        for (long r = 0; r < oh; ++r) std::memcpy(y + r * planes.pitch, dy + (i * oh + r) * ow, ow * sizeof(float));
        for (long first = 0; first < taps; first += N) {
          const float* from[N];
          V acc[N];
          for (int j = 0; j < N; ++j) {
            const long tap = std::min(first + j, taps - 1);
            from[j] = plane + tap / k * planes.pitch + tap % k;
            acc[j] = load(sums + (first + j) * L);
          }
          for (long q = 0; q < length; q += L) {
            const V g = load(y + q);
#pragma GCC unroll 8
            for (int j = 0; j < N; ++j) acc[j] += g * load(from[j] + q);
          }
          for (int j = 0; j < N; ++j) store(sums + (first + j) * L, acc[j]);
        }
      }
      for (long tap = 0; tap < taps; ++tap) dw[c * taps + tap] = sum(load(sums + tap * L));
    }
  });
}

// db (c) = the sums of dy (n, c, pixels)
inline void bias_gradient(const float* dy, long n, long c, long pixels, float* db) {
  parallel_for(c, [&](long begin, long end) {
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

// The convolution of all groups.
inline void grouped_convolution(const Shape& shape, long groups, const float* x, const float* weight, const float* bias,
                                float* y) {
  if (is_depthwise(shape)) return depthwise(shape, groups, x, weight, bias, y, false);
  for (long g = 0; g < groups; ++g)
    convolve(shape, x + g * shape.c * shape.h * shape.w, weight + g * shape.o * shape.c * shape.k * shape.k,
             bias + g * shape.o, y + g * shape.o * shape.oh * shape.ow);
}

// `frozen`: the gradient of the weight is 0, which saves a third of the time.
inline void grouped_convolution_gradient(const Shape& shape, long groups, bool frozen, const float* dy, const float* x,
                                         const float* weight, float* dx, float* dweight, float* dbias) {
  const long weights = shape.o * shape.c * shape.k * shape.k;
  bias_gradient(dy, shape.n, groups * shape.o, shape.oh * shape.ow, dbias);
  if (frozen) std::fill_n(dweight, groups * weights, 0.f);
  if (is_depthwise(shape)) {
    if (!frozen) depthwise_weight_gradient(shape, groups, x, dy, dweight);
    return depthwise(shape, groups, dy, weight, nullptr, dx, true);
  }
  for (long g = 0; g < groups; ++g) {
    const long in = g * shape.c * shape.h * shape.w, out = g * shape.o * shape.oh * shape.ow;
    if (!frozen) weight_gradient(shape, x + in, dy + out, dweight + g * weights);
    convolve_transposed(shape, dy + out, weight + g * weights, nullptr, dx + in);
  }
}

}  // namespace kernels
