// Checks every argument of the exit operators before anything is touched.
#include <cinttypes>
#include <vector>

#include "kernels/exit_compact.h"
#include "kernels/ranges.h"

namespace sidestep {
namespace {

constexpr int64_t kIndex = sizeof(int64_t);

// Value number i is in [0, end), and none before it was the same.
Status check_new(const char* operation, const char* name, int64_t i, int64_t value, int64_t end,
                 std::vector<char>* seen) {
  if (value < 0 || value >= end) {
    return invalid_argument("%s: %s[%" PRId64 "] is %" PRId64 ", expected 0 <= %s < %" PRId64,
                            operation, name, i, value, name, end);
  }
  if ((*seen)[value] != 0) {
    return invalid_argument("%s: %s holds %" PRId64 " twice, expected every one once", operation,
                            name, value);
  }
  (*seen)[value] = 1;
  return Status();
}

}  // namespace

Status check_exit_decide(const ExitDecideArgs& a) {
  if (a.rows < 0) {
    return invalid_argument("exit_decide: rows = %" PRId64 ", expected none below 0", a.rows);
  }
  const Range ranges[] = {
      {"order", a.order, a.rows * kIndex, true, false},
      {"kept", a.kept, kIndex, true, false},
      {"score", a.score, a.rows * 4, false, false},
      {"limit", a.limit, a.rows * 4, false, false},
      {"group", a.group, a.rows * kIndex, false, true},
  };
  return check_ranges("exit_decide", ranges, 5);
}

Status check_exit_decide_values(const ExitDecideArgs& a) {
  for (int64_t r = 0; a.group != nullptr && r < a.rows; ++r) {
    if (a.group[r] < 0 || a.group[r] >= a.rows) {
      return invalid_argument("exit_decide: group[%" PRId64 "] is %" PRId64
                              ", expected 0 <= group < %" PRId64,
                              r, a.group[r], a.rows);
    }
  }
  return Status();
}

Status check_exit_compact(const ExitCompactArgs& a) {
  if (a.rows < 0 || a.places < 0 || a.row_bytes < 0) {
    return invalid_argument("exit_compact_: rows = %" PRId64 ", places = %" PRId64
                            ", bytes of a row = %" PRId64 ", expected none below 0",
                            a.rows, a.places, a.row_bytes);
  }
  const Range ranges[] = {
      {"hidden", a.hidden, a.rows * a.row_bytes, true, false},
      {"out", a.out, a.places * a.row_bytes, true, false},
      {"order", a.order, a.rows * kIndex, false, false},
      {"kept", a.kept, kIndex, false, false},
      {"place", a.place, a.rows * kIndex, false, false},
  };
  return check_ranges("exit_compact_", ranges, 5);
}

Status check_exit_compact_values(const ExitCompactArgs& a) {
  const int64_t kept = *a.kept;
  if (kept < 0 || kept > a.rows) {
    return invalid_argument("exit_compact_: kept is %" PRId64 ", expected 0 <= kept <= %" PRId64,
                            kept, a.rows);
  }
  thread_local std::vector<char> rows;
  thread_local std::vector<char> places;
  rows.assign(a.rows, 0);
  places.assign(a.places, 0);
  for (int64_t p = 0; p < a.rows; ++p) {
    const int64_t r = a.order[p];
    const Status row = check_new("exit_compact_", "order", p, r, a.rows, &rows);
    if (!row.ok()) return row;
    if (p < kept && r != p && r < kept) {
      return invalid_argument("exit_compact_: order[%" PRId64 "] is %" PRId64 ", expected %" PRId64
                              " or one from kept = %" PRId64 " on",
                              p, r, p, kept);
    }
    if (p < kept) continue;
    const Status place = check_new("exit_compact_", "place", r, a.place[r], a.places, &places);
    if (!place.ok()) return place;
  }
  return Status();
}

int64_t cuda_exit_decide_workspace(int64_t rows) { return rows * 4; }

int64_t exit_decide_bytes(const ExitDecideArgs& a) { return a.rows * (8 + 3 * kIndex); }

// Every row read and written once, or half of them twice.
int64_t exit_compact_bytes(const ExitCompactArgs& a) { return a.rows * a.row_bytes * 2; }

}  // namespace sidestep
