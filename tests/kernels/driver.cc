// Compares every operator of the library with loops in double, on random shapes and numbers of threads. It is meant to be
// compiled with sanitizers: all tensors are heap blocks of their exact size.
//
//   driver [seed] [rounds]      exit code 0: all results agree; 1: a line on stderr names each that does not

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

using Operator = int(int, void**, int*, int64_t**, const char**, void*, void*);
extern "C" {
Operator conv, conv_gradient, norm_conv, norm_conv_gradient, conv_transpose, conv_transpose_gradient, linear,
    linear_gradient, group_norm, group_norm_gradient, gelu, gelu_gradient, silu, silu_gradient, linear_attention,
    linear_attention_gradient, attention, attention_gradient, ada_norm, ada_norm_gradient, gated_sum, gated_sum_gradient, adam;
void set_threads(int);
int get_threads();
int self_test();
}

namespace {

using Doubles = std::vector<double>;

std::mt19937 generator;
long uniform(long low, long high) { return std::uniform_int_distribution<long>(low, high)(generator); }

struct Tensor {
  std::vector<int64_t> shape;
  std::unique_ptr<float[]> floats;
  std::unique_ptr<int32_t[]> ints;
  const char* type = "float32";

  long size() const {
    long n = 1;
    for (const int64_t d : shape) n *= d;
    return n;
  }
  Doubles doubles() const { return Doubles(floats.get(), floats.get() + size()); }
};

Tensor floats(std::vector<int64_t> shape, const std::function<double()>& value) {
  Tensor t{std::move(shape), nullptr, nullptr};
  t.floats.reset(new float[static_cast<size_t>(t.size())]);
  for (long i = 0; i < t.size(); ++i) t.floats[i] = static_cast<float>(value());
  return t;
}
Tensor normal(std::vector<int64_t> shape, double scale = 1) {
  std::normal_distribution<double> distribution(0, scale);
  return floats(std::move(shape), [&] { return distribution(generator); });
}
Tensor positive(std::vector<int64_t> shape) {
  std::uniform_real_distribution<double> distribution(0.01, 1);
  return floats(std::move(shape), [&] { return distribution(generator); });
}
Tensor constant(std::vector<double> values) {
  size_t i = 0;
  return floats({static_cast<int64_t>(values.size())}, [&] { return values[i++]; });
}
Tensor ints(const std::vector<int32_t>& values) {
  Tensor t{{static_cast<int64_t>(values.size())}, nullptr, nullptr, "int32"};
  t.ints.reset(new int32_t[values.size()]);
  for (size_t i = 0; i < values.size(); ++i) t.ints[i] = values[i];
  return t;
}
Tensor output(std::vector<int64_t> shape) {
  return floats(std::move(shape), [] { return NAN; });
}

int call(Operator f, std::vector<Tensor*> tensors) {
  std::vector<void*> data;
  std::vector<int> ndims;
  std::vector<int64_t*> shapes;
  std::vector<const char*> types;
  for (Tensor* t : tensors) {
    data.push_back(t->ints ? static_cast<void*>(t->ints.get()) : t->floats.get());
    ndims.push_back(static_cast<int>(t->shape.size()));
    shapes.push_back(t->shape.data());
    types.push_back(t->type);
  }
  return f(static_cast<int>(tensors.size()), data.data(), ndims.data(), shapes.data(), types.data(), nullptr, nullptr);
}

int failures = 0, comparisons = 0;
std::string now;  // the case that runs

void expect(bool good, const std::string& what) {
  ++comparisons;
  if (good) return;
  ++failures;
  std::fprintf(stderr, "%s: %s\n", now.c_str(), what.c_str());
}

void compare(const char* name, const Tensor& found, const Doubles& wanted, double tolerance = 3e-5) {
  double scale = 1, error = 0;
  for (const double w : wanted) scale = std::fmax(scale, std::fabs(w));
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double difference = std::fabs(found.floats[i] - wanted[i]);
    error = difference <= error ? error : difference;  // NaN stays
  }
  expect(found.size() == static_cast<long>(wanted.size()), std::string(name) + " has another size");
  expect(error <= tolerance * scale, std::string(name) + " differs by " + std::to_string(error / scale));
}

// The formulas

struct Conv {
  long n, c, h, w, o, k, s, p, groups, oh = (h + 2 * p - k) / s + 1, ow = (w + 2 * p - k) / s + 1;

