// KV blocks of one pool as blocks of another one that differs in element type, in the order of the elements or in size.
//
// A head of K or V is [tokens, channels]. Token-major order has it so; the interleaved order puts w = 4 / itemsize
// channels (K) or tokens (V) side by side: see KvFormat in cache/layout.py. One head fits the first cache, so that going
// through it in another order costs no memory access.
#pragma once

#include <cstdint>
#include <type_traits>

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

// Some tokens of a block of `size` tokens, from its `first` on.
struct Part {
    int size, first;
};

// Call `one(token_major, interleaved)` for the two places of every element, in runs that the compiler can join.
template <int Lanes, bool IsKey, class One>
inline __attribute__((always_inline)) void pair_places(Part plain, Part woven, int count, int channels, One one) {
    const int outer = (IsKey ? channels : count) / Lanes, inner = IsKey ? count : channels;
    const int64_t step = static_cast<int64_t>(IsKey ? woven.size : channels) * Lanes;
    const int64_t start = IsKey ? woven.first * Lanes : woven.first / Lanes * step;
    for (int group = 0; group < outer; ++group)
        for (int at = 0; at < inner; ++at)
            for (int lane = 0; lane < Lanes; ++lane) {
                const int64_t token = IsKey ? at : group * Lanes + lane, channel = IsKey ? group * Lanes + lane : at;
                one((plain.first + token) * channels + channel, start + group * step + at * Lanes + lane);
            }
}

// Call `one(source, target)` for the places of every element in two blocks of one order, which are runs in both.
template <int Lanes, bool IsKey, class One>
inline __attribute__((always_inline)) void same_places(Part source, Part target, int count, int channels, One one) {
    constexpr bool in_strips = Lanes > 0 && IsKey;  // each of some channels of all tokens
    constexpr int width = Lanes > 0 ? Lanes : 1;
    const int strips = in_strips ? channels / width : 1;
    const int64_t run = in_strips ? static_cast<int64_t>(count) * width : static_cast<int64_t>(count) * channels;
    const int64_t each = in_strips ? width : channels;
    for (int strip = 0; strip < strips; ++strip) {
        const int64_t from = (static_cast<int64_t>(strip) * source.size + source.first) * each;
        const int64_t to = (static_cast<int64_t>(strip) * target.size + target.first) * each;
        for (int64_t index = 0; index < run; ++index) one(from + index, to + index);
    }
}

template <class From, class To, int FromLanes, int ToLanes, bool IsKey>
inline __attribute__((always_inline)) void convert_head(const typename From::Bits* __restrict from,
                                                        typename To::Bits* __restrict to, Part source, Part target,
                                                        int count, int channels) {
    const auto move = [&](int64_t source, int64_t target) {
        if constexpr (std::is_same_v<From, To>) to[target] = from[source];
        else
            to[target] = To::from_float(From::to_float(from[source]));
    };
    if constexpr (FromLanes == ToLanes) {
        same_places<FromLanes, IsKey>(source, target, count, channels, move);
    } else if constexpr (FromLanes == 0) {
        pair_places<ToLanes, IsKey>(source, target, count, channels,
                                    [&](int64_t plain, int64_t woven) { move(plain, woven); });
    } else if constexpr (ToLanes == 0) {
        pair_places<FromLanes, IsKey>(target, source, count, channels,
                                      [&](int64_t plain, int64_t woven) { move(woven, plain); });
    } else {
        for (int token = 0; token < count; ++token)
            for (int channel = 0; channel < channels; ++channel)
                move(place<FromLanes, IsKey>(source.first + token, channel, source.size, channels),
                     place<ToLanes, IsKey>(target.first + token, channel, target.size, channels));
    }
}

// One layer of one block, or of what two blocks of unequal size have in common: K of all heads, then V of all heads.
template <class From, class To, int FromLanes, int ToLanes>
inline __attribute__((always_inline)) void convert_layer(const uint8_t* source, uint8_t* target, int heads, Part theirs,
                                                         Part ours, int channels) {
    const auto* from = reinterpret_cast<const typename From::Bits*>(source);
    auto* to = reinterpret_cast<typename To::Bits*>(target);
    const int count = theirs.size < ours.size ? theirs.size : ours.size;
    const int64_t from_head = static_cast<int64_t>(theirs.size) * channels;
    const int64_t to_head = static_cast<int64_t>(ours.size) * channels;
    for (int head = 0; head < heads; ++head)
        convert_head<From, To, FromLanes, ToLanes, true>(from + head * from_head, to + head * to_head, theirs, ours,
                                                         count, channels);
    for (int head = heads; head < 2 * heads; ++head)
        convert_head<From, To, FromLanes, ToLanes, false>(from + head * from_head, to + head * to_head, theirs, ours,
                                                          count, channels);
}

}  // namespace conversion
