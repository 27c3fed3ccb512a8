// As much of JSON as the header of a safetensors file has: objects, arrays of whole numbers, texts.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/status.h"

namespace sidestep {

// UTF-8 of a code point that is no surrogate.
void append_utf8(uint32_t code, std::string* text);

// Decodes the character at text[*at], and moves *at behind it; false where it is no valid UTF-8.
bool next_utf8(const std::string& text, size_t* at, uint32_t* code);

// A place in a text that is read once, from left to right. A failed call leaves it there.
class JsonText {
 public:
  explicit JsonText(std::string text) : text_(std::move(text)) {}

  // Takes the character if it comes next, after white space.
  bool take(char wanted);
  Status expect(char wanted);
  Status string(std::string* value);
  Status whole_number(int64_t* value);  // 0 or more
  Status whole_numbers(std::vector<int64_t>* values, size_t most);
  bool ended();

  // member(key) reads the value of each member of an object.
  template <typename Member>
  Status object(Member member) {
    Status status = expect('{');
    if (!status.ok() || take('}')) return status;
    do {
      std::string key;
      status = string(&key);
      if (status.ok()) status = expect(':');
      if (status.ok()) status = member(key);
      if (!status.ok()) return status;
    } while (take(','));
    return expect('}');
  }

  Status wrong(const char* expected) const;

 private:
  void skip_space();
  bool escape(std::string* value);
  bool hexadecimal(uint32_t* code);

  std::string text_;
  size_t at_ = 0;
};

}  // namespace sidestep