  // f(index in x, index in weight, index in y) for every product of the convolution
  template <class F>
  void each(F f) const {
    const long ci = c / groups, co = o / groups;
    for (long i = 0; i < n; ++i)
      for (long j = 0; j < o; ++j)
        for (long y = 0; y < oh; ++y)
          for (long x = 0; x < ow; ++x)
            for (long l = 0; l < ci; ++l)
              for (long ky = 0; ky < k; ++ky)
                for (long kx = 0; kx < k; ++kx) {
                  const long r = y * s + ky - p, q = x * s + kx - p;
                  if (r < 0 || r >= h || q < 0 || q >= w) continue;
                  f(((i * c + j / co * ci + l) * h + r) * w + q, ((j * ci + l) * k + ky) * k + kx,
                    ((i * o + j) * oh + y) * ow + x);
                }
  }
  Doubles forward(const Doubles& x, const Doubles& weight, const Doubles& bias) const {
    Doubles y(n * o * oh * ow);
    for (size_t i = 0; i < y.size(); ++i) y[i] = bias.empty() ? 0 : bias[static_cast<long>(i) / (oh * ow) % o];
    each([&](long a, long b, long to) { y[to] += x[a] * weight[b]; });
    return y;
  }
  Doubles input_gradient(const Doubles& dy, const Doubles& weight, const Doubles& bias) const {
    Doubles dx(n * c * h * w);
    for (size_t i = 0; i < dx.size(); ++i) dx[i] = bias.empty() ? 0 : bias[static_cast<long>(i) / (h * w) % c];
    each([&](long a, long b, long from) { dx[a] += dy[from] * weight[b]; });
    return dx;
  }
  Doubles weight_gradient(const Doubles& dy, const Doubles& x) const {
    Doubles dw(o * (c / groups) * k * k);
    each([&](long a, long b, long from) { dw[b] += dy[from] * x[a]; });
    return dw;
  }
};

Doubles channel_sums(const Doubles& y, long n, long c) {
  Doubles sums(c);
  for (size_t i = 0; i < y.size(); ++i) sums[static_cast<long>(i) / (static_cast<long>(y.size()) / (n * c)) % c] += y[i];
  return sums;
}

struct Function {
  double (*value)(double), (*derivative)(double);
};
double cdf(double x) { return std::erfc(-x / std::sqrt(2.)) / 2; }
double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
const Function IDENTITY{[](double x) { return x; }, [](double) { return 1.; }};
const Function RELU{[](double x) { return x > 0 ? x : 0; }, [](double x) { return x > 0 ? 1. : 0; }};
const Function GELU{[](double x) { return x * cdf(x); },
                    [](double x) { return cdf(x) + x * std::exp(-x * x / 2) / std::sqrt(2 * M_PI); }};
const Function SILU{[](double x) { return x * sigmoid(x); },
                    [](double x) { return sigmoid(x) * (1 + x * (1 - sigmoid(x))); }};

double tanh_of(double x) { return std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)); }
const Function GELU_TANH{[](double x) { return x * (1 + tanh_of(x)) / 2; },
                         [](double x) {
                           const double t = tanh_of(x), u = std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
                           return (1 + t) / 2 + x * (1 - t * t) * u / 2;
                         }};

struct GroupNorm {
  long n, c, pixels, groups, activation;
  bool own;  // weight and bias (n, c)
  double eps;

