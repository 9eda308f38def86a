#include "kvc_server.h"

void kvc_server::attach(llama_context * ctx) {
    *this = kvc_server();
    this->ctx = ctx;
    options = kvc_options::of_environment();
    on = kvc_guess_prompt_end(ctx, false) == 0; // a prompt's end is announced, see kvc_slot
    if (!on) {
        return;
    }
    kvc_usage usage;
    kvc_get_usage(ctx, &usage);
    n_cells    = usage.n_cells;
    bounded    = n_cells < (int32_t) llama_n_ctx_seq(ctx);
    has_budget = bounded || !options.budget.empty() || !options.decode_budget.empty();
}

json kvc_server::props() const {
    return {
        { "policy",        options.policy },
        { "budget",        options.budget.empty()        ? json(nullptr) : json(options.budget) },
        { "decode_budget", options.decode_budget.empty() ? json(nullptr) : json(options.decode_budget) },
        { "cells",         n_cells },
    };
}

void kvc_totals::look(llama_context * ctx, int32_t n_slots) {
    kvc_get_usage(ctx, &usage);
    on = true;
    n_cells = (int64_t) usage.n_cells*n_slots;
    n_cells_used = 0;
    for (int32_t i = 0; i < n_slots; ++i) {
        kvc_seq_usage u;
        kvc_get_seq_usage(ctx, i, &u);
        n_cells_used += u.n_cells;
    }
}

std::vector<kvc_totals::item> kvc_totals::counters() const {
    if (!on) {
        return {};
    }
    return {
        { "kv_evictions_total",        "Evictions, of a prompt or of generated tokens",  (double) usage.n_evictions },
        { "kv_tokens_evicted_total",   "Tokens evicted, of the mean layer",              (double) usage.n_evicted },
        { "kv_eviction_seconds_total", "Time spent scoring, choosing and moving tokens", 1e-3*(usage.score_ms + usage.plan_ms + usage.compact_ms) },
    };
}

std::vector<kvc_totals::item> kvc_totals::gauges() const {
    if (!on) {
        return {};
    }
    return {
        { "kv_cells",      "Cells of all slots that are allocated, in the mean layer",         (double) n_cells },
        { "kv_cells_used", "Cells of all slots in use, in the layer that holds most",          (double) n_cells_used },
        { "kv_bytes",      "Bytes of the cache that are allocated, with what policies look at", (double) usage.bytes_allocated },
        { "kv_bytes_used", "Bytes of the cache in use",                                        (double) usage.bytes_used },
        { "kv_bytes_full", "Bytes that would be in use without eviction",                      (double) usage.bytes_full },
    };
}
