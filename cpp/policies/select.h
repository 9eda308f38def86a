#pragma once

// What policies share: how slots are ranked and picked, how budgets become whole numbers, reductions over heads.

#include "policy.h"

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace kvc {

// One flag per slot of a head: 1 is kept. A policy marks what it must keep, then fills up with the best scores.
using slot_marks = std::vector<uint8_t>;

// The one order of slots: higher score first, equal scores -> the older slot, NaN counts as -inf.
// As a number: the greater key is kept longer.
uint64_t rank_key(float score, int32_t slot);
int32_t  ranked_slot(uint64_t key);

// The first slot of a head that is not empty. pos: I32 [n_kv] of that head.
int32_t first_slot(const int32_t * pos, int32_t n_kv);

// Marks [begin, end), cut to the slots there are.
void mark_range(slot_marks & marks, int32_t begin, int32_t end);

int32_t count_marked(const slot_marks & marks);

// Slots still to choose once what is always kept is marked; throws if the budget does not hold that much.
// `what` says what is always kept, for the message.
int32_t count_left(const slot_marks & marks, int32_t n_keep, const std::string & what);

// Marks the n_best best of the unmarked slots in [begin, end), or all of them if there are no more.
void mark_best(slot_marks & marks, const float * score, int32_t begin, int32_t end, int32_t n_best);

// Neighbouring slots that live or die together: a chunk, a shot. Slots of it that are marked already are not its own.
struct unit { int32_t begin, end; float score; };

float mean_score(const slot_marks & marks, const unit & u, const std::vector<float> & token);

// Marks n_left slots: whole units, best first, equal scores -> the earlier one. A unit that does not fit is skipped for
// the next that does, or (skip = false) ends the search. What is left goes to the best tokens of the best unit that
// did not fit.
void mark_units(slot_marks & marks, const std::vector<unit> & units, const std::vector<float> & token, int32_t n_left,
                bool skip);

// Writes the marked slots, ascending. There must be exactly n_keep of them: anything else is a policy's bug.
void write_marked(const slot_marks & marks, int32_t n_keep, int32_t * out);

// Whole budgets from ideal ones: rounded down, cut to [n_min, n_kv] of the layer, then made to sum to
// n_layer * r.budget (or to all slots, if those are fewer). What is missing goes one slot each to the first layers
// with room, again and again; what is too much is taken one slot each from the last layers.
std::vector<int32_t> whole_budgets(const request & r, const std::vector<double> & ideal, int32_t n_min);

// GPU kernels want views of whole blocks, so layers have to differ by whole blocks of slots. These are the nearest numbers
// to n_keep that do, with no more slots together. A layer keeps n_least at least, and no more than it has. Where that cannot
// be, layers keep more than n_keep.
std::vector<int32_t> in_blocks(const request & r, const std::vector<int32_t> & n_keep, int32_t n_block, int32_t n_least);

// The same of heads, where they differ: [n_layer][n_head_kv], or nothing.
std::vector<std::vector<int32_t>> heads_in_blocks(const request & r, std::vector<std::vector<int32_t>> heads, int32_t n_block, int32_t n_least);

// Of lengths that have to be whole blocks below n_base, the first that is not; -1: all are.
int32_t off_blocks(int32_t n_base, const std::vector<int32_t> & n_held, int32_t n_block);

// What a head certainly keeps where its budget holds it: finite, so that it can be compared.
constexpr float BEST_SCORE = std::numeric_limits<float>::max();

// Reductions of what query heads give to cells, F32 [n_head, n_kv].
void mean_over_group(const layer_view & v, const float * given, float * out); // F32 [n_head_kv, n_kv]
void mean_over_heads(const layer_view & v, float * out); // F32 [n_head_kv, n_kv], the same numbers for every head

// F32 [n_kv], the scores of layer il summed over its KV heads.
std::vector<float> sum_over_heads(const request & r, int32_t il);

float sum(const float * a, int32_t n);
float dot(const float * a, const float * b, int32_t n);
float distance_squared(const float * a, const float * b, int32_t n);

// In [0, 1), from 24 bits of splitmix64(splitmix64(seed) ^ x): the same on every machine.
float hash_unit(uint64_t seed, uint64_t x);

// The same of a token in one KV head of one layer.
float hash_slot(uint64_t seed, int32_t il, int32_t h, int32_t pos);

} // namespace kvc
