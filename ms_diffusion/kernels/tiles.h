// The two inner loops of all matrix products. They keep a tile of the result in registers.

#pragma once

#include <utility>
#include <vector>

#include "simd.h"

namespace kernels {

// out[m][q] = sum_k weight[k][m] * planes[offset[k] + q] for m < M, q < NV * L: a product whose second matrix has rows that
// overlap in memory, such as shifted views of a padded image
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

constexpr int NV = 3, MAX_M = REGISTERS / NV;  // the largest tile: MAX_M rows of NV vectors

// `tile` for all q < length; it reads and writes up to the next multiple of L.
template <int M>
void tiles(const float* planes, const std::vector<int>& offset, const float* weight, float* out, long pitch, long length) {
  long q = 0;
  const long k = static_cast<long>(offset.size());
  for (; q + (NV - 1) * L < length; q += NV * L) tile<M, NV>(planes + q, offset.data(), k, weight, out + q, pitch);
  for (; q < length; q += L) tile<M, 1>(planes + q, offset.data(), k, weight, out + q, pitch);
}
using Tiles = void (*)(const float*, const std::vector<int>&, const float*, float*, long, long);
template <int... M>
Tiles choose_tiles(long m, std::integer_sequence<int, M...>) {
  static constexpr Tiles all[] = {tiles<M + 1>...};
  return all[m - 1];
}

// Output channels in `count` blocks of m, the last perhaps shorter.
struct Blocks {
  long channels, count = (channels + MAX_M - 1) / MAX_M, m = (channels + count - 1) / count;

  // The weights at(channel, k) in the order of `tiles`: (block, k, channel in the block), zero beyond the last channel.
  template <class At>
  std::vector<float> pack(long taps, At at) const {
    std::vector<float> packed(count * m * taps, 0.f);
    for (long i = 0; i < channels; ++i)
      for (long k = 0; k < taps; ++k) packed[(i / m * taps + k) * m + i % m] = at(i, k);
    return packed;
  }
  Tiles tiles() const { return choose_tiles(m, std::make_integer_sequence<int, MAX_M>()); }
};

// Rows of pixels in padded planes: row r of image i begins at i * image + r * pitch.
struct Rows {
  long images, rows, columns, image, pitch;
};

// sums[m][j] += sum over the pixels of planes[offset[m] + pixel] * y[pixel][j] for m < M, j < N * L
template <int M, int N>
void accumulate_tile(const float* planes, const int* offset, const float* y, long y_pitch, const Rows& at, float* sums,
                     long sums_pitch) {
  V acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) acc[m][v] = load(sums + m * sums_pitch + v * L);
  for (long i = 0; i < at.images; ++i)
    for (long r = 0; r < at.rows; ++r) {
      const float* from = planes + i * at.image + r * at.pitch;
      for (long q = 0; q < at.columns; ++q, y += y_pitch) {
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

}  // namespace kernels
