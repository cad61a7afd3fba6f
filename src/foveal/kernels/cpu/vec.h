// Vectors of 32-bit lanes, as wide as the instruction set that this file is compiled for.
//
// Every kernel source is compiled once per instruction set (CMakeLists.txt), each time in a
// namespace of its own, FOVEAL_ISA; whatever may become a function of its own must live in there,
// or the linker would keep one copy for all and an old processor would meet new instructions.
// Arithmetic is that of the compiler's vector extensions; intrinsics appear only where the
// language has no word for what the processor can do (float16, partial loads).
//
// bfloat16 and float16 are widened to float32 on load and rounded to nearest even on store.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace foveal {

// One element as it lies in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Int8 {
  int8_t code;
};
// The lower and the upper four bits of a byte.
struct LowBits {
  uint8_t both;
};
struct HighBits {
  uint8_t both;
};

namespace FOVEAL_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif
inline constexpr int kLanes = kVectorBytes / 4;

#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kRegisters = 32;
#else
inline constexpr int kRegisters = 16;
#endif

using F32 = float __attribute__((vector_size(kVectorBytes)));
using I32 = int32_t __attribute__((vector_size(kVectorBytes)));
using U32 = uint32_t __attribute__((vector_size(kVectorBytes)));
using U16 = uint16_t __attribute__((vector_size(kVectorBytes / 2)));

// Not x + 0, which would have to turn -0 into 0, and is an instruction.
inline F32 splat(float x) { return x - F32{}; }
inline U32 bits(F32 x) { return reinterpret_cast<U32>(x); }
inline F32 from_bits(U32 x) { return reinterpret_cast<F32>(x); }
// Lane by lane; where a is NaN the result is b.
inline F32 max(F32 a, F32 b) { return a > b ? a : b; }

