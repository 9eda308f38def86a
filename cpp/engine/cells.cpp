// kv_cells: a cache of fewer cells than the context has tokens. Evictions make room before each ubatch.
//
// Layers whose budgets differ are allocated at their own length: a layer of budget B_l has B_l + n_ubatch rows, and all
// of them together n_layer * kv_cells. A layer's rows begin at 0, so row = cell - cell_begin(layer). Where layers or
// heads share a budget, they draw their rows from a pool (pool.cpp). Where there is none, heads that differ are allocated
// alike, and no head keeps more than its layer has rows for.

#include "config.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <stdexcept>

namespace kvc {

static const uint32_t N_PAD     = 256; // as llama.cpp pads n_ctx
static const uint32_t N_TABLE   = 48;  // bytes of llama.cpp's cell table for a cell, at least
static const uint32_t N_LONGEST = 4;   // times kv_cells: what a layer may draw from the pool, and llama.cpp's cell table holds

uint32_t config::rows_of_layer(uint32_t il, uint32_t n_all) const {
    return il < rows.size() && rows[il] > 0 ? rows[il] : n_all;
}

// "1536" cells of a sequence, or "512MiB" of all sequences and layers that evict.
static int64_t parse_cells(const std::string & text, size_t bytes_per_cell) {
    size_t used = 0;
    double value = 0;
    try {
        value = std::stod(text, &used);
    } catch (const std::exception &) {
    }
    const std::string unit = text.substr(std::min(used, text.size()));
    const double scale = unit == "KiB" ? 1 << 10 : unit == "MiB" ? 1 << 20 : unit == "GiB" ? 1 << 30 : 0;
    if (used == 0 || !(value > 0 && value < 1e12) || (!unit.empty() && scale == 0) || (unit.empty() && value != (double) (int64_t) value)) {
        throw std::invalid_argument("kv_cells '" + text + "': a number of cells, or of bytes with KiB, MiB or GiB");
    }
    if (unit.empty()) {
        return GGML_PAD((int64_t) value, N_PAD);
    }
    return (int64_t) (value*scale/bytes_per_cell)/N_PAD*N_PAD;
}

static bool on_gpu(const llama_model & model, const llama_cparams & cparams, uint32_t il) {
    return cparams.offload_kqv && ggml_backend_dev_type(model.dev_layer(il)) != GGML_BACKEND_DEVICE_TYPE_CPU;
}

// Layers that will hold a row for every token: of a hybrid what its cache says, asked of one of a single cell.
static std::vector<uint32_t> layers_of(const llama_model & model, const llama_context_params & params, const llama_cparams & cparams) {
    const auto & hp = model.hparams;
    if (llm_arch_is_hybrid(model.arch)) {
        llama_cparams small = cparams;
        small.n_ctx = small.n_ctx_seq = small.n_seq_max = 1;
        const std::unique_ptr<llama_memory_i> memory(model.create_memory({ params.type_k, params.type_v, false, params.ctx_type, nullptr }, small));
        const auto * kv = parts_of(memory.get()).cache;
        return kv ? kv->get_layer_ids() : std::vector<uint32_t>();
    }
    std::vector<uint32_t> res;
    for (uint32_t il = 0; il < hp.n_layer(); ++il) {
        if (hp.has_kv(il) && !hp.is_swa(il)) {
            res.push_back(il);
        }
    }
    return res;
}

// K and V of one cell; a latent row is both.
static size_t row_bytes_of(const llama_model & model, const llama_context_params & params, uint32_t il) {
    const auto & hp = model.hparams;
    return ggml_row_size(params.type_k, hp.n_embd_k_gqa(il)) + (hp.is_mla() ? 0 : ggml_row_size(params.type_v, hp.n_embd_v_gqa(il)));
}

std::shared_ptr<const config> bound(std::shared_ptr<const config> cfg, const llama_model & model,
        const llama_context_params & params, const llama_cparams & cparams) {
    if (!cfg || cfg->cells_text.empty()) {
        return cfg;
    }
    const auto & hp = model.hparams;
    const auto layers = layers_of(model, params, cparams); // those that evict
    size_t bytes = 0;
    for (const uint32_t il : layers) {
        bytes += row_bytes_of(model, params, il);
    }
    if (layers.empty()) {
        return cfg; // refused with a reason when the engine is attached
    }
    const int64_t n_cells = parse_cells(cfg->cells_text, bytes*cparams.n_seq_max);
    if (n_cells >= cparams.n_ctx_seq) {
        return cfg;
    }
    const int64_t n_budget = cfg->prompt_budget.kind == budget::tokens ? (int64_t) cfg->prompt_budget.value : cfg->pol->min_budget();
    if (n_cells < n_budget + cparams.n_ubatch) {
        throw std::invalid_argument("kv_cells " + cfg->cells_text + " is " + std::to_string(n_cells) + " cells of a sequence: it has to hold "
                "the budget of " + std::to_string(n_budget) + " tokens and n_ubatch " + std::to_string(cparams.n_ubatch) + " new ones");
    }

    const auto device = [&](uint32_t il) { return on_gpu(model, cparams, il) ? model.dev_layer(il) : nullptr; };
    const bool off_host = std::any_of(layers.begin(), layers.end(), device);
    const bool one_device = std::all_of(layers.begin(), layers.end(), [&](uint32_t il) { return device(il) == device(layers[0]); });
    const std::string why = !cparams.flash_attn ? "with flash attention" : !one_device ? "on one device" : ""; // there is no pool
    if (off_host && !why.empty() && cfg->pol->heads_differ() && !cfg->pol->share.layers_differ()) {
        throw std::invalid_argument(cfg->spec + ": with kv_cells heads of different lengths share their rows off the CPU only " + why +
                ": use n_gpu_layers 0, or offload_kqv off");
    }
    if (cfg->pol->share.layers_differ() && !why.empty()) {
        if (cfg->own_share) {
            throw std::invalid_argument(cfg->spec + ": with kv_cells layers share their rows only " + why + ": give share=head");
        }
        LLAMA_LOG_WARN("%s: share=head, since with kv_cells layers share their rows only %s\n", cfg->spec.c_str(), why.c_str());
        spec sp = parse_spec(cfg->spec);
        sp.p.values["share"] = "head";
        cfg = make_config(sp.canonical(), cfg->prompt_budget.str(), cfg->decode_budget.str(), cfg->cells_text, cfg->guess);
    }
    auto c = std::make_shared<config>(*cfg);
    c->pooled = why.empty() && (c->pol->share.layers_differ() || c->pol->heads_differ());
    c->n_cells  = (int32_t) n_cells;
    c->n_reserve = (int32_t) cparams.n_ubatch;
    if (c->prompt_budget.kind == budget::none) {
        c->prompt_budget = { budget::tokens, (double) (n_cells - cparams.n_ubatch) };
    }
    request r;
    r.prompt    = true;
    r.n_head_kv = (int32_t) hp.n_head_kv(layers[0]);
    r.budget    = (int32_t) (n_cells - cparams.n_ubatch);
    for (size_t i = 0; i < layers.size(); ++i) {
        r.layers.push_back({ (int32_t) cparams.n_ctx_seq, 0, nullptr, nullptr });
    }
    const bool own_length = c->layers_differ && !c->pol->heads_differ() && !c->pooled;
    const auto n_keep = own_length ? c->pol->budgets(r) : std::vector<int32_t>(layers.size(), r.budget);

    c->rows.resize(hp.n_layer(), 0);
    for (size_t i = 0; i < layers.size(); ++i) {
        uint32_t n = (uint32_t) n_keep[i] + cparams.n_ubatch;
        if (own_length && off_host) { // of layers on the host, too: what all see ends where the longest one does
            n = GGML_PAD(n, N_PAD) + N_PAD; // kernels want whole blocks, and run() keeps up to one block more
        }
        c->rows[layers[i]] = std::min(n, cparams.n_ctx_seq);
    }
    if (c->pooled && off_host) {
        c->rows[layers[0]] += N_PAD; // attention reads whole blocks, also of the last heads
    }
    const uint32_t n_max = *std::max_element(c->rows.begin(), c->rows.end());
    if (hp.swa_type != LLAMA_SWA_TYPE_NONE && n_max < hp.n_swa + cparams.n_ubatch) {
        throw std::invalid_argument("kv_cells " + cfg->cells_text + ": this model's sliding window takes " +
                std::to_string(hp.n_swa + cparams.n_ubatch) + " cells, and llama.cpp gives it no more than the global layers have");
    }
    return c;
}

llama_cparams memory_cparams(const std::shared_ptr<const config> & cfg, const llama_cparams & cparams) {
    llama_cparams res = cparams;
    if (cfg && cfg->n_cells > 0) {
        const uint32_t n_most = *std::max_element(cfg->rows.begin(), cfg->rows.end());
        res.n_ctx_seq = cfg->pooled ? std::min(cparams.n_ctx_seq, GGML_PAD(N_LONGEST*n_most, N_PAD)) : n_most;
    }
    return res;
}

// An allocation larger than the memory may be granted all the same, and the process is killed once it is cleared.
void check_memory(const std::shared_ptr<const config> & cfg, const llama_model & model,
        const llama_context_params & params, const llama_cparams & cparams) {
    const uint64_t n_seq = cparams.n_seq_max;
    const uint32_t n_cells = memory_cparams(cfg, cparams).n_ctx_seq;
    uint64_t n_bytes = n_seq*n_cells*N_TABLE;
    for (const uint32_t il : layers_of(model, params, cparams)) {
        if (!on_gpu(model, cparams, il)) {
            n_bytes += n_seq*(cfg ? cfg->rows_of_layer(il, n_cells) : n_cells)*row_bytes_of(model, params, il);
        }
    }
    size_t n_free = 0, n_total = 0;
    ggml_backend_dev_memory(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), &n_free, &n_total);
    if (n_total > 0 && n_bytes > n_total) {
        const auto gib = [](uint64_t n) { return std::to_string(((n >> 29) + 1)/2) + " GiB"; };
        throw std::invalid_argument("a cache of " + std::to_string(n_seq*n_cells) + " cells takes " + gib(n_bytes) +
                ", and this machine has " + gib(n_total) + ": give a smaller n_ctx, or kv_cells");
    }
}

} // namespace kvc
