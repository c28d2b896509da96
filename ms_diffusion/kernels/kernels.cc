// The operators of the library: float32, NCHW, for MindSpore on the CPU. C++17 with GNU vectors, no other library.
//
// Each operator is a function for ops.Custom(..., func_type="aot"): (number of tensors, their data, their numbers of
// dimensions, their shapes, their types, stream, unused), inputs first, outputs last. It returns 0, 1 where a tensor is
// neither float32 nor int32, or 2 after an exception, such as too little memory.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "convolution.h"
#include "linear.h"
#include "norms.h"
#include "optimizer.h"
#include "pool.h"
#include "simd.h"
#include "transformer.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace kernels {

struct Arguments {
  int tensors;
  void** data;
  const int* ndims;
  int64_t** shapes;

  const float* in(int i) const { return static_cast<float*>(data[i]); }
  float* out(int i) const { return static_cast<float*>(data[i]); }
  const int32_t* settings(int i) const { return static_cast<int32_t*>(data[i]); }
  long size(int i, int axis) const { return shapes[i][axis]; }
  long elements(int i) const {
    long n = 1;
    for (int axis = 0; axis < ndims[i]; ++axis) n *= size(i, axis);
    return n;
  }

  // One group of a convolution of x (n, c, h, w) with weight and y; settings {stride, padding, groups, ...}
  Shape shape(int x, int weight, int y, const int32_t* settings) const {
    const long groups = settings[2], k = size(weight, 2), h = size(x, 2), w = size(x, 3), oh = size(y, 2), ow = size(y, 3);
    const long x_image = size(x, 1) * h * w, y_image = size(y, 1) * oh * ow;
    return {size(x, 0),  size(x, 1) / groups, h,       w,      size(y, 1) / groups, oh, ow, k,
            settings[0], settings[1],         x_image, y_image};
  }

  // A norm of x (n, c, h, w) with weight (c) or (n, c); settings {groups, eps, activation}
  Norm norm(int x, int weight, const float* settings) const {
    const long n = size(x, 0), c = size(x, 1), own = ndims[weight] == 2 ? c : 0;
    const auto activation = static_cast<NormActivation>(static_cast<int>(settings[2]));
    return {n, c, static_cast<long>(settings[0]), size(x, 2) * size(x, 3), own, settings[1], activation};
  }
};

int call(void (*f)(const Arguments&), const Arguments& arguments, const char** types) noexcept {
  for (int i = 0; i < arguments.tensors; ++i)
    if (std::strcmp(types[i], "float32") && std::strcmp(types[i], "int32")) return 1;
  try {
    f(arguments);
  } catch (...) {
    return 2;
  }
  return 0;
}

