#include "step.h"

#include <algorithm>
#include <climits>
#include <stdexcept>
#include <string>

namespace disagg {

namespace {

[[noreturn]] void refuse(const std::string& what, int64_t value, const std::string& where, int64_t limit) {
  throw std::out_of_range(what + " " + std::to_string(value) + " of " + where + " is outside 0 to " +
                          std::to_string(limit));
}

}  // namespace

Step::Step(const StepShape& shape, const StepArrays& arrays)
    : shape_(shape),
      positions_(arrays.num_rows),
      slots_(arrays.num_rows),
      query_start_(arrays.query_start, arrays.query_start + arrays.num_sequences + 1),
      context_lens_(arrays.context_lens, arrays.context_lens + arrays.num_sequences),
      tables_(arrays.block_tables, arrays.block_tables + arrays.num_sequences * arrays.table_width),
      table_width_(arrays.table_width) {
  if (query_start_.front() != 0 || query_start_.back() != arrays.num_rows)
    throw std::out_of_range("query_start must run from 0 to the number of rows, " + std::to_string(arrays.num_rows));
  // All lengths before any use of one: a wrong one must not have been followed.
  for (int64_t sequence = 0; sequence < arrays.num_sequences; ++sequence) check_sequence(sequence);
  for (int64_t sequence = 0; sequence < arrays.num_sequences; ++sequence) find_slots(sequence);
}

void Step::check_sequence(int64_t sequence) const {
  const std::string where = "sequence " + std::to_string(sequence);
  const int64_t rows = int64_t{query_start_[sequence + 1]} - query_start_[sequence];
  const int64_t context = context_lens_[sequence];
  const int64_t longest = table_width_ * shape_.block_size;
  if (context < 0 || context > longest) refuse("context length", context, where, longest);
  if (rows < 0 || rows > context) refuse("number of new tokens", rows, where, context);
  const int32_t* table = tables_.data() + sequence * table_width_;
  for (int64_t block = 0; block * shape_.block_size < context; ++block)
    if (table[block] < 0 || table[block] >= shape_.num_blocks)
      refuse("block id", table[block], where, shape_.num_blocks - 1);
}

void Step::find_slots(int64_t sequence) {
  const int32_t* table = tables_.data() + sequence * table_width_;
  int32_t position = context_lens_[sequence] - (query_start_[sequence + 1] - query_start_[sequence]);
  for (int32_t row = query_start_[sequence]; row < query_start_[sequence + 1]; ++row, ++position) {
    positions_[row] = position;
    slots_[row] = table[position / shape_.block_size] * shape_.block_size + position % shape_.block_size;
  }
  longest_context_ = std::max(longest_context_, position);
}

Step::Plan* Step::find_plan(int window) {
  for (Plan& plan : plans_)
    if (plan.window == window) return &plan;
  return nullptr;
}

void Step::prepare(int window) {
  if (find_plan(window) != nullptr) return;
  Plan plan{window, {}, {}, 0};
  for (int32_t sequence = 0; sequence < static_cast<int32_t>(context_lens_.size()); ++sequence) {
    if (query_start_[sequence + 1] - query_start_[sequence] == 1) {
      plan_decode(plan, sequence);
    } else {
      plan_prefill(plan, sequence);
    }
  }
  // Long pieces first, so that no thread is left with one at the end.
  std::stable_sort(plan.items.begin(), plan.items.end(), [](const AttentionItem& a, const AttentionItem& b) {
    return int64_t{a.num_tokens} * (a.key_end - a.key_begin) > int64_t{b.num_tokens} * (b.key_end - b.key_begin);
  });
  if (partials_.size() < static_cast<size_t>(plan.partial_floats)) partials_.resize(plan.partial_floats);
  plans_.push_back(std::move(plan));
}

void Step::plan_prefill(Plan& plan, int32_t sequence) const {
  const int32_t first = query_start_[sequence];
  const int32_t rows = query_start_[sequence + 1] - first;
  const int32_t tile = kTileRows / shape_.group;
  for (int32_t kv_head = 0; kv_head < shape_.num_kv_heads; ++kv_head)
    for (int32_t row = 0; row < rows; row += tile) {
      AttentionItem item{};
      item.sequence = sequence;
      item.kv_head = kv_head;
      item.num_kv_heads = 1;
      item.first_row = first + row;
      item.num_tokens = std::min(tile, rows - row);
      item.first_position = context_lens_[sequence] - rows + row;
      item.key_begin = first_key(item.first_position, plan.window);
      item.key_end = item.first_position + item.num_tokens;
      item.split_group = -1;
      plan.items.push_back(item);
    }
}

void Step::plan_decode(Plan& plan, int32_t sequence) const {
  const int32_t heads_at_once = kTileRows / shape_.group;
  for (int32_t kv_head = 0; kv_head < shape_.num_kv_heads; kv_head += heads_at_once) {
    AttentionItem whole{};
    whole.sequence = sequence;
    whole.kv_head = kv_head;
    whole.num_kv_heads = std::min(heads_at_once, shape_.num_kv_heads - kv_head);
    whole.first_row = query_start_[sequence];
    whole.num_tokens = 1;
    whole.first_position = context_lens_[sequence] - 1;
    whole.key_begin = first_key(whole.first_position, plan.window);
    whole.key_end = context_lens_[sequence];
    whole.split_group = -1;
    plan_ranges(plan, whole);
  }
}

void Step::plan_ranges(Plan& plan, const AttentionItem& whole) const {
  const int32_t first = whole.key_begin / kSplitKeys;
  const int32_t last = (whole.key_end - 1) / kSplitKeys;
  if (first == last) {
    plan.items.push_back(whole);
    return;
  }
  const auto group = static_cast<int32_t>(plan.split_groups.size());
  plan.split_groups.push_back({plan.partial_floats, last - first + 1, std::make_unique<std::atomic<int32_t>>(0)});
  for (int32_t split = first; split <= last; ++split) {
    AttentionItem item = whole;
    item.key_begin = std::max(whole.key_begin, split * kSplitKeys);
    item.key_end = std::min(whole.key_end, (split + 1) * kSplitKeys);
    item.split_group = group;
    item.partial = plan.partial_floats;
    plan.items.push_back(item);
    plan.partial_floats += int64_t{whole.num_kv_heads} * shape_.group * (shape_.head_dim + 2);
  }
}

int32_t Step::first_key(int32_t position, int window) const {
  return window > position ? 0 : (position - window + 1) / shape_.block_size * shape_.block_size;
}

std::array<int32_t, 2> Step::first_blocks(const AttentionItem& item) const {
  const int32_t first = item.key_begin / shape_.block_size;
  const int32_t last = (item.key_end - 1) / shape_.block_size;
  const int32_t* table = tables_.data() + item.sequence * table_width_;
  return {table[first], table[std::min(first + 1, last)]};
}

void Step::attend(Team& team, const Kernels& kernels, const void* q, void* out, const void* kv_layer,
                  const AttentionScores& scores) {
  Plan& plan = *find_plan(scores.window);
  const AttentionArgs args{q,
                           out,
                           kv_layer,
                           tables_.data(),
                           table_width_,
                           shape_.num_kv_heads,
                           shape_.group,
                           shape_.head_dim,
                           shape_.block_size,
                           scores.scale,
                           scores.softcap,
                           scores.window};
  const auto num_items = static_cast<int64_t>(plan.items.size());
  team.for_each_item(num_items, [&](int64_t index, int64_t next) {
    const AttentionItem& item = plan.items[index];
    if (item.num_tokens > 1) return kernels.prefill(args, item);
    const std::array<int32_t, 2> following = first_blocks(plan.items[next < num_items ? next : index]);
    if (item.split_group < 0) return kernels.decode(args, item, nullptr, following.data());
    kernels.decode(args, item, partials_.data() + item.partial, following.data());
    // Whoever finishes the last range of a decode joins all of them, in their order: same sums whatever the timing.
    const SplitGroup& group = plan.split_groups[item.split_group];
    if (group.num_finished->fetch_add(1, std::memory_order_acq_rel) + 1 == group.num_partials) {
      group.num_finished->store(0, std::memory_order_relaxed);
      kernels.merge(args, item, partials_.data() + group.first_partial, group.num_partials);
    }
  });
}

}  // namespace disagg
