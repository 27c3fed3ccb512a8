// The model's dtypes for one instruction set; included by *_block.h, like lanes.h.
#pragma once

#include "kernels/cpu/dtype.h"
#include "kernels/cpu/lanes.h"
#include "sidestep/sidestep.h"

namespace sidestep {
namespace SIDESTEP_ISA {
namespace {

typedef uint16_t HalfVec __attribute__((vector_size(2 * SIDESTEP_WIDTH)));

// ---- halves, one or kWidth at a time ----

SIDESTEP_HOST_DEVICE float widen_float16(uint16_t half) { return float16_to_float(half); }
SIDESTEP_HOST_DEVICE float widen_bfloat16(uint16_t half) { return bfloat16_to_float(half); }
SIDESTEP_HOST_DEVICE uint16_t narrow_float16(float value) { return float_to_float16(value); }
SIDESTEP_HOST_DEVICE uint16_t narrow_bfloat16(float value) { return float_to_bfloat16(value); }

#if SIDESTEP_WIDTH == 16 && defined(__AVX512F__)

SIDESTEP_HOST_DEVICE Vec widen_float16(HalfVec half) { return _mm512_cvtph_ps((__m256i)half); }
SIDESTEP_HOST_DEVICE HalfVec narrow_float16(Vec value) {
  return (HalfVec)_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
}
SIDESTEP_HOST_DEVICE WordVec widen_words(HalfVec half) {
  return (WordVec)_mm512_cvtepu16_epi32((__m256i)half);
}
SIDESTEP_HOST_DEVICE HalfVec narrow_words(WordVec word) {
  return (HalfVec)_mm512_cvtepi32_epi16((__m512i)word);
}

#elif SIDESTEP_WIDTH == 8 && defined(__AVX2__) && defined(__F16C__)

SIDESTEP_HOST_DEVICE Vec widen_float16(HalfVec half) { return _mm256_cvtph_ps((__m128i)half); }
SIDESTEP_HOST_DEVICE HalfVec narrow_float16(Vec value) {
  return (HalfVec)_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
}
SIDESTEP_HOST_DEVICE WordVec widen_words(HalfVec half) {
  return (WordVec)_mm256_cvtepu16_epi32((__m128i)half);
}
SIDESTEP_HOST_DEVICE HalfVec narrow_words(WordVec word) {
  const auto words = (__m256i)word;
  return (HalfVec)_mm_packus_epi32(_mm256_castsi256_si128(words),
                                   _mm256_extracti128_si256(words, 1));
}

#else  // any processor

SIDESTEP_HOST_DEVICE Vec widen_float16(HalfVec half) {
  Vec value;
  for (int i = 0; i < kWidth; ++i) value[i] = widen_float16(static_cast<uint16_t>(half[i]));
  return value;
}
SIDESTEP_HOST_DEVICE HalfVec narrow_float16(Vec value) {
  HalfVec half;
  for (int i = 0; i < kWidth; ++i) half[i] = narrow_float16(static_cast<float>(value[i]));
  return half;
}
SIDESTEP_HOST_DEVICE WordVec widen_words(HalfVec half) {
  return __builtin_convertvector(half, WordVec);
}
SIDESTEP_HOST_DEVICE HalfVec narrow_words(WordVec word) {
  return __builtin_convertvector(word, HalfVec);
}

#endif

SIDESTEP_HOST_DEVICE Vec widen_bfloat16(HalfVec half) { return (Vec)(widen_words(half) << 16); }
SIDESTEP_HOST_DEVICE HalfVec narrow_bfloat16(Vec value) {
  const auto bits = (WordVec)value;
  const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const auto quiet = (bits >> 16) | 0x40u;
  const auto nan = (WordVec)(value != value);
  return narrow_words((nan & quiet) | (~nan & rounded));
}

// ---- the model's tensors ----

template <typename V>
struct HalfOf {
  using type = HalfVec;
};
template <>
struct HalfOf<float> {
  using type = uint16_t;
};

// P vectors of a model output, from element i on, as fp32.
template <typename V, int P>
SIDESTEP_HOST_DEVICE void read_output(int32_t dtype, const char* output, int64_t i, V (&value)[P]) {
  using Half = typename HalfOf<V>::type;
  if (SIDESTEP_LIKELY(dtype == SIDESTEP_FLOAT32)) {
    const char* from = output + i * 4;
    SIDESTEP_UNROLL
    for (int p = 0; p < P; ++p) value[p] = load<V>(from + p * sizeof(V));
    return;
  }
  const char* from = output + i * 2;
  if (dtype == SIDESTEP_FLOAT16) {
    SIDESTEP_UNROLL
    for (int p = 0; p < P; ++p) value[p] = widen_float16(load<Half>(from + p * sizeof(Half)));
  } else {
    SIDESTEP_UNROLL
    for (int p = 0; p < P; ++p) value[p] = widen_bfloat16(load<Half>(from + p * sizeof(Half)));
  }
}

// P vectors into each of `count` model inputs, from element i on, rounded to nearest even.
template <typename V, int P>
SIDESTEP_HOST_DEVICE void write_inputs(int32_t dtype, char* const* inputs, int count, int64_t i,
                                       const V (&value)[P]) {
  if (SIDESTEP_LIKELY(dtype == SIDESTEP_FLOAT32)) {
    for (int g = 0; g < count; ++g) {
      SIDESTEP_UNROLL
      for (int p = 0; p < P; ++p) store(inputs[g] + i * 4 + p * sizeof(V), value[p]);
    }
    return;
  }
  using Half = typename HalfOf<V>::type;
  Half half[P];
  if (dtype == SIDESTEP_FLOAT16) {
    SIDESTEP_UNROLL
    for (int p = 0; p < P; ++p) half[p] = narrow_float16(value[p]);
  } else {
    SIDESTEP_UNROLL
    for (int p = 0; p < P; ++p) half[p] = narrow_bfloat16(value[p]);
  }
  for (int g = 0; g < count; ++g) {
    SIDESTEP_UNROLL
    for (int p = 0; p < P; ++p) store(inputs[g] + i * 2 + p * sizeof(Half), half[p]);
  }
}

}  // namespace
}  // namespace SIDESTEP_ISA
}  // namespace sidestep