  Doubles forward(const Doubles& x, const Doubles& weight, const Doubles& bias) const {
    return run(x, weight, bias, nullptr, nullptr, nullptr, nullptr);
  }
  Doubles run(const Doubles& x, const Doubles& weight, const Doubles& bias, const Doubles* dy, Doubles* dx, Doubles* dweight,
              Doubles* dbias) const {
    const Function before = activation == 1 ? GELU : IDENTITY, after = activation == 2 ? SILU : IDENTITY;
    const long block = c / groups * pixels;
    Doubles y(x.size());
    if (dy) dx->assign(x.size(), 0), dweight->assign(weight.size(), 0), dbias->assign(weight.size(), 0);
    for (long g = 0; g < n * groups; ++g) {
      const auto channel = [&](long i) {
        const long image_channel = g / groups * c + g % groups * (c / groups) + i / pixels;
        return own ? image_channel : image_channel % c;
      };
      Doubles normalised(block), slope(block);
      double mean = 0, variance = 0, mean_slope = 0, mean_product = 0;
      for (long i = 0; i < block; ++i) mean += (normalised[i] = before.value(x[g * block + i])) / static_cast<double>(block);
      for (long i = 0; i < block; ++i) variance += std::pow(normalised[i] - mean, 2) / static_cast<double>(block);
      const double deviation = std::sqrt(variance + eps);
      for (long i = 0; i < block; ++i) {
        normalised[i] = (normalised[i] - mean) / deviation;
        const double affine = normalised[i] * weight[channel(i)] + bias[channel(i)];
        y[g * block + i] = after.value(affine);
        if (!dy) continue;
        const double d = (*dy)[g * block + i] * after.derivative(affine);
        (*dweight)[channel(i)] += d * normalised[i];
        (*dbias)[channel(i)] += d;
        slope[i] = d * weight[channel(i)];
        mean_slope += slope[i] / static_cast<double>(block);
        mean_product += slope[i] * normalised[i] / static_cast<double>(block);
      }
      for (long i = 0; dy && i < block; ++i)
        (*dx)[g * block + i] =
            (slope[i] - mean_slope - normalised[i] * mean_product) / deviation * before.derivative(x[g * block + i]);
    }
    return y;
  }
};

// c (rows, columns) = a b, where `a` and `b` return elements
Doubles product(long rows, long inner, long columns, const std::function<double(long, long)>& a,
                const std::function<double(long, long)>& b) {
  Doubles c(rows * columns);
  for (long i = 0; i < rows; ++i)
    for (long j = 0; j < columns; ++j)
      for (long k = 0; k < inner; ++k) c[i * columns + j] += a(i, k) * b(k, j);
  return c;
}

// Softmax of `count` numbers `stride` apart, in place; or, with the softmax p, the gradient d of p becomes that of its
// input.
void softmax(double* x, long count, long stride) {
  double most = -INFINITY, total = 0;
  for (long i = 0; i < count; ++i) most = std::fmax(most, x[i * stride]);
  for (long i = 0; i < count; ++i) total += x[i * stride] = std::exp(x[i * stride] - most);
  for (long i = 0; i < count; ++i) x[i * stride] /= total;
}
void softmax_gradient(const double* p, double* d, long count, long stride) {
  double total = 0;
  for (long i = 0; i < count; ++i) total += p[i * stride] * d[i * stride];
  for (long i = 0; i < count; ++i) d[i * stride] = p[i * stride] * (d[i * stride] - total);
}

// The cases

void check_conv(const Conv& z, bool frozen) {
  const long ci = z.c / z.groups;
  Tensor x = normal({z.n, z.c, z.h, z.w}), weight = normal({z.o, ci, z.k, z.k}), bias = normal({z.o});
  Tensor dy = normal({z.n, z.o, z.oh, z.ow}), y = output(dy.shape), dx = output(x.shape), dw = output(weight.shape),
         db = output({z.o});
  Tensor settings = ints({static_cast<int32_t>(z.s), static_cast<int32_t>(z.p), static_cast<int32_t>(z.groups), frozen});
  const Doubles xs = x.doubles(), ws = weight.doubles(), dys = dy.doubles();
  const Doubles zeros(ws.size());

  expect(call(conv, {&x, &weight, &bias, &settings, &y}) == 0, "conv fails");
  compare("conv", y, z.forward(xs, ws, bias.doubles()));
  expect(call(conv_gradient, {&dy, &x, &weight, &settings, &dx, &dw, &db}) == 0, "conv_gradient fails");
  compare("conv dx", dx, z.input_gradient(dys, ws, {}));
  compare("conv dweight", dw, frozen ? zeros : z.weight_gradient(dys, xs));
  compare("conv dbias", db, channel_sums(dys, z.n, z.o));

  if (z.groups == 1) {  // x and y change places
    Tensor input_bias = normal({z.c}), dx_bias = output({z.c});
    expect(call(conv_transpose, {&dy, &weight, &input_bias, &settings, &dx}) == 0, "conv_transpose fails");
    compare("conv_transpose", dx, z.input_gradient(dys, ws, input_bias.doubles()));
    expect(call(conv_transpose_gradient, {&x, &dy, &weight, &settings, &y, &dw, &dx_bias}) == 0,
           "conv_transpose_gradient fails");
    compare("conv_transpose dx", y, z.forward(xs, ws, {}));
    compare("conv_transpose dweight", dw, z.weight_gradient(dys, xs));
    compare("conv_transpose dbias", dx_bias, channel_sums(xs, z.n, z.c));
  }

  long groups = uniform(1, z.c);
  while (z.c % groups) --groups;
  const GroupNorm norm{z.n, z.c, z.h * z.w, groups, uniform(0, 2), false, 0.01};
  Tensor norm_weight = normal({z.c}), norm_bias = normal({z.c}), dg = output({z.c}), dh = output({z.c});
  Tensor norm_settings = constant({static_cast<double>(groups), norm.eps, static_cast<double>(norm.activation)});
  const Doubles gs = norm_weight.doubles(), hs = norm_bias.doubles(), normalised = norm.forward(xs, gs, hs);
  expect(call(norm_conv, {&x, &norm_weight, &norm_bias, &norm_settings, &weight, &bias, &settings, &y}) == 0,
         "norm_conv fails");
  compare("norm_conv", y, z.forward(normalised, ws, bias.doubles()), 1e-4);
  expect(call(norm_conv_gradient,
              {&dy, &x, &norm_weight, &norm_bias, &norm_settings, &weight, &settings, &dx, &dg, &dh, &dw, &db}) == 0,
         "norm_conv_gradient fails");
  const Doubles dnormalised = z.input_gradient(dys, ws, {});
  Doubles wanted_dx, wanted_dg, wanted_dh;
  norm.run(xs, gs, hs, &dnormalised, &wanted_dx, &wanted_dg, &wanted_dh);
  compare("norm_conv dx", dx, wanted_dx, 1e-3);
  compare("norm_conv dnorm weight", dg, wanted_dg, 1e-4);
  compare("norm_conv dnorm bias", dh, wanted_dh, 1e-4);
  compare("norm_conv dweight", dw, z.weight_gradient(dys, normalised), 1e-4);
  compare("norm_conv dbias", db, channel_sums(dys, z.n, z.o));
}

