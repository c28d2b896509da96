// One step of training after the gradients: clipping, Adam and the average of the parameters, for all parameters at once.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "pool.h"
#include "simd.h"

namespace kernels {

struct AdamState {
  float beta1, beta2, eps, clip_norm;
  float loss, rate, decay;           // the step's loss; the learning rate; the decay of the averages
  float *beta1_power, *beta2_power;  // beta1 and beta2 to the power of the number of steps; this step multiplies them
  std::vector<long> sizes;           // of each parameter
  std::vector<float> weight_decays;  // of each parameter; 0 for none
  std::vector<float*> parameters, first_moments, second_moments, averages;  // averages: null where there is none
  std::vector<const float*> gradients;
};

// Scales the gradients to a norm of at most clip_norm, decays the parameters, parameter -= rate weight_decay parameter
// (Loshchilov & Hutter 2019), takes the step of nn.Adam, and moves the averages: average += (1 - decay) (parameter - average).
// All in place. Returns the norm of the gradients before the scaling, or NaN
// where the loss, the norm or the rate is not finite: then nothing changes.
inline float adam(const AdamState& state) {
  const long count = static_cast<long>(state.sizes.size());
  std::vector<long> end(count + 1, 0);  // of each parameter, as if they were one array
  for (long i = 0; i < count; ++i) end[i + 1] = end[i] + state.sizes[i];
  const auto share = [&](int t, auto f) {  // f(parameter, from, to) for the elements of thread t
    const long begin = end[count] * t / threads(), stop = end[count] * (t + 1) / threads();
    for (long i = 0; i < count; ++i) {
      const long from = std::max(begin, end[i]), to = std::min(stop, end[i + 1]);
      if (from < to) f(i, from - end[i], to - end[i]);
    }
  };

  std::vector<double> squares(threads() * 8, 0.);  // a cache line for each thread
  parallel([&](int t) {
    share(t, [&](long i, long from, long to) {
      const float* g = state.gradients[i];
      float s = 0;
#pragma omp simd reduction(+ : s)
      for (long j = from; j < to; ++j) s += g[j] * g[j];
      squares[8 * t] += s;
    });
  });
  double total = 0;
  for (int t = 0; t < threads(); ++t) total += squares[8 * t];
  const float norm = static_cast<float>(std::sqrt(total)), shrink = std::min(1.f, state.clip_norm / (norm + 1e-6f));

  if (!std::isfinite(norm) || !std::isfinite(state.loss) || !std::isfinite(state.rate)) return NAN;

  const float beta1 = state.beta1, beta2 = state.beta2, eps = state.eps;
  const float power1 = *state.beta1_power *= beta1, power2 = *state.beta2_power *= beta2;
  const float rate = state.rate * std::sqrt(1 - power2) / (1 - power1), move = 1 - state.decay;
  parallel([&](int t) {
    share(t, [&](long i, long from, long to) {
      float *p = state.parameters[i], *m = state.first_moments[i], *v = state.second_moments[i];
      float* average = state.averages[i];
      const float kept = 1 - state.rate * state.weight_decays[i];
      const float* gradient = state.gradients[i];
#pragma omp simd
      for (long j = from; j < to; ++j) {
        const float g = gradient[j] * shrink;
        m[j] += (1 - beta1) * (g - m[j]);
        v[j] += (1 - beta2) * (g * g - v[j]);
        p[j] = kept * p[j] - rate * m[j] / (std::sqrt(v[j]) + eps);
      }
      if (average)
#pragma omp simd
        for (long j = from; j < to; ++j) average[j] += move * (p[j] - average[j]);
    });
  });
  return norm;
}

}  // namespace kernels
