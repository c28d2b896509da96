// Linear attention (Shen et al. 2018, equation 4) and its gradient, for one image and head: out (d, n) = context^T
// softmax_d(q) / sqrt(d) with context (d, d) = softmax_n(k) v^T, for d channels and n positions.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "pool.h"
#include "simd.h"
#include "tiles.h"

namespace kernels {

// Matrices (d, n), and copies whose rows are padded with zeros to `pitch` floats: (d, pitch).
struct Head {
  long d, n, pitch;
  Head(long channels, long positions) : d(channels), n(positions), pitch(round_up(positions, L)) {}
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

  // `most` and `total` (n): room for the maxima and sums
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

  // out (d, n) = w x, or w^T x, with w (d, d) and x (d, pitch); room (MAX_M, pitch)
  void multiply(const float* w, bool transposed, const float* x, float* out, float* room) const {
    const Blocks blocks{d};
    const auto packed = blocks.pack(d, [&](long row, long k) { return transposed ? w[k * d + row] : w[row * d + k]; });
    std::vector<int> offset(d);
    for (long i = 0; i < d; ++i) offset[i] = static_cast<int>(i * pitch);
    for (long first = 0; first < d; first += blocks.m) {
      blocks.tiles()(x, offset, packed.data() + first * d, room, pitch, n);
      for (long j = 0; j < std::min(blocks.m, d - first); ++j)
        std::memcpy(out + (first + j) * n, room + j * pitch, n * sizeof(float));
    }
  }
};

inline void linear_attention(const Head& head, const float* q, const float* k, const float* v, float* out) {
  const float factor = 1 / std::sqrt(static_cast<float>(head.d));
  const Buffer keys(head.size()), queries(head.size()), values(head.size());
  const Buffer context(head.d * head.d), room(MAX_M * head.pitch);
  head.softmax_positions(k, keys);
  head.copy(v, values);
  head.outer(keys, values, factor, context);
  head.softmax_channels(q, queries, room, room + head.pitch);
  head.multiply(context, true, queries, out, room);
}

inline void linear_attention_gradient(const Head& head, const float* dout, const float* q, const float* k, const float* v,
                                      float* dq, float* dk, float* dv) {
  const long d = head.d, n = head.n, pitch = head.pitch;
  const float factor = 1 / std::sqrt(static_cast<float>(d));
  const Buffer key_buffer(head.size()), query_buffer(head.size()), values(head.size()), douts(head.size());
  const Buffer context(d * d), dcontext(d * d), room_buffer(MAX_M * pitch);
  float *keys = key_buffer, *queries = query_buffer, *room = room_buffer;
  head.softmax_positions(k, keys);
  head.softmax_channels(q, queries, room, room + pitch);
  head.copy(v, values);
  head.copy(dout, douts);
  head.outer(keys, values, factor, context);
  head.outer(queries, douts, factor, dcontext);
  head.multiply(context, false, douts, dq, room);    // the gradient of the queries' softmax
  head.multiply(dcontext, false, values, dk, room);  // the gradient of the keys' softmax
  head.multiply(dcontext, true, keys, dv, room);
  // With p = softmax(input), the gradient of the input is p (dp - sum(p dp)).
  std::fill(room, room + n, 0.f);
  for (long i = 0; i < d; ++i)
#pragma omp simd
    for (long j = 0; j < n; ++j) room[j] += queries[i * pitch + j] * dq[i * n + j];
  for (long i = 0; i < d; ++i) {
    float* row = dq + i * n;
#pragma omp simd
    for (long j = 0; j < n; ++j) row[j] = queries[i * pitch + j] * (row[j] - room[j]);
  }
  for (long i = 0; i < d; ++i) {
    float *row = dk + i * n, *p = keys + i * pitch, total = 0;
#pragma omp simd reduction(+ : total)
    for (long j = 0; j < n; ++j) total += p[j] * row[j];
#pragma omp simd
    for (long j = 0; j < n; ++j) row[j] = p[j] * (row[j] - total);
  }
}

}  // namespace kernels