template <class Vector, class T>
inline Vector load_bits(const T* p) {
  static_assert(sizeof(Vector) % sizeof(T) == 0);
  Vector v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline F32 load(const float* p) { return load_bits<F32>(p); }
inline void store(float* p, F32 x) { __builtin_memcpy(p, &x, sizeof x); }

inline F32 load(const BFloat16* p) {
  return from_bits(__builtin_convertvector(load_bits<U16>(p), U32) << 16);
}

inline void store(BFloat16* p, F32 x) {
  const U32 raw = bits(x);
  const U32 rounded = (raw + 0x7fff + (raw >> 16 & 1)) >> 16;
  const U16 narrow = __builtin_convertvector(x == x ? rounded : U32{} + 0x7fc0, U16);
  __builtin_memcpy(p, &narrow, sizeof narrow);
}

#if defined(__AVX512F__)
inline F32 load(const Float16* p) { return _mm512_cvtph_ps(load_bits<__m256i>(p)); }
inline void store(Float16* p, F32 x) {
  const __m256i narrow = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __builtin_memcpy(p, &narrow, sizeof narrow);
}
#elif defined(__F16C__)
inline F32 load(const Float16* p) { return _mm256_cvtph_ps(load_bits<__m128i>(p)); }
inline void store(Float16* p, F32 x) {
  const __m128i narrow = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(p, &narrow, sizeof narrow);
}
#elif defined(__aarch64__)
inline F32 load(const Float16* p) {
  return reinterpret_cast<F32>(vcvt_f32_f16(load_bits<float16x4_t>(p)));
}
inline void store(Float16* p, F32 x) {
  const float16x4_t narrow = vcvt_f16_f32(reinterpret_cast<float32x4_t>(x));
  __builtin_memcpy(p, &narrow, sizeof narrow);
}
#else
// Exponents move by a multiplication, which also makes float16's denormals normal.
inline F32 load(const Float16* p) {
  const U32 raw = __builtin_convertvector(load_bits<U16>(p), U32);
  const U32 sign = (raw & 0x8000) << 16;
  const U32 rest = raw & 0x7fff;
  const U32 finite = bits(from_bits(rest << 13) * splat(0x1p112f));
  return from_bits(sign | (rest >= 0x7c00 ? (rest << 13) | 0x7f800000 : finite));
}
// Adding a number 13 binary places above the last bit that is kept lets the addition round.
inline void store(Float16* p, F32 x) {
  const U32 raw = bits(x);
  const U32 twice = raw << 1;
  const F32 magnitude = from_bits(raw & 0x7fffffff) * splat(0x1p112f) * splat(0x1p-110f);
  const U32 exponent = twice & 0xff000000;
  const U32 anchor = exponent < 0x71000000 ? U32{} + 0x71000000 : exponent;
  const U32 sum = bits(from_bits((anchor >> 1) + 0x07800000) + magnitude);
  const U32 finite = (sum >> 13 & 0x7c00) + (sum & 0xfff);
  const U32 rest = twice > 0xff000000 ? U32{} + 0x7e00 : finite;
  const U16 narrow = __builtin_convertvector((raw >> 16 & 0x8000) | rest, U16);
  __builtin_memcpy(p, &narrow, sizeof narrow);
}
#endif

// kLanes bytes as integers. (GCC 12 widens bytes one by one where it is not told how.)
#if defined(__AVX512F__)
inline I32 widen_bytes(const int8_t* p) {
  return reinterpret_cast<I32>(_mm512_cvtepi8_epi32(load_bits<__m128i>(p)));
}
inline I32 widen_bytes(const uint8_t* p) {
  return reinterpret_cast<I32>(_mm512_cvtepu8_epi32(load_bits<__m128i>(p)));
}
#elif defined(__AVX2__)
inline I32 widen_bytes(const int8_t* p) {
  return reinterpret_cast<I32>(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline I32 widen_bytes(const uint8_t* p) {
  return reinterpret_cast<I32>(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
#elif defined(__aarch64__)
inline I32 widen_bytes(const int8_t* p) {
  const int8x8_t bytes = vreinterpret_s8_u32(vdup_n_u32(load_bits<uint32_t>(p)));
  return reinterpret_cast<I32>(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
}
inline I32 widen_bytes(const uint8_t* p) {
  const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(load_bits<uint32_t>(p)));
  return reinterpret_cast<I32>(vmovl_u16(vget_low_u16(vmovl_u8(bytes))));
}
#else
inline __m128i four_bytes(const void* p) {
  int32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  const __m128i bytes = _mm_cvtsi32_si128(word);
  const __m128i twice = _mm_unpacklo_epi8(bytes, bytes);
  return _mm_unpacklo_epi16(twice, twice);  // each byte in all four of a lane
}
inline I32 widen_bytes(const int8_t* p) {
  return reinterpret_cast<I32>(_mm_srai_epi32(four_bytes(p), 24));
}
inline I32 widen_bytes(const uint8_t* p) {
  return reinterpret_cast<I32>(_mm_srli_epi32(four_bytes(p), 24));
}
#endif

inline F32 to_float(I32 x) { return __builtin_convertvector(x, F32); }

inline F32 load(const Int8* p) { return to_float(widen_bytes(&p->code)); }
inline F32 load(const LowBits* p) { return to_float(widen_bytes(&p->both) & 15); }
inline F32 load(const HighBits* p) { return to_float(widen_bytes(&p->both) >> 4); }

// The first n < kLanes elements, zeros after them; nothing behind them is touched.
template <class Element>
inline F32 load_some(const Element* p, int n) {
  Element filled[kLanes] = {};
  for (int i = 0; i < n; ++i) filled[i] = p[i];
  return load(filled);
}
template <class Element>
inline void store_some(Element* p, F32 x, int n) {
  Element filled[kLanes];
  store(filled, x);
  for (int i = 0; i < n; ++i) p[i] = filled[i];
}
#if defined(__AVX512F__)
inline F32 load_some(const float* p, int n) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
#endif

// Lanes of a and b by index: 0 up to kLanes of a, from there on of b.
template <class Index, int... I>
inline F32 shuffle(F32 a, F32 b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Index::of(I)...);
#else
  return __builtin_shuffle(a, b, I32{Index::of(I)...});
#endif
}
using Lanes = std::make_integer_sequence<int, kLanes>;

// Of the 2x2 blocks that lanes l and l + kBit of a and b make: the first and the second column.
template <int kBit>
struct Lower {
  static constexpr int of(int l) { return l & kBit ? kLanes + (l ^ kBit) : l; }
};
template <int kBit>
struct Upper {
  static constexpr int of(int l) { return l & kBit ? kLanes + l : l + kBit; }
};

// Transposes a square of kLanes vectors.
template <int kBit = 1>
inline void transpose(F32 (&x)[kLanes]) {
  if constexpr (kBit < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & kBit) continue;
      const F32 a = x[i], b = x[i | kBit];
      x[i] = shuffle<Lower<kBit>>(a, b, Lanes());
      x[i | kBit] = shuffle<Upper<kBit>>(a, b, Lanes());
    }
    transpose<kBit * 2>(x);
  }
}

// Lanes of a where kBit is not set, of b where it is: as they are, and each pair swapped.
template <int kBit>
struct Blended {
  static constexpr int of(int l) { return l & kBit ? kLanes + l : l; }
};
template <int kBit>
struct Swapped {
  static constexpr int of(int l) { return (l & kBit ? kLanes : 0) + (l ^ kBit); }
};

// Lane i of the result is the sum over the lanes of x[i]; every sum is taken in the same order.
template <int kBit = 1>
inline F32 sum_each(F32 (&x)[kLanes]) {
  if constexpr (kBit < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += 2 * kBit) {
      const F32 a = x[i], b = x[i + kBit];
      const F32 moved = shuffle<Swapped<kBit>>(a, b, Lanes());
      x[i] = shuffle<Blended<kBit>>(a, b, Lanes()) + moved;
    }
    return sum_each<kBit * 2>(x);
  } else {
    return x[0];
  }
}

template <int kBit = kLanes / 2>
inline float sum(F32 x) {
  if constexpr (kBit) {
    return sum<kBit / 2>(x + shuffle<Upper<kBit>>(x, x, Lanes()));
  } else {
    return x[0];
  }
}
template <int kBit = kLanes / 2>
inline float largest(F32 x) {
  if constexpr (kBit) {
    return largest<kBit / 2>(max(x, shuffle<Upper<kBit>>(x, x, Lanes())));
  } else {
    return x[0];
  }
}

}  // namespace FOVEAL_ISA
}  // namespace foveal
