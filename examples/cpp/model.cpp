// A model run by ONNX Runtime on the CPU, and one that is a formula.
#include "model.h"

#include <dlfcn.h>

#include <stdexcept>

#include "onnx_runtime_abi.h"

namespace {

const OrtApi* load_api(const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) throw std::runtime_error(dlerror());
  const auto base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(handle, "OrtGetApiBase"));
  if (base == nullptr) throw std::runtime_error(library + " is not ONNX Runtime");
  const OrtApi* api = base()->GetApi(kOrtApiVersion);
  if (api == nullptr) throw std::runtime_error(library + " has no API of version 1");
  return api;
}

template <typename T>
using Owned = std::unique_ptr<T, void (*)(T*)>;

class OnnxModel : public Model {
 public:
  OnnxModel(const std::string& library, const std::string& file, const Shape& shape)
      : api_(load_api(library)),
        shape_(shape),
        env_(made(api_->ReleaseEnv, api_->CreateEnv, kOrtLoggingWarning, "sidestep")),
        memory_(made(api_->ReleaseMemoryInfo, api_->CreateCpuMemoryInfo, kOrtArenaAllocator,
                     kOrtMemoryDefault)),
        session_(open(file)) {}

  void run(int64_t n, float* x, float* t, float* text, float* u) const override {
    const auto& latent = shape_.latent;
    const int64_t of_x[] = {n, latent[0], latent[1], latent[2]};
    const int64_t of_text[] = {n, shape_.text[0], shape_.text[1]};
    const Owned<OrtValue> tensors[] = {tensor(x, n * shape_.dim(), of_x, 4), tensor(t, n, of_x, 1),
                                       tensor(text, n * shape_.text_size(), of_text, 3),
                                       tensor(u, n * shape_.dim(), of_x, 4)};
    const OrtValue* given[] = {tensors[0].get(), tensors[1].get(), tensors[2].get()};
    OrtValue* written[] = {tensors[3].get()};
    const char* inputs[] = {"x", "t", "text"};
    const char* outputs[] = {"u"};
    check(api_->Run(session_.get(), nullptr, inputs, given, 3, outputs, 1, written));
  }

 private:
  void check(OrtStatus* status) const {
    if (status == nullptr) return;
    const Owned<OrtStatus> owned(status, api_->ReleaseStatus);
    throw std::runtime_error(std::string("ONNX Runtime: ") + api_->GetErrorMessage(status));
  }

  // What one of the library's functions makes, with the function that ends it.
  template <typename T, typename Create, typename... Arguments>
  Owned<T> made(void (*release)(T*), Create create, Arguments... arguments) const {
    T* value = nullptr;
    check(create(arguments..., &value));
    return Owned<T>(value, release);
  }

  Owned<OrtSession> open(const std::string& file) const {
    const auto options = made(api_->ReleaseSessionOptions, api_->CreateSessionOptions);
    check(api_->SetIntraOpNumThreads(options.get(), 1));
    return made(api_->ReleaseSession, api_->CreateSession, env_.get(), file.c_str(), options.get());
  }

  Owned<OrtValue> tensor(float* data, int64_t count, const int64_t* shape,
                         size_t dimensions) const {
    return made(api_->ReleaseValue, api_->CreateTensorWithDataAsOrtValue, memory_.get(), data,
                count * sizeof(float), shape, dimensions, kOrtFloat);
  }

  const OrtApi* api_;
  Shape shape_;
  Owned<OrtEnv> env_;
  Owned<OrtMemoryInfo> memory_;
  Owned<OrtSession> session_;
};

class AnalyticModel : public Model {
 public:
  explicit AnalyticModel(const Shape& shape) : shape_(shape) {}

  void run(int64_t n, float* x, float* t, float* text, float* u) const override {
    for (int64_t i = 0; i < n; ++i) {
      const float offset = 0.001f * t[i] + text[i * shape_.text_size()];
      for (int64_t k = i * shape_.dim(); k < (i + 1) * shape_.dim(); ++k) {
        u[k] = 0.5f * x[k] + offset;
      }
    }
  }

 private:
  Shape shape_;
};

}  // namespace

std::unique_ptr<Model> onnx_model(const std::string& library, const std::string& file,
                                  const Shape& shape) {
  return std::make_unique<OnnxModel>(library, file, shape);
}

std::unique_ptr<Model> analytic_model(const Shape& shape) {
  return std::make_unique<AnalyticModel>(shape);
}
