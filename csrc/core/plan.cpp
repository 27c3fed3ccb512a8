// Reading a plan, and its line in a coefficient table: see plan.h.
#include "core/plan.h"

#include <algorithm>
#include <cfloat>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "core/json_text.h"
#include "core/sha256.h"
#include "core/table.h"

namespace sidestep {
namespace {

constexpr const char* kFormat = "sidestep-plan-1";
// The arrays of a plan, in the order of its digest.
constexpr const char* kArrays[] = {"matrices", "timesteps", "input_scales", "draws",
                                   "errors",   "log_snr",   "data_maps"};

// What float.hex() writes of a number above 0 that is finite, and nothing else.
bool read_hex(const std::string& text, double* value) {
  unsigned long long fraction = 0;
  int leading = 0;
  int exponent = 0;
  int used = 0;
  char again[64];
  if (text.size() < 20 || text.size() > 23 || text[17] != 'p' ||
      std::sscanf(text.c_str(), "0x%1d.%13llxp%d%n", &leading, &fraction, &exponent, &used) != 3) {
    return false;
  }
  std::snprintf(again, sizeof(again), "0x%d.%013llxp%+d", leading, fraction, exponent);
  if (text != again || leading > 1 || exponent < -1022 || exponent > 1023) return false;
  if (leading == 0 && exponent != -1022) return false;
  const double mantissa = std::ldexp(static_cast<double>(fraction), -52) + leading;
  *value = std::ldexp(mantissa, exponent);
  return *value > 0;
}

// As Python writes a tuple.
std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (const int64_t length : shape) text += std::to_string(length) + ", ";
  if (!shape.empty()) text.resize(text.size() - (shape.size() == 1 ? 1 : 2));
  return text + ")";
}

std::string digest_of(const SafeTensors& file, const std::string& head) {
  Sha256 digest;
  digest.update(head);
  for (const char* key : kArrays) {
    const auto found = file.tensors.find(key);
    if (found == file.tensors.end()) {
      digest.update("-", 1);
      continue;
    }
    digest.update(shape_text(found->second.shape));
    digest.update(found->second.data, found->second.count * sizeof(double));
  }
  return digest.hexadecimal();
}

Status wrong_shape(const char* key, const SafeTensor& tensor, const std::string& expected) {
  return invalid_argument("%s has shape %s and dtype %s, expected %s", key,
                          shape_text(tensor.shape).c_str(), tensor.dtype.c_str(), expected.c_str());
}

// The engine computes in fp32: what is finite here alone would be infinite there.
bool fits(double value) { return std::fabs(value) <= FLT_MAX; }

Status does_not_fit(const char* key, double value, int64_t step) {
  return invalid_argument("%s is %g at step %" PRId64 ", expected a number that fits in fp32", key,
                          value, step);
}

}  // namespace

std::string python_ascii(const std::string& text) {
  const bool single = text.find('\'') != std::string::npos;
  const char quote = single && text.find('"') == std::string::npos ? '"' : '\'';
  std::string written(1, quote);
  for (size_t at = 0; at < text.size();) {
    uint32_t code = 0;
    if (!next_utf8(text, &at, &code)) break;
    char escaped[16];
    if (code == '\\' || code == static_cast<uint32_t>(quote)) {
      std::snprintf(escaped, sizeof(escaped), "\\%c", static_cast<char>(code));
    } else if (code == '\t' || code == '\n' || code == '\r') {
      const char letter = code == '\t' ? 't' : code == '\n' ? 'n' : 'r';
      std::snprintf(escaped, sizeof(escaped), "\\%c", letter);
    } else if (code >= 0x20 && code < 0x7f) {
      std::snprintf(escaped, sizeof(escaped), "%c", static_cast<char>(code));
    } else {
      const char* format = code < 0x100 ? "\\x%02x" : code < 0x10000 ? "\\u%04x" : "\\U%08x";
      std::snprintf(escaped, sizeof(escaped), format, code);
    }
    written += escaped;
  }
  return written + quote;
}

