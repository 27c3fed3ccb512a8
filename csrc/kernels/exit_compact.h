// Who leaves the network, and the moves that make the batch as small as those who stay.
//
// A row leaves if it and all rows of its group (a guidance pair) have score <= limit. With n rows,
// of which `kept` stay:
//
//   order[kept:]   the rows that leave, ascending
//   order[p]       for p < kept, the row that moves to position p: p itself if it stays; the holes,
//                  ascending, take the rows from position kept on that stay, ascending
//
// So a row that stays below `kept` is not touched, and the moves are one copy into its place of the
// output per leaving row, and one into its hole where it leaves one: min(kept, n - kept) at most.
// Every move is its leaving row's own, so all of them may run at once.
#pragma once

#include <cstdint>

#include "core/status.h"

namespace sidestep {

struct ExitDecideArgs {
  const float* score;    // [rows]
  const float* limit;    // [rows]
  const int64_t* group;  // [rows] in 0..rows-1, or null: every row for itself
  int64_t* order;        // [rows] written
  int64_t* kept;         // [1] written
  int64_t rows;
};

struct ExitCompactArgs {
  void* hidden;          // [rows, row_bytes]: the first `kept` become those who stay
  void* out;             // [places, row_bytes]: out[place[r]] = hidden[r] for every r that leaves
  const int64_t* order;  // [rows]
  const int64_t* kept;   // [1]
  const int64_t* place;  // [rows]
  int64_t rows;
  int64_t places;
  int64_t row_bytes;
};

// Sizes, null pointers and overlap; then the values, in host memory only.
Status check_exit_decide(const ExitDecideArgs& args);
Status check_exit_decide_values(const ExitDecideArgs& args);
Status check_exit_compact(const ExitCompactArgs& args);
Status check_exit_compact_values(const ExitCompactArgs& args);

Status cpu_exit_decide(const ExitDecideArgs& args);
Status cpu_exit_compact(const ExitCompactArgs& args);

// On the current device: no value is checked. A row whose group is out of range stays; one whose
// own number or place is, is not moved. The workspace may hold anything.
Status cuda_exit_decide(const ExitDecideArgs& args, void* workspace, void* stream);
Status cuda_exit_compact(const ExitCompactArgs& args, void* stream);
int64_t cuda_exit_decide_workspace(int64_t rows);

// Bytes a call moves at most.
int64_t exit_decide_bytes(const ExitDecideArgs& args);
int64_t exit_compact_bytes(const ExitCompactArgs& args);

}  // namespace sidestep
