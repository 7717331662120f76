// Compiled once per instruction set, with DISAGG_ISA as its name and the compiler's flags for it (see setup.py).

#include "decode_attention.h"
#include "elementwise.h"
#include "experts.h"
#include "kernel_table.h"
#include "linear.h"
#include "linear_blocks.h"
#include "linear_int8.h"
#include "logits.h"
#include "prefill_attention.h"
#include "rope.h"

namespace disagg {
namespace DISAGG_ISA {

template <class E>
void prefill(const AttentionArgs& args, const AttentionItem& item) {
  PrefillTile<E>(args, item).run();
}

template <class E>
void decode(const AttentionArgs& args, const AttentionItem& item, float* partial, const int32_t* following) {
  DecodeRange<E> range(args, item, following);
  range.run();
  if (partial != nullptr) {
    range.write_partial(partial);
  } else {
    range.write_output();
  }
}

template <class E>
constexpr Kernels kernels_for() {
  return {prefill<E>,   decode<E>,        merge_ranges<E>,      kPanelWidth, pack_weight<E>,
          linear_scratch<E>, multiply<E>, pack_int8<E>, multiply_int8<E>,
          {block_kernels_for<E, Blocks<8, 32, false, false>>(), block_kernels_for<E, Blocks<8, 32, false, true>>(),
           block_kernels_for<E, Blocks<8, 32, true, true>>(), block_kernels_for<E, Blocks<8, 16, true, false>>(),
           block_kernels_for<E, Blocks<4, 32, false, true>>(), block_kernels_for<E, Blocks<4, 32, true, true>>()},
          rope_and_write_kv<E>, rms_norm<E>, {gate<E, Silu>, gate<E, GeluTanh>}, scale_and_cap<E>,
          choose_experts<E>, combine_experts<E>,
          find_largest<E>, find_likely<E>, logprob_of<E>};
}

extern const Kernels kKernels[kNumElementTypes];
const Kernels kKernels[kNumElementTypes] = {kernels_for<F32>(), kernels_for<BF16>(), kernels_for<F16>()};

}  // namespace DISAGG_ISA
}  // namespace disagg
