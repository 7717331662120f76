// Vectors of 32-bit lanes for whatever instruction set this file is compiled for (GCC and Clang vector extensions).
//
// Everything is inside a namespace named after the instruction set, so that no function compiled for AVX-512 can be
// taken by the linker for a machine without it. For the same reason no inline function of the C++ library is used.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define DISAGG_INLINE inline __attribute__((always_inline))
// For functions around one register tile: inlined into several callers, GCC 12's code for them is a fifth slower.
#define DISAGG_NOINLINE __attribute__((noinline))

namespace disagg {
namespace DISAGG_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kMaxRows = 6;  // Register tile: 6 x 4 accumulators, 4 operands, 1 broadcast of 32 registers.
constexpr int kMaxColumns = 4;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kMaxRows = 4;
constexpr int kMaxColumns = 2;
#else
constexpr int kVectorBytes = 16;
constexpr int kMaxRows = 4;
constexpr int kMaxColumns = 2;
#endif
constexpr int kLanes = kVectorBytes / 4;

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Units __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef int16_t Words __attribute__((vector_size(kVectorBytes / 2)));
typedef int8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));

template <class Vector>
DISAGG_INLINE Vector load(const void* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <class Vector>
DISAGG_INLINE void store(void* to, Vector vector) {
  __builtin_memcpy(to, &vector, sizeof(vector));
}

// Keep GCC from loading a vector anew for each of its uses, as it does where the tile is small.
template <class Vector>
DISAGG_INLINE void keep_in_register(Vector& vector) {
#if defined(__AVX512F__)
  asm("" : "+v"(vector));
#elif defined(__AVX2__)
  asm("" : "+x"(vector));
#else
  (void)vector;
#endif
}

DISAGG_INLINE Units broadcast(uint32_t unit) { return Units{} + unit; }
DISAGG_INLINE Floats broadcast(float value) { return (Floats)broadcast(__builtin_bit_cast(uint32_t, value)); }

DISAGG_INLINE Floats minimum(Floats a, Floats b) { return a < b ? a : b; }

DISAGG_INLINE Floats maximum(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

DISAGG_INLINE bool any_above(Floats x, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(bound), _CMP_GT_OQ) != 0;
#else
  const Ints above = x > broadcast(bound);
  bool found = false;
  for (int lane = 0; lane < kLanes; ++lane) found |= above[lane] != 0;
  return found;
#endif
}

// One bit for each lane in which a comparison holds.
DISAGG_INLINE uint32_t bits_of(Ints holds) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)holds, (__m512i)holds);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)holds));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= (holds[lane] != 0 ? 1u : 0u) << lane;
  return bits;
#endif
}

// Lanes first, first + 1, ... as integers.
DISAGG_INLINE Ints lane_numbers(int first) {
  static const int32_t counting[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load<Ints>(counting) + first;
}

template <int Lanes>
struct Reduce {
  typedef float Whole __attribute__((vector_size(Lanes * 4)));
  typedef float Half __attribute__((vector_size(Lanes * 2)));
  static DISAGG_INLINE float sum(Whole x) {
    Half low, high;
    split(x, low, high);
    return Reduce<Lanes / 2>::sum(low + high);
  }
  static DISAGG_INLINE float max(Whole x) {
    Half low, high;
    split(x, low, high);
    return Reduce<Lanes / 2>::max(low > high ? low : high);
  }
  static DISAGG_INLINE void split(Whole x, Half& low, Half& high) {
    __builtin_memcpy(&low, &x, sizeof(low));
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof(low), sizeof(high));
  }
};

template <>
struct Reduce<2> {
  typedef float Whole __attribute__((vector_size(8)));
  static DISAGG_INLINE float sum(Whole x) { return x[0] + x[1]; }
  static DISAGG_INLINE float max(Whole x) { return x[0] > x[1] ? x[0] : x[1]; }
};

DISAGG_INLINE float sum_of_lanes(Floats x) { return Reduce<kLanes>::sum(x); }
DISAGG_INLINE float max_of_lanes(Floats x) { return Reduce<kLanes>::max(x); }

