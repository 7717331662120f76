// KV blocks of one pool as blocks of another one that differs in element type or in the order of the elements.
//
// A head of K or V is [tokens, channels]. Token-major order has it so; the interleaved order puts w = 4 / itemsize
// channels (K) or tokens (V) side by side: see KvFormat in cache/layout.py. One head fits the first cache, so that going
// through it in another order costs no memory access.
#pragma once

#include <cstdint>

namespace conversion {

// Where element (token, channel) of one head lies: the two strides of the outer and the lane of the inner dimension.
template <int Lanes, bool IsKey>
inline __attribute__((always_inline)) int64_t place(int token, int channel, int tokens, int channels) {
    if constexpr (Lanes == 0) return static_cast<int64_t>(token) * channels + channel;
    else if constexpr (IsKey)
        return (static_cast<int64_t>(channel / Lanes) * tokens + token) * Lanes + channel % Lanes;
    else
        return (static_cast<int64_t>(token / Lanes) * channels + channel) * Lanes + token % Lanes;
}

// Call `one(token_major, interleaved)` for the two places of every element, in runs that the compiler can join.
template <int Lanes, bool IsKey, class One>
inline __attribute__((always_inline)) void pair_places(int tokens, int channels, One one) {
    const int outer = (IsKey ? channels : tokens) / Lanes, inner = IsKey ? tokens : channels;
    for (int group = 0; group < outer; ++group)
        for (int at = 0; at < inner; ++at)
            for (int lane = 0; lane < Lanes; ++lane) {
                const int64_t token = IsKey ? at : group * Lanes + lane, channel = IsKey ? group * Lanes + lane : at;
                one(token * channels + channel, (static_cast<int64_t>(group) * inner + at) * Lanes + lane);
            }
}

template <class From, class To, int FromLanes, int ToLanes, bool IsKey>
inline __attribute__((always_inline)) void convert_head(const typename From::Bits* __restrict from,
                                                        typename To::Bits* __restrict to, int tokens, int channels) {
    const auto move = [&](int64_t source, int64_t target) {
        to[target] = To::from_float(From::to_float(from[source]));
    };
    if constexpr (FromLanes == ToLanes) {
        for (int64_t index = 0; index < static_cast<int64_t>(tokens) * channels; ++index) move(index, index);
    } else if constexpr (FromLanes == 0) {
        pair_places<ToLanes, IsKey>(tokens, channels, [&](int64_t plain, int64_t woven) { move(plain, woven); });
    } else if constexpr (ToLanes == 0) {
        pair_places<FromLanes, IsKey>(tokens, channels, [&](int64_t plain, int64_t woven) { move(woven, plain); });
    } else {
        for (int token = 0; token < tokens; ++token)
            for (int channel = 0; channel < channels; ++channel)
                move(place<FromLanes, IsKey>(token, channel, tokens, channels),
                     place<ToLanes, IsKey>(token, channel, tokens, channels));
    }
}

// One layer of one block: K of all heads, then V of all heads.
template <class From, class To, int FromLanes, int ToLanes>
inline __attribute__((always_inline)) void convert_layer(const uint8_t* source, uint8_t* target, int heads, int tokens,
                                                         int channels) {
    const auto* from = reinterpret_cast<const typename From::Bits*>(source);
    auto* to = reinterpret_cast<typename To::Bits*>(target);
    const int64_t elements = static_cast<int64_t>(tokens) * channels;
    for (int head = 0; head < heads; ++head)
        convert_head<From, To, FromLanes, ToLanes, true>(from + head * elements, to + head * elements, tokens, channels);
    for (int head = heads; head < 2 * heads; ++head)
        convert_head<From, To, FromLanes, ToLanes, false>(from + head * elements, to + head * elements, tokens, channels);
}

}  // namespace conversion
