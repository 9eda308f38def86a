#include "kvc_metrics.h"

#include "kvc.h"

#include <sstream>

std::string kvc_metrics(llama_context * ctx, int32_t n_slots) {
    kvc_usage all;
    kvc_get_usage(ctx, &all);
    int64_t n_used = 0;
    for (int32_t i = 0; i < n_slots; ++i) {
        kvc_seq_usage u;
        kvc_get_seq_usage(ctx, i, &u);
        n_used += u.n_cells;
    }
    struct item { const char * type, * name, * help; double value; };
    const item items[] = {
        { "counter", "kv_evictions_total",        "Evictions, of a prompt or of generated tokens",  (double) all.n_evictions },
        { "counter", "kv_tokens_evicted_total",   "Tokens evicted, of the mean layer",              (double) all.n_evicted },
        { "counter", "kv_eviction_seconds_total", "Time spent scoring, choosing and moving tokens",
            1e-3*(all.score_ms + all.plan_ms + all.compact_ms) },
        { "gauge", "kv_cells",      "Cells of all slots that are allocated, in the mean layer", (double) all.n_cells*n_slots },
        { "gauge", "kv_cells_used", "Cells of all slots in use, in the layer that holds most",  (double) n_used },
        { "gauge", "kv_bytes",      "Bytes of the cache that are allocated, with what policies look at", (double) all.bytes_allocated },
        { "gauge", "kv_bytes_used", "Bytes of the cache in use",                                (double) all.bytes_used },
        { "gauge", "kv_bytes_full", "Bytes that would be in use without eviction",              (double) all.bytes_full },
    };
    std::ostringstream res;
    res.precision(15); // whole numbers as such
    for (const auto & i : items) {
        res << "# HELP llamacpp:" << i.name << " " << i.help << "\n"
            << "# TYPE llamacpp:" << i.name << " " << i.type << "\n"
            << "llamacpp:" << i.name << " " << i.value << "\n";
    }
    return res.str();
}