// 2^x for x <= 127 with a relative error of 1e-4 (Degree 3) or 1e-7 (Degree 5); exactly 0 far below -127.
template <int Degree>
DISAGG_INLINE Floats exp2(Floats x) {
  static_assert(Degree == 3 || Degree == 5);
#if defined(__AVX512DQ__)
  // Minimax polynomials of 2^f on [0, 1), f = x - floor(x); scalef multiplies with 2^floor(x).
  const Floats f = (Floats)_mm512_reduce_ps((__m512)x, 0x09);
  Floats p;
  if constexpr (Degree == 3) {
    p = 0.07802452147006989f * f + 0.2260671705007553f;
    p = p * f + 0.6958335041999817f;
    p = p * f + 0.9999251961708069f;
  } else {
    p = 0.0018775766948238015f * f + 0.008989340625703335f;
    p = p * f + 0.05582631751894951f;
    p = p * f + 0.24015361070632935f;
    p = p * f + 0.6931530833244324f;
    p = p * f + 0.9999999403953552f;
  }
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  // Minimax polynomials of 2^f on [-0.5, 0.5] with constant term 1; the exponent is added to the bits.
  const float rounding = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  x = maximum(x, broadcast(-127.0f));
  const Floats shifted = x + rounding;
  const Floats f = x - (shifted - rounding);
  Floats p;
  if constexpr (Degree == 3) {
    p = 0.05500892922282219f * f + 0.2422109693288803f;
    p = p * f + 0.6932829022407532f;
  } else {
    p = 0.001326472731307149f * f + 0.009671512991189957f;
    p = p * f + 0.05550733581185341f;
    p = p * f + 0.24022242426872253f;
    p = p * f + 0.6931470036506653f;
  }
  p = p * f + 1.0f;
  return (Floats)((Ints)p + ((Ints)shifted << 23));
#endif
}

constexpr float kLog2E = 1.4426950408889634f;

// Element types. ``Operand`` is a vector of units as the multiplier wants it, ``multiply_add`` adds the product with
// one broadcast unit of a row to float32 sums. A row has kRowWords 32-bit words for a unit: see RowOf.
struct F32 {
  using Storage = float;
  static constexpr int kPerUnit = 1;
  static constexpr int kRowWords = 1;
  static constexpr int kExpDegree = 5;
  using Operand = Floats;
  using Factor = Floats;
  static DISAGG_INLINE Operand operand(const void* units) { return load<Floats>(units); }
  static DISAGG_INLINE Operand operand_of(Units units) { return (Floats)units; }
  // The unit of each lane from bytes of kPerUnit times as many elements.
  static DISAGG_INLINE Operand operand_of_int8(const int8_t* from) {
    return __builtin_convertvector(__builtin_convertvector(load<Bytes>(from), Ints), Floats);
  }
  // Step ``step`` of the 8 that the 4-bit values of a lane are: see put_value in linear_blocks.h.
  static DISAGG_INLINE Operand operand_of_nibbles(Units packed, int step) {
    return __builtin_convertvector((Ints)(packed >> (4 * step) & 15u), Floats);
  }
  static DISAGG_INLINE Units units_of(const Operand& operand) { return (Units)operand; }
  static DISAGG_INLINE void keep(Operand& operand) { keep_in_register(operand); }
  static DISAGG_INLINE Factor factor(const uint32_t* unit) { return (Floats)broadcast(*unit); }
  static DISAGG_INLINE Floats multiply_add(Floats sum, Factor a, const Operand& b) { return a * b + sum; }
  static DISAGG_INLINE Floats load_floats(const float* from) { return load<Floats>(from); }
  static DISAGG_INLINE void store_floats(float* to, Floats x) { store(to, x); }
  static DISAGG_INLINE float to_float(float x) { return x; }
  static DISAGG_INLINE float from_float(float x) { return x; }
};

