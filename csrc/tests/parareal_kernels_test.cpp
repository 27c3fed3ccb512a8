// Uses the parareal operators as a C++ program does: through sidestep.h alone. Run by ctest.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "expect.h"
#include "sidestep/sidestep.h"

namespace {

// Two rows of one register: d_0 = 2, d_1 = -0.5 except where new and old are equal; C = [3, 4].
struct Correction {
  static constexpr int64_t kRows = 2;
  explicit Correction(int64_t dim)
      : boundary(kRows * dim, 1.0f),
        fine(kRows * dim, -0.0f),
        now(kRows * 2 * dim),
        before(kRows * 2 * dim, 0.25f) {
    for (int64_t i = 0; i < kRows * 2 * dim; ++i) {
      const float d = i % dim % 3 == 0 ? 0.0f : i / dim % 2 == 0 ? 2.0f : -0.5f;
      now[i] = before[i] + d;
    }
    correct.boundary = boundary.data();
    correct.fine = fine.data();
    correct.new_vectors = gram.new_vectors = now.data();
    correct.old_vectors = gram.old_vectors = before.data();
    correct.coefficients = coefficients;
    correct.residual = residual;
    correct.dim = gram.dim = dim;
    correct.rows = gram.rows = kRows;
    correct.num_registers = 1;
    gram.gram = products;
    gram.num_vectors = 2;
  }

  std::vector<float> boundary;
  std::vector<float> fine;
  std::vector<float> now;
  std::vector<float> before;
  float coefficients[kRows * 2] = {3.0f, 4.0f, 3.0f, 4.0f};
  float residual[kRows * 2] = {};
  float products[kRows * 4] = {};
  sidestep_parareal_correct_args correct{};
  sidestep_difference_gram_args gram{};
};

void values_are_exact(int64_t dim) {
  Correction c(dim);
  expect(sidestep_difference_gram(&c.gram) == SIDESTEP_OK, "valid inner products succeed");
  expect(sidestep_parareal_correct(&c.correct) == SIDESTEP_OK, "a valid correction succeeds");
  const auto moved = static_cast<float>(dim - (dim + 2) / 3);
  for (int64_t row = 0; row < Correction::kRows; ++row) {
    const float* gram = c.products + row * 4;
    expect(gram[0] == 4.0f * moved && gram[3] == 0.25f * moved, "d_i . d_i");
    expect(gram[1] == -moved && gram[2] == -moved, "d_i . d_j, both halves");
    for (int64_t i = 0; i < dim; ++i) {
      const float x = c.boundary[row * dim + i];
      expect(i % 3 == 0 ? x == 0.0f && std::signbit(x) : x == 4.0f, "fine + (3 d_0 + 4 d_1)");
    }
    const float change = (9.0f * moved + static_cast<float>(dim) - moved) / static_cast<float>(dim);
    expect(std::fabs(c.residual[row * 2] - change) < 1e-6f * change, "mean (x' - x)^2");
    const float size = 16.0f * moved / static_cast<float>(dim);
    expect(std::fabs(c.residual[row * 2 + 1] - size) <= 1e-6f * size, "mean x'^2");
  }
}

void calls_allocate_nothing() {
  for (const int64_t dim : {16, 300001}) {
    Correction c(dim);
    sidestep_difference_gram(&c.gram);  // scratch memory and threads come with the first
    sidestep_parareal_correct(&c.correct);
    const int before = g_allocations;
    for (int i = 0; i < 5; ++i) {
      sidestep_difference_gram(&c.gram);
      sidestep_parareal_correct(&c.correct);
    }
    expect(g_allocations == before, "a call allocates nothing");
  }
}

void failures_are_statuses() {
  Correction c(8);
  c.correct.fine = c.boundary.data() + 1;
  expect(sidestep_parareal_correct(&c.correct) == SIDESTEP_INVALID_ARGUMENT, "overlap is refused");
  expect(std::strstr(sidestep_error(), "boundary overlaps fine") != nullptr, "and named");
  expect(c.boundary == std::vector<float>(16, 1.0f), "a refused call changes nothing");
  c.gram.num_vectors = 8;
  expect(sidestep_difference_gram(&c.gram) == SIDESTEP_INVALID_ARGUMENT, "V = 8 is refused");
  expect(sidestep_cuda_parareal_correct_workspace(2, 8) == 16, "two sums a row and chunk");
  if (std::strncmp(sidestep_build_info("cuda"), "no", 2) == 0) {
    expect(sidestep_cuda_difference_gram(&c.gram, nullptr, nullptr) == SIDESTEP_UNAVAILABLE,
           "a build without CUDA says so");
  }
}

}  // namespace

int main() {
  for (const int64_t dim : {1, 7, 129, 4231}) values_are_exact(dim);
  calls_allocate_nothing();
  failures_are_statuses();
  return g_failures == 0 ? 0 : 1;
}
