// The transformer's operators on rows of numbers, one row for each token: softmax attention (Vaswani et al. 2017, equation 1),
// and layer norms and sums with a scale, shift or gate for each image (Peebles & Xie 2023, section 3.2).

#pragma once

#include <algorithm>
#include <cmath>

#include "pool.h"
#include "simd.h"
#include "tiles.h"

namespace kernels {

// c (m, n) += a b, where a(i, q) = a[i * a_row + q * a_column], b has k rows and c has m; the rows of b and c are n numbers
// long, a multiple of L, and lie n apart.
template <int N>
void add_columns(long m, long n, long k, const float* a, long a_row, long a_column, const float* b, float* c) {
  constexpr int M = REGISTERS / N;
  int row[M];
  for (int j = 0; j < M; ++j) row[j] = static_cast<int>(j * a_row);
  for (long i = 0; i < m;) {
    const int rows = m - i < M ? 1 : M;
    const auto accumulate = rows == M ? accumulate_tile<M, N> : accumulate_tile<1, N>;
    if (a_column == 1)
      accumulate(a + i * a_row, row, b, n, {1, 1, k, 0, 0}, c + i * n, n);
    else
      accumulate(a + i * a_row, row, b, n, {1, k, 1, 0, a_column}, c + i * n, n);
    i += rows;
  }
}
inline void add_product(long m, long n, long k, const float* a, long a_row, long a_column, const float* b, float* c) {
  for (long j = 0, wide; j < n; j += wide * L) {
    wide = std::min(4L, (n - j) / L);
    if (wide == 1) add_columns<1>(m, n, k, a, a_row, a_column, b + j, c + j);
    if (wide == 2) add_columns<2>(m, n, k, a, a_row, a_column, b + j, c + j);
    if (wide == 3) add_columns<3>(m, n, k, a, a_row, a_column, b + j, c + j);
    if (wide == 4) add_columns<4>(m, n, k, a, a_row, a_column, b + j, c + j);
  }
}

// One head of an image: q, k and v are (n, d), and their rows lie 3 `width` apart, those of its output `width`. Copies have
// rows of `wide` numbers, or are transposed with rows of `pitch`, and zeros beyond d and n.
struct Tokens {
  static constexpr long ROWS = 48;  // queries at a time, whose scores stay in the cache
  long n, d, width, wide, pitch;
  float scale;
  Tokens(long tokens, long channels, long heads)
      : n(tokens), d(channels), width(heads * channels), wide(round_up(d, L)), pitch(round_up(n, L)),
        scale(1 / std::sqrt(static_cast<float>(d))) {}

  void copy(const float* from, long step, long rows, float factor, float* to) const {
    for (long i = 0; i < rows; ++i) {
      for (long c = 0; c < d; ++c) to[i * wide + c] = from[i * step + c] * factor;
      std::fill(to + i * wide + d, to + (i + 1) * wide, 0.f);
    }
  }
  void transpose(const float* from, long step, float* to) const {
    for (long c = 0; c < d; ++c) {
      for (long i = 0; i < n; ++i) to[c * pitch + i] = from[i * step + c];
      std::fill(to + c * pitch + n, to + (c + 1) * pitch, 0.f);
    }
  }
  void store(const float* from, long rows, float factor, float* to, long step) const {
    for (long i = 0; i < rows; ++i)
      for (long c = 0; c < d; ++c) to[i * step + c] = from[i * wide + c] * factor;
  }

