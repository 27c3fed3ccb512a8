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

class OnnxModel : public Model {
 public:
  OnnxModel(const std::string& library, const std::string& file, const Shape& shape)
      : api_(load_api(library)), shape_(shape) {
    OrtSessionOptions* options = nullptr;
    check(api_->CreateEnv(kOrtLoggingWarning, "sidestep", &env_));
    check(api_->CreateCpuMemoryInfo(kOrtArenaAllocator, kOrtMemoryDefault, &memory_));
    check(api_->CreateSessionOptions(&options));
    check(api_->SetIntraOpNumThreads(options, 1));
    OrtStatus* created = api_->CreateSession(env_, file.c_str(), options, &session_);
    api_->ReleaseSessionOptions(options);
    check(created);
  }

  ~OnnxModel() override {
    if (session_ != nullptr) api_->ReleaseSession(session_);
    if (memory_ != nullptr) api_->ReleaseMemoryInfo(memory_);
    if (env_ != nullptr) api_->ReleaseEnv(env_);
  }

  void run(int64_t n, float* x, float* t, float* text, float* u) const override {
    const auto& latent = shape_.latent;
    const int64_t of_x[] = {n, latent[0], latent[1], latent[2]};
    const int64_t of_text[] = {n, shape_.text[0], shape_.text[1]};
    OrtValue* values[] = {tensor(x, n * shape_.dim(), of_x, 4), tensor(t, n, of_x, 1),
                          tensor(text, n * shape_.text_size(), of_text, 3),
                          tensor(u, n * shape_.dim(), of_x, 4)};
    const char* inputs[] = {"x", "t", "text"};
    const char* outputs[] = {"u"};
    OrtStatus* ran = api_->Run(session_, nullptr, inputs, values, 3, outputs, 1, values + 3);
    for (OrtValue* value : values) api_->ReleaseValue(value);
    check(ran);
  }

 private:
  void check(OrtStatus* status) const {
    if (status == nullptr) return;
    const std::string why = api_->GetErrorMessage(status);
    api_->ReleaseStatus(status);
    throw std::runtime_error("ONNX Runtime: " + why);
  }

  OrtValue* tensor(float* data, int64_t count, const int64_t* shape, size_t dimensions) const {
    OrtValue* value = nullptr;
    check(api_->CreateTensorWithDataAsOrtValue(memory_, data, count * sizeof(float), shape,
                                               dimensions, kOrtFloat, &value));
    return value;
  }

  const OrtApi* api_;
  Shape shape_;
  OrtEnv* env_ = nullptr;
  OrtMemoryInfo* memory_ = nullptr;
  OrtSession* session_ = nullptr;
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
