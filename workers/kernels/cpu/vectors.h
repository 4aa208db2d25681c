// Sixteen numbers at a time on any instruction set: one AVX-512 register, two of AVX2, or four of 128 bits.
//
// Included by each level's file inside its own namespace and compiled with that level's flags; nothing here
// may be an inline function of the standard library, for the linker keeps one copy of those for all levels.
#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif
constexpr int parts = 16 / lanes;
#define EACH_PART for (int part = 0; part < parts; part++)
#define INLINE static inline __attribute__((always_inline))

typedef float FloatLanes __attribute__((vector_size(lanes * 4)));
typedef int32_t IntLanes __attribute__((vector_size(lanes * 4)));

struct Floats {
  FloatLanes part[parts];
};
struct Ints {
  IntLanes part[parts];
};

INLINE Floats all(float number) {
  Floats result;
  EACH_PART result.part[part] = FloatLanes{} + number;
  return result;
}
INLINE Ints all_ints(int32_t number) {
  Ints result;
  EACH_PART result.part[part] = IntLanes{} + number;
  return result;
}
INLINE Floats load(const float* from) {
  Floats result;
  __builtin_memcpy(&result, from, 64);
  return result;
}
INLINE Ints load_ints(const void* from) {
  Ints result;
  __builtin_memcpy(&result, from, 64);
  return result;
}
INLINE void store(float* to, Floats numbers) { __builtin_memcpy(to, &numbers, 64); }
INLINE void store_ints(void* to, Ints numbers) { __builtin_memcpy(to, &numbers, 64); }

INLINE Floats operator+(Floats a, Floats b) {
  EACH_PART a.part[part] += b.part[part];
  return a;
}
INLINE Floats operator-(Floats a, Floats b) {
  EACH_PART a.part[part] -= b.part[part];
  return a;
}
INLINE Floats operator*(Floats a, Floats b) {
  EACH_PART a.part[part] *= b.part[part];
  return a;
}
// a * b + c, fused where the level can (-ffp-contract=fast).
INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  EACH_PART c.part[part] = a.part[part] * b.part[part] + c.part[part];
  return c;
}
INLINE Floats larger(Floats a, Floats b) {
  EACH_PART a.part[part] = a.part[part] > b.part[part] ? a.part[part] : b.part[part];
  return a;
}
INLINE Ints operator&(Ints a, Ints b) {
  EACH_PART a.part[part] &= b.part[part];
  return a;
}
template <int Bits>
INLINE Ints shift_left(Ints a) {
  EACH_PART a.part[part] <<= Bits;
  return a;
}
template <int Bits>
INLINE Ints shift_right(Ints a) {
  EACH_PART a.part[part] >>= Bits;
  return a;
}
INLINE Floats as_floats(Ints bits) {
  Floats result;
  __builtin_memcpy(&result, &bits, 64);
  return result;
}
INLINE Floats to_floats(Ints numbers) {
  Floats result;
  EACH_PART result.part[part] = __builtin_convertvector(numbers.part[part], FloatLanes);
  return result;
}
// `numbers` where the bit of `mask` is set, `other` elsewhere.
INLINE Floats choose(uint32_t mask, Floats numbers, Floats other) {
#if defined(__AVX512F__)
  numbers.part[0] = (FloatLanes)_mm512_mask_blend_ps(
      (__mmask16)mask, (__m512)other.part[0], (__m512)numbers.part[0]);
#else
  for (int lane = 0; lane < 16; lane++)
    if (!(mask >> lane & 1)) numbers.part[lane / lanes][lane % lanes] = other.part[lane / lanes][lane % lanes];
#endif
  return numbers;
}
INLINE float sum(Floats numbers) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)numbers.part[0]);
#else
  float kept[16];
  store(kept, numbers);
  for (int width = 8; width > 0; width /= 2)
    for (int lane = 0; lane < width; lane++) kept[lane] += kept[lane + width];
  return kept[0];
