// Group normalisation (Wu & He 2018) and its gradient: y = (x - mean) / deviation * weight + bias, with the mean and the
// deviation of each group of channels of an image. GELU may be applied to x before it, SiLU to y after it.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "pool.h"
#include "simd.h"

namespace kernels {

enum class NormActivation { NONE, GELU_BEFORE, SILU_AFTER };

struct Norm {
  long n, c, groups, pixels;
  long own;  // c where each image has a weight and bias of its own, (n, c), else 0
  float eps;
  NormActivation activation;
  long channels() const { return c / groups; }
  long block() const { return channels() * pixels; }
};

// Sets the mean and 1 / deviation of the block x or, with GELU_BEFORE, of its GELU, which is written to `activated`. Returns
// the numbers that were normalised.
inline const float* statistics(const Norm& norm, const float* x, float* activated, float* mean, float* scale) {
  const long n = norm.block();
  if (norm.activation == NormActivation::GELU_BEFORE) {
#pragma omp simd
    for (long i = 0; i < n; ++i) activated[i] = gelu(x[i]);
    x = activated;
  }
  float s = 0, v = 0;
#pragma omp simd reduction(+ : s)
  for (long i = 0; i < n; ++i) s += x[i];
  const float count = static_cast<float>(n), m = s / count;
#pragma omp simd reduction(+ : v)
  for (long i = 0; i < n; ++i) v += (x[i] - m) * (x[i] - m);
  *mean = m;
  *scale = 1 / std::sqrt(v / count + norm.eps);
  return x;
}

inline void group_norm(const Norm& norm, const float* x, const float* weight, const float* bias, float* y) {
  parallel_for(norm.n * norm.groups, [&](long begin, long end) {
    const Buffer activated(norm.activation == NormActivation::GELU_BEFORE ? norm.block() : 0);
    for (long i = begin; i < end; ++i) {
      float mean, scale;
      const float* from = statistics(norm, x + i * norm.block(), activated, &mean, &scale);
      for (long j = 0; j < norm.channels(); ++j, from += norm.pixels) {
        const long c = i / norm.groups * norm.own + i % norm.groups * norm.channels() + j;
        const float a = scale * weight[c], b = bias[c] - mean * a;
        float* to = y + i * norm.block() + j * norm.pixels;
        if (norm.activation == NormActivation::SILU_AFTER)
#pragma omp simd
          for (long q = 0; q < norm.pixels; ++q) to[q] = silu(from[q] * a + b);
        else
#pragma omp simd
          for (long q = 0; q < norm.pixels; ++q) to[q] = from[q] * a + b;
      }
    }
  });
}

inline void group_norm_gradient(const Norm& norm, const float* dy, const float* x, const float* weight, const float* bias,
                                float* dx, float* dweight, float* dbias) {
  const float block = static_cast<float>(norm.block());
  std::vector<float> sums(2 * norm.n * norm.c);  // of dy and of dy times the normalised x, for each image and channel
  parallel_for(norm.n * norm.groups, [&](long begin, long end) {
    const Buffer activated(norm.activation == NormActivation::GELU_BEFORE ? norm.block() : 0);
    const Buffer buffer(norm.activation == NormActivation::SILU_AFTER ? norm.block() : 0);
    for (long i = begin; i < end; ++i) {
      float mean, scale, mean_g = 0, mean_gx = 0;  // means of g = dy weight and of g times the normalised x
      const float *in = statistics(norm, x + i * norm.block(), activated, &mean, &scale), *slope = dy + i * norm.block();
      const long first = i % norm.groups * norm.channels(), at = i / norm.groups * norm.own + first;
      if (norm.activation == NormActivation::SILU_AFTER) {
        float* to = buffer;
        for (long j = 0; j < norm.channels(); ++j) {
          const float a = scale * weight[at + j], b = bias[at + j] - mean * a;
#pragma omp simd
          for (long q = j * norm.pixels; q < (j + 1) * norm.pixels; ++q) to[q] = slope[q] * silu_derivative(in[q] * a + b);
        }
        slope = to;
      }
      for (long j = 0; j < norm.channels(); ++j) {
        float s = 0, sx = 0;
#pragma omp simd reduction(+ : s, sx)
        for (long q = j * norm.pixels; q < (j + 1) * norm.pixels; ++q) {
          s += slope[q];
          sx += slope[q] * (in[q] - mean);
        }
        sx *= scale;
        const long to = i / norm.groups * norm.c + first + j;
        sums[2 * to] = s, sums[2 * to + 1] = sx;
        mean_g += s * weight[at + j] / block, mean_gx += sx * weight[at + j] / block;
      }
      // dx = scale (g - mean_g - normalised x * mean_gx), the derivative of equation 1 of Wu & He
      float* to = dx + i * norm.block();
      for (long j = 0; j < norm.channels(); ++j) {
        const float a = scale * weight[at + j], b = -scale * scale * mean_gx, c = -scale * mean_g - b * mean;
#pragma omp simd
        for (long q = j * norm.pixels; q < (j + 1) * norm.pixels; ++q) to[q] = slope[q] * a + in[q] * b + c;
      }
      if (norm.activation == NormActivation::GELU_BEFORE)
#pragma omp simd
        for (long q = 0; q < norm.block(); ++q) to[q] *= gelu_derivative(x[i * norm.block() + q]);
    }
  });
  const long weights = norm.own ? norm.n * norm.c : norm.c;
  std::fill_n(dweight, weights, 0.f);
  std::fill_n(dbias, weights, 0.f);
  for (long i = 0; i < norm.n * norm.c; ++i) dbias[i % weights] += sums[2 * i], dweight[i % weights] += sums[2 * i + 1];
}

}  // namespace kernels
