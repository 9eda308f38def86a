#pragma once

// One sequence of a cache that evicts: what its layers hold, and what it was asked for. n_stream == n_seq_max, so a stream
// of llama.cpp's is a sequence, and has its number.

#include "config.h"

#include "llama.h"

#include <cstdint>
#include <memory>
#include <vector>

namespace kvc {

struct sequence {
    int32_t   n_base = 0;                   // cells of the compacted part
    std::vector<int32_t> n_kept;            // [n_layer] rows of it a layer holds
    std::vector<std::vector<int32_t>> kept; // a layer I32 [n_head_kv, n_kept] original positions, after -1s in a shorter head
    std::vector<int32_t> lacks;             // [n_layer, n_head_kv] how many -1s
    llama_pos floor = 0;                    // every head of every layer holds [floor, end)
    llama_pos seen  = 0;                    // tokens that the last eviction saw
    llama_pos gen   = -1;                   // first generated position; -1: still the prompt
    llama_pos past_end = -1;                // the recurrent state of all before it is kept; -1: none is
    std::vector<uint8_t> past;              // in here, once another token has come
    int32_t   n_prompt = 0;                 // slots of the mean layer when generation began
    std::vector<std::vector<float>> probed; // a layer F32 [n_probed, n_head_kv]: of its first slots
    std::vector<llama_token> tokens;        // [end] by position
    std::vector<span>        spans;         // of set_spans()
    bool      has_spans = false;            // it was called, maybe with none: what lies in no span stays
    std::shared_ptr<const config> cfg;      // the context's, or set_policy()'s
    budget    prompt_budget;                // of the configuration, or set_budget()'s
    budget    decode_budget;
    int64_t   n_evictions = 0;
    int64_t   n_evicted   = 0;              // slots of the mean layer
    double    evict_ms    = 0;
    std::vector<llama_pos>   win_pos;       // [window] position of the query in each ring row, -1: none

    llama_pos end() const { return (llama_pos) tokens.size(); }
    int64_t   n_decode() const;    // tokens of the answer that may stay
    bool      has_limit() const;   // of an answer that has begun
    llama_pos first_query() const; // of those that score
    bool      has_queries() const; // does a policy that scores by the last queries have one?
};

} // namespace kvc