// Operands of types that no instruction multiplies as they are: a unit's two elements, each in a vector of floats. Rows,
// which many columns use, were widened before.
struct FloatPairs {
  static constexpr int kRowWords = 2;
  struct Operand {
    Floats low, high;
  };
  using Factor = Operand;
  static DISAGG_INLINE Operand operand_of_int8(const int8_t* from) {
    const Ints pairs = __builtin_convertvector(load<Words>(from), Ints);
    return {__builtin_convertvector(pairs << 24 >> 24, Floats), __builtin_convertvector(pairs >> 8, Floats)};
  }
  static DISAGG_INLINE Operand operand_of_nibbles(Units packed, int step) {
    return {__builtin_convertvector((Ints)(packed >> (4 * step) & 15u), Floats),
            __builtin_convertvector((Ints)(packed >> (16 + 4 * step) & 15u), Floats)};
  }
  static DISAGG_INLINE Factor factor(const uint32_t* unit) {
    return {(Floats)broadcast(unit[0]), (Floats)broadcast(unit[1])};
  }
  static DISAGG_INLINE void keep(Operand& operand) {
    keep_in_register(operand.low);
    keep_in_register(operand.high);
  }
  static DISAGG_INLINE Floats multiply_add(Floats sum, const Factor& a, const Operand& b) {
    return a.high * b.high + (a.low * b.low + sum);
  }
};

// How bfloat16 is multiplied, and rounded.
#if defined(__AVX512BF16__)
struct Bfloat16Products {
  static constexpr int kRowWords = 1;
  using Operand = Units;
  using Factor = Units;
  static DISAGG_INLINE Operand operand_of(Units units) { return units; }
  static DISAGG_INLINE Operand operand_of_int8(const int8_t* from) {
    const __m512 first = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from)));
    const __m512 second = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from + kLanes)));
    return (Units)_mm512_cvtne2ps_pbh(second, first);
  }
  // Step ``step`` of 4. A table has the 16 values twice: the permutation reads a fifth bit, the next value's lowest.
  static DISAGG_INLINE Operand operand_of_nibbles(Units packed, int step) {
    alignas(64) static const uint16_t values[32] = {
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120,
        0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
        0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
    const __m512i shifted = _mm512_srli_epi16((__m512i)packed, 4 * step);
    return (Units)_mm512_permutexvar_epi16(shifted, load<__m512i>(values));
  }
  static DISAGG_INLINE Units units_of(const Operand& operand) { return operand; }
  static DISAGG_INLINE void keep(Operand& operand) { keep_in_register(operand); }
  static DISAGG_INLINE Factor factor(const uint32_t* unit) { return broadcast(*unit); }
  static DISAGG_INLINE Floats multiply_add(Floats sum, Factor a, const Operand& b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  static DISAGG_INLINE void store_floats(uint16_t* to, Floats x) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
    __builtin_memcpy(to, &rounded, sizeof(rounded));
  }
};
#else
struct Bfloat16Products : FloatPairs {
  static DISAGG_INLINE Operand operand_of(Units units) {
    return {(Floats)(units << 16), (Floats)(units & 0xffff0000u)};
  }
  // The upper halves of floats that bfloat16 holds exactly.
  static DISAGG_INLINE Units units_of(const Operand& operand) {
    return (Units)operand.low >> 16 | ((Units)operand.high & 0xffff0000u);
  }
  static DISAGG_INLINE void store_floats(uint16_t* to, Floats x) {
    const Units bits = (Units)x;
    const Units rounded = (bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16;
    store(to, __builtin_convertvector(rounded, Halves));
  }
};
#endif

struct BF16 : Bfloat16Products {
  using Storage = uint16_t;
  static constexpr int kPerUnit = 2;
  static constexpr int kExpDegree = 3;
  static DISAGG_INLINE Operand operand(const void* units) { return operand_of(load<Units>(units)); }
  static DISAGG_INLINE Floats load_floats(const uint16_t* from) {
    return (Floats)(__builtin_convertvector(load<Halves>(from), Units) << 16);
  }
  static DISAGG_INLINE float to_float(uint16_t x) { return __builtin_bit_cast(float, uint32_t{x} << 16); }
  // Round to nearest even. Infinities stay, a NaN may become another NaN or an infinity: neither occurs in a sane model.
  static DISAGG_INLINE uint16_t from_float(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    return static_cast<uint16_t>((bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16);
  }
};

// Between float16 and float32, rounding to nearest even. Beyond 65504 is infinity, which a model's check finds.
#if defined(__F16C__)
DISAGG_INLINE Floats widen(Halves halves) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps((__m256i)halves);
#else
  return (Floats)_mm256_cvtph_ps((__m128i)halves);
#endif
}
DISAGG_INLINE Halves narrow(Floats x) {
#if defined(__AVX512F__)
  return (Halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
}
DISAGG_INLINE float widen_one(uint16_t half) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half))); }
DISAGG_INLINE uint16_t narrow_one(float x) {
  return static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)));
}
#else
DISAGG_INLINE Floats widen(Halves halves) {
  const Units half = __builtin_convertvector(halves, Units);
  const Units magnitude = (half & 0x7fffu) << 13;
  const Units finite = (Units)((Floats)magnitude * 0x1p112f);
  const Units bits = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : finite;
  return (Floats)(bits | (half & 0x8000u) << 16);
}
DISAGG_INLINE Halves narrow(Floats x) {
  const Units bits = (Units)x;
  const Units magnitude = bits & 0x7fffffffu;
  const Units normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Units tiny = (Units)((Floats)magnitude + 0.5f) - 0x3f000000u;  // the addition rounds
  Units half = magnitude < 0x38800000u ? tiny : normal;
  half = magnitude >= 0x47800000u ? broadcast(uint32_t{0x7c00}) : half;
  half = magnitude > 0x7f800000u ? broadcast(uint32_t{0x7e00}) : half;
  return __builtin_convertvector(half | (bits >> 16 & 0x8000u), Halves);
}
DISAGG_INLINE float widen_one(uint16_t half) { return widen(Halves{} + half)[0]; }
DISAGG_INLINE uint16_t narrow_one(float x) { return narrow(Floats{} + x)[0]; }
#endif

