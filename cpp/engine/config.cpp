// Which policy a new context gets, and which models can evict.

#include "engine.h"

#include "llama-arch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-idx.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include <cstdlib>
#include <stdexcept>
#include <utility>

namespace kvc {

std::string & last_error() {
    static thread_local std::string text;
    return text;
}

static thread_local std::shared_ptr<const config> next_cfg;
static thread_local bool next_set = false;

void next_context(std::shared_ptr<const config> cfg) {
    next_cfg = std::move(cfg);
    next_set = true;
}

void forget_next_context() {
    next_cfg = nullptr;
    next_set = false;
}

void check_budgets(const policy & pol, const std::string & name, decode_mode mode, const budget & prompt, const budget & decode) {
    if (decode.kind != budget::none && mode == decode_mode::none) {
        std::string names;
        for (const auto & info : policy_table()) {
            if (info.decode != decode_mode::none) {
                names += (names.empty() ? "" : ", ") + std::string(info.name);
            }
        }
        throw std::invalid_argument("kv_decode_budget: " + name + " does not evict generated tokens; these do: " + names);
    }
    if (prompt.kind == budget::tokens && prompt.value < pol.min_budget()) {
        throw std::invalid_argument("kv_budget " + prompt.str() + " is below what " + name +
                " always keeps (sinks, window, one more): at least " + std::to_string(pol.min_budget()) + " tokens");
    }
}

std::shared_ptr<const config> make_config(std::shared_ptr<const policy> pol, const std::string & name, decode_mode decode,
        const std::string & kv_budget, const std::string & kv_decode_budget, const std::string & kv_cells) {
    auto cfg = std::make_shared<config>();
    cfg->pol           = std::move(pol);
    cfg->spec          = name;
    cfg->decode        = decode;
    cfg->layers_differ = cfg->pol->heads_differ() || cfg->pol->share.layers_differ(); // longest heads do
    cfg->need          = cfg->pol->need();
    cfg->prompt_budget = parse_budget(kv_budget, "kv_budget");
    cfg->decode_budget = parse_budget(kv_decode_budget, "kv_decode_budget");
    cfg->cells_text    = kv_cells;
    cfg->guess         = false;
    if (cfg->pol->heads_differ() && decode != decode_mode::none) {
        throw std::invalid_argument(name + ": heads that keep different numbers of tokens (heads_differ) need decode 'none'");
    }
    check_budgets(*cfg->pol, name, decode, cfg->prompt_budget, cfg->decode_budget);
    return cfg;
}

std::shared_ptr<const config> make_config(const std::string & text, const std::string & kv_budget, const std::string & kv_decode_budget,
        const std::string & kv_cells, bool guess, bool pool) {
    spec sp = parse_spec(text);
    const bool own_share = sp.p.values.count("share") && sp.p.s("share") != "auto";
    settle_share(sp.p, kv_cells.empty() || pool);
    const std::string name = sp.info->name;
    if (name == "full") {
        if (!kv_budget.empty() || !kv_decode_budget.empty() || !kv_cells.empty()) {
            throw std::invalid_argument(std::string(kv_cells.empty() ? "kv_budget" : "kv_cells") +
                    ": the policy is full, which keeps everything; name one that evicts");
        }
        return nullptr;
    }
    auto pol = std::shared_ptr<const policy>(sp.info->make_policy(sp.p));
    const bool only_prompt = pol->share.heads_differ(); // what generated tokens a shorter head would keep is not known
    if (only_prompt && !kv_decode_budget.empty()) {
        throw std::invalid_argument("kv_decode_budget: with share=" + sp.p.s("share") + " " + name + " evicts the prompt only; share=head and layers "
                "evict generated tokens where the policy does");
    }
    auto cfg = std::const_pointer_cast<config>(make_config(std::move(pol), name, only_prompt ? decode_mode::none : sp.info->decode, kv_budget,
            kv_decode_budget, kv_cells));
    cfg->spec          = sp.canonical();
    cfg->layers_differ = cfg->layers_differ || sp.info->layers_differ;
    cfg->interval      = sp.p.values.count("interval") ? sp.p.i("interval") : cfg->interval;
    cfg->guess         = guess;
    cfg->own_share     = own_share;
    return cfg;
}

std::shared_ptr<const config> engine::configure(const llama_model & model, const llama_context_params & params, llama_cparams & cparams) {
    std::shared_ptr<const config> cfg;
    const bool asked = next_set;
    if (next_set) {
        cfg = std::move(next_cfg);
        forget_next_context();
    } else if (const char * name = getenv("LLAMA_ARG_KV_POLICY"); name && *name) {
        const char * b = getenv("LLAMA_ARG_KV_BUDGET");
        const char * d = getenv("LLAMA_ARG_KV_DECODE_BUDGET");
        const char * c = getenv("LLAMA_ARG_KV_CELLS");
        cfg = make_config(name, b ? b : "", d ? d : "", c ? c : "", true);
    }
    if (cfg && (cparams.ctx_other || cparams.ctx_type == LLAMA_CONTEXT_TYPE_MTP)) {
        const std::string why = "a draft's context reads another one's cells or layers, so its own cache is never evicted";
        if (asked) {
            throw std::invalid_argument(cfg->spec + ": " + why + ": give it the policy full");
        }
        LLAMA_LOG_WARN("%s is ignored here: %s\n", cfg->spec.c_str(), why.c_str());
        return nullptr;
    }
    if (cfg && cfg->need.sums) {
        if (params.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_ENABLED) {
            throw std::invalid_argument(cfg->spec + " sums the attention of every query, which flash attention never forms: "
                    "use flash_attn off or auto (and a V cache that is not quantized)");
        }
        cparams.flash_attn = false;
        cparams.auto_fa    = false;
    }
    cfg = bound(std::move(cfg), model, params, cparams);
    if (asked) {
        check_memory(cfg, model, params, cparams);
    }
    return cfg;
}

std::shared_ptr<const config> engine::variant(const char * policy, const char * prompt, const char * decode) const {
    auto res = std::make_shared<config>(*cfg);
    const std::string text = policy ? policy : "";
    if (policy && parse_spec(text).info->name == std::string("full")) {
        if ((prompt && *prompt) || (decode && *decode)) {
            throw std::invalid_argument("kv_budget: the policy is full, which keeps everything; name one that evicts");
        }
        res->prompt_budget = res->decode_budget = {};
        return res;
    }
    if (policy) {
        const auto own = make_config(text, "", "", cfg->is_bounded() ? cfg->cells_text : "", guess, cfg->pooled);
        refuse_latent(*own, model, kv);
        check_weights(own->pol->share, kv.layers.size());
        const bool fits = own->spec == cfg->spec || !cfg->is_bounded() || cfg->pooled || !(own->layers_differ || cfg->layers_differ);
        const std::string why = !fits ? "does not fit the cells of " + cfg->spec : lacks(*cfg->pol, *own->pol);
        if (!why.empty()) {
            throw std::invalid_argument("kv_policy " + own->spec + " " + why + ": this context was created with " + cfg->spec +
                    ", and takes policies that need no more than that one. Start it with the one that needs most");
        }
        if (cfg->is_bounded() && own->pol->min_budget() > cfg->n_cells - cfg->n_reserve) {
            throw std::invalid_argument("kv_policy " + own->spec + " always keeps " + std::to_string(own->pol->min_budget()) +
                    " tokens: kv_cells leave it at most " + std::to_string(cfg->n_cells - cfg->n_reserve));
        }
        res->pol  = own->pol;
        res->spec = own->spec;
        res->need = own->need;
        res->decode        = own->decode;
        res->interval      = own->interval;
        res->layers_differ = own->layers_differ;
        if (res->decode == decode_mode::none) {
            res->decode_budget = {}; // the context's own was not meant for this policy
        }
    }
    if (prompt) {
        const auto b = parse_budget(prompt, "kv_budget");
        res->prompt_budget = cfg->is_bounded() && b.kind == budget::none ? cfg->prompt_budget : b;
    }
    if (decode) {
        res->decode_budget = parse_budget(decode, "kv_decode_budget");
    }
    check_budgets(*res, res->prompt_budget, res->decode_budget);
    return res;
}

// The next class of memory is one line.
parts parts_of(llama_memory_i * mem) {
    const auto of = [](llama_kv_cache_iswa * iswa, llama_memory_recurrent * recurrent) { return parts { iswa->get_base(), iswa->get_swa(), recurrent }; };
    if (dynamic_cast<llama_memory_hybrid_idx *>(mem))                { return {}; } // an index beside the cache picks what attention reads
    if (auto * m = dynamic_cast<llama_memory_hybrid *>(mem))         { return { m->get_mem_attn(), nullptr, m->get_mem_recr() }; }
    if (auto * m = dynamic_cast<llama_memory_hybrid_iswa *>(mem))    { return of(m->get_mem_attn(), m->get_mem_recr()); }
    if (auto * m = dynamic_cast<llama_kv_cache_iswa *>(mem))         { return of(m, nullptr); }
    return { dynamic_cast<llama_kv_cache *>(mem), nullptr, nullptr };
}

llama_kv_cache * cache_of(llama_context * lctx) {
    return parts_of(lctx->get_memory()).cache;
}

std::vector<std::string> architectures() {
    std::vector<std::string> res;
    for (int i = 0; i < LLM_ARCH_UNKNOWN; ++i) {
        res.push_back(llm_arch_name((llm_arch) i));
    }
    return res;
}

int32_t n_head_kv_of(llama_context * lctx, int32_t ikv) {
    return (int32_t) lctx->get_model().hparams.n_head_kv(cache_of(lctx)->get_layer_ids().at(ikv));
}

void flush_copies(llama_context * lctx) {
    lctx->memory_update(false);
}

bool uses_flash_attn(llama_context * lctx) {
    return lctx->get_cparams().flash_attn;
}

engine * engine::of(llama_context * lctx) {
    auto * kv = cache_of(lctx);
    return kv ? kv->kvc.get() : nullptr;
}

static void refuse_unsupported(const config & cfg, const llama_model & model, const llama_cparams & cparams, llama_memory_i * mem) {
    const auto & hp = model.hparams;
    const auto own = parts_of(mem);
    std::string why;
    if (!mem)                                             { why = "it has no KV cache"; }
    else if (llm_arch_is_recurrent(model.arch))           { why = "its memory is a recurrent state, which does not grow"; }
    else if (!own.cache)                                  { why = "an index beside its cache picks what attention reads"; }
    else if (hp.ple_n_heads > 0)                          { why = "it looks up earlier tokens in the cache"; }
    else if (hp.use_alibi)                                { why = "ALiBi needs the distance to every cell"; }
    else if (hp.n_rel_attn_bkts > 0)                      { why = "its relative positions need the distance to every cell"; }
    else if (model.arch == LLM_ARCH_GROK)                 { why = "its attention scores are transformed in a way not tested"; }
    else if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) { why = "its heads are split over devices (split mode tensor)"; }
    else if (!cparams.causal_attn || cparams.embeddings)  { why = "an embedding context evaluates all its tokens at once"; }
    if (!why.empty()) {
        throw std::invalid_argument("this model (" + model.arch_name() + ") cannot evict: " + why);
    }
    if (cfg.need.probe != probe::none && own.windows) {
        throw std::invalid_argument(cfg.spec + " takes probes out of the cache again, which a sliding window does not allow");
    }
    if (cparams.kv_unified && cparams.n_seq_max > 1) {
        throw std::invalid_argument("a unified cache of several sequences cannot evict: use one stream per sequence (kv_unified off)");
    }
}