void check_norm(const GroupNorm& z, long h) {
  const std::vector<int64_t> shape{z.n, z.c, h, z.pixels / h},
      weights = z.own ? std::vector<int64_t>{z.n, z.c} : std::vector<int64_t>{z.c};
  Tensor x = normal(shape), dy = normal(shape), weight = normal(weights), bias = normal(weights);
  Tensor y = output(shape), dx = output(shape), dweight = output(weights), dbias = output(weights);
  Tensor settings = constant({static_cast<double>(z.groups), z.eps, static_cast<double>(z.activation)});
  const Doubles dys = dy.doubles();
  Doubles wanted_dx, wanted_dweight, wanted_dbias;
  const Doubles wanted =
      z.run(x.doubles(), weight.doubles(), bias.doubles(), &dys, &wanted_dx, &wanted_dweight, &wanted_dbias);
  expect(call(group_norm, {&x, &weight, &bias, &settings, &y}) == 0, "group_norm fails");
  compare("group_norm", y, wanted, 1e-4);
  expect(call(group_norm_gradient, {&dy, &x, &weight, &bias, &settings, &dx, &dweight, &dbias}) == 0,
         "group_norm_gradient fails");
  compare("group_norm dx", dx, wanted_dx, 1e-3);
  compare("group_norm dweight", dweight, wanted_dweight, 1e-4);
  compare("group_norm dbias", dbias, wanted_dbias, 1e-4);
}

void check_linear(long n, long c, long o, int activation, bool with_residual) {
  const Function f = activation == 0 ? IDENTITY : activation == 1 ? RELU : activation == 2 ? SILU : GELU_TANH;
  Tensor x = normal({n, c}), weight = normal({o, c}), bias = normal({o}), residual = normal({n, o}), dy = normal({n, o});
  Tensor y = output({n, o}), dx = output({n, c}), dw = output({o, c}), db = output({o}), settings = ints({activation});
  const Doubles xs = x.doubles(), ws = weight.doubles(), dys = dy.doubles();
  Doubles wanted = product(
      n, c, o, [&](long i, long k) { return f.value(xs[i * c + k]); }, [&](long k, long j) { return ws[j * c + k]; });
  for (long i = 0; i < n * o; ++i) wanted[i] += bias.floats[i % o] + (with_residual ? residual.floats[i] : 0);
  const int rc = with_residual ? call(linear, {&x, &weight, &bias, &residual, &settings, &y})
                               : call(linear, {&x, &weight, &bias, &settings, &y});
  expect(rc == 0, "linear fails");
  compare("linear", y, wanted);
  expect(call(linear_gradient, {&dy, &x, &weight, &settings, &dx, &dw, &db}) == 0, "linear_gradient fails");
  wanted = product(n, o, c, [&](long i, long k) { return dys[i * o + k]; }, [&](long k, long j) { return ws[k * c + j]; });
  for (long i = 0; i < n * c; ++i) wanted[i] *= f.derivative(xs[i]);
  compare("linear dx", dx, wanted);
  const auto input = [&](long k, long j) { return f.value(xs[k * c + j]); };
  compare("linear dweight", dw, product(o, n, c, [&](long i, long k) { return dys[k * o + i]; }, input));
  compare("linear dbias", db, channel_sums(dys, n, o));
}

