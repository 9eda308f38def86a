#pragma once

// pykvc's C API on top of llama.h: a small, versioned surface for programs that link the patched libllama.
//
// A policy reaches a context in one of two ways, because no public llama.cpp struct changes:
//   - kvc_next_context(), called on the thread that then calls llama_init_from_model();
//   - the environment, for programs that know nothing of this header:
//     LLAMA_ARG_KV_POLICY=snapkv:window=32  LLAMA_ARG_KV_BUDGET=512|25%  LLAMA_ARG_KV_DECODE_BUDGET=...
//     LLAMA_ARG_KV_CELLS=2048|512MiB
//
// Functions that can fail return a negative number and leave the reason in kvc_last_error() of the calling thread; a
// llama_decode() that returns 1 because an eviction failed does too. Not thread-safe per context, as llama.h is not.

#include "llama.h"

#define KVC_API_VERSION 7

#ifdef __cplusplus
extern "C" {
#endif

struct kvc_span { int32_t begin, end; }; // original positions [begin, end)

struct kvc_usage {
    int32_t n_cells;          // cells of one sequence that are allocated, in the mean layer
    int32_t n_layer;          // layers that may evict
    int32_t n_head_kv;        // of those layers; 0 where they differ
    size_t  bytes_allocated;  // all KV buffers, the signals, and copies of recurrent states
    size_t  bytes_signals;    // of them, what a policy looks at: the window of queries, the sums
    size_t  bytes_past;       // of them, what recurrent states were where the prompts ended
    size_t  bytes_used;       // rows held by the sequences
    size_t  bytes_full;       // rows they would hold without eviction
    int64_t n_evictions;
    int64_t n_evicted;        // rows of the mean layer
    double  score_ms, plan_ms, compact_ms;
};

LLAMA_API int32_t      kvc_version(void);
LLAMA_API const char * kvc_last_error(void); // "" if nothing failed

struct kvc_seq_usage {
    int32_t n_tokens;         // evaluated, evicted ones too
    int32_t n_cells;          // of the layer that holds most
    size_t  bytes_used, bytes_full;
    int64_t n_evictions;      // since the sequence was emptied
    int64_t n_evicted;        // rows of the mean layer
    double  evict_ms;
};

// The policy of the next context this thread creates, whatever the environment says. "full" or NULL: stock.
// cells: NULL, or fewer than the context has tokens, of one sequence (or bytes of all: 512MiB): evictions make room before
// each ubatch. guess_prompt_end: evict at the first single token after a prompt; otherwise the caller says so with kvc_evict().
// A context that llama.cpp refuses before it looks at the policy leaves it to the next one: call this again after
// llama_init_from_model() returned NULL.
LLAMA_API int32_t kvc_next_context(const char * policy, const char * budget, const char * decode_budget,
                                         const char * cells, bool guess_prompt_end);

// Budgets of one sequence, until it is emptied.
LLAMA_API int32_t      kvc_set_budget(struct llama_context * ctx, llama_seq_id seq_id, const char * budget, const char * decode_budget);

// Are these what kvc_next_context() takes? Changes nothing. 1: the policy evicts, 0: it is full.
LLAMA_API int32_t kvc_check_config(const char * policy, const char * budget, const char * decode_budget, const char * cells);

// The policy for a budget without one.
LLAMA_API const char * kvc_recommended_policy(void);

// guess_prompt_end of a context that exists, for callers that cannot be there when it is created.
LLAMA_API int32_t kvc_guess_prompt_end(struct llama_context * ctx, bool guess);

// Policy and budgets of one sequence, until it is emptied. NULL: the context's own; "" for a budget: none. The policy works on what the
// context was created with: its window of queries (or a part of it), its sums, its cells; "full" evicts only where kv_cells are too few.
LLAMA_API int32_t kvc_set_policy(struct llama_context * ctx, llama_seq_id seq_id, const char * policy, const char * budget, const char * decode_budget);

// Would kvc_set_policy() take these? From any thread, while the context works. 1: the policy uses spans, 0: it does not.
LLAMA_API int32_t kvc_check_policy(struct llama_context * ctx, const char * policy, const char * budget, const char * decode_budget);

// Units of the prompt for policies that need them: ascending, disjoint. What lies in none is kept, all if there is none; never called:
// sentences.
LLAMA_API int32_t kvc_set_spans(struct llama_context * ctx, llama_seq_id seq_id, const struct kvc_span * spans, size_t n_spans);

// Units of a prompt for kvc_set_spans(), in tokens: its sentences (separator NULL), or pieces that end with a separator. A token belongs
// to the unit in which its first byte lies; units of white space alone and tokens of no text are left out.
// out: NULL or room for n_tokens. Returns how many there are.
LLAMA_API int32_t kvc_segment(const struct llama_vocab * vocab, const llama_token * tokens, int32_t n_tokens, const char * separator,
                              struct kvc_span * out);

// Compress what the sequence holds to kv_budget, now. 1: evicted, 0: nothing was over budget.
LLAMA_API int32_t kvc_evict(struct llama_context * ctx, llama_seq_id seq_id);

// Tokens from here on belong to another prompt: it is evicted as a whole, what was generated before it included.
LLAMA_API int32_t kvc_begin_prompt(struct llama_context * ctx, llama_seq_id seq_id);

// Tokens from here on are generated ones: kv_decode_budget is theirs.
LLAMA_API int32_t kvc_end_prompt(struct llama_context * ctx, llama_seq_id seq_id);

// First position a llama_memory_seq_rm(seq, p0, -1) may start at, so that the sequence goes on from there: what lies before it is not
// whole, in the layers that evict or in a sliding window. Never behind the end. Recurrent layers go back to the floor, and to nothing
// between it and the end: their state is kept of where the prompt ended.
LLAMA_API llama_pos kvc_floor(struct llama_context * ctx, llama_seq_id seq_id);

// The same, if recurrent layers could go back anywhere: a state of theirs of a position from here on (llama_state_seq_get_data_ext() with
// LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) can be loaded, followed by llama_memory_seq_rm(seq, its position + 1, -1).
LLAMA_API llama_pos kvc_whole_from(struct llama_context * ctx, llama_seq_id seq_id);

// Where to evaluate a prompt of `end` positions from, which a sequence holds up to pos: pos, or an earlier one, from which the queries
// that its eviction under a policy (NULL: the context's) scores by are gone. It may lie below kvc_floor().
LLAMA_API llama_pos kvc_heard_from(struct llama_context * ctx, llama_seq_id seq_id, llama_pos pos, llama_pos end,
                                   const char * policy);

// The last of the positions up to pos that a sequence can go on from, so that llama_memory_seq_rm(seq, it, -1) succeeds. 0: its start alone.
LLAMA_API llama_pos kvc_back(struct llama_context * ctx, llama_seq_id seq_id, llama_pos pos);

// Rows layer il (0 .. n_layer-1) holds; out: NULL or I32 [n_head_kv, that many] original positions, -1 first where a head
// holds fewer (adakv).
LLAMA_API int32_t kvc_kept(struct llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t * out);

LLAMA_API int32_t kvc_get_usage(struct llama_context * ctx, struct kvc_usage * out);

// Of the cache, without signals: bytes in memory now. Rows that were never written, or evicted, take none on a Linux host.
LLAMA_API int64_t kvc_resident_bytes(struct llama_context * ctx);

// Of one sequence, its rows in the layers that evict.
LLAMA_API int32_t kvc_get_seq_usage(struct llama_context * ctx, llama_seq_id seq_id, struct kvc_seq_usage * out);

#ifdef __cplusplus
}
#endif
