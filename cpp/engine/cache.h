#pragma once

// Where llama.cpp creates a cache that may evict: its own class where the context has no policy, else one that asks an
// engine. All of llama.cpp reads this header, so it names our classes and includes none of their headers.

#include "llama-hparams.h"
#include "llama-memory.h"

class  llama_kv_cache;
class  llama_kv_cache_context;
class  llm_graph_result;
struct llm_graph_context;
struct llama_model;

namespace kvc {

class cache;
class engine;
class evictor;
class layout;
class scorer;
class taps;

// As the constructor of llama_kv_cache.
llama_kv_cache * new_cache(
        const llama_model & model, const llama_hparams & hparams, ggml_type type_k, ggml_type type_v, bool v_trans,
        bool offload, bool unified, uint32_t kv_size, uint32_t n_seq_max, uint32_t n_pad, uint32_t n_swa,
        llama_swa_type swa_type, llama_memory_t mem_other, const llama_memory_i::layer_filter_cb & filter,
        const llama_memory_i::layer_reuse_cb & reuse, const llama_memory_i::layer_share_cb & share);

// In a model's graph: where the keys or values of new tokens go, idxs unless the cache evicts, and what
// build_attn_mha() gives.
ggml_tensor * build_rows(llm_graph_result * res, const llama_kv_cache_context * mctx, int il, ggml_tensor * idxs,
        bool values);
ggml_tensor * build_attn(const llm_graph_context & graph, const llama_kv_cache_context * mctx, ggml_tensor * q,
        ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b, ggml_tensor * kq_mask, ggml_tensor * sinks,
        ggml_tensor * v_mla, float kq_scale, int il);

// The memory of a context that evicts is being created, by this thread: config.cpp.
bool is_creating();

// Rows of a layer of the cache that is being created: n_cells, or what kv_cells leaves it.
uint32_t rows_of_layer(uint32_t il, uint32_t n_cells);

} // namespace kvc
