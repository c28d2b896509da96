// Linear layers and their gradients.

#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "pool.h"
#include "simd.h"
#include "tiles.h"

namespace kernels {

// use(i, values) for each row i of a (m, k) times b (k, N * L)
template <int N, class Use>
void product_columns(long m, long k, const float* a, const float* b, Use use) {
  constexpr int M = REGISTERS / N;
  int row[M];
  for (int j = 0; j < M; ++j) row[j] = static_cast<int>(j * k);
  float c[M * N * L];
  for (long i = 0; i < m;) {
    const int rows = m - i < M ? 1 : M;
    std::fill(c, c + rows * N * L, 0.f);
    const auto accumulate = rows == M ? accumulate_tile<M, N> : accumulate_tile<1, N>;
    accumulate(a + i * k, row, b, N * L, {1, 1, k, 0, 0}, c, N * L);
    for (int j = 0; j < rows; ++j, ++i) use(i, c + j * N * L);
  }
}

// The product of a (m, k) and b (k, n), whose elements are b(q, j): use(i, j, count, values) receives columns
// j .. j + count - 1 of row i. Each thread packs and multiplies columns of its own.
template <class B, class Use>
void product(long m, long n, long k, const float* a, B b, Use use) {
  parallel_for((n + L - 1) / L, [&](long begin, long end) {
    for (long v = begin, wide; v < end; v += wide) {
      wide = std::min(4L, end - v);
      const long j = v * L, width = wide * L, count = std::min(n - j, width);
      const Buffer buffer(k * width);
      float* packed = buffer;
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

// The function that is applied to a linear layer's input. `choose` calls f with it as a constant, so that no loop tests it.
enum class InputActivation { NONE, RELU, SILU, GELU_TANH };
template <class F>
void choose(int activation, F f) {
  if (activation == 1) return f(std::integral_constant<InputActivation, InputActivation::RELU>());
  if (activation == 2) return f(std::integral_constant<InputActivation, InputActivation::SILU>());
  if (activation == 3) return f(std::integral_constant<InputActivation, InputActivation::GELU_TANH>());
  f(std::integral_constant<InputActivation, InputActivation::NONE>());
}
template <InputActivation A>
float activate(float x) {
  if (A == InputActivation::RELU) return std::max(x, 0.f);
  if (A == InputActivation::SILU) return silu(x);
  return A == InputActivation::GELU_TANH ? gelu_tanh(x) : x;
}
template <InputActivation A>
float derivative(float x) {
  if (A == InputActivation::RELU) return x > 0 ? 1.f : 0.f;
  if (A == InputActivation::SILU) return silu_derivative(x);
  return A == InputActivation::GELU_TANH ? gelu_tanh_derivative(x) : 1.f;
}

// y (n, o) = activate(x) (n, c) w (o, c)^T + bias (o) + residual (n, o), or without a residual (nullptr)
template <InputActivation A>
void linear(long n, long c, long o, const float* x, const float* w, const float* bias, const float* residual, float* y) {
  const Buffer buffer(A == InputActivation::NONE ? 0 : n * c);
  const float* a = x;
  if (A != InputActivation::NONE) {
    float* activated = buffer;
    elementwise(n * c, [=](long i) { activated[i] = activate<A>(x[i]); });
    a = activated;
  }
  const auto weight = [=](long q, long j) { return w[j * c + q]; };
  product(n, o, c, a, weight, [=](long i, long j, long count, const float* v) {
    for (long l = 0; l < count; ++l) y[i * o + j + l] = v[l] + bias[j + l] + (residual ? residual[i * o + j + l] : 0.f);
  });
}

template <InputActivation A>
void linear_gradient(long n, long c, long o, const float* dy, const float* x, const float* w, float* dx, float* dw,
                     float* dbias) {
  const auto weight = [=](long q, long j) { return w[q * c + j]; };
  product(n, c, o, dy, weight, [=](long i, long j, long count, const float* v) {
#pragma omp simd
    for (long l = 0; l < count; ++l) dx[i * c + j + l] = v[l] * derivative<A>(x[i * c + j + l]);
  });
  const Buffer buffer(o * n);  // dy transposed: along n, each number of dy lies in a cache line of its own
  float* transposed = buffer;
  parallel_for(o, [=](long begin, long end) {
    for (long j = begin; j < end; ++j) {
      float total = 0;
      for (long i = 0; i < n; ++i) total += transposed[j * n + i] = dy[i * o + j];
      dbias[j] = total;
    }
  });
  const auto input = [=](long q, long j) { return activate<A>(x[q * c + j]); };
  product(o, c, n, transposed, input,
          [=](long i, long j, long count, const float* v) { std::memcpy(dw + i * c + j, v, count * sizeof(float)); });
}

}  // namespace kernels