// Float16 is widened to float32 as it is read: no instruction is asked for that multiplies it as it is.
struct F16 : FloatPairs {
  using Storage = uint16_t;
  static constexpr int kPerUnit = 2;
  static constexpr int kExpDegree = 3;
  static DISAGG_INLINE Operand operand_of(Units units) {
    return {widen(__builtin_convertvector(units & 0xffffu, Halves)), widen(__builtin_convertvector(units >> 16, Halves))};
  }
  static DISAGG_INLINE Operand operand(const void* units) { return operand_of(load<Units>(units)); }
  static DISAGG_INLINE Units units_of(const Operand& operand) {
    return __builtin_convertvector(narrow(operand.low), Units) | __builtin_convertvector(narrow(operand.high), Units) << 16;
  }
  static DISAGG_INLINE Floats load_floats(const uint16_t* from) { return widen(load<Halves>(from)); }
  static DISAGG_INLINE void store_floats(uint16_t* to, Floats x) { store(to, narrow(x)); }
  static DISAGG_INLINE float to_float(uint16_t x) { return widen_one(x); }
  static DISAGG_INLINE uint16_t from_float(float x) { return narrow_one(x); }
};

// What the elements of a row are, on the side of a product whose units are broadcast: E's own, or floats.
template <class E, int RowWords = E::kRowWords>
struct RowsOf {
  using Type = E;
};
template <class E>
struct RowsOf<E, 2> {
  using Type = F32;
};
template <class E>
using RowOf = typename RowsOf<E>::Type;

// Write ``count`` elements as those of a row.
template <class E>
DISAGG_INLINE void widen_row(const typename E::Storage* from, int64_t count, void* to) {
  if constexpr (E::kRowWords == 1) {
    __builtin_memcpy(to, from, count * sizeof(typename E::Storage));
    return;
  }
  auto* row = static_cast<typename RowOf<E>::Storage*>(to);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) RowOf<E>::store_floats(row + i, E::load_floats(from + i));
  for (; i < count; ++i) row[i] = RowOf<E>::from_float(E::to_float(from[i]));
}

DISAGG_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }

}  // namespace DISAGG_ISA
}  // namespace disagg
