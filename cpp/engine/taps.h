#pragma once

// What attention leaves behind in the model's graph, in tensors beside the cache: its last queries, sums of its
// probabilities. taps.cpp says where they lie, tap.cpp writes them in the graph.

#include "layout.h"
#include "signals.h"

#include "ggml-cpp.h"

#include <cstdint>
#include <memory>
#include <vector>

struct llama_cparams;
struct llama_ubatch;
class  llm_graph_result;

namespace kvc {

class taps {
public:
    // Throws std::invalid_argument where layers that share a cache differ in how they read it.
    taps(std::shared_ptr<const config> cfg, const llama_model & model, llama_kv_cache & kv, const kvc::layout & layout, const llama_cparams & cparams);

    struct layer_tensors {
        ggml_tensor * win  = nullptr; // F16 or F32 [head_dim*n_head, n_ring*n_stream] ring of the last queries
        ggml_tensor * sums = nullptr; // F32 [kv_size, n_head_kv, n_stream]
        ggml_tensor * ones = nullptr; // F32 [n_ubatch*n_head] all 1/g, 1/(g*n_reader) where several layers read
        ggml_tensor * inputs = nullptr; // F32 [1, window*n_stream] ring of the squared norms of what the last queries were made from
        bool out_prod = true;         // the layer's device has it
    };
    // What attention was given, for the graphs of ours.
    struct layer_attn { ggml_tensor * sinks = nullptr; float scale = 0; rotation turn; };

    std::vector<layer_tensors> tensors; // [n_layer]
    std::vector<layer_attn>    attn;    // [n_layer]
    std::vector<std::vector<int32_t>> readers; // [n_layer] layers of the model that read the cache of one, ascending: it, and who shares it

    // -- in the model's graph
    void tap_queries(llm_graph_result * res, int il, ggml_tensor * q, int64_t n_seqs, ggml_tensor * sinks, float kq_scale);
    ggml_tensor * graph_sums(ggml_context * ctx, int32_t ikv, ggml_tensor * kq, int64_t s0, int32_t h0) const;
    ggml_tensor * graph_dot(ggml_context * ctx, int32_t ikv, ggml_tensor * x, ggml_tensor * w) const;

    // -- read back
    int32_t n_ring(int32_t ikv) const; // queries in the ring of a sequence: a window of each reader
    std::vector<ring_query> of_all_readers(int32_t ikv, const std::vector<ring_query> & queries) const; // of the first one: their mean
    std::vector<float> read_ring(uint32_t s, int32_t ikv) const;   // F32 [n_ring, head_dim*n_head]
    std::vector<float> read_sums(uint32_t s, int32_t ikv) const;   // F32 [n_head_kv, n_slots]
    std::vector<float> read_inputs(uint32_t s, int32_t ikv) const; // F32 [window] squared norms

    // -- what happened to sequences
    void clear() const;                          // all of them
    void clear_sums(uint32_t s) const;
    void clear_free_sums(uint32_t s) const;      // of rows that hold nothing
    void copy(uint32_t s0, uint32_t s1) const;
    size_t n_bytes() const;

private:
    void find_readers(); // throws where they differ in what they read
    void alloc(const llama_cparams & cparams);
    void set_window_rows(ggml_tensor * rows, const llama_ubatch * ubatch, int32_t i_reader, int32_t n_reader) const;

    std::shared_ptr<const config> cfg;
    const llama_model  & model;
    llama_kv_cache     & kv;
    const kvc::layout  & layout;
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;
};

} // namespace kvc
