#include "kvc_totals.h"

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
