// Matrix products A Bᵀ and A B, block by block, for kernels that produce or use a block while it is in the cache.
//
// As in Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication (ACM TOMS 2008): a tile of the result
// stays in registers while up to kDepth products are added, the rows of B that it needs stay in the L1 cache while rows
// of A pass by, and both are stored in the order in which they are used.
#pragma once

#include "parallel.h"
#include "tile.h"

namespace quietstar::cpu::QUIETSTAR_ISA {
namespace {

constexpr int64_t kDepth = 256;

// Rows of a matrix with `columns` columns, packed into panels of `Width` rows, each stored column by column and padded
// with zeros, in memory of the given size.
template <int Width>
class Panels {
 public:
  Panels(float* memory, int64_t columns) : memory_(memory), columns_(columns) {}

  static int64_t size(int64_t rows, int64_t columns) { return rounded_up(rows, Width) * columns; }

  template <class T>
  void pack(const Matrix<const T>& matrix, int64_t first_row, int64_t rows, int threads) {
    for_rows(rounded_up(rows, Width) / Width, threads, [&](int64_t panel, int) {
      float* to = memory_ + panel * Width * columns_;
      for (int64_t row = 0; row < Width; ++row) {
        const int64_t number = panel * Width + row;
        const T* from = matrix.row(first_row + smaller(number, rows - 1));
        for (int64_t k = 0; k < columns_; ++k) to[k * Width + row] = number < rows ? load_one(from + k) : 0.0f;
      }
    });
  }

  // The part, from a column on, of the panel that begins with the given row.
  const float* at(int64_t row, int64_t column) const { return memory_ + row * columns_ + column * Width; }

  int64_t columns() const { return columns_; }

 private:
  float* memory_;
  int64_t columns_;
};

using LeftPanels = Panels<kTileRows>;
using RightPanels = Panels<kTileColumns>;

// result[i, j] = left row i · right row j, for rows that begin a panel. The result has room for whole tiles.
inline void multiply(const LeftPanels& left, int64_t left_row, int64_t rows, const RightPanels& right,
                     int64_t right_row, int64_t columns, float* result, int64_t stride) {
  for (int64_t begin = 0; begin < left.columns(); begin += kDepth) {
    const int64_t depth = smaller(kDepth, left.columns() - begin);
    for (int64_t j = 0; j < columns; j += kTileColumns) {
      for (int64_t i = 0; i < rows; i += kTileRows) {
        multiply_tile<kTileRows, 2>({left.at(left_row + i, begin), 1, kTileRows}, right.at(right_row + j, begin),
                                    kTileColumns, depth, {result + i * stride + j, stride}, begin > 0);
      }
    }
  }
}

// Rows of a matrix with `columns` columns, packed into panels of kTileColumns columns, each stored row by row and
// padded with zeros to a whole panel.
template <class T>
void pack_columns(const Matrix<const T>& matrix, int64_t first_row, int64_t rows, int64_t columns, float* to) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < rounded_up(columns, kTileColumns); column += kLanes) {
      const int64_t left = columns - column;
      const T* from = matrix.row(first_row + row) + column;
      const Vec v = left >= kLanes ? load(from, Whole{}) : left > 0 ? load(from, Part{(int)left}) : Vec{};
      store(to + column / kTileColumns * kTileColumns * rows + row * kTileColumns + column % kTileColumns, v, Whole{});
    }
  }
}

// result (+)= left [rows, depth] · right [depth, columns], where `right` is packed. The result has rows of whole
// panels, and room for whole tiles.
inline void multiply_columns(Operand left, int64_t rows, const float* right, int64_t depth, Rows result, bool add) {
  for (int64_t j = 0; j < result.stride; j += kTileColumns) {
    for (int64_t i = 0; i < rows; i += kTileRows) {
      multiply_tile<kTileRows, 2>({left.at(i, 0), left.row_stride, left.column_stride}, right + j * depth, kTileColumns,
                                  depth, {result.data + i * result.stride + j, result.stride}, add);
    }
  }
}

}  // namespace
}  // namespace quietstar::cpu::QUIETSTAR_ISA