#define OPERATOR(name)                                                                                        \
  static void run_##name(const Arguments& a);                                                                 \
  EXPORT int name(int tensors, void** data, int* ndims, int64_t** shapes, const char** types, void*, void*) { \
    return call(run_##name, {tensors, data, ndims, shapes}, types);                                           \
  }                                                                                                           \
  static void run_##name(const Arguments& a)

// x, weight (o, c / groups, k, k), bias (o), {stride, padding, groups, frozen} -> y
OPERATOR(conv) {
  const int32_t* settings = a.settings(3);
  grouped_convolution(a.shape(0, 1, 4, settings), settings[2], a.in(0), a.in(1), a.in(2), a.out(4));
}

// dy, x, weight, {stride, padding, groups, frozen} -> dx, dweight, dbias
OPERATOR(conv_gradient) {
  const int32_t* settings = a.settings(3);
  grouped_convolution_gradient(a.shape(1, 2, 0, settings), settings[2], settings[3], a.in(0), a.in(1), a.in(2), a.out(4),
                               a.out(5), a.out(6));
}

// The convolution of the normalised x. The gradient computes the normalised x again instead of keeping it.
// x, norm weight (c), norm bias (c), norm settings, weight, bias, {stride, padding, groups} -> y
OPERATOR(norm_conv) {
  const int32_t* settings = a.settings(6);
  const Shape shape = a.shape(0, 4, 7, settings);
  const Buffer normal(shape.n * shape.x_image);
  group_norm(a.norm(0, 1, a.in(3)), a.in(0), a.in(1), a.in(2), normal);
  grouped_convolution(shape, settings[2], normal, a.in(4), a.in(5), a.out(7));
}

// dy, x, norm weight, norm bias, norm settings, weight, {stride, padding, groups} -> dx, dnorm weight, dnorm bias, dweight,
// dbias
OPERATOR(norm_conv_gradient) {
  const int32_t* settings = a.settings(6);
  const Shape shape = a.shape(1, 5, 0, settings);
  const Norm norm = a.norm(1, 2, a.in(4));
  const Buffer normal(shape.n * shape.x_image), dnormal(shape.n * shape.x_image);
  group_norm(norm, a.in(1), a.in(2), a.in(3), normal);
  grouped_convolution_gradient(shape, settings[2], false, a.in(0), normal, a.in(5), dnormal, a.out(10), a.out(11));
  group_norm_gradient(norm, dnormal, a.in(1), a.in(2), a.in(3), a.out(7), a.out(8), a.out(9));
}

// x (n, c, h, w), weight (c, o, k, k), bias (o), {stride, padding, 1, frozen} -> y
OPERATOR(conv_transpose) { convolve_transposed(a.shape(4, 1, 0, a.settings(3)), a.in(0), a.in(1), a.in(2), a.out(4)); }

// dy, x, weight, {stride, padding, 1, frozen} -> dx, dweight, dbias
OPERATOR(conv_transpose_gradient) {
  const Shape shape = a.shape(0, 2, 1, a.settings(3));
  weight_gradient(shape, a.in(0), a.in(1), a.out(5));
  convolve(shape, a.in(0), a.in(2), nullptr, a.out(4));
  bias_gradient(a.in(0), shape.n, a.size(0, 1), shape.h * shape.w, a.out(6));
}

// x (n, c), weight (o, c), bias (o), optional residual (n, o), {input activation} -> y (n, o)
OPERATOR(linear) {
  const int last = a.tensors - 1;
  choose(a.settings(last - 1)[0], [&](auto activation) {
    linear<activation>(a.size(0, 0), a.size(0, 1), a.size(1, 0), a.in(0), a.in(1), a.in(2), last > 4 ? a.in(3) : nullptr,
                       a.out(last));
  });
}

// dy, x, weight, {input activation} -> dx, dweight, dbias
OPERATOR(linear_gradient) {
  choose(a.settings(3)[0], [&](auto activation) {
    linear_gradient<activation>(a.size(1, 0), a.size(1, 1), a.size(2, 0), a.in(0), a.in(1), a.in(2), a.out(4), a.out(5),
                                a.out(6));
  });
}

// x, weight and bias (c) or (n, c), {groups, eps, activation} -> y
OPERATOR(group_norm) { group_norm(a.norm(0, 1, a.in(3)), a.in(0), a.in(1), a.in(2), a.out(4)); }

// dy, x, weight, bias, {groups, eps, activation} -> dx, dweight, dbias
OPERATOR(group_norm_gradient) {
  group_norm_gradient(a.norm(1, 2, a.in(4)), a.in(0), a.in(1), a.in(2), a.in(3), a.out(5), a.out(6), a.out(7));
}

// x -> y
OPERATOR(gelu) {
  const float* x = a.in(0);
  float* y = a.out(1);
  elementwise(a.elements(0), [=](long i) { y[i] = gelu(x[i]); });
}
OPERATOR(silu) {
  const float* x = a.in(0);
  float* y = a.out(1);
  elementwise(a.elements(0), [=](long i) { y[i] = silu(x[i]); });
}

// x, dy -> dx
OPERATOR(gelu_gradient) {
  const float *x = a.in(0), *dy = a.in(1);
  float* dx = a.out(2);
  elementwise(a.elements(0), [=](long i) { dx[i] = gelu_derivative(x[i]) * dy[i]; });
}
OPERATOR(silu_gradient) {
  const float *x = a.in(0), *dy = a.in(1);
  float* dx = a.out(2);
  elementwise(a.elements(0), [=](long i) { dx[i] = silu_derivative(x[i]) * dy[i]; });
}

// f(head, offset of its output, offset of its q, floats from its q to its k and from its k to its v) for each image and head
// of the tensor qkv (n, 3 heads d, h, w)
template <class F>
void each_head(const Arguments& a, int qkv, long heads, F f) {
  const Head head(a.size(qkv, 1) / (3 * heads), a.size(qkv, 2) * a.size(qkv, 3));
  const long floats = head.d * head.n;
  parallel_for(a.size(qkv, 0) * heads, [&](long begin, long end) {
    for (long i = begin; i < end; ++i) f(head, i * floats, (i / heads * 3 * heads + i % heads) * floats, heads * floats);
  });
}

// qkv (n, 3 heads d, h, w), {heads} -> out (n, heads d, h, w)
OPERATOR(linear_attention) {
  each_head(a, 0, a.settings(1)[0], [&](const Head& head, long out, long first, long part) {
    const float* q = a.in(0) + first;
    linear_attention(head, q, q + part, q + 2 * part, a.out(2) + out);
  });
}

// dout, qkv, {heads} -> dqkv
OPERATOR(linear_attention_gradient) {
  each_head(a, 1, a.settings(2)[0], [&](const Head& head, long out, long first, long part) {
    const float* q = a.in(1) + first;
    float* dq = a.out(3) + first;
    linear_attention_gradient(head, a.in(0) + out, q, q + part, q + 2 * part, dq, dq + part, dq + 2 * part);
  });
}

// f(head, offset of its image's output, offset of the head in a row of it) for each image and head of qkv (b, n, 3 heads d)
template <class F>
void each_sequence(const Arguments& a, int qkv, long heads, F f) {
  const long n = a.size(qkv, 1), d = a.size(qkv, 2) / (3 * heads);
  const Tokens head(n, d, heads);
  parallel_for(a.size(qkv, 0) * heads, [&](long begin, long end) {
    for (long i = begin; i < end; ++i) f(head, i / heads * n * heads * d, i % heads * d);
  });
}

// qkv (b, n, 3 heads d), {heads} -> out (b, n, heads d)
OPERATOR(attention) {
  each_sequence(a, 0, a.settings(1)[0], [&](const Tokens& head, long image, long first) {
    attention(head, a.in(0) + 3 * image + first, a.out(2) + image + first);
  });
}

// dout, qkv, {heads} -> dqkv
OPERATOR(attention_gradient) {
  each_sequence(a, 1, a.settings(2)[0], [&](const Tokens& head, long image, long first) {
    const long at = 3 * image + first;
    attention_gradient(head, a.in(0) + image + first, a.in(1) + at, a.out(3) + at);
  });
}

// x (b n, d), scale and shift (b, d), {eps} -> y
OPERATOR(ada_norm) {
  const long images = a.size(1, 0), n = a.size(0, 0) / std::max(images, 1L);
  ada_norm(images, n, a.size(0, 1), *a.in(3), a.in(0), a.in(1), a.in(2), a.out(4));
}

// dy, x, scale, {eps} -> dx, dscale, dshift
OPERATOR(ada_norm_gradient) {
  const long images = a.size(2, 0), n = a.size(1, 0) / std::max(images, 1L);
  ada_norm_gradient(images, n, a.size(1, 1), *a.in(3), a.in(0), a.in(1), a.in(2), a.out(4), a.out(5), a.out(6));
}

// x and y (b n, d), gate (b, d) -> x + gate y
OPERATOR(gated_sum) {
  const long images = a.size(2, 0), n = a.size(0, 0) / std::max(images, 1L);
  gated_sum(images, n, a.size(0, 1), a.in(0), a.in(1), a.in(2), a.out(3));
}

// dout, y, gate -> dy, dgate
OPERATOR(gated_sum_gradient) {
  const long images = a.size(2, 0), n = a.size(0, 0) / std::max(images, 1L);
  gated_sum_gradient(images, n, a.size(0, 1), a.in(0), a.in(1), a.in(2), a.out(3), a.out(4));
}

// {n, beta1, beta2, eps, clip norm, n times whether the parameter has an average, n weight decays}, loss, learning rate, decay of the averages,
// the powers of beta1 and beta2, the number of steps, n parameters, n first moments, n second moments, n gradients, the
// averages -> the loss, norm of the gradients; both are NaN, and nothing else changes, where the loss, the norm or the rate is
// not finite
OPERATOR(adam) {
  constexpr int FIRST = 7;
  const float* settings = a.in(0);
  const int n = static_cast<int>(settings[0]), out = a.tensors - 2;
  AdamState state{settings[1], settings[2], settings[3], settings[4], *a.in(1), *a.in(2), *a.in(3),
                  a.out(4),    a.out(5),    {},          {},          {},       {},       {},       {},       {}};
  int average = FIRST + 4 * n;  // the input that is the next parameter's average
  for (int i = FIRST; i < FIRST + n; ++i) {
    state.sizes.push_back(a.elements(i));
    state.weight_decays.push_back(settings[5 + n + i - FIRST]);
    state.parameters.push_back(a.out(i));
    state.first_moments.push_back(a.out(i + n));
    state.second_moments.push_back(a.out(i + 2 * n));
    state.gradients.push_back(a.in(i + 3 * n));
    state.averages.push_back(settings[5 + i - FIRST] != 0 ? a.out(average++) : nullptr);
  }
  const float norm = adam(state);
  *a.out(out) = std::isfinite(norm) ? state.loss : norm;
  *a.out(out + 1) = norm;
  *static_cast<int32_t*>(a.data[6]) += std::isfinite(norm);
}

// The number of threads of all operators: 1 until it is set. No operator may run meanwhile.
EXPORT void set_threads(int count) { use_threads(count); }
EXPORT int get_threads() { return threads(); }

// 0 where the library computes SiLU(1) correctly on this machine.
EXPORT int self_test() {
  float x = 1, y = 0;
  void* data[] = {&x, &y};
  int64_t one = 1, *shapes[] = {&one, &one};
  int ndims[] = {1, 1};
  const char* types[] = {"float32", "float32"};
  return silu(2, data, ndims, shapes, types, nullptr, nullptr) || std::abs(y - 0.7310586f) > 1e-6f;
}

}  // namespace kernels