Status Plan::read(const uint8_t* data, int64_t size, std::shared_ptr<const Plan>* plan) {
  SafeTensors file;
  auto made = std::make_shared<Plan>();
  Status status = read_safetensors(data, size, &file);
  if (status.ok()) status = made->take(file);
  if (!status.ok()) return Status(status.code(), "plan: " + status.message());
  *plan = std::move(made);
  return status;
}

Status Plan::take(const SafeTensors& file) {
  std::string head;
  Status status = take_metadata(file, &head);
  if (!status.ok()) return status;
  for (const auto& [key, tensor] : file.tensors) {
    const auto* end = std::end(kArrays);
    if (std::find(std::begin(kArrays), end, key) == end || key == "data_maps") {
      return invalid_argument("it holds the array %.64s, which no plan without a threshold has",
                              key.c_str());
    }
  }
  const auto matrices = file.tensors.find("matrices");
  if (matrices == file.tensors.end()) return invalid_argument("it holds no matrices");
  std::vector<double> log_snr;
  status = take_matrices(matrices->second);
  if (status.ok()) status = take_column(file, "timesteps", 0, &timesteps_);
  if (status.ok()) status = take_column(file, "input_scales", 0, &input_scales_);
  if (status.ok() && file.tensors.count("errors") > 0) {
    status = take_column(file, "errors", columns_, &errors_);
  }
  if (status.ok() && file.tensors.count("log_snr") > 0) {
    status = take_column(file, "log_snr", 0, &log_snr);
  }
  if (status.ok()) status = take_draws(file);
  if (status.ok()) status = find_draws();
  if (!status.ok()) return status;
  if (digest_of(file, head) == digest_) return status;
  return invalid_argument("it was altered, its digest does not match its contents");
}

Status Plan::take_metadata(const SafeTensors& file, std::string* head) {
  const auto text = [&file](const char* key) {
    const auto found = file.metadata.find(key);
    return found == file.metadata.end() ? std::string() : found->second;
  };
  if (text("format") != kFormat) {
    return invalid_argument("its format is '%.64s', expected '%s'", text("format").c_str(),
                            kFormat);
  }
  if (text("threshold") != "null") {
    return invalid_argument("it has dynamic thresholding, expected a plan that is a table");
  }
  name_ = text("name");
  digest_ = text("digest");
  const std::string scale = text("initial_scale");
  if (name_.find('\0') != std::string::npos) {
    return invalid_argument("its name has a zero in it, expected a text");
  }
  if (!read_hex(scale, &initial_scale_)) {
    return invalid_argument("its initial_scale is '%.64s', expected a finite number above 0",
                            scale.c_str());
  }
  *head = "(" + python_ascii(name_) + ", '" + scale + "', None)";
  return Status();
}

Status Plan::take_matrices(const SafeTensor& tensor) {
  const auto& shape = tensor.shape;
  const bool right = tensor.dtype == "F64" && shape.size() == 3 && shape[0] <= SIDESTEP_MAX_STEPS &&
                     shape[1] >= 1 && shape[1] <= kMaxRegisters && shape[2] > shape[1] &&
                     shape[2] <= shape[1] + 1 + SIDESTEP_MAX_NOISE_COLUMNS;
  if (!right) {
    return wrong_shape("matrices", tensor,
                       "F64 [K, R, R + 1 + J] with K up to 1048576, R 1 to 6 and J up to 64");
  }
  steps_ = shape[0];
  registers_ = static_cast<int>(shape[1]);
  columns_ = shape[2];
  matrices_.resize(tensor.count);
  if (tensor.count > 0) std::memcpy(matrices_.data(), tensor.data, tensor.count * sizeof(double));
  const auto strange = std::find_if_not(matrices_.begin(), matrices_.end(), fits);
  if (strange == matrices_.end()) return Status();
  const int64_t step = (strange - matrices_.begin()) / (registers_ * columns_);
  return does_not_fit("matrices", *strange, step);
}

