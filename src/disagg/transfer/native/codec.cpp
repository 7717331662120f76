// KV blocks as one byte for each element and a float32 scale for each row (K: channel, V: token), at memory speed.
//
// A layer of a block is a number of matrices (K and V of each head), each seen as [outer, inner, lane] elements with a
// scale for each (outer, lane): that is K per channel and V per token in every order of elements that a pool has (see
// Int8Codec in int8_codec.py, whose NumPy form gives the same bits). 32 elements are worked on at a time.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "conversion.h"
#include "elements.h"

namespace py = pybind11;

namespace {

#if defined(__x86_64__) && defined(__GNUC__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define CLONES
#endif
#define INLINE inline __attribute__((always_inline))

constexpr int kChunk = 32;
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits

using elements::Bf16;
using elements::F16;
using elements::F32;

// Elements that share scales: `count` chunks, `stride` elements apart; lane n of a chunk has scale n % Period.
struct Strip {
    int count;
    int stride;
};

template <class Type, int Period>
INLINE void encode_strip(const typename Type::Bits* source, int8_t* target, float* scales, Strip strip) {
    using Bits = typename Type::Bits;
    Bits most[kChunk] = {};
    for (int chunk = 0; chunk < strip.count; ++chunk) {
        const Bits* row = source + static_cast<int64_t>(chunk) * strip.stride;
        for (int lane = 0; lane < kChunk; ++lane) {
            Bits magnitude = row[lane] & Type::kMagnitude;
            most[lane] = most[lane] > magnitude ? most[lane] : magnitude;
        }
    }
#pragma GCC unroll 5
    for (int width = kChunk / 2; width >= Period; width /= 2) {
        for (int lane = 0; lane < width; ++lane) {
            most[lane] = most[lane] > most[lane + width] ? most[lane] : most[lane + width];
        }
    }
    float factors[Period];
    for (int scale = 0; scale < Period; ++scale) {
        // Of what is not finite nothing can be kept.
        const Bits largest = most[scale] < Type::kLargest ? most[scale] : Type::kLargest;
        scales[scale] = Type::to_float(largest) / 127.0f;
        factors[scale] = scales[scale] > 0.0f ? 1.0f / scales[scale] : 0.0f;
    }
    float inverse[kChunk];
    for (int lane = 0; lane < kChunk; ++lane) inverse[lane] = factors[lane % Period];
    for (int chunk = 0; chunk < strip.count; ++chunk) {
        const int64_t start = static_cast<int64_t>(chunk) * strip.stride;
        for (int lane = 0; lane < kChunk; ++lane) {
            float rounded = Type::to_float(source[start + lane]) * inverse[lane] + kRound;
            int32_t bits;
            std::memcpy(&bits, &rounded, 4);
            target[start + lane] = static_cast<int8_t>(bits);
        }
    }
}

template <class Type, int Period>
INLINE void decode_strip(const int8_t* source, typename Type::Bits* target, const float* scales, Strip strip) {
    float factor[kChunk];
    for (int lane = 0; lane < kChunk; ++lane) factor[lane] = scales[lane % Period];
    for (int chunk = 0; chunk < strip.count; ++chunk) {
        const int64_t start = static_cast<int64_t>(chunk) * strip.stride;
        for (int lane = 0; lane < kChunk; ++lane) {
            target[start + lane] = Type::from_float(static_cast<float>(source[start + lane]) * factor[lane]);
        }
    }
}

struct Matrix {
    int outer;
    int inner;
    int lanes;
    int64_t elements() const { return static_cast<int64_t>(outer) * inner * lanes; }
    int64_t scales() const { return static_cast<int64_t>(outer) * lanes; }
};

struct Encode {
    template <class Type, int Period>
    static INLINE void strip(const typename Type::Bits* raw, int8_t* coded, float* scales, Strip strip) {
        encode_strip<Type, Period>(raw, coded, scales, strip);
    }
};

struct Decode {
    template <class Type, int Period>
    static INLINE void strip(typename Type::Bits* raw, const int8_t* coded, const float* scales, Strip strip) {
        decode_strip<Type, Period>(coded, raw, scales, strip);
    }
};

// Works on each strip of one head.
template <class Work, class Type, class Raw, class Coded, class Scale>
INLINE void for_strips(const Matrix& matrix, Raw* raw, Coded* coded, Scale* scales) {
    const int64_t row = static_cast<int64_t>(matrix.inner) * matrix.lanes;
    for (int outer = 0; outer < matrix.outer; ++outer, raw += row, coded += row, scales += matrix.lanes) {
        const Strip whole{static_cast<int>(row / kChunk), kChunk};
        if (matrix.lanes == 1) {
            Work::template strip<Type, 1>(raw, coded, scales, whole);
        } else if (matrix.lanes == 2) {
            Work::template strip<Type, 2>(raw, coded, scales, whole);
        } else {
            for (int lane = 0; lane < matrix.lanes; lane += kChunk) {
                const Strip column{matrix.inner, matrix.lanes};
                Work::template strip<Type, kChunk>(raw + lane, coded + lane, scales + lane, column);
            }
        }
    }
}

// One layer of one block: `heads` matrices of K, then as many of V; all bytes first, then all scales.
template <class Type>
INLINE void encode_block(const typename Type::Bits* source, int8_t* target, int heads, const Matrix* kinds) {
    const int64_t elements = heads * (kinds[0].elements() + kinds[1].elements());
    float* scales = reinterpret_cast<float*>(target + elements);
    for (int kind = 0; kind < 2; ++kind) {
        for (int head = 0; head < heads; ++head) {
            for_strips<Encode, Type>(kinds[kind], source, target, scales);
            source += kinds[kind].elements();
            target += kinds[kind].elements();
            scales += kinds[kind].scales();
        }
    }
}

template <class Type>
INLINE void decode_block(const int8_t* source, typename Type::Bits* target, int heads, const Matrix* kinds) {
    const int64_t elements = heads * (kinds[0].elements() + kinds[1].elements());
    const float* scales = reinterpret_cast<const float*>(source + elements);
    for (int kind = 0; kind < 2; ++kind) {
        for (int head = 0; head < heads; ++head) {
            for_strips<Decode, Type>(kinds[kind], target, source, scales);
            source += kinds[kind].elements();
            target += kinds[kind].elements();
            scales += kinds[kind].scales();
        }
    }
}

template <class Type>
CLONES void encode_one(const uint8_t* source, uint8_t* target, int heads, const Matrix* kinds) {
    encode_block<Type>(reinterpret_cast<const typename Type::Bits*>(source), reinterpret_cast<int8_t*>(target), heads,
                       kinds);
}

template <class Type>
CLONES void decode_one(const uint8_t* source, uint8_t* target, int heads, const Matrix* kinds) {
    decode_block<Type>(reinterpret_cast<const int8_t*>(source), reinterpret_cast<typename Type::Bits*>(target), heads,
                       kinds);
}

enum class Element { kFloat32, kBfloat16, kFloat16 };

Element element_named(const std::string& name) {
    if (name == "float32") return Element::kFloat32;
    if (name == "bfloat16") return Element::kBfloat16;
    if (name == "float16") return Element::kFloat16;
    throw std::invalid_argument("no such element type: " + name);
}

int bytes_of(Element element) { return element == Element::kFloat32 ? 4 : 2; }

// Call `one` with the bytes at each place of both buffers; places are multiples of 4 and lie inside.
template <class One>
void for_each(py::buffer source, py::array_t<int64_t>& from, int64_t from_bytes, py::buffer target,
         py::array_t<int64_t>& to, int64_t to_bytes, One one) {
    const py::buffer_info in = source.request();
    const py::buffer_info out = target.request(true);
    const int64_t in_bytes = in.size * in.itemsize, out_bytes = out.size * out.itemsize;
    if (from.size() != to.size()) throw std::invalid_argument("as many sources as targets are needed");
    const int64_t* starts = from.data();
    const int64_t* ends = to.data();
    for (py::ssize_t index = 0; index < from.size(); ++index) {
        if (starts[index] < 0 || starts[index] % 4 || starts[index] + from_bytes > in_bytes || ends[index] < 0 ||
            ends[index] % 4 || ends[index] + to_bytes > out_bytes)
            throw std::out_of_range("a block lies outside its buffer");
    }
    const uint8_t* first = static_cast<const uint8_t*>(in.ptr);
    uint8_t* last = static_cast<uint8_t*>(out.ptr);
    const py::ssize_t count = from.size();
    py::gil_scoped_release released;
    for (py::ssize_t index = 0; index < count; ++index) one(first + starts[index], last + ends[index]);
}

class Int8Blocks {
public:
    Int8Blocks(const std::string& element, int heads, std::array<int, 3> k, std::array<int, 3> v)
        : element_(element_named(element)), heads_(heads), kinds_{{k[0], k[1], k[2]}, {v[0], v[1], v[2]}} {
        for (const Matrix& kind : kinds_) {
            const bool is_narrow = kind.lanes == 1 || kind.lanes == 2;
            const bool fits = is_narrow ? kind.inner * kind.lanes % kChunk == 0 : kind.lanes % kChunk == 0;
            if (!fits) throw std::invalid_argument("the rows are no multiple of 32 elements");
        }
    }

