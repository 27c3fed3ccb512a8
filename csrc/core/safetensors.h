// Reads the container of a plan file: safetensors, a JSON header before raw little-endian arrays.
//
//   8 bytes   N, the size of the header
//   N bytes   {"__metadata__": {text: text, ...}, name: {"dtype": "F64", "shape": [..],
//             "data_offsets": [begin, end]}, ...}, then spaces
//   the rest  the arrays, one after another without gaps
//
// Whatever the bytes are, nothing outside of them is read and little is allocated for them.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/status.h"

namespace sidestep {

struct SafeTensor {
  std::string dtype;  // "F64" or "I64"
  std::vector<int64_t> shape;
  int64_t count = 0;  // elements
  const uint8_t* data = nullptr;
};

struct SafeTensors {
  std::map<std::string, std::string> metadata;  // UTF-8
  std::map<std::string, SafeTensor> tensors;
};

// The arrays point into `data`.
Status read_safetensors(const uint8_t* data, int64_t size, SafeTensors* file);

}  // namespace sidestep
