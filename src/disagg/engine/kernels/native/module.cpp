// Python bindings. Tensors come as addresses: native_backend.py has checked types and shapes, Step has checked indices.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <climits>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core_board.h"
#include "decoder_stack.h"
#include "helpers.h"
#include "kernel_table.h"
#include "mlp.h"
#include "packed_linear.h"
#include "parallel.h"
#include "sampling.h"
#include "step.h"

namespace py = pybind11;

namespace disagg {

#define DISAGG_DECLARE(isa) \
  namespace isa {           \
  extern const Kernels kKernels[kNumElementTypes]; \
  }
DISAGG_DECLARE(portable)
#if defined(DISAGG_X86)
DISAGG_DECLARE(avx2)
DISAGG_DECLARE(avx512)
DISAGG_DECLARE(avx512_bf16)
#endif

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Fastest first.
std::vector<InstructionSet> supported_instruction_sets() {
  std::vector<InstructionSet> all = {
#if defined(DISAGG_X86)
      {"avx512_bf16",
       [] { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"); },
       avx512_bf16::kKernels},
      {"avx512",
       [] { return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512dq"); },
       avx512::kKernels},
      {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, avx2::kKernels},
#endif
      {"portable", [] { return true; }, portable::kKernels},
  };
  std::vector<InstructionSet> usable;
  for (const InstructionSet& set : all)
    if (set.supported()) usable.push_back(set);
  return usable;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : supported_instruction_sets()) names.emplace_back(set.name);
  return names;
}

// How the rows of a step are sampled: arrays with one value per row.
struct DrawSettings {
  uintptr_t temperature, top_p, min_p, top_k, seed, position;
  float floor;

  Drawing of_row(int64_t row) const {
    return {at<double>(temperature)[row],
            at<double>(top_p)[row],
            at<double>(min_p)[row],
            at<int32_t>(top_k)[row],
            noise_key(at<uint64_t>(seed)[row], at<uint64_t>(position)[row]),
            floor};
  }
};

// The kernels of one instruction set and element type, as Python sees them.
class BoundKernels {
 public:
  BoundKernels(const std::string& instruction_set, ElementType element) : element_(element) {
    for (const InstructionSet& set : supported_instruction_sets())
      if (set.name == instruction_set) kernels_ = &set.kernels[element];
    if (kernels_ == nullptr) throw std::invalid_argument("this processor has no " + instruction_set);
  }

  void rms_norm(uintptr_t x, uintptr_t residual, uintptr_t x_norm, uintptr_t norm, uintptr_t out, int64_t rows,
                int64_t width, float multiplier, float eps, int num_threads) const {
    const NormArgs args{at<void>(x), at<void>(residual), at<void>(x_norm), at<void>(norm), at<void>(out),
                        width,       multiplier,         eps};
    for_rows(rows, width * item_bytes(), num_threads,
             [&](int64_t begin, int64_t end) { kernels_->rms_norm(args, begin, end); });
  }

  void gate(Activation activation, uintptr_t gate_up, uintptr_t out, int64_t rows, int64_t width,
            int num_threads) const {
    for_rows(rows, 2 * width * item_bytes(), num_threads, [&](int64_t begin, int64_t end) {
      kernels_->gate[activation](at<void>(gate_up), at<void>(out), width, begin, end);
    });
  }

  void scale_and_cap(uintptr_t x, int64_t rows, int64_t width, float scale, float cap, int num_threads) const {
    for_rows(rows, width * item_bytes(), num_threads, [&](int64_t begin, int64_t end) {
      kernels_->scale_and_cap(at<void>(x), scale, cap, begin * width, end * width);
    });
  }

  void rope_and_write_kv(const Step& step, uintptr_t qkv, uintptr_t q_out, uintptr_t kv_layer, uintptr_t cos_sin,
                         int64_t num_positions, int rotary_dim, uintptr_t q_norm, uintptr_t k_norm, bool norm_rows,
                         float eps, int num_threads) const {
    check_positions(step, num_positions);
    RopeArgs args{};
    args.qkv = at<void>(qkv);
    args.q_out = at<void>(q_out);
    args.kv_layer = at<void>(kv_layer);
    args.cos_sin = at<float>(cos_sin);
    args.rotary_dim = rotary_dim;
    args.norm_rows = norm_rows;
    args.q_norm = at<void>(q_norm);
    args.k_norm = at<void>(k_norm);
    args.eps = eps;
    run_team(num_threads, [&](Team& team) { disagg::rope_and_write_kv(team, *kernels_, step, args, item_bytes()); });
  }

  void attention(Step& step, uintptr_t q, uintptr_t out, uintptr_t kv_layer, float scale, float softcap,
                 int window, int num_threads) const {
    const py::gil_scoped_release unlocked;
    step.prepare(window);
    run_team(num_threads, [&](Team& team) {
      step.attend(team, *kernels_, at<void>(q), at<void>(out), at<void>(kv_layer), {scale, softcap, window});
    });
  }

  // Per row of logits its largest, as logits.h says, into ``tokens``.
  void find_largest(uintptr_t logits, uintptr_t tokens, int64_t rows, int64_t width, int num_threads) const {
    for_each_row(rows, num_threads, [&](int64_t row) {
      at<int64_t>(tokens)[row] = kernels_->find_largest(row_of(logits, row, width), width);
    });
  }

  // Per row of logits a drawn token, as sampling.h says, into ``tokens``.
  void draw(uintptr_t logits, const DrawSettings& settings, uintptr_t tokens, int64_t rows, int64_t width,
            int num_threads) const {
    for_each_row(rows, num_threads, [&](int64_t row) {
      at<int64_t>(tokens)[row] = draw_token(*kernels_, row_of(logits, row, width), width, settings.of_row(row));
    });
  }

  // In the rows of logits that ``numbers`` names, minus infinity for every token that ``allowed``, a bit for each
  // token of each of these rows, does not allow.
  void forbid(uintptr_t logits, uintptr_t allowed, uintptr_t numbers, int64_t count, int64_t width,
              int num_threads) const {
    const int64_t words = (width + 31) / 32;
    for_each_row(count, num_threads, [&](int64_t index) {
      char* row = at<char>(logits) + at<int64_t>(numbers)[index] * width * item_bytes();
      const uint32_t* bits = at<uint32_t>(allowed) + index * words;
      if (element_ != kFloat32)
        forbid_tokens(reinterpret_cast<uint16_t*>(row), width, bits, element_ == kFloat16 ? uint16_t{0xFC00} : uint16_t{0xFF80});
      else
        forbid_tokens(reinterpret_cast<float*>(row), width, bits, -std::numeric_limits<float>::infinity());
    });
  }

  const Kernels& table() const { return *kernels_; }
  int64_t item_bytes() const { return element_ == kFloat32 ? 4 : 2; }

 private:
  template <class Work>
  static void for_rows(int64_t rows, int64_t row_bytes, int num_threads, Work work) {
    run_team(num_threads, [&](Team& team) { team.for_each_range(rows, row_bytes, work); });
  }

  template <class Work>
  static void for_each_row(int64_t rows, int num_threads, Work work) {
    const py::gil_scoped_release unlocked;
    run_team(num_threads, [&](Team& team) { team.for_each_item(rows, [&](int64_t row, int64_t) { work(row); }); });
  }

  const char* row_of(uintptr_t matrix, int64_t row, int64_t width) const {
    return at<char>(matrix) + row * width * item_bytes();
  }

  const Kernels* kernels_ = nullptr;
  ElementType element_;
};

// A packed weight matrix, as Python sees it; ``packed`` stays in Python's hands.
class BoundLinear {
 public:
  BoundLinear(const BoundKernels& kernels, int64_t out_features, int64_t in_features, const std::vector<float>& scale,
              const std::vector<float>& bias, std::optional<BlockFormat> blocks)
      : linear_(kernels.table(), out_features, in_features, 4 / kernels.item_bytes(), scale, bias,
                blocks ? &kernels.table().blocks[*blocks] : nullptr) {
    if (in_features % (4 / kernels.item_bytes()))
      throw std::invalid_argument("a packed weight needs an even number of input features");
    for (const std::vector<float>* values : {&scale, &bias})
      if (!values->empty() && static_cast<int64_t>(values->size()) != out_features)
        throw std::invalid_argument("a packed weight needs one scale, and one bias, per output feature");
  }

  int64_t packed_bytes() const { return linear_.packed_bytes(); }

  void pack(uintptr_t weight, uintptr_t packed, int num_threads) {
    const py::gil_scoped_release unlocked;
    linear_.pack(at<void>(weight), at<void>(packed), num_threads);
  }

  void pack_blocks(uintptr_t values, uintptr_t scale, uintptr_t offset, uintptr_t sub_scale, uintptr_t sub_offset,
                   uintptr_t packed, int num_threads) {
    const py::gil_scoped_release unlocked;
    const BlockArrays weight{at<int8_t>(values), at<uint16_t>(scale), at<uint16_t>(offset), at<int8_t>(sub_scale),
                             at<int8_t>(sub_offset)};
    linear_.pack_blocks(weight, at<void>(packed), num_threads);
  }

  void use_packed(uintptr_t packed) { linear_.use_packed(at<void>(packed)); }

  void multiply(uintptr_t x, uintptr_t out, int64_t rows, int num_threads) const {
    const py::gil_scoped_release unlocked;
    run_team(num_threads, [&](Team& team) { linear_.multiply(team, at<void>(x), at<void>(out), rows); });
  }

  const PackedLinear* get() const { return &linear_; }

 private:
  PackedLinear linear_;
};

DenseMlp make_dense_mlp(const BoundLinear& gate_up, const BoundLinear& down, Activation activation) {
  return {gate_up.get(), down.get(), activation};
}

SparseMlp make_sparse_mlp(const BoundLinear& router, const std::vector<const DenseMlp*>& experts,
                          const DenseMlp* shared, int num_per_token, bool normalize_weights) {
  const auto num_experts = static_cast<int>(experts.size());
  if (num_experts > kMostExperts || num_per_token < 1 || num_per_token > num_experts ||
      router.get()->out_features() != num_experts + (shared != nullptr))
    throw std::invalid_argument("no native kernel for " + std::to_string(num_per_token) + " of " +
                                std::to_string(num_experts) + " experts and a router of " +
                                std::to_string(router.get()->out_features()) + " rows");
  std::vector<DenseMlp> copies;
  for (const DenseMlp* expert : experts) copies.push_back(*expert);
  std::optional<DenseMlp> shared_copy;
  if (shared != nullptr) shared_copy = *shared;
  return {router.get(), std::move(copies), shared_copy, num_per_token, normalize_weights};
}

// A decoder, as Python sees it. Weights and linears stay in Python's hands.
class BoundDecoder {
 public:
  BoundDecoder(const BoundKernels& kernels, int64_t hidden, int64_t vocab_size, uintptr_t embeddings, uintptr_t norm,
               const BoundLinear& head, int64_t num_positions, int rotary_dim, bool norm_rows, float eps, float scale,
               float attention_softcap, float residual_multiplier, float logit_scale, float logit_softcap)
      : stack_(kernels.table(), kernels.item_bytes(),
               {hidden, vocab_size, at<void>(embeddings), at<void>(norm), head.get(), num_positions, rotary_dim,
                norm_rows, eps, scale, attention_softcap, residual_multiplier, logit_scale, logit_softcap}) {}

  void add(uintptr_t attention_norm, const BoundLinear& qkv, uintptr_t q_norm, uintptr_t k_norm,
           const BoundLinear& attention_output, uintptr_t attention_output_norm, uintptr_t mlp_norm, const Mlp& mlp,
           uintptr_t mlp_output_norm, uintptr_t cos_sin, int window) {
    stack_.add({at<void>(attention_norm), qkv.get(), at<void>(q_norm), at<void>(k_norm), attention_output.get(),
                at<void>(attention_output_norm), at<void>(mlp_norm), &mlp, at<void>(mlp_output_norm),
                at<float>(cos_sin), window});
  }

  void run(const std::vector<Step*>& steps, uintptr_t token_ids, const std::vector<uintptr_t>& kv_layers,
           uintptr_t wanted_rows, int64_t num_wanted, uintptr_t logits, uintptr_t largest, uintptr_t progress,
           int num_threads, Helpers* helpers) {
    if (kv_layers.size() != stack_.num_layers() || steps.size() != stack_.num_layers())
      throw std::invalid_argument(std::to_string(kv_layers.size()) + " KV layers and " + std::to_string(steps.size()) +
                                  " steps for " + std::to_string(stack_.num_layers()) + " layers");
    std::vector<void*> pools;
    for (const uintptr_t address : kv_layers) pools.push_back(at<void>(address));
    const py::gil_scoped_release unlocked;
    stack_.run(steps, at<int64_t>(token_ids), pools,
               {at<int64_t>(wanted_rows), num_wanted, at<void>(logits), at<int64_t>(largest)},
               Progress(at<uint64_t>(progress)), num_threads, helpers);
  }

 private:
  DecoderStack stack_;
};

Step make_step(int64_t num_blocks, int num_kv_heads, int group, int head_dim, int block_size, uintptr_t query_start,
               uintptr_t context_lens, uintptr_t block_tables, int64_t num_rows, int64_t num_sequences,
               int64_t table_width) {
  if (head_dim < 16 || head_dim % 16 || head_dim > kMaxHeadDim || block_size < kMinBlockSize ||
      block_size > kMaxBlockSize || block_size % kMinBlockSize || kTileKeys % block_size || group < 1 || group > kTileRows)
    throw std::invalid_argument("no native kernel for head dimension " + std::to_string(head_dim) + ", block size " +
                                std::to_string(block_size) + ", " + std::to_string(group) + " query heads per KV head");
  const StepArrays arrays{at<int32_t>(query_start), at<int32_t>(context_lens), at<int32_t>(block_tables),
                          num_rows, num_sequences, table_width};
  return Step({num_blocks, num_kv_heads, group, head_dim, block_size}, arrays);
}

}  // namespace
}  // namespace disagg

