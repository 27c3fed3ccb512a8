// The exit operators on raw addresses.
#include "bindings/exits.h"

#include "bindings/call.h"

namespace {

void exit_score(uintptr_t hidden, uintptr_t probe, uintptr_t bias, uintptr_t score, int64_t rows,
                int64_t tokens, int64_t dim, int64_t row_stride, int64_t token_stride,
                int64_t probes, int32_t dtype, bool normalize, bool sigmoid, double eps) {
  sidestep::ExitScoreArgs args{};
  args.hidden = address<const void>(hidden);
  args.probe = address<const float>(probe);
  args.bias = address<const float>(bias);
  args.score = address<float>(score);
  args.row_stride = row_stride;
  args.token_stride = token_stride;
  args.rows = rows;
  args.tokens = tokens;
  args.dim = dim;
  args.probes = probes;
  args.eps = eps;
  args.dtype = dtype;
  args.normalize = normalize;
  args.sigmoid = sigmoid;
  call(sidestep::cpu_exit_score, args, sidestep::exit_score_bytes(args));
}

sidestep::ExitDecideArgs decide_args(uintptr_t score, uintptr_t limit, uintptr_t group,
                                     uintptr_t order, uintptr_t kept, int64_t rows) {
  sidestep::ExitDecideArgs args{};
  args.score = address<const float>(score);
  args.limit = address<const float>(limit);
  args.group = address<const int64_t>(group);
  args.order = address<int64_t>(order);
  args.kept = address<int64_t>(kept);
  args.rows = rows;
  return args;
}

sidestep::ExitCompactArgs compact_args(uintptr_t hidden, uintptr_t out, uintptr_t order,
                                       uintptr_t kept, uintptr_t place, int64_t rows,
                                       int64_t places, int64_t row_bytes) {
  sidestep::ExitCompactArgs args{};
  args.hidden = address<void>(hidden);
  args.out = address<void>(out);
  args.order = address<const int64_t>(order);
  args.kept = address<const int64_t>(kept);
  args.place = address<const int64_t>(place);
  args.rows = rows;
  args.places = places;
  args.row_bytes = row_bytes;
  return args;
}

void exit_decide(uintptr_t score, uintptr_t limit, uintptr_t group, uintptr_t order, uintptr_t kept,
                 int64_t rows) {
  const auto args = decide_args(score, limit, group, order, kept, rows);
  call(sidestep::cpu_exit_decide, args, sidestep::exit_decide_bytes(args));
}

void exit_compact(uintptr_t hidden, uintptr_t out, uintptr_t order, uintptr_t kept, uintptr_t place,
                  int64_t rows, int64_t places, int64_t row_bytes) {
  const auto args = compact_args(hidden, out, order, kept, place, rows, places, row_bytes);
  call(sidestep::cpu_exit_compact, args, sidestep::exit_compact_bytes(args));
}

void cuda_exit_decide(uintptr_t score, uintptr_t limit, uintptr_t group, uintptr_t order,
                      uintptr_t kept, int64_t rows, uintptr_t workspace, uintptr_t stream) {
  const auto args = decide_args(score, limit, group, order, kept, rows);
  raise(sidestep::cuda_exit_decide(args, address<void>(workspace), address<void>(stream)));
}

void cuda_exit_compact(uintptr_t hidden, uintptr_t out, uintptr_t order, uintptr_t kept,
                       uintptr_t place, int64_t rows, int64_t places, int64_t row_bytes,
                       uintptr_t stream) {
  const auto args = compact_args(hidden, out, order, kept, place, rows, places, row_bytes);
  raise(sidestep::cuda_exit_compact(args, address<void>(stream)));
}

}  // namespace

void bind_exits(pybind11::module_& m) {
  m.def("exit_score", &exit_score,
        "(hidden, probe, bias, score, rows, N, D, row_stride, token_stride, k, dtype, normalize, "
        "sigmoid, eps): probes of hidden states, on CPU addresses.");
  m.def("exit_decide", &exit_decide,
        "(score, limit, group, order, kept, rows): who leaves, on CPU addresses; 0 stands for "
        "None.");
  m.def("exit_compact", &exit_compact,
        "(hidden, out, order, kept, place, rows, places, bytes of a row): moves rows, on CPU "
        "addresses.");
  m.def("cuda_exit_decide", &cuda_exit_decide,
        "(..., workspace, stream): the same on device addresses.");
  m.def("cuda_exit_compact", &cuda_exit_compact, "(..., stream): the same on device addresses.");
  m.def("cuda_exit_decide_workspace", &sidestep::cuda_exit_decide_workspace,
        "(rows): bytes of the workspace, of any content.");
}
