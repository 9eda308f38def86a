#pragma once

// What a policy looks at, read from the cache and from what attention left behind, and the scores that it gives.
//
//   signal.cpp  one layer's signals
//   attn.cpp    what some queries give to a layer's cells: attn_tiles.cpp on the CPU, attn_graph.cpp elsewhere
//   reduce.cpp  what policies need of keys and values, computed where they lie
//   fit.cpp     the queries that are to be expected
//   heard.cpp   what a probe attended to
//   output.cpp  what values become behind the output projection

#include "layout.h"
#include "signals.h"
#include "taps.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace kvc {

class scorer {
public:
    // Throws std::invalid_argument where the model has not what the policy looks at.
    scorer(std::shared_ptr<const config> cfg, const llama_model & model, llama_kv_cache & kv, const kvc::layout & layout, const kvc::taps & taps,
           const std::vector<sequence> & sequences);

    // whole: the keys themselves, although the policy has a graph for what it needs of them.
    layer_signals read_signals(llama_context * lctx, uint32_t s, int32_t ikv, bool whole = false) const;
    std::vector<float> score(uint32_t s, const layer_signals & sig, int32_t budget) const; // F32 [n_head_kv, n_kv], -inf where a slot is empty

    // What the last n_new of the n_probe tokens of a probe about [begin, end) gave each slot: F32 [n_head, n_kv], the mean or
    // the largest. KVzip+ divides by |h| of the query.
    std::vector<float> read_probe(llama_context * lctx, uint32_t s, int32_t ikv, int32_t n_new, int32_t n_probe, llama_pos begin,
                                  llama_pos end) const;
    std::vector<float> output_norms(llama_context * lctx, uint32_t s, int32_t ikv) const; // F32 [n_head, n_kv]

    // -- graphs, which the device of a layer is asked for when the context is created
    // softmax(scale * Q K^T + mask) of some rows of the ring and KV heads of a lane: F32 [n_kv, n_row, n_head], of a mask F32
    // [n_kv, n_row].
    ggml_tensor * graph_scores(ggml_context * ctx, uint32_t s, int32_t ikv, ggml_tensor * mask, const ring_part & p) const;
    // Of probabilities [n_kv, n_row, n_head] and a weight F32 [1, n_row, n_head] of each row: [n_kv, 1, n_head] or, of the
    // largest, [1, n_kv, n_head].
    ggml_tensor * graph_reduced(ggml_context * ctx, int32_t ikv, ggml_tensor * each, ggml_tensor * weight, bool largest) const;
    ring_part largest_part(int32_t ikv) const; // that one graph ever takes

private:
    using lane = kvc::layout::lane;

    // signal.cpp
    layer_signals no_signals(uint32_t s, int32_t ikv) const;
    void read_attn(llama_context * lctx, uint32_t s, layer_signals & sig) const;
    std::vector<float> read_rows(uint32_t s, int32_t ikv, bool values) const; // F32 [n_head_kv, n_kv, head_dim] as they lie in the cache
    void read_values(uint32_t s, layer_signals & sig) const;
    void read_probed(uint32_t s, layer_signals & sig) const;

    // attn.cpp
    // Heads that have as many slots, and which of those are seen: their own slots, ascending; empty: all.
    struct watched { lane x; int32_t n_kv; const int32_t * pos; std::vector<int32_t> slots; };
    using queries_of = std::vector<ring_query>;
    using add_row = std::function<void(int32_t h, size_t i, const float * row)>; // what query i gives in query head h: F32 [n_kv]
    std::vector<watched> watch(uint32_t s, const layer_signals & sig, const std::vector<int32_t> & slots) const;
    // F32 [n_head, n_kv]: the weighted sum, or the largest, of what the queries give to each slot. slots: those that
    // they see, ascending, of all heads; empty: all of them.
    std::vector<float> attention_of(llama_context * lctx, uint32_t s, const layer_signals & sig, const queries_of & queries, bool largest,
                                    const std::vector<int32_t> & slots = {}) const;
    // F32 [n_head, n_query, n_kv]: of each query, in their order.
    std::vector<float> attention_rows(llama_context * lctx, uint32_t s, const layer_signals & sig, const queries_of & queries) const;

    // attn_tiles.cpp
    bool has_tiles(int32_t ikv) const;
    std::vector<float> run_tiles(llama_context * lctx, uint32_t s, const layer_signals & sig, const watched & w, const lane & x,
                                 const std::vector<float> & ring, const queries_of & queries, const char * step) const;
    std::vector<float> attention_tiles(llama_context * lctx, uint32_t s, const layer_signals & sig, const watched & w, const queries_of & queries,
                                       bool largest) const;
    void tiles_rows(llama_context * lctx, uint32_t s, const layer_signals & sig, const watched & w, const queries_of & queries, const add_row & add) const;

    // attn_graph.cpp
    std::vector<float> attention_graph(llama_context * lctx, uint32_t s, const layer_signals & sig, const watched & w, const queries_of & queries,
                                       bool largest) const;
    void graph_rows(llama_context * lctx, uint32_t s, const layer_signals & sig, const watched & w, const queries_of & queries, const add_row & add) const;

    // reduce.cpp
    ggml_tensor * graph_head(ggml_context * ctx, uint32_t s, int32_t ikv, int32_t h, bool values) const;
    std::vector<float> run_heads(llama_context * lctx, uint32_t s, int32_t ikv, llm_graph_result * graph, const std::vector<ggml_tensor *> & heads,
                                 const std::function<void()> & set_inputs) const;
    bool reduce_keys  (llama_context * lctx, uint32_t s, layer_signals & sig) const; // false: the policy or the device has no graph for it
    bool reduce_values(llama_context * lctx, uint32_t s, layer_signals & sig) const;

    // fit.cpp
    void read_fit(llama_context * lctx, uint32_t s, layer_signals & sig) const;
    std::vector<float> read_turns(llama_context * lctx, int32_t ikv, const std::vector<llama_pos> & pos) const;

    // heard.cpp
    std::vector<int32_t> slots_of_chunk(uint32_t s, const layer_signals & sig, llama_pos begin, llama_pos end, llama_pos n_context) const;

    // output.cpp
    void find_outputs(); // throws where the model has no plain output projection
    const std::vector<float> & gram_of(llama_context * lctx, int32_t ikv) const; // F32 [n_head, head_dim, head_dim] W_O^h' W_O^h
    std::vector<float> plain_values(uint32_t s, int32_t ikv) const; // read_rows(), not mixed as a quantized cache has them

    std::shared_ptr<const config> cfg;
    const llama_model & model;
    llama_kv_cache    & kv;
    const kvc::layout & layout;
    const kvc::taps   & taps;
    const std::vector<sequence> & sequences;
    std::shared_ptr<std::vector<std::vector<float>>> grams; // [n_layer] gram_of(), shared by the contexts of a model
};

} // namespace kvc
