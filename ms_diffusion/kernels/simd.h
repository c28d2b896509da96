// Vectors of floats by GCC's and Clang's vector extension, and elementwise functions that the compiler vectorises.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace kernels {

#if defined(__AVX512F__)
constexpr int L = 16;          // floats in a vector
constexpr int REGISTERS = 24;  // vectors that accumulate in an inner loop; the other registers hold the operands
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
inline long round_up(long n, long to) { return (n + to - 1) / to * to; }

// exp(y) within 2 units in the last place; 0 below -87 and infinity above 88 (polynomial of Cephes' expf)
inline float exponential(float y) {
  const float x = y < -87.f ? -87.f : y > 88.f ? 88.f : y;
  const float n = std::floor(x * 1.44269504f + 0.5f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  // power = 2^n: the low bits of 1.5 * 2^23 + 127 + n are the exponent. A cast of n to int would be undefined for NaN.
  const float shifted = n + 12583039.f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits <<= 23;
  float power;
  std::memcpy(&power, &bits, 4);
  p = (p * r * r + r + 1.f) * power;
  return y < -87.f ? 0.f : y > 88.f ? INFINITY : p;
}

// The cumulative distribution function of N(0, 1), by a rational function for erf (as in Eigen), constant beyond
// |x / sqrt(2)| = 4
inline float normal_cdf(float x) {
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
inline float gelu_derivative(float x) { return normal_cdf(x) + x * 0.39894228f * exponential(-0.5f * x * x); }
inline float silu(float x) { return x / (1.f + exponential(-x)); }
inline float silu_derivative(float x) {
  const float s = 1.f / (1.f + exponential(-x));
  return s * (1.f + x * (1.f - s));
}

// GELU with a tanh in place of the error function: x (1 + tanh(u)) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
inline float gelu_tanh(float x) {
  return x / (1.f + exponential(-1.59576912f * (x + 0.044715f * x * x * x)));
}
inline float gelu_tanh_derivative(float x) {
  const float s = 1.f / (1.f + exponential(-1.59576912f * (x + 0.044715f * x * x * x)));
  return s + x * s * (1.f - s) * 1.59576912f * (1.f + 0.134145f * x * x);
}

}  // namespace kernels