    // Layers of blocks that begin at `from` in `source` to those that begin at `to` in `target`.
    void encode(py::buffer source, py::array_t<int64_t> from, py::buffer target, py::array_t<int64_t> to) const {
        const Code one = pick(encode_one<F32>, encode_one<Bf16>, encode_one<F16>);
        for_each(source, from, raw_bytes(), target, to, coded_bytes(),
                 [&](const uint8_t* in, uint8_t* out) { one(in, out, heads_, kinds_); });
    }

    void decode(py::buffer source, py::array_t<int64_t> from, py::buffer target, py::array_t<int64_t> to) const {
        const Code one = pick(decode_one<F32>, decode_one<Bf16>, decode_one<F16>);
        for_each(source, from, coded_bytes(), target, to, raw_bytes(),
                 [&](const uint8_t* in, uint8_t* out) { one(in, out, heads_, kinds_); });
    }

private:
    using Code = void (*)(const uint8_t*, uint8_t*, int, const Matrix*);

    Code pick(Code float32, Code bfloat16, Code float16) const {
        return element_ == Element::kFloat32 ? float32 : element_ == Element::kBfloat16 ? bfloat16 : float16;
    }
    int64_t elements() const { return heads_ * (kinds_[0].elements() + kinds_[1].elements()); }
    int64_t raw_bytes() const { return elements() * bytes_of(element_); }
    int64_t coded_bytes() const { return elements() + 4 * heads_ * (kinds_[0].scales() + kinds_[1].scales()); }

