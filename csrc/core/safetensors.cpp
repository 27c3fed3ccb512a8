// The container of a plan file: see safetensors.h.
#include "core/safetensors.h"

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <utility>

#include "core/json_text.h"

namespace sidestep {
namespace {

#if defined(__BYTE_ORDER__)
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the arrays of a file are little-endian");
#endif

constexpr int64_t kMostHeader = int64_t{1} << 20;
constexpr size_t kMostMembers = 64;
constexpr size_t kMostDimensions = 8;
constexpr int64_t kElement = 8;  // bytes: F64 and I64 are all that a plan has

using Offsets = std::pair<int64_t, int64_t>;

Status read_metadata(JsonText* header, SafeTensors* file) {
  return header->object([&](const std::string& key) {
    std::string value;
    const Status status = header->string(&value);
    if (!status.ok()) return status;
    if (file->metadata.size() == kMostMembers) return header->wrong("fewer members");
    return file->metadata.emplace(key, value).second ? Status() : header->wrong("each key once");
  });
}

Status read_tensor(JsonText* header, SafeTensor* tensor, std::vector<int64_t>* offsets) {
  bool dtype = false;
  bool shape = false;
  const Status status = header->object([&](const std::string& key) {
    if (key == "dtype" && !std::exchange(dtype, true)) return header->string(&tensor->dtype);
    if (key == "shape" && !std::exchange(shape, true)) {
      return header->whole_numbers(&tensor->shape, kMostDimensions);
    }
    if (key == "data_offsets" && offsets->empty()) return header->whole_numbers(offsets, 2);
    return header->wrong("dtype, shape and data_offsets, each once");
  });
  if (!status.ok()) return status;
  if (dtype && shape && offsets->size() == 2) return status;
  return header->wrong("dtype, shape and two data_offsets before it");
}

// Sizes, and the place of the array among the `size` bytes of all of them.
Status place(const std::string& name, const uint8_t* arrays, int64_t size, const Offsets& offsets,
             SafeTensor* tensor) {
  const char* text = name.c_str();
  if (tensor->dtype != "F64" && tensor->dtype != "I64") {
    return invalid_argument("%.64s has dtype %.16s, expected F64 or I64", text,
                            tensor->dtype.c_str());
  }
  tensor->count = 1;
  for (const int64_t length : tensor->shape) {
    if (length > 0 && tensor->count > size / kElement / length) {
      return invalid_argument("%.64s has more elements than the file has bytes for", text);
    }
    tensor->count *= length;
  }
  const auto [begin, end] = offsets;
  if (begin > end || end > size || end - begin != tensor->count * kElement) {
    return invalid_argument("%.64s has bytes %" PRId64 " to %" PRId64 " of %" PRId64
                            ", expected %" PRId64 " of them",
                            text, begin, end, size, tensor->count * kElement);
  }
  tensor->data = arrays + begin;
  return Status();
}

Status read_header(JsonText* header, const uint8_t* arrays, int64_t size, SafeTensors* file) {
  std::vector<Offsets> places;
  bool metadata = false;
  Status status = header->object([&](const std::string& key) {
    if (key == "__metadata__") {
      return std::exchange(metadata, true) ? header->wrong("each key once")
                                           : read_metadata(header, file);
    }
    SafeTensor tensor;
    std::vector<int64_t> offsets;
    Status of_tensor = read_tensor(header, &tensor, &offsets);
    if (!of_tensor.ok()) return of_tensor;
    if (places.size() == kMostMembers) return header->wrong("fewer members");
    places.emplace_back(offsets[0], offsets[1]);
    of_tensor = place(key, arrays, size, places.back(), &tensor);
    if (!of_tensor.ok()) return of_tensor;
    return file->tensors.emplace(key, tensor).second ? of_tensor : header->wrong("each key once");
  });
  if (!status.ok()) return status;
  if (!header->ended()) return header->wrong("its end");
  std::sort(places.begin(), places.end());
  int64_t end = 0;
  for (const Offsets& offsets : places) {
    if (offsets.first != end) {
      return invalid_argument("the arrays overlap or leave a gap at byte %" PRId64, end);
    }
    end = offsets.second;
  }
  if (end == size) return status;
  return invalid_argument("the arrays end at byte %" PRId64 " of %" PRId64, end, size);
}

}  // namespace

Status read_safetensors(const uint8_t* data, int64_t size, SafeTensors* file) {
  uint64_t length = 0;
  if (size >= 8) std::memcpy(&length, data, sizeof(length));
  if (size < 8 || length > static_cast<uint64_t>(size - 8)) {
    return invalid_argument("%" PRId64 " bytes are fewer than its header has", size);
  }
  if (length > static_cast<uint64_t>(kMostHeader)) {
    return invalid_argument("the header has %" PRIu64 " bytes, expected at most %" PRId64, length,
                            kMostHeader);
  }
  const auto end = static_cast<int64_t>(length) + 8;
  JsonText header(std::string(reinterpret_cast<const char*>(data) + 8, length));
  return read_header(&header, data + end, size - end, file);
}

}  // namespace sidestep