void engine::attach(std::shared_ptr<const config> cfg, const llama_model & model, const llama_cparams & cparams, llama_memory_i * mem) {
    const auto own = parts_of(mem);
    refuse_unsupported(*cfg, model, cparams, mem);
    refuse_latent(*cfg, model, *own.cache);
    own.cache->kvc.reset(new engine(std::move(cfg), model, cparams, *own.cache));
    own.cache->kvc->mem = own;
}

// Of the memory that this thread creates: llama.cpp hands no policy down to where a cache is made.
static thread_local const config * creating = nullptr;

bool is_creating() {
    return creating;
}

uint32_t rows_of_layer(uint32_t il, uint32_t n_cells) {
    return creating ? creating->rows_of_layer(il, n_cells) : n_cells;
}

llama_memory_i * engine::create_memory(const llama_model & model, const llama_context_params & params, const llama_memory_params & mparams,
        llama_cparams & cparams) {
    const auto cfg = configure(model, params, cparams);
    struct scope {
        explicit scope(const config * cfg) { creating = cfg; }
        ~scope() { creating = nullptr; }
    };
    const scope here(cfg.get());
    std::unique_ptr<llama_memory_i> res(model.create_memory(mparams, memory_cparams(cfg, cparams)));
    if (cfg) {
        attach(cfg, model, cparams, res.get());
    }
    return res.release();
}

} // namespace kvc