PYBIND11_MODULE(_native, module) {
  using namespace disagg;
  module.doc() = "CPU kernels over paged KV blocks; see kernel_table.h for the layouts.";
  module.def("use_openmp", &use_openmp, py::arg("path"));
  module.def("instruction_sets", &instruction_sets);
  py::enum_<Activation>(module, "Activation").value("SILU", kSilu).value("GELU_TANH", kGeluTanh);
  py::class_<Step>(module, "Step")
      .def(py::init(&make_step), py::kw_only(), py::arg("num_blocks"), py::arg("num_kv_heads"), py::arg("group"),
           py::arg("head_dim"), py::arg("block_size"), py::arg("query_start"), py::arg("context_lens"),
           py::arg("block_tables"), py::arg("num_rows"), py::arg("num_sequences"), py::arg("table_width"));
  py::class_<DrawSettings>(module, "DrawSettings")
      .def(py::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, float>(), py::kw_only(),
           py::arg("temperature"), py::arg("top_p"), py::arg("min_p"), py::arg("top_k"), py::arg("seed"),
           py::arg("position"), py::arg("floor"));
  py::enum_<ElementType>(module, "ElementType")
      .value("FLOAT32", kFloat32)
      .value("BFLOAT16", kBFloat16)
      .value("FLOAT16", kFloat16);
  py::class_<BoundKernels>(module, "Kernels")
      .def(py::init<const std::string&, ElementType>(), py::arg("instruction_set"), py::arg("element"))
      .def("rms_norm", &BoundKernels::rms_norm)
      .def("gate", &BoundKernels::gate)
      .def("scale_and_cap", &BoundKernels::scale_and_cap)
      .def("rope_and_write_kv", &BoundKernels::rope_and_write_kv)
      .def("attention", &BoundKernels::attention)
      .def("find_largest", &BoundKernels::find_largest)
      .def("draw", &BoundKernels::draw)
      .def("forbid", &BoundKernels::forbid);
  py::enum_<BlockFormat>(module, "BlockFormat")
      .value("BYTES32", kBytes32)
      .value("BYTES32_OFFSET", kBytes32Offset)
      .value("BYTES32_SUB_OFFSET", kBytes32SubOffset)
      .value("BYTES16_SUB", kBytes16Sub)
      .value("NIBBLES32_OFFSET", kNibbles32Offset)
      .value("NIBBLES32_SUB_OFFSET", kNibbles32SubOffset);
  py::class_<BoundLinear>(module, "Linear")
      .def(py::init<const BoundKernels&, int64_t, int64_t, const std::vector<float>&, const std::vector<float>&,
                    std::optional<BlockFormat>>(),
           py::arg("kernels"), py::arg("out_features"), py::arg("in_features"), py::arg("scale"), py::arg("bias"),
           py::arg("blocks") = py::none())
      .def("packed_bytes", &BoundLinear::packed_bytes)
      .def("pack", &BoundLinear::pack)
      .def("pack_blocks", &BoundLinear::pack_blocks, py::kw_only(), py::arg("values"), py::arg("scale"),
           py::arg("offset"), py::arg("sub_scale"), py::arg("sub_offset"), py::arg("packed"), py::arg("num_threads"))
      .def("use_packed", &BoundLinear::use_packed)
      .def("multiply", &BoundLinear::multiply);
  py::class_<Mlp>(module, "Mlp");
  py::class_<DenseMlp, Mlp>(module, "DenseMlp")
      .def(py::init(&make_dense_mlp), py::kw_only(), py::arg("gate_up"), py::arg("down"),
           py::arg("activation"));
  py::class_<SparseMlp, Mlp>(module, "SparseMlp")
      .def(py::init(&make_sparse_mlp), py::kw_only(), py::arg("router"), py::arg("experts"), py::arg("shared"),
           py::arg("num_per_token"), py::arg("normalize_weights"));
  py::class_<BoundDecoder>(module, "Decoder")
      .def(py::init<const BoundKernels&, int64_t, int64_t, uintptr_t, uintptr_t, const BoundLinear&, int64_t, int, bool,
                    float, float, float, float, float, float>(),
           py::kw_only(), py::arg("kernels"), py::arg("hidden"), py::arg("vocab_size"), py::arg("embeddings"),
           py::arg("norm"), py::arg("head"), py::arg("num_positions"), py::arg("rotary_dim"), py::arg("norm_rows"),
           py::arg("eps"), py::arg("scale"), py::arg("attention_softcap"), py::arg("residual_multiplier"),
           py::arg("logit_scale"), py::arg("logit_softcap"))
      .def("add", &BoundDecoder::add, py::kw_only(), py::arg("attention_norm"), py::arg("qkv"), py::arg("q_norm"),
           py::arg("k_norm"), py::arg("attention_output"), py::arg("attention_output_norm"), py::arg("mlp_norm"),
           py::arg("mlp"), py::arg("mlp_output_norm"), py::arg("cos_sin"), py::arg("window"))
      .def("run", &BoundDecoder::run, py::kw_only(), py::arg("steps"), py::arg("token_ids"), py::arg("kv_layers"),
           py::arg("wanted_rows"), py::arg("num_wanted"), py::arg("logits"), py::arg("largest"),
           py::arg("progress"), py::arg("num_threads"), py::arg("helpers").none(true));
  py::class_<CoreBoard>(module, "CoreBoard")
      .def(py::init([](uintptr_t cells, const std::vector<int>& own) {
             return std::make_unique<CoreBoard>(at<CoreCell>(cells), own);
           }),
           py::arg("cells"), py::arg("own"))
      .def("take_back", &CoreBoard::take_back)
      .def("lend", &CoreBoard::lend);
  module.attr("CORE_CELL_BYTES") = sizeof(CoreCell);
  py::class_<Helpers>(module, "Helpers")
      .def(py::init<CoreBoard&, const std::vector<int>&>(), py::arg("board"), py::arg("cores"), py::keep_alive<1, 2>())
      .def("allow", &Helpers::allow, py::arg("number"))
      .def("take_seconds", &Helpers::take_seconds);
}