void check_elementwise(long n) {
  const double infinity = INFINITY;
  Tensor x = normal({n}, 5), dy = normal({n}), y = output({n}), dx = output({n});
  const struct {
    const char* name;
    Operator *forward, *gradient;
    Function f;
  } all[] = {{"gelu", gelu, gelu_gradient, GELU}, {"silu", silu, silu_gradient, SILU}};
  for (const auto& z : all) {
    Doubles wanted = x.doubles(), slope = wanted;
    for (long i = 0; i < n; ++i) wanted[i] = z.f.value(wanted[i]), slope[i] = z.f.derivative(slope[i]) * dy.floats[i];
    expect(call(z.forward, {&x, &y}) == 0 && call(z.gradient, {&x, &dy, &dx}) == 0, std::string(z.name) + " fails");
    compare(z.name, y, wanted, 1e-6);
    compare((z.name + std::string(" dx")).c_str(), dx, slope, 3e-6);
    Tensor extreme = floats({n}, [&] { return Doubles{NAN, infinity, -infinity, 1e30, -1e30, 88, -88}[uniform(0, 6)]; });
    expect(call(z.forward, {&extreme, &y}) == 0 && call(z.gradient, {&extreme, &dy, &dx}) == 0,
           std::string(z.name) + " fails");
    for (long i = 0; i < n; ++i) {
      const float e = extreme.floats[i];
      if (std::isnan(e)) expect(std::isnan(y.floats[i]) && std::isnan(dx.floats[i]), std::string(z.name) + " loses NaN");
      if (e == 88 || e == 1e30f) expect(y.floats[i] == e, std::string(z.name) + " of a large number");
      if (e == -88) expect(std::fabs(y.floats[i]) < 1e-30, std::string(z.name) + " of a large negative number");
    }
  }
}

void check_attention(long images, long heads, long d, long h, long w) {
  const long n = h * w, part = heads * d * n;
  const double root = std::sqrt(static_cast<double>(d));
  Tensor qkv = normal({images, 3 * heads * d, h, w}), dout = normal({images, heads * d, h, w});
  Tensor out = output(dout.shape), dqkv = output(qkv.shape), settings = ints({static_cast<int32_t>(heads)});
  Doubles wanted(images * part), gradient(images * 3 * part);
  for (long i = 0; i < images * heads; ++i) {
    const float* begin = &qkv.floats[i / heads * 3 * part + i % heads * d * n];
    Doubles q(begin, begin + d * n), k(begin + part, begin + part + d * n), v(begin + 2 * part, begin + 2 * part + d * n);
    for (long j = 0; j < n; ++j) softmax(&q[j], d, n);
    for (long c = 0; c < d; ++c) softmax(&k[c * n], n, 1);
    const auto rows = [n](const auto& a) { return [&a, n](long r, long s) { return static_cast<double>(a[r * n + s]); }; };
    const auto columns = [n](const auto& a) {
      return [&a, n](long r, long s) { return static_cast<double>(a[s * n + r]); };
    };
    const float* dy = &dout.floats[i * d * n];
    Doubles context = product(d, n, d, rows(k), columns(v)), dcontext = product(d, n, d, rows(q), columns(dy));
    for (long c = 0; c < d * d; ++c) context[c] /= root, dcontext[c] /= root;
    const auto at = [d](const Doubles& a) { return [&a, d](long r, long s) { return a[r * d + s]; }; };
    const auto transposed = [d](const Doubles& a) { return [&a, d](long r, long s) { return a[s * d + r]; }; };
    const Doubles y = product(d, d, n, transposed(context), rows(q));
    Doubles dq = product(d, d, n, at(context), rows(dy)), dk = product(d, d, n, at(dcontext), rows(v));
    const Doubles dv = product(d, d, n, transposed(dcontext), rows(k));
    for (long j = 0; j < n; ++j) softmax_gradient(&q[j], &dq[j], d, n);
    for (long c = 0; c < d; ++c) softmax_gradient(&k[c * n], &dk[c * n], n, 1);
    double* to = &gradient[i / heads * 3 * part + i % heads * d * n];
    for (long j = 0; j < d * n; ++j)
      wanted[i * d * n + j] = y[j], to[j] = dq[j], to[part + j] = dk[j], to[2 * part + j] = dv[j];
  }
  expect(call(linear_attention, {&qkv, &settings, &out}) == 0, "linear_attention fails");
  compare("linear_attention", out, wanted);
  expect(call(linear_attention_gradient, {&dout, &qkv, &settings, &dqkv}) == 0, "linear_attention_gradient fails");
  compare("linear_attention dqkv", dqkv, gradient);
}

