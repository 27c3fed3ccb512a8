// Checks every argument of the parareal operators before anything is touched.
#include <cinttypes>

#include "kernels/launch.h"
#include "kernels/parareal.h"
#include "kernels/ranges.h"

namespace sidestep {
namespace {

Status check_extent(const char* operation, int64_t rows, int64_t dim) {
  if (rows >= 0 && dim >= 0) return Status();
  return invalid_argument("%s: rows = %" PRId64 ", D = %" PRId64 ", expected none below 0",
                          operation, rows, dim);
}

int64_t partial_sums_bytes(int64_t rows, int64_t dim, int count) {
  return rows * cuda_chunks(dim) * count * 4;
}

}  // namespace

Status check_difference_gram(const sidestep_difference_gram_args& a) {
  if (a.num_vectors < 1 || a.num_vectors > kMaxVectors) {
    return invalid_argument("difference_gram: new has V = %d, expected 1 to %d", a.num_vectors,
                            kMaxVectors);
  }
  const Status extent = check_extent("difference_gram", a.rows, a.dim);
  if (!extent.ok()) return extent;
  const int64_t bytes = a.rows * a.num_vectors * a.dim * 4;
  const Range ranges[] = {
      {"gram", a.gram, a.rows * a.num_vectors * a.num_vectors * 4, true, false},
      {"new", a.new_vectors, bytes, false, false},
      {"old", a.old_vectors, bytes, false, false},
  };
  return check_ranges("difference_gram", ranges, 3);
}

Status check_parareal_correct(const sidestep_parareal_correct_args& a) {
  if (a.num_registers < 1 || a.num_registers > SIDESTEP_MAX_REGISTERS) {
    return invalid_argument("parareal_correct_: boundary has R = %d, expected 1 to %d",
                            a.num_registers, SIDESTEP_MAX_REGISTERS);
  }
  const Status extent = check_extent("parareal_correct_", a.rows, a.dim);
  if (!extent.ok()) return extent;
  const int64_t states = a.rows * a.num_registers * a.dim * 4;
  const int64_t vectors = a.rows * (a.num_registers + 1) * a.dim * 4;
  const int64_t coefficients = a.rows * a.num_registers * (a.num_registers + 1) * 4;
  const Range ranges[] = {
      {"boundary", a.boundary, states, true, false},
      {"residual", a.residual, a.rows * 2 * 4, true, false},
      {"fine", a.fine, states, false, false},
      {"new", a.new_vectors, vectors, false, false},
      {"old", a.old_vectors, vectors, false, false},
      {"coefficients", a.coefficients, coefficients, false, false},
  };
  return check_ranges("parareal_correct_", ranges, 6);
}

int64_t difference_gram_bytes(const sidestep_difference_gram_args& a) {
  return a.rows * a.dim * 8 * a.num_vectors;
}

// `fine` read and boundary written, both versions of R + 1 vectors, and register 0 before.
int64_t parareal_correct_bytes(const sidestep_parareal_correct_args& a) {
  return a.rows * a.dim * 4 * (4 * a.num_registers + 3);
}

int64_t cuda_difference_gram_workspace(int64_t rows, int64_t dim, int32_t num_vectors) {
  return partial_sums_bytes(rows, dim, gram_pairs(num_vectors));
}

int64_t cuda_parareal_correct_workspace(int64_t rows, int64_t dim) {
  return partial_sums_bytes(rows, dim, 2);
}

}  // namespace sidestep
