// Texts, whole numbers and their containers: see json_text.h.
#include "core/json_text.h"

#include <cinttypes>

namespace sidestep {
namespace {

bool is_surrogate(uint32_t code) { return code >= 0xd800 && code < 0xe000; }

}  // namespace

void append_utf8(uint32_t code, std::string* text) {
  const auto put = [text](uint32_t byte) { text->push_back(static_cast<char>(byte)); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xc0 | code >> 6);
    put(0x80 | (code & 0x3f));
  } else if (code < 0x10000) {
    put(0xe0 | code >> 12);
    put(0x80 | (code >> 6 & 0x3f));
    put(0x80 | (code & 0x3f));
  } else {
    put(0xf0 | code >> 18);
    put(0x80 | (code >> 12 & 0x3f));
    put(0x80 | (code >> 6 & 0x3f));
    put(0x80 | (code & 0x3f));
  }
}

bool next_utf8(const std::string& text, size_t* at, uint32_t* code) {
  const auto byte = [&text](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t first = byte(*at);
  if (first < 0x80) {
    *code = first;
    ++*at;
    return true;
  }
  const int more = first >= 0xf0 ? 3 : first >= 0xe0 ? 2 : 1;
  const uint32_t least[] = {0, 0x80, 0x800, 0x10000};
  if (first < 0xc0 || first > 0xf7 || text.size() - *at <= static_cast<size_t>(more)) return false;
  uint32_t value = first & (0x3fu >> more);
  for (int i = 1; i <= more; ++i) {
    const uint8_t next = byte(*at + i);
    if ((next & 0xc0) != 0x80) return false;
    value = value << 6 | (next & 0x3fu);
  }
  if (value < least[more] || value > 0x10ffff || is_surrogate(value)) return false;
  *code = value;
  *at += more + 1;
  return true;
}

Status JsonText::wrong(const char* expected) const {
  return invalid_argument("the header is wrong at byte %" PRIu64 ", expected %s",
                          static_cast<uint64_t>(at_), expected);
}

void JsonText::skip_space() {
  while (at_ < text_.size() &&
         (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n' || text_[at_] == '\r')) {
    ++at_;
  }
}

bool JsonText::take(char wanted) {
  skip_space();
  if (at_ == text_.size() || text_[at_] != wanted) return false;
  ++at_;
  return true;
}

Status JsonText::expect(char wanted) {
  const char text[] = {'\'', wanted, '\'', 0};
  return take(wanted) ? Status() : wrong(text);
}

bool JsonText::ended() {
  skip_space();
  return at_ == text_.size();
}

Status JsonText::string(std::string* value) {
  value->clear();
  if (!take('"')) return wrong("a text");
  while (at_ < text_.size() && text_[at_] != '"') {
    if (text_[at_] == '\\') {
      if (!escape(value)) return wrong("a valid escape");
      continue;
    }
    const size_t begin = at_;
    uint32_t code = 0;
    if (static_cast<uint8_t>(text_[at_]) < 0x20 || !next_utf8(text_, &at_, &code)) {
      return wrong("valid UTF-8 without control characters");
    }
    value->append(text_, begin, at_ - begin);
  }
  return expect('"');
}

// At a backslash; a surrogate pair is one character.
bool JsonText::escape(std::string* value) {
  static const char kNames[] = "\"\\/bfnrt";
  static const char kValues[] = "\"\\/\b\f\n\r\t";
  if (text_.size() - at_ < 2) return false;
  const char name = text_[at_ + 1];
  for (int i = 0; kNames[i] != 0; ++i) {
    if (kNames[i] != name) continue;
    value->push_back(kValues[i]);
    at_ += 2;
    return true;
  }
  uint32_t code = 0;
  if (!hexadecimal(&code)) return false;
  if (is_surrogate(code)) {
    uint32_t low = 0;
    if (code >= 0xdc00 || !hexadecimal(&low) || low < 0xdc00 || low >= 0xe000) return false;
    code = 0x10000 + ((code & 0x3ff) << 10 | (low & 0x3ff));
  }
  append_utf8(code, value);
  return true;
}

// The four digits of \uXXXX.
bool JsonText::hexadecimal(uint32_t* code) {
  if (text_.size() - at_ < 6 || text_[at_] != '\\' || text_[at_ + 1] != 'u') return false;
  *code = 0;
  for (size_t i = at_ + 2; i < at_ + 6; ++i) {
    const char c = text_[i];
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                             : -1;
    if (digit < 0) return false;
    *code = *code << 4 | static_cast<uint32_t>(digit);
  }
  at_ += 6;
  return true;
}

Status JsonText::whole_number(int64_t* value) {
  skip_space();
  const size_t begin = at_;
  *value = 0;
  while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9' && at_ - begin < 18) {
    *value = *value * 10 + (text_[at_++] - '0');
  }
  const bool leading_zero = at_ - begin > 1 && text_[begin] == '0';
  return at_ == begin || leading_zero ? wrong("a whole number") : Status();
}

Status JsonText::whole_numbers(std::vector<int64_t>* values, size_t most) {
  values->clear();
  Status status = expect('[');
  if (!status.ok() || take(']')) return status;
  do {
    if (values->size() == most) return wrong("fewer numbers");
    int64_t value = 0;
    status = whole_number(&value);
    if (!status.ok()) return status;
    values->push_back(value);
  } while (take(','));
  return expect(']');
}

}  // namespace sidestep
