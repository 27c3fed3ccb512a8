// The CPU launchers of the exit operators.
#include "kernels/exit_compact.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/thread_pool.h"
#include "kernels/launch.h"

namespace sidestep {
namespace {

constexpr int64_t kPieceBytes = int64_t{64} << 10;  // the unit of threading

struct Work {
  const ExitCompactArgs* args;
  int64_t chunks;  // of a row
};

// Pieces [begin, end) of the leaving rows x chunks grid, row-major.
void run_pieces(void* context, int64_t begin, int64_t end) {
  const Work& work = *static_cast<const Work*>(context);
  const ExitCompactArgs& args = *work.args;
  const int64_t kept = *args.kept;
  auto* hidden = static_cast<char*>(args.hidden);
  auto* out = static_cast<char*>(args.out);
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t r = args.order[kept + piece / work.chunks];
    const int64_t at = piece % work.chunks * kPieceBytes;
    const auto bytes = static_cast<size_t>(std::min(kPieceBytes, args.row_bytes - at));
    char* row = hidden + r * args.row_bytes + at;
    std::memcpy(out + args.place[r] * args.row_bytes + at, row, bytes);
    if (r < kept) std::memcpy(row, hidden + args.order[r] * args.row_bytes + at, bytes);
  }
}

}  // namespace

Status cpu_exit_decide(const ExitDecideArgs& args) {
  const Status sizes = check_exit_decide(args);
  if (!sizes.ok()) return sizes;
  const Status values = check_exit_decide_values(args);
  if (!values.ok()) return values;
  thread_local std::vector<char> stays;  // of groups; grows once and stays
  stays.assign(args.rows, 0);
  const auto group = [&](int64_t r) { return args.group != nullptr ? args.group[r] : r; };
  for (int64_t r = 0; r < args.rows; ++r) {
    if (!(args.score[r] <= args.limit[r])) stays[group(r)] = 1;  // NaN stays
  }
  int64_t kept = 0;
  for (int64_t r = 0; r < args.rows; ++r) kept += stays[group(r)];
  int64_t leaving = kept;
  for (int64_t r = 0; r < args.rows; ++r) {
    if (stays[group(r)] == 0) args.order[leaving++] = r;
  }
  int64_t hole = kept;  // in order, whose first leaving rows are the holes
  for (int64_t r = 0; r < args.rows; ++r) {
    if (stays[group(r)] != 0) args.order[r < kept ? r : args.order[hole++]] = r;
  }
  *args.kept = kept;
  return Status();
}

Status cpu_exit_compact(const ExitCompactArgs& args) {
  const Status sizes = check_exit_compact(args);
  if (!sizes.ok()) return sizes;
  const Status values = check_exit_compact_values(args);
  if (!values.ok()) return values;
  Work work{&args, (args.row_bytes + kPieceBytes - 1) / kPieceBytes};
  const int64_t pieces = (args.rows - *args.kept) * work.chunks;
  const int threads = exit_compact_bytes(args) < kParallelBytes ? 1 : num_threads();
  const int64_t grain = std::max<int64_t>(1, pieces / (int64_t{16} * threads));
  ThreadPool::instance().parallel_for(pieces, grain, threads, run_pieces, &work);
  return Status();
}

}  // namespace sidestep
