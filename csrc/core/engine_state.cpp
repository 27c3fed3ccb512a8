// The arrays of an engine: see engine_state.h.
#include "core/engine_state.h"

#include <algorithm>
#include <cinttypes>

#include "core/table.h"
#include "kernels/launch.h"

namespace sidestep {
namespace {

constexpr int64_t kMostRows = int64_t{1} << 20;
constexpr int64_t kMostDim = int64_t{1} << 32;
constexpr int64_t kMostLines = int64_t{1} << 24;
constexpr int64_t kMostBytes = int64_t{1} << 46;

Status check_size(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return Status();
  return invalid_argument("engine: %s is %" PRId64 ", expected %" PRId64 " to %" PRId64, name,
                          value, least, most);
}

int64_t rounded(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

Status EngineState::check(const sidestep_engine_options& options) {
  const struct {
    const char* name;
    int64_t value, least, most;
  } sizes[] = {
      {"dim", options.dim, 1, kMostDim},
      {"capacity", options.capacity, 1, kMostRows},
      {"table_steps", options.table_steps, 1, kMostLines},
      {"num_registers", options.num_registers, 1, kMaxRegisters},
      {"num_branches", options.num_branches, 1, kMaxBranches},
      {"dtype", options.dtype, SIDESTEP_FLOAT32, SIDESTEP_BFLOAT16},
      {"device", options.device, SIDESTEP_CPU, SIDESTEP_CUDA},
      {"skips", options.skips, 0, 1},
  };
  for (const auto& size : sizes) {
    const Status status = check_size(size.name, size.value, size.least, size.most);
    if (!status.ok()) return status;
  }
  const int64_t row = options.dim * 4 * (options.num_registers + 1 + options.num_branches);
  return check_size("capacity times the bytes of a row", options.capacity * (row >> 20), 0,
                    kMostBytes >> 20);
}

int64_t EngineState::bytes(const sidestep_engine_options& o) {
  const int64_t element = o.dtype == SIDESTEP_FLOAT32 ? 4 : 2;
  const int64_t branches = o.num_branches;
  return rounded(o.capacity * o.num_registers * o.dim * 4) + rounded(o.capacity * o.dim * 4) +
         rounded(o.skips != 0 ? branches * o.capacity * o.dim * element : 0) +
         rounded(o.capacity * 2 * 4) + 2 * rounded(o.capacity * branches * 4) +
         rounded(2 * o.capacity * 8) + rounded(PlanTable::bytes(o.num_registers, o.table_steps)) +
         rounded(cuda_solver_step_workspace(o.capacity, o.dim));
}

EngineState::EngineState(const sidestep_engine_options& options)
    : dim_(options.dim),
      capacity_(options.capacity),
      branches_(options.num_branches),
      registers_(options.num_registers),
      dtype_(options.dtype),
      device_(options.device),
      skips_(options.skips != 0),
      element_(options.dtype == SIDESTEP_FLOAT32 ? 4 : 2),
      table_(options.num_registers, options.table_steps),
      host_weights_(capacity_ * branches_),
      host_lines_(2 * capacity_),
      host_stats_(2 * capacity_) {}

EngineState::~EngineState() {
  if (owned_ != nullptr) memory_->release(owned_);
}

Status EngineState::allocate(const sidestep_engine_options& options) {
  const int64_t needed = bytes(options);
  if (device_ == SIDESTEP_CUDA) {
    const Status status = cuda_memory(&memory_);
    if (!status.ok()) return status;
  } else {
    memory_ = host_memory();
  }
  char* at = static_cast<char*>(options.memory);
  if (at == nullptr) {
    const Status status = memory_->allocate(needed, &owned_);
    if (!status.ok()) return status;
    at = static_cast<char*>(owned_);
  } else if (reinterpret_cast<uintptr_t>(at) % kAlignment != 0 || options.memory_bytes < needed) {
    return invalid_argument("engine: memory is %p of %" PRId64 " bytes, expected %" PRId64
                            " bytes at an address divisible by %" PRId64,
                            options.memory, options.memory_bytes, needed, kAlignment);
  }
  const auto take = [&at](int64_t bytes) {
    void* part = at;
    at += rounded(bytes);
    return part;
  };
  registers_at_ = static_cast<float*>(take(capacity_ * registers_ * dim_ * 4));
  noise_ = static_cast<float*>(take(capacity_ * dim_ * 4));
  kept_ = static_cast<char*>(take(skips_ ? branches_ * capacity_ * dim_ * element_ : 0));
  stats_ = static_cast<float*>(take(capacity_ * 2 * 4));
  zeros_ = static_cast<float*>(take(capacity_ * branches_ * 4));
  weights_ = static_cast<float*>(take(capacity_ * branches_ * 4));
  lines_ = static_cast<int64_t*>(take(2 * capacity_ * 8));
  table_.place(static_cast<float*>(take(PlanTable::bytes(registers_, table_.steps()))));
  const int64_t workspace = cuda_solver_step_workspace(capacity_, dim_);
  workspace_ = take(workspace);
  if (owned_ != nullptr) return Status();
  Status status = memory_->clear(zeros_, capacity_ * branches_ * 4);
  if (status.ok()) status = memory_->clear(workspace_, workspace);
  if (!status.ok()) return status;
  return memory_->download(host_stats_.data(), stats_, 4);  // waits until they are
}

Status EngineState::begin(int64_t slot, const float* latent) {
  float* registers = registers_at_ + slot * registers_ * dim_;
  Status status = memory_->clear(registers + dim_, (registers_ - 1) * dim_ * 4);
  if (status.ok()) status = memory_->copy(registers, latent, dim_ * 4);
  return status;
}

Status EngineState::finish(int64_t slot, float* latent) {
  return memory_->copy(latent, registers_at_ + slot * registers_ * dim_, dim_ * 4);
}

Status EngineState::gather(const std::vector<GatheredRow>& rows, int64_t size, void* x) {
  const auto count = static_cast<int64_t>(rows.size());
  for (int64_t i = 0; i < count; ++i) {
    host_lines_[i] = rows[i].line;
    host_lines_[count + i] = rows[i].slot;
  }
  Status status = memory_->upload(lines_, host_lines_.data(), 2 * count * 8);
  int64_t done = 0;
  int64_t live = count;
  for (int64_t branch = 0; branch < rows.front().branches && status.ok();) {
    while (rows[live - 1].branches <= branch) --live;
    const int64_t together = rows[live - 1].branches - branch;  // branches of the same rows
    auto args = arguments(table_.inputs(), 0, live, together);
    args.weights = zeros_;
    for (int64_t g = 0; g < together; ++g) args.outputs[g] = noise_;  // of weight 0: not read
    args.slot = lines_ + count;
    args.model_input = const_cast<char*>(element(x, done));
    status = memory_->step(args, workspace_);
    done += live * together;
    branch += together;
  }
  for (; done < size && status.ok(); ++done) {
    status = memory_->copy(const_cast<char*>(element(x, done)), x, dim_ * element_);
  }
  return status;
}

Status EngineState::step(const std::vector<SteppingRow>& rows, const void* outputs) {
  Status status = upload_numbers(rows);
  const auto count = static_cast<int64_t>(rows.size());
  for (int64_t i = 0; i < count && status.ok(); ++i) {
    if (rows[i].noise != nullptr) {
      status = memory_->copy(noise_ + i * dim_, rows[i].noise, dim_ * 4);
    }
  }
  // A run has the same branches, and its outputs follow one another in memory: nothing is copied.
  const auto follows = [](const SteppingRow& row, const SteppingRow& next) {
    bool same = row.branches == next.branches;
    for (int64_t g = 0; g < row.branches; ++g) same = same && next.place[g] == row.place[g] + 1;
    return same;
  };
  for (int64_t first = 0, last = 1; last <= count && status.ok(); ++last) {
    if (last < count && follows(rows[last - 1], rows[last])) continue;
    status = step_run(rows, outputs, first, last);
    first = last;
  }
  return status;
}

Status EngineState::upload_numbers(const std::vector<SteppingRow>& rows) {
  const auto count = static_cast<int64_t>(rows.size());
  for (int64_t i = 0; i < count; ++i) {
    host_lines_[i] = rows[i].line;
    host_lines_[count + i] = rows[i].slot;
  }
  // Rows of one run have the same stride; runs begin at multiples of the largest.
  std::fill(host_weights_.begin(), host_weights_.begin() + count * branches_, 0.0f);
  for (int64_t i = 0, first = 0; i < count; ++i) {
    if (i > 0 && rows[i].branches != rows[i - 1].branches) first = i;
    float* of_row = host_weights_.data() + first * branches_ + (i - first) * rows[i].branches;
    std::copy(rows[i].guidance, rows[i].guidance + rows[i].branches, of_row);
  }
  Status status = memory_->upload(lines_, host_lines_.data(), 2 * count * 8);
  if (status.ok()) status = memory_->upload(weights_, host_weights_.data(), count * branches_ * 4);
  return status;
}

Status EngineState::step_run(const std::vector<SteppingRow>& rows, const void* outputs,
                             int64_t first, int64_t last) {
  const auto count = static_cast<int64_t>(rows.size());
  const int64_t branches = rows[first].branches;
  auto args = arguments(table_.coefficients(), first, last - first, branches);
  int64_t start = first;  // of the rows with as many branches
  while (start > 0 && rows[start - 1].branches == branches) --start;
  args.weights = weights_ + start * branches_ + (first - start) * branches;
  args.slot = lines_ + count + first;
  for (int64_t g = 0; g < branches; ++g) args.outputs[g] = element(outputs, rows[first].place[g]);
  const bool noise = std::any_of(rows.begin() + first, rows.begin() + last,
                                 [](const SteppingRow& row) { return row.noise != nullptr; });
  if (noise) args.noise = noise_ + first * dim_;
  return memory_->step(args, workspace_);
}

sidestep_solver_step_args EngineState::arguments(const float* table, int64_t first, int64_t rows,
                                                 int64_t branches) const {
  sidestep_solver_step_args args{};
  args.registers = registers_at_;
  args.table = table;
  args.step = lines_ + first;
  args.stats = stats_ + 2 * first;
  args.slots = capacity_;
  args.dim = dim_;
  args.rows = rows;
  args.steps = table_.steps();
  args.num_registers = registers_;
  args.num_branches = static_cast<int32_t>(branches);
  args.dtype = dtype_;
  return args;
}

Status EngineState::sizes(int64_t count, std::vector<float>* sizes) {
  const Status status = memory_->download(host_stats_.data(), stats_, 2 * count * 4);
  for (int64_t i = 0; i < count && status.ok(); ++i) (*sizes)[i] = host_stats_[2 * i];
  return status;
}

Status EngineState::keep(const SteppingRow& row, const void* outputs) {
  Status status;
  for (int64_t g = 0; g < row.branches && status.ok(); ++g) {
    char* to = kept_ + kept_place(row.slot, g) * dim_ * element_;
    status = memory_->copy(to, element(outputs, row.place[g]), dim_ * element_);
  }
  return status;
}

const char* EngineState::element(const void* array, int64_t line) const {
  return static_cast<const char*>(array) + line * dim_ * element_;
}

}  // namespace sidestep