void check_softmax_attention(long images, long heads, long d, long n) {
  const long width = heads * d, step = 3 * width;
  const double root = std::sqrt(static_cast<double>(d));
  Tensor qkv = normal({images, n, step}), dout = normal({images, n, width});
  Tensor out = output(dout.shape), dqkv = output(qkv.shape), settings = ints({static_cast<int32_t>(heads)});
  Doubles wanted(images * n * width), gradient(images * n * step);
  for (long i = 0; i < images * heads; ++i) {
    const long first = i / heads * n * step + i % heads * d, to = i / heads * n * width + i % heads * d;
    const auto part = [&](long which) {
      return [&, which](long r, long c) { return static_cast<double>(qkv.floats[first + r * step + which * width + c]); };
    };
    const auto q = part(0), k = part(1), v = part(2);
    const auto dy = [&](long r, long c) { return static_cast<double>(dout.floats[to + r * width + c]); };
    Doubles p = product(n, d, n, q, [&](long c, long r) { return k(r, c) / root; });
    for (long r = 0; r < n; ++r) softmax(&p[r * n], n, 1);
    Doubles dp = product(n, d, n, dy, [&](long c, long r) { return v(r, c); });
    for (long r = 0; r < n; ++r) softmax_gradient(&p[r * n], &dp[r * n], n, 1);
    const auto at = [n](const Doubles& a) { return [&a, n](long r, long s) { return a[r * n + s]; }; };
    const auto transposed = [n](const Doubles& a) { return [&a, n](long r, long s) { return a[s * n + r]; }; };
    const Doubles y = product(n, n, d, at(p), v), dq = product(n, n, d, at(dp), k);
    const Doubles dk = product(n, n, d, transposed(dp), q), dv = product(n, n, d, transposed(p), dy);
    for (long r = 0; r < n; ++r)
      for (long c = 0; c < d; ++c) {
        wanted[to + r * width + c] = y[r * d + c];
        double* all = &gradient[first + r * step + c];
        all[0] = dq[r * d + c] / root, all[width] = dk[r * d + c] / root, all[2 * width] = dv[r * d + c];
      }
  }
  expect(call(attention, {&qkv, &settings, &out}) == 0, "attention fails");
  compare("attention", out, wanted);
  expect(call(attention_gradient, {&dout, &qkv, &settings, &dqkv}) == 0, "attention_gradient fails");
  compare("attention dqkv", dqkv, gradient);
}

