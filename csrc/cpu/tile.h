// Products of small matrices that are in the cache: a tile of the result stays in registers while its products are
// added.
#pragma once

#include "vector.h"

namespace quietstar::cpu::QUIETSTAR_ISA {
namespace {

constexpr int kTileRows = kLanes == 16 ? 12 : 6;  // with two vectors of columns they fill the registers
constexpr int kTileColumns = 2 * kLanes;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t rounded_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// An element a(i, k) of a small matrix or of its transpose.
struct Operand {
  const float* data;
  int64_t row_stride, column_stride;

  const float* at(int64_t row, int64_t column) const { return data + row * row_stride + column * column_stride; }
};

// Where a tile of the result is stored, with rows `stride` apart.
struct Rows {
  float* data;
  int64_t stride;
};

// c (+)= a [kRows, depth] · b [depth, kVectors vectors], with the rows of b `b_stride` apart.
template <int kRows, int kVectors>
inline void multiply_tile(Operand a, const float* b, int64_t b_stride, int64_t depth, Rows c, bool add) {
  Vec sums[kRows][kVectors] = {};
#pragma GCC unroll 4  // a fifth faster than one by one
  for (int64_t k = 0; k < depth; ++k, a.data += a.column_stride, b += b_stride) {
    Vec right[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) right[j] = load(b + j * kLanes, Whole{});
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const Vec left = splat(a.data[i * a.row_stride]);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sums[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      float* to = c.data + i * c.stride + j * kLanes;
      store(to, add ? load(to, Whole{}) + sums[i][j] : sums[i][j], Whole{});
    }
  }
}

template <int kRows>
inline void multiply_rows(Operand a, const float* b, int64_t b_stride, int64_t width, int64_t depth, Rows c, bool add) {
  int64_t column = 0;
  for (; column + kTileColumns <= width; column += kTileColumns) {
    multiply_tile<kRows, 2>(a, b + column, b_stride, depth, {c.data + column, c.stride}, add);
  }
  if (column < width) multiply_tile<kRows, 1>(a, b + column, b_stride, depth, {c.data + column, c.stride}, add);
}

// c (+)= a [rows, depth] · b [depth, width], with the rows of b `b_stride` apart; width in whole vectors.
inline void multiply(Operand a, const float* b, int64_t b_stride, int64_t rows, int64_t width, int64_t depth, Rows c,
                     bool add = false) {
  const auto a_from = [&](int64_t row) { return Operand{a.at(row, 0), a.row_stride, a.column_stride}; };
  const auto c_from = [&](int64_t row) { return Rows{c.data + row * c.stride, c.stride}; };
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) {
    multiply_rows<kTileRows>(a_from(row), b, b_stride, width, depth, c_from(row), add);
  }
  for (; row + 4 <= rows; row += 4) multiply_rows<4>(a_from(row), b, b_stride, width, depth, c_from(row), add);
  for (; row < rows; ++row) multiply_rows<1>(a_from(row), b, b_stride, width, depth, c_from(row), add);
}

// One row of `size` elements in float32, with zeros behind it.
template <class T>
void gather(const T* from, float* to, int64_t size) {
  for_vectors(0, size, [&](int64_t d, auto extent) { store(to + d, load(from + d, extent), Whole{}); });
}

}  // namespace
}  // namespace quietstar::cpu::QUIETSTAR_ISA