    Element element_;
    int heads_;
    Matrix kinds_[2];
};

// Copy `size` bytes past the caches, which neither reads the target first nor drives out what others have there. The
// source's are in the cache afterwards.
void copy_past_caches(const uint8_t* source, uint8_t* target, int64_t size) {
#if defined(__SSE2__)
    constexpr int64_t line = 64, ahead = 16 * line;
    if (reinterpret_cast<uintptr_t>(target) % 16 || size % line) {
        std::memcpy(target, source, size);
        return;
    }
    for (int64_t start = 0; start < size; start += line) {
        _mm_prefetch(reinterpret_cast<const char*>(source + start + ahead), _MM_HINT_T0);
        const auto* from = reinterpret_cast<const __m128i*>(source + start);
        auto* to = reinterpret_cast<__m128i*>(target + start);
        const __m128i words[] = {_mm_loadu_si128(from), _mm_loadu_si128(from + 1), _mm_loadu_si128(from + 2),
                                 _mm_loadu_si128(from + 3)};
        for (int word = 0; word < 4; ++word) _mm_stream_si128(to + word, words[word]);
    }
#else
    std::memcpy(target, source, size);
#endif
}

void copy_blocks(py::buffer source, py::array_t<int64_t> from, py::buffer target, py::array_t<int64_t> to, int64_t size) {
    if (size < 0) throw std::invalid_argument("a block has some bytes");
    for_each(source, from, size, target, to, size,
             [&](const uint8_t* in, uint8_t* out) { copy_past_caches(in, out, size); });
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

struct Form {
    Element element;
    bool interleaved;
};

template <class From, int FromLanes, class To, int ToLanes>
CLONES void convert_one(const uint8_t* source, uint8_t* target, int heads, conversion::Part theirs,
                        conversion::Part ours, int channels) {
    conversion::convert_layer<From, To, FromLanes, ToLanes>(source, target, heads, theirs, ours, channels);
}

using Convert = void (*)(const uint8_t*, uint8_t*, int, conversion::Part, conversion::Part, int);

template <class From, int FromLanes>
Convert pick_target(Form to) {
    switch (to.element) {
        case Element::kFloat32:
            return to.interleaved ? convert_one<From, FromLanes, F32, 1> : convert_one<From, FromLanes, F32, 0>;
        case Element::kBfloat16:
            return to.interleaved ? convert_one<From, FromLanes, Bf16, 2> : convert_one<From, FromLanes, Bf16, 0>;
        default:
            return to.interleaved ? convert_one<From, FromLanes, F16, 2> : convert_one<From, FromLanes, F16, 0>;
    }
}

Convert pick(Form from, Form to) {
    switch (from.element) {
        case Element::kFloat32: return from.interleaved ? pick_target<F32, 1>(to) : pick_target<F32, 0>(to);
        case Element::kBfloat16: return from.interleaved ? pick_target<Bf16, 2>(to) : pick_target<Bf16, 0>(to);
        default: return from.interleaved ? pick_target<F16, 2>(to) : pick_target<F16, 0>(to);
    }
}

// Layers of blocks of a pool in one form, as those of a pool in another one.
class FormConverter {
public:
    using Named = std::pair<std::string, bool>;

    FormConverter(const Named& from, const Named& to, int heads, std::pair<int, int> tokens, int channels)
        : from_{element_named(from.first), from.second},
          to_{element_named(to.first), to.second},
          heads_(heads),
          from_tokens_(tokens.first),
          to_tokens_(tokens.second),
          channels_(channels) {
        const int least = std::min(tokens.first, tokens.second), most = std::max(tokens.first, tokens.second);
        if (heads < 1 || least < 2 || channels < 2 || least % 2 || channels % 2)
            throw std::invalid_argument("heads, and an even number of tokens and channels are needed");
        if (most % least) throw std::invalid_argument("blocks of one size are no multiple of the other's");
    }

    // `parts` says of each pair which part of the larger block is the smaller one.
    void convert(py::buffer source, py::array_t<int64_t> from, py::buffer target, py::array_t<int64_t> to,
                 py::array_t<int64_t> parts) const {
        const Convert one = pick(from_, to_);
        const int least = std::min(from_tokens_, to_tokens_);
        const int64_t num_parts = std::max(from_tokens_, to_tokens_) / least;
        if (parts.size() != from.size()) throw std::invalid_argument("as many parts as sources are needed");
        const int64_t* part = parts.data();
        for (py::ssize_t index = 0; index < parts.size(); ++index)
            if (part[index] < 0 || part[index] >= num_parts) throw std::out_of_range("a block has no such part");
        for_each(source, from, layer_bytes(from_, from_tokens_), target, to, layer_bytes(to_, to_tokens_),
                 [&](const uint8_t* in, uint8_t* out) {
                     const int first = static_cast<int>(*part++) * least;
                     one(in, out, heads_, {from_tokens_, from_tokens_ > least ? first : 0},
                         {to_tokens_, to_tokens_ > least ? first : 0}, channels_);
                 });
    }

private:
    int64_t layer_bytes(const Form& form, int tokens) const {
        return 2 * static_cast<int64_t>(heads_) * tokens * channels_ * bytes_of(form.element);
    }

    Form from_, to_;
    int heads_, from_tokens_, to_tokens_, channels_;
};

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.def("copy_blocks", &copy_blocks);
    py::class_<FormConverter>(module, "FormConverter")
        .def(py::init<FormConverter::Named, FormConverter::Named, int, std::pair<int, int>, int>())
        .def("convert", &FormConverter::convert);
    py::class_<Int8Blocks>(module, "Int8Blocks")
        .def(py::init<std::string, int, std::array<int, 3>, std::array<int, 3>>())
        .def("encode", &Int8Blocks::encode)
        .def("decode", &Int8Blocks::decode);
}