  // The weights (rows, pitch) of these queries: softmax(scale q k^T)
  void weights(const float* q, long rows, const float* keys, float* p) const {
    std::fill(p, p + rows * pitch, 0.f);
    add_product(rows, pitch, d, q, 3 * width, 1, keys, p);
    for (long i = 0; i < rows; ++i) {
      float *row = p + i * pitch, most = row[0], total = 0;
#pragma omp simd reduction(max : most)
      for (long j = 0; j < n; ++j) most = row[j] > most ? row[j] : most;
#pragma omp simd reduction(+ : total)
      for (long j = 0; j < n; ++j) total += row[j] = exponential((row[j] - most) * scale);
#pragma omp simd
      for (long j = 0; j < n; ++j) row[j] /= total;
      std::fill(row + n, row + pitch, 0.f);
    }
  }
};

inline void attention(const Tokens& head, const float* q, float* out) {
  const long n = head.n, step = 3 * head.width;
  const float *k = q + head.width, *v = k + head.width;
  const Buffer keys(head.d * head.pitch), values(n * head.wide), p(Tokens::ROWS * head.pitch), y(Tokens::ROWS * head.wide);
  head.transpose(k, step, keys);
  head.copy(v, step, n, 1, values);
  for (long i = 0; i < n; i += Tokens::ROWS) {
    const long rows = std::min(Tokens::ROWS, n - i);
    head.weights(q + i * step, rows, keys, p);
    std::fill(y + 0, y + rows * head.wide, 0.f);
    add_product(rows, head.wide, n, p, head.pitch, 1, values, y);
    head.store(y, rows, 1, out + i * head.width, head.width);
  }
}

inline void attention_gradient(const Tokens& head, const float* dout, const float* q, float* dq) {
  const long n = head.n, wide = head.wide, pitch = head.pitch, step = 3 * head.width, ROWS = Tokens::ROWS;
  const float *k = q + head.width, *v = k + head.width;
  const Buffer keys(head.d * pitch), values(head.d * pitch), rows_of_k(n * wide), rows_of_q(ROWS * wide), douts(ROWS * wide);
  const Buffer p_buffer(ROWS * pitch), dp_buffer(ROWS * pitch), y(ROWS * wide), dk(n * wide), dv(n * wide);
  float *p = p_buffer, *dp = dp_buffer;
  head.transpose(k, step, keys);
  head.transpose(v, step, values);
  head.copy(k, step, n, 1, rows_of_k);
  std::fill(dk + 0, dk + n * wide, 0.f);
  std::fill(dv + 0, dv + n * wide, 0.f);
  for (long i = 0; i < n; i += ROWS) {
    const long rows = std::min(ROWS, n - i);
    head.weights(q + i * step, rows, keys, p);
    head.copy(q + i * step, step, rows, 1, rows_of_q);
    head.copy(dout + i * head.width, head.width, rows, 1, douts);
    add_product(n, wide, rows, p, 1, pitch, douts, dv);
    std::fill(dp, dp + rows * pitch, 0.f);
    add_product(rows, pitch, head.d, douts, wide, 1, values, dp);
    // With p = softmax(s), the gradient of s is p (dp - sum(p dp)).
    for (long r = 0; r < rows; ++r) {
      float *a = p + r * pitch, *b = dp + r * pitch, total = 0;
#pragma omp simd reduction(+ : total)
      for (long j = 0; j < n; ++j) total += a[j] * b[j];
#pragma omp simd
      for (long j = 0; j < n; ++j) b[j] = a[j] * (b[j] - total);
    }
    std::fill(y + 0, y + rows * wide, 0.f);
    add_product(rows, wide, n, dp, pitch, 1, rows_of_k, y);
    head.store(y, rows, head.scale, dq + i * step, step);
    add_product(n, wide, rows, dp, 1, pitch, rows_of_q, dk);
  }
  head.store(dk, n, head.scale, dq + head.width, step);
  head.store(dv, n, 1, dq + 2 * head.width, step);
}

// y = (x - mean) / deviation * (1 + scale) + shift for rows (images * n, d); scale and shift are (images, d)
inline void ada_norm(long images, long n, long d, float eps, const float* x, const float* scale, const float* shift, float* y) {
  parallel_for(images * n, [=](long begin, long end) {
    for (long i = begin; i < end; ++i) {
      const float *from = x + i * d, *a = scale + i / n * d, *b = shift + i / n * d;
      float s = 0, v = 0, *to = y + i * d;
#pragma omp simd reduction(+ : s)
      for (long c = 0; c < d; ++c) s += from[c];
      const float mean = s / static_cast<float>(d);
#pragma omp simd reduction(+ : v)
      for (long c = 0; c < d; ++c) v += (from[c] - mean) * (from[c] - mean);
      const float factor = 1 / std::sqrt(v / static_cast<float>(d) + eps);
#pragma omp simd
      for (long c = 0; c < d; ++c) to[c] = (from[c] - mean) * factor * (1 + a[c]) + b[c];
    }
  });
}

inline void ada_norm_gradient(long images, long n, long d, float eps, const float* dy, const float* x, const float* scale,
                              float* dx, float* dscale, float* dshift) {
  parallel_for(images, [=](long begin, long end) {
    for (long image = begin; image < end; ++image) {
      const float* a = scale + image * d;
      float *da = dscale + image * d, *db = dshift + image * d;
      std::fill_n(da, d, 0.f);
      std::fill_n(db, d, 0.f);
      for (long i = image * n; i < (image + 1) * n; ++i) {
        const float *from = x + i * d, *slope = dy + i * d, count = static_cast<float>(d);
        float s = 0, v = 0, g = 0, gx = 0, *to = dx + i * d;
#pragma omp simd reduction(+ : s)
        for (long c = 0; c < d; ++c) s += from[c];
        const float mean = s / count;
#pragma omp simd reduction(+ : v, g, gx)
        for (long c = 0; c < d; ++c) {
          const float centred = from[c] - mean, weighted = slope[c] * (1 + a[c]);
          v += centred * centred;
          g += weighted;
          gx += weighted * centred;
        }
        const float factor = 1 / std::sqrt(v / count + eps), mean_g = g / count, mean_gx = gx * factor * factor / count;
#pragma omp simd
        for (long c = 0; c < d; ++c) {
          const float centred = from[c] - mean;
          to[c] = factor * (slope[c] * (1 + a[c]) - mean_g - centred * mean_gx);
          da[c] += slope[c] * centred * factor;
          db[c] += slope[c];
        }
      }
    }
  });
}

// x + gate * y for rows (images * n, d); the gate is (images, d)
inline void gated_sum(long images, long n, long d, const float* x, const float* y, const float* gate, float* out) {
  parallel_for(images * n, [=](long begin, long end) {
    for (long i = begin; i < end; ++i)
#pragma omp simd
      for (long c = 0; c < d; ++c) out[i * d + c] = x[i * d + c] + y[i * d + c] * gate[i / n * d + c];
  });
}

inline void gated_sum_gradient(long images, long n, long d, const float* dout, const float* y, const float* gate, float* dy,
                               float* dgate) {
  parallel_for(images, [=](long begin, long end) {
    for (long image = begin; image < end; ++image) {
      std::fill_n(dgate + image * d, d, 0.f);
      for (long i = image * n; i < (image + 1) * n; ++i)
#pragma omp simd
        for (long c = 0; c < d; ++c) {
          dy[i * d + c] = dout[i * d + c] * gate[image * d + c];
          dgate[image * d + c] += dout[i * d + c] * y[i * d + c];
        }
    }
  });
}

}  // namespace kernels
