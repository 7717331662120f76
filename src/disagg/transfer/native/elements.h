// Elements of KV blocks as their bits, and as the float32 that is computed with.
#pragma once

#include <cstdint>
#include <cstring>

namespace elements {

#define INLINE inline __attribute__((always_inline))

INLINE float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// Numbers are rounded to the nearest, to the even one of two that are equally near.
struct Bf16 {
    using Bits = uint16_t;
    static constexpr Bits kMagnitude = 0x7fff;
    static constexpr Bits kLargest = 0x7f7f;
    static INLINE float to_float(Bits bits) { return as_float(static_cast<uint32_t>(bits) << 16); }
    static INLINE Bits from_float(float value) {
        const uint32_t bits = as_bits(value);
        return static_cast<Bits>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
};

// All cases are computed and one is chosen, so that a loop over elements has no jumps. It takes subnormal numbers.
struct F16 {
    using Bits = uint16_t;
    static constexpr Bits kMagnitude = 0x7fff;
    static constexpr Bits kLargest = 0x7bff;
    static INLINE float to_float(Bits bits) {
        const uint32_t magnitude = static_cast<uint32_t>(bits & kMagnitude) << 13;
        const uint32_t number = as_bits(as_float(magnitude) * 0x1p112f);
        const uint32_t rest = magnitude | 0x7f800000;  // infinity, or no number
        const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
        return as_float((magnitude > (static_cast<uint32_t>(kLargest) << 13 | 0x1fff) ? rest : number) | sign);
    }
    static INLINE Bits from_float(float value) {
        const uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffff;
        const uint32_t rest = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
        const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
        const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
        const uint32_t number = magnitude < (113u << 23) ? subnormal : normal;
        return static_cast<Bits>((magnitude >= (143u << 23) ? rest : number) | (bits & 0x80000000) >> 16);
    }
};

struct F32 {
    using Bits = uint32_t;
    static constexpr Bits kMagnitude = 0x7fffffff;
    static constexpr Bits kLargest = 0x7f7fffff;
    static INLINE float to_float(Bits bits) { return as_float(bits); }
    static INLINE Bits from_float(float value) { return as_bits(value); }
};

#undef INLINE

}  // namespace elements
