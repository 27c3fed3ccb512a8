// The model that the server calls: any function from (x, t, text) to u, one line for each entry.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

struct Shape {
  int64_t latent[3] = {4, 16, 16};  // of one latent
  int64_t text[2] = {24, 192};      // tokens and features of one prompt

  int64_t dim() const { return latent[0] * latent[1] * latent[2]; }
  int64_t text_size() const { return text[0] * text[1]; }
};

class Model {
 public:
  virtual ~Model() = default;
  virtual void run(int64_t n, float* x,  // [n, dim]
                   float* t,             // [n]
                   float* text,          // [n, text_size]
                   float* u) const = 0;  // [n, dim] written
};

// An ONNX file with inputs x, t, text and output u, all fp32, by the library at `library`.
std::unique_ptr<Model> onnx_model(const std::string& library, const std::string& file,
                                  const Shape& shape);

// u = 0.5 x + 0.001 t + (the first number of text): for tests that compare bits.
std::unique_ptr<Model> analytic_model(const Shape& shape);
