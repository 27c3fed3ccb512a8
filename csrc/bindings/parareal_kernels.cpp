// The parareal operators on raw addresses.
#include "bindings/parareal_kernels.h"

#include "bindings/call.h"
#include "sidestep/sidestep.h"

namespace {

sidestep_difference_gram_args gram_args(uintptr_t new_vectors, uintptr_t old_vectors,
                                        uintptr_t gram, int64_t rows, int32_t num_vectors,
                                        int64_t dim) {
  sidestep_difference_gram_args args{};
  args.new_vectors = address<const float>(new_vectors);
  args.old_vectors = address<const float>(old_vectors);
  args.gram = address<float>(gram);
  args.dim = dim;
  args.rows = rows;
  args.num_vectors = num_vectors;
  return args;
}

sidestep_parareal_correct_args correct_args(uintptr_t boundary, uintptr_t fine,
                                            uintptr_t new_vectors, uintptr_t old_vectors,
                                            uintptr_t coefficients, uintptr_t residual,
                                            int64_t rows, int32_t num_registers, int64_t dim) {
  sidestep_parareal_correct_args args{};
  args.boundary = address<float>(boundary);
  args.fine = address<const float>(fine);
  args.new_vectors = address<const float>(new_vectors);
  args.old_vectors = address<const float>(old_vectors);
  args.coefficients = address<const float>(coefficients);
  args.residual = address<float>(residual);
  args.dim = dim;
  args.rows = rows;
  args.num_registers = num_registers;
  return args;
}

void difference_gram(uintptr_t new_vectors, uintptr_t old_vectors, uintptr_t gram, int64_t rows,
                     int32_t num_vectors, int64_t dim) {
  const auto args = gram_args(new_vectors, old_vectors, gram, rows, num_vectors, dim);
  call(sidestep::cpu_difference_gram, args, sidestep::difference_gram_bytes(args));
}

void parareal_correct(uintptr_t boundary, uintptr_t fine, uintptr_t new_vectors,
                      uintptr_t old_vectors, uintptr_t coefficients, uintptr_t residual,
                      int64_t rows, int32_t num_registers, int64_t dim) {
  const auto args = correct_args(boundary, fine, new_vectors, old_vectors, coefficients, residual,
                                 rows, num_registers, dim);
  call(sidestep::cpu_parareal_correct, args, sidestep::parareal_correct_bytes(args));
}

void cuda_difference_gram(uintptr_t new_vectors, uintptr_t old_vectors, uintptr_t gram,
                          int64_t rows, int32_t num_vectors, int64_t dim, uintptr_t workspace,
                          uintptr_t stream) {
  const auto args = gram_args(new_vectors, old_vectors, gram, rows, num_vectors, dim);
  raise(sidestep::cuda_difference_gram(args, address<void>(workspace), address<void>(stream)));
}

void cuda_parareal_correct(uintptr_t boundary, uintptr_t fine, uintptr_t new_vectors,
                           uintptr_t old_vectors, uintptr_t coefficients, uintptr_t residual,
                           int64_t rows, int32_t num_registers, int64_t dim, uintptr_t workspace,
                           uintptr_t stream) {
  const auto args = correct_args(boundary, fine, new_vectors, old_vectors, coefficients, residual,
                                 rows, num_registers, dim);
  raise(sidestep::cuda_parareal_correct(args, address<void>(workspace), address<void>(stream)));
}

}  // namespace

void bind_parareal_kernels(pybind11::module_& m) {
  m.def("difference_gram", &difference_gram,
        "(new, old, gram, rows, V, D): inner products of the differences, on CPU addresses.");
  m.def("parareal_correct", &parareal_correct,
        "(boundary, fine, new, old, coefficients, residual, rows, R, D): the correction in place, "
        "on CPU addresses.");
  m.def("cuda_difference_gram", &cuda_difference_gram,
        "(..., workspace, stream): the same on device addresses.");
  m.def("cuda_parareal_correct", &cuda_parareal_correct,
        "(..., workspace, stream): the same on device addresses.");
  m.def("cuda_difference_gram_workspace", &sidestep::cuda_difference_gram_workspace,
        "(rows, D, V): bytes of the workspace, of any content.");
  m.def("cuda_parareal_correct_workspace", &sidestep::cuda_parareal_correct_workspace,
        "(rows, D): bytes of the workspace, of any content.");
}