// Norms and sums of rows (images n, d) with a scale, shift or gate (images, d)
void check_rows(long images, long n, long d) {
  const double eps = 0.01, count = static_cast<double>(d);
  Tensor x = normal({images * n, d}), other = normal(x.shape), dy = normal(x.shape), y = output(x.shape), dx = output(x.shape);
  Tensor scale = normal({images, d}), shift = normal({images, d}), dscale = output({images, d}), dshift = output({images, d});
  Tensor settings = constant({eps});
  Doubles wanted(x.size()), wanted_dx(x.size()), da(images * d), db(images * d);
  Doubles sums(x.size()), dother(x.size()), dgate(images * d);
  for (long i = 0; i < images * n; ++i) {
    double mean = 0, variance = 0, mean_slope = 0, mean_product = 0;
    const auto a = [&](long c) { return i / n * d + c; };
    for (long c = 0; c < d; ++c) mean += x.floats[i * d + c] / count;
    for (long c = 0; c < d; ++c) variance += std::pow(x.floats[i * d + c] - mean, 2) / count;
    const auto normalised = [&](long c) { return (x.floats[i * d + c] - mean) / std::sqrt(variance + eps); };
    const auto slope = [&](long c) { return dy.floats[i * d + c] * (1. + scale.floats[a(c)]); };
    for (long c = 0; c < d; ++c) {
      wanted[i * d + c] = normalised(c) * (1. + scale.floats[a(c)]) + shift.floats[a(c)];
      da[a(c)] += dy.floats[i * d + c] * normalised(c);
      db[a(c)] += dy.floats[i * d + c];
      mean_slope += slope(c) / count;
      mean_product += slope(c) * normalised(c) / count;
      const double o = other.floats[i * d + c], g = scale.floats[a(c)], t = dy.floats[i * d + c];
      sums[i * d + c] = x.floats[i * d + c] + o * g;
      dother[i * d + c] = t * g;
      dgate[a(c)] += t * o;
    }
    for (long c = 0; c < d; ++c)
      wanted_dx[i * d + c] = (slope(c) - mean_slope - normalised(c) * mean_product) / std::sqrt(variance + eps);
  }
  expect(call(ada_norm, {&x, &scale, &shift, &settings, &y}) == 0, "ada_norm fails");
  compare("ada_norm", y, wanted, 1e-4);
  expect(call(ada_norm_gradient, {&dy, &x, &scale, &settings, &dx, &dscale, &dshift}) == 0, "ada_norm_gradient fails");
  compare("ada_norm dx", dx, wanted_dx, 1e-3);
  compare("ada_norm dscale", dscale, da, 1e-4);
  compare("ada_norm dshift", dshift, db, 1e-4);
  expect(call(gated_sum, {&x, &other, &scale, &y}) == 0, "gated_sum fails");
  compare("gated_sum", y, sums);
  expect(call(gated_sum_gradient, {&dy, &other, &scale, &dx, &dscale}) == 0, "gated_sum_gradient fails");
  compare("gated_sum dy", dx, dother);
  compare("gated_sum dgate", dscale, dgate);
}

// Two of three parameters decay; every second one, or the others, or all, have an average. With a loss that is not finite nothing changes.
void check_adam(long count, int averaged, bool finite) {
  const double beta1 = 0.9, beta2 = 0.99, eps = 1e-3, clip = 2, lr = 0.1, decay = 0.7;
  const auto has_average = [&](long i) { return averaged == 2 || i % 2 == averaged; };
  const auto weight_decay = [](long i) { return i % 3 ? 0.2 : 0.; };
  std::vector<double> constants{static_cast<double>(count), beta1, beta2, eps, clip};
  for (long i = 0; i < count; ++i) constants.push_back(has_average(i));
  for (long i = 0; i < count; ++i) constants.push_back(weight_decay(i));
  Tensor settings = constant(constants), rate = constant({lr}), keep = constant({decay});
  Tensor loss = constant({finite ? 3. : NAN}), loss_out = output({});
  Tensor power1 = constant({beta1}), power2 = constant({beta2}), steps = ints({4}), norm = output({});
  std::vector<std::vector<int64_t>> shapes;
  for (long i = 0; i < count; ++i)
    shapes.push_back(i % 2 ? std::vector<int64_t>{uniform(1, 90)} : std::vector<int64_t>{uniform(1, 9), uniform(1, 20)});
  std::vector<Tensor> all;  // parameters, first moments, second moments, gradients, averages
  for (int kind = 0; kind < 5; ++kind)
    for (long i = 0; i < count; ++i)
      if (kind < 4 || has_average(i)) all.push_back(kind == 2 ? positive(shapes[i]) : normal(shapes[i]));
  std::vector<Doubles> wanted;
  for (const Tensor& t : all) wanted.push_back(t.doubles());
  double total = 0;
  for (long i = 0; i < count; ++i)
    for (const double g : wanted[3 * count + i]) total += g * g;
  const double scale = std::fmin(1, clip / (std::sqrt(total) + 1e-6));
  long average = 4 * count - 1;
  for (long i = 0; i < count && finite; ++i) {
    average += has_average(i);
    for (size_t j = 0; j < wanted[i].size(); ++j) {
      const double g = wanted[3 * count + i][j] * scale;
      double &p = wanted[i][j], &m = wanted[count + i][j], &v = wanted[2 * count + i][j];
      m = beta1 * m + (1 - beta1) * g;
      v = beta2 * v + (1 - beta2) * g * g;
      p *= 1 - lr * weight_decay(i);
      p -= lr * std::sqrt(1 - beta2 * beta2) / (1 - beta1 * beta1) * m / (std::sqrt(v) + eps);
      if (has_average(i)) wanted[average][j] += (1 - decay) * (p - wanted[average][j]);
    }
  }
  std::vector<Tensor*> tensors{&settings, &loss, &rate, &keep, &power1, &power2, &steps};
  for (Tensor& t : all) tensors.push_back(&t);
  tensors.push_back(&loss_out);
  tensors.push_back(&norm);
  expect(call(adam, tensors) == 0, "adam fails");
  for (size_t i = 0; i < all.size(); ++i) compare("adam", all[i], wanted[i]);
  if (finite) {
    compare("adam loss", loss_out, {3});
    compare("adam norm", norm, {std::sqrt(total)});
  } else {
    expect(std::isnan(loss_out.doubles()[0]) && std::isnan(norm.doubles()[0]), "adam does not say that it skips");
  }
  compare("adam power of beta1", power1, {finite ? beta1 * beta1 : beta1});
  compare("adam power of beta2", power2, {finite ? beta2 * beta2 : beta2});
  expect(steps.ints[0] == 4 + finite, "adam counts wrong");
}