#endif
}
// Whether one of `numbers` is larger.
INLINE bool exceeds(Floats numbers, float other) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)numbers.part[0], _mm512_set1_ps(other), _CMP_GT_OQ) != 0;
#else
  bool found = false;
  for (int lane = 0; lane < 16; lane++) found |= numbers.part[lane / lanes][lane % lanes] > other;
  return found;
#endif
}
INLINE float largest(Floats numbers) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)numbers.part[0]);
#else
  float kept[16];
  store(kept, numbers);
  for (int width = 8; width > 0; width /= 2)
    for (int lane = 0; lane < width; lane++)
      kept[lane] = kept[lane] > kept[lane + width] ? kept[lane] : kept[lane + width];
  return kept[0];
#endif
}

INLINE float half_to_float(uint16_t half) {
  // Shift exponent and fraction into place and scale by 2^112; infinities and NaN keep their exponent.
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16;
  uint32_t bits = (uint32_t)(half & 0x7fff) << 13;
  float number;
  if (bits >= 0x0f800000) {
    bits = bits + 0x70000000;
    __builtin_memcpy(&number, &bits, 4);
  } else {
    __builtin_memcpy(&number, &bits, 4);
    number *= 0x1p112f;
    __builtin_memcpy(&bits, &number, 4);
  }
  bits |= sign;
  __builtin_memcpy(&number, &bits, 4);
  return number;
}

INLINE Floats load_halves(const void* from) {
  Floats result;
#if defined(__AVX512F__)
  result.part[0] = (FloatLanes)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__) && defined(__F16C__)
  EACH_PART result.part[part] = (FloatLanes)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from + part));
#else
  const uint16_t* halves = (const uint16_t*)from;
  for (int lane = 0; lane < 16; lane++) result.part[lane / lanes][lane % lanes] = half_to_float(halves[lane]);
#endif
  return result;
}

// exp(x) for x of at most 80 within 1e-7, 0 below -87: 2^n times a polynomial over [-ln 2 / 2, ln 2 / 2].
INLINE Floats exponential(Floats x) {
#if defined(__AVX512F__)
  // What makes NaN of minus infinity is masked in the end.
  Floats n;
  n.part[0] = (FloatLanes)_mm512_roundscale_ps(_mm512_mul_ps((__m512)x.part[0], _mm512_set1_ps(1.44269504f)), 8);
  Floats r = multiply_add(n, all(-0.693145752f), x);
#else
  const Floats magic = all(12582912.0f);  // 1.5 x 2^23: adding it rounds to an integer in the low bits
  const Floats floored = larger(x, all(-87.0f));
  const Floats shifted = multiply_add(floored, all(1.44269504f), magic);
  const Floats n = shifted - magic;
  Floats r = multiply_add(n, all(-0.693145752f), floored);
#endif
  r = multiply_add(n, all(-1.42860677e-6f), r);
  Floats p = all(1.0f / 5040);
  p = multiply_add(p, r, all(1.0f / 720));
  p = multiply_add(p, r, all(1.0f / 120));
  p = multiply_add(p, r, all(1.0f / 24));
  p = multiply_add(p, r, all(1.0f / 6));
  p = multiply_add(p, r, all(0.5f));
  p = multiply_add(p, r, all(1.0f));
  p = multiply_add(p, r, all(1.0f));
  Floats result;
#if defined(__AVX512F__)
  const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x.part[0], _mm512_set1_ps(-87.0f), _CMP_GE_OQ);
  result.part[0] = (FloatLanes)_mm512_maskz_scalef_ps(counts, (__m512)p.part[0], (__m512)n.part[0]);
#else
  EACH_PART {
    const IntLanes exponent = ((IntLanes)shifted.part[part] - (IntLanes)magic.part[part]) << 23;
    const FloatLanes scaled = (FloatLanes)((IntLanes)p.part[part] + exponent);
    result.part[part] = x.part[part] < -87.0f ? FloatLanes{} : scaled;
  }
#endif
  return result;
}
