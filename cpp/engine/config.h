#pragma once

// Which policy a context gets, and what of its memory evicts: config.cpp.

#include "policy.h"

#include <memory>
#include <string>
#include <vector>

struct llama_context_params;
struct llama_cparams;
struct llama_memory_i;
struct llama_model;
class  llama_kv_cache;
class  llama_memory_recurrent;

namespace kvc {

// What a context's memory is made of, as far as it is ours.
struct parts {
    llama_kv_cache         * cache     = nullptr; // a row per token in every layer of it: evicts, or would; null: none of ours
    llama_kv_cache         * windows   = nullptr; // the layers with sliding windows have one of their own
    llama_memory_recurrent * recurrent = nullptr; // the state of the other layers, of whatever length the context is
};

struct config {
    std::shared_ptr<const policy> pol;
    std::string spec;              // canonical
    decode_mode decode = decode_mode::none;
    bool        layers_differ = false;
    needs       need;
    int32_t     interval = 32;     // generated tokens between two evictions
    budget      prompt_budget;
    budget      decode_budget;
    bool        guess = true;      // a caller that knows nothing of us: find the prompt's end from the batches
    std::string cells_text;        // kv_cells as it was given
    bool        own_share = true;  // the spec named its share; false: auto
    bool        pooled    = false; // with kv_cells: layers draw their rows from one pool
    int32_t     n_cells   = 0;     // cells of the mean layer and a sequence; 0: as many as the context has tokens
    int32_t     n_reserve = 0;     // of them, those that an eviction of the prompt leaves free: n_ubatch
    std::vector<uint32_t> rows;    // [n_layer] that a layer is given with kv_cells, 0 or none: one for every cell

    bool is_bounded() const { return n_cells > 0; }
    uint32_t rows_of_layer(uint32_t il, uint32_t n_all) const; // cells.cpp
};

// The policy of the next context this thread creates; null: stock whatever the environment says.
void next_context(std::shared_ptr<const config> cfg);
void forget_next_context(); // the environment says it again

void check_budgets(const policy & pol, const std::string & name, decode_mode mode, const budget & prompt, const budget & decode);
std::shared_ptr<const config> make_config(const std::string & spec, const std::string & budget, const std::string & decode_budget,
        const std::string & cells, bool guess, bool pool = true); // pool: what share=auto may count on, with kv_cells
std::shared_ptr<const config> make_config(std::shared_ptr<const policy> pol, const std::string & name, decode_mode decode,
        const std::string & budget, const std::string & decode_budget, const std::string & cells);

// kv_cells: cells.cpp. The configuration with what a layer is given, what the cache is then built from, and whether the
// machine has the memory. Null: full. Throw std::invalid_argument.
std::shared_ptr<const config> bound(std::shared_ptr<const config> cfg, const llama_model & model, const llama_context_params & params,
        const llama_cparams & cparams);
llama_cparams memory_cparams(const std::shared_ptr<const config> & cfg, const llama_cparams & cparams);
void check_memory(const std::shared_ptr<const config> & cfg, const llama_model & model, const llama_context_params & params,
        const llama_cparams & cparams);

parts parts_of(llama_memory_i * mem);
std::vector<std::string> architectures(); // llama.cpp's own list

} // namespace kvc