// [K], or [K, width]; log_snr alone may be infinite.
Status Plan::take_column(const SafeTensors& file, const char* key, int64_t width,
                         std::vector<double>* values) {
  const auto found = file.tensors.find(key);
  if (found == file.tensors.end()) return invalid_argument("it holds no %s", key);
  const SafeTensor& tensor = found->second;
  std::vector<int64_t> shape{steps_};
  if (width > 0) shape.push_back(width);
  if (tensor.dtype != "F64" || tensor.shape != shape) {
    return wrong_shape(key, tensor, "F64 " + shape_text(shape));
  }
  values->resize(tensor.count);
  if (tensor.count > 0) std::memcpy(values->data(), tensor.data, tensor.count * sizeof(double));
  for (size_t i = 0; i < values->size() && std::strcmp(key, "log_snr") != 0; ++i) {
    if (fits((*values)[i])) continue;
    return does_not_fit(key, (*values)[i], static_cast<int64_t>(i) / std::max<int64_t>(width, 1));
  }
  return Status();
}

Status Plan::take_draws(const SafeTensors& file) {
  const auto found = file.tensors.find("draws");
  if (found == file.tensors.end()) return invalid_argument("it holds no draws");
  const SafeTensor& tensor = found->second;
  if (tensor.dtype != "I64" || tensor.shape != std::vector<int64_t>{steps_}) {
    return wrong_shape("draws", tensor, "I64 " + shape_text({steps_}));
  }
  draws_.resize(steps_);
  if (steps_ > 0) std::memcpy(draws_.data(), tensor.data, steps_ * sizeof(int64_t));
  for (int64_t k = 0; k < steps_; ++k) {
    if (draws_[k] >= 0 && draws_[k] <= noise_columns()) continue;
    return invalid_argument("draws is %" PRId64 " at step %" PRId64 ", expected 0 to %" PRId64,
                            draws_[k], k, noise_columns());
  }
  return Status();
}

// The one draw of each step that its matrix multiplies by something.
Status Plan::find_draws() {
  used_draws_.assign(steps_, -1);
  for (int64_t k = 0; k < steps_; ++k) {
    for (int64_t j = 0; j < draws_[k]; ++j) {
      bool used = false;
      for (int line = 0; line < registers_; ++line) {
        used = used || coefficient(k, line, registers_ + 1 + j) != 0.0;
      }
      if (used && used_draws_[k] >= 0) {
        return invalid_argument("step %" PRId64 " uses 2 noise draws or more, expected 1", k);
      }
      if (used) used_draws_[k] = j;
    }
  }
  return Status();
}

bool Plan::stochastic() const {
  return std::any_of(used_draws_.begin(), used_draws_.end(),
                     [](int64_t draw) { return draw >= 0; });
}

double Plan::coefficient(int64_t step, int line, int64_t column) const {
  if (line < registers_) return matrices_[(step * registers_ + line) * columns_ + column];
  return errors_.empty() ? 0.0 : errors_[step * columns_ + column];
}

void Plan::write_line(int64_t step, int registers, float* line) const {
  const int columns = table_columns(registers);
  std::fill(line, line + table_width(registers), 0.0f);
  for (int i = registers_; i < registers; ++i) line[i * columns + i] = 1.0f;
  for (int own = 0; own <= registers_; ++own) {
    float* to = line + (own < registers_ ? own : registers) * columns;
    for (int j = 0; j < registers_; ++j) to[j] = static_cast<float>(coefficient(step, own, j));
    to[registers] = static_cast<float>(coefficient(step, own, registers_));
    if (used_draws_[step] < 0) continue;
    const int64_t z = registers_ + 1 + used_draws_[step];
    to[registers + 1] = static_cast<float>(coefficient(step, own, z));
  }
  const bool last = step + 1 == steps_;
  line[table_width(registers) - 1] = last ? 1.0f : static_cast<float>(input_scales_[step + 1]);
}

}  // namespace sidestep