// An operator returns an error, and those that follow work.
void check_errors() {
  Tensor x = normal({3}), y = output({3});
  x.type = "float64";
  expect(call(silu, {&x, &y}) == 1, "another type is accepted");
  x.type = "float32";
  Tensor settings = ints({1, 0, 1, 0}), one = normal({1}), large = normal({1});
  large.shape = {1, 1, 50000, 50000};
  one.shape = {1, 1, 1, 1};
  Tensor bias = normal({1}), norm_settings = constant({1, 0.01, 1});
  expect(call(conv, {&large, &one, &bias, &settings, &large}) == 2, "an image beyond int offsets is accepted");
  large.shape = {5, 1, 1L << 31, 1L << 31};  // every thread asks for more floats than a vector can hold
  expect(call(group_norm, {&large, &bias, &bias, &norm_settings, &large}) == 2, "an exception of a thread is lost");
  expect(call(silu, {&x, &y}) == 0 && std::isfinite(y.floats[0]), "silu fails after errors");
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned seed = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 0;
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 60;
  expect(self_test() == 0, "self_test fails");
  for (int round = 0; round < rounds; ++round) {
    generator.seed(seed * 1000003 + static_cast<unsigned>(round));
    set_threads(static_cast<int>(uniform(1, 5)));
    now = "seed " + std::to_string(seed) + ", round " + std::to_string(round) + ", " + std::to_string(get_threads()) +
          " threads";
    const long k = uniform(1, 6), s = uniform(1, 3), p = uniform(0, 3), least = std::max(1L, k - 2 * p);
    const long n = round % 9 ? uniform(1, 4) : 0, h = uniform(least, 12), w = uniform(least, 12);
    const long groups = round % 3 == 1 ? uniform(2, 3) : 1, channels = uniform(1, 9);
    if (round % 3 == 2)
      check_conv({n, channels, h, w, channels, k, round % 2 ? 1 : s, p, channels}, round % 5 == 0);
    else
      check_conv({n, groups * uniform(1, 12), h, w, groups * uniform(1, 20), k, s, p, groups}, round % 5 == 0);
    const long norm_groups = uniform(1, 4), rows = uniform(1, 9);
    check_norm({n, norm_groups * uniform(1, 5), rows * uniform(1, 9), norm_groups, round % 3, round % 2 == 0, 0.01}, rows);
    check_linear(n ? uniform(1, 30) : 0, uniform(1, 70), uniform(1, 70), round % 4, round % 3 == 0);
    check_elementwise(uniform(1, 100));
    check_attention(n, uniform(1, 3), uniform(1, 34), uniform(1, 9), uniform(1, 9));
    check_softmax_attention(n, uniform(1, 3), uniform(1, 34), uniform(1, 130));
    check_rows(n, uniform(1, 9), uniform(1, 70));
    check_adam(uniform(1, 5), static_cast<int>(round % 3), round % 4 != 0);
    check_errors();
  }
  set_threads(1);  // ends the pool: LeakSanitizer then sees every block that was lost
  std::printf("%d comparisons, %d failures\n", comparisons, failures);
  return failures ? 1 : 0;
}
