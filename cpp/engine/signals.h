#pragma once

// What a policy looks at, of one layer: signal.cpp, attn*.cpp.

#include "policy.h"

#include "llama.h"

#include <cstdint>
#include <vector>

namespace kvc {

// Signals of one layer, host copies. The arrays a policy did not ask for are empty.
struct layer_signals {
    int32_t il, n_kv, n_head, n_head_kv, head_dim, n_query, value_dim;
    std::vector<int32_t> pos;  // I32 [n_head_kv, n_kv]
    std::vector<float>   attn; // F32 [n_head, n_kv]
    std::vector<float>   sums; // F32 [n_head_kv, n_kv]
    std::vector<float>   keys; // F32 [n_head_kv, n_kv, head_dim]
    std::vector<float>   probed; // F32 [n_head_kv, n_kv]
    std::vector<float>   q_mean; // F32 [n_head, head_dim]
    std::vector<float>   q_cov;  // F32 [n_head, head_dim, head_dim]
    std::vector<float>   v_norm; // F32 [n_head_kv, n_kv]
    std::vector<float>   o_norm; // F32 [n_head, n_kv]
    std::vector<float>   attn_rows;  // F32 [n_head, n_query, n_kv]
    std::vector<float>   value_rows; // F32 [n_head_kv, n_kv, value_dim]
    std::vector<float>   reduced;    // F32 [n_head_kv, n_out, n_kv] by policy::reduce_keys()

    layer_view view(int32_t n_layer, int32_t budget) const;
    size_t n_bytes() const;
};

// One of the ring of the last queries, and what it counts.
struct ring_query {
    llama_pos pos;
    int32_t   row; // of the ring
    float     weight;
};

// Rows of a layer's ring and its KV heads that one graph takes.
struct ring_part {
    int32_t row, n_row, head, n_head;

    bool has(const ring_query & q) const { return q.row >= row && q.row < row + n_row; }
};

// Up to which of n_kv slots each query sees, I32 [n_query]: those of no later position.
std::vector<int32_t> seen_by(const std::vector<ring_query> & queries, const int32_t * pos, int32_t n_kv);

// How a layer's queries were rotated before they reached attention, read off the model's own graph.
struct rotation {
    bool          rope = false;
    int32_t       params[GGML_MAX_OP_PARAMS/sizeof(int32_t)] = {}; // of ggml_rope_ext
    ggml_tensor * factors = nullptr; // of its frequencies, or null
    int32_t       n_hadamard = 0;    // side of the Hadamard matrix that quantized keys are mixed with, 0: none

    bool pairs_apart() const { return params[2] != GGML_ROPE_TYPE_NORMAL; } // the halves of a head, else neighbours
    static bool find(const ggml_tensor * q, rotation & res); // false: the queries are changed after it
};

} // namespace kvc
