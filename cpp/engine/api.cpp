#include "kvc.h"

#include "engine.h"
#include "spans.h"

#include "llama-context.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

using namespace kvc;

namespace {

template <typename F>
auto guarded(F fn) -> decltype(fn()) {
    try {
        last_error().clear();
        return fn();
    } catch (const std::exception & e) {
        last_error() = e.what();
        return -1;
    }
}

engine & need_engine(llama_context * ctx) {
    auto * e = engine::of(ctx);
    if (!e) {
        throw std::invalid_argument("this context has no eviction policy: it is full, or its memory is none that evicts");
    }
    return *e;
}

llama_kv_cache & need_cache(llama_context * ctx, llama_seq_id seq_id) {
    auto * kv = cache_of(ctx);
    if (!kv) {
        throw std::invalid_argument("this context has no KV cache with one cell per token");
    }
    if (seq_id < 0 || (uint32_t) seq_id >= kv->get_n_seq_max()) {
        throw std::invalid_argument("sequence " + std::to_string(seq_id) + ": this context has 0 to " + std::to_string(kv->get_n_seq_max() - 1));
    }
    return *kv;
}

size_t row_bytes(const llama_kv_cache & kv) {
    size_t res = 0;
    const int32_t n_layer = (int32_t) kv.get_layer_ids().size();
    for (int32_t l = 0; l < n_layer; ++l) {
        res += layout::row_bytes(kv, l);
    }
    return res;
}

size_t n_used(const llama_kv_cache & kv) {
    size_t res = 0;
    for (uint32_t s = 0; s < kv.get_n_stream(); ++s) {
        res += kv.get_cells((llama_seq_id) s).get_used();
    }
    return res;
}

} // namespace

int32_t kvc_version(void) {
    return KVC_API_VERSION;
}

const char * kvc_last_error(void) {
    return last_error().c_str();
}

int32_t kvc_next_context(const char * policy, const char * budget, const char * decode_budget, const char * cells, bool guess_prompt_end) {
    return guarded([&]() {
        const auto text = [](const char * s) { return std::string(s ? s : ""); };
        next_context(policy ? make_config(policy, text(budget), text(decode_budget), text(cells), guess_prompt_end) : nullptr);
        return 0;
    });
}

const char * kvc_recommended_policy(void) {
    return recommended;
}

int32_t kvc_check_config(const char * policy, const char * budget, const char * decode_budget, const char * cells) {
    return guarded([&]() {
        const auto text = [](const char * s) { return std::string(s ? s : ""); };
        return make_config(text(policy), text(budget), text(decode_budget), text(cells), false) ? 1 : 0;
    });
}

int32_t kvc_guess_prompt_end(llama_context * ctx, bool guess) {
    return guarded([&]() { need_engine(ctx).set_guess(guess); return 0; });
}

int32_t kvc_set_budget(llama_context * ctx, llama_seq_id seq_id, const char * budget, const char * decode_budget) {
    return guarded([&]() {
        need_engine(ctx).set_budget(seq_id, parse_budget(budget ? budget : "", "kv_budget"), parse_budget(decode_budget ? decode_budget : "", "kv_decode_budget"));
        return 0;
    });
}

int32_t kvc_set_policy(llama_context * ctx, llama_seq_id seq_id, const char * policy, const char * budget, const char * decode_budget) {
    return guarded([&]() { need_engine(ctx).set_policy(seq_id, policy, budget, decode_budget); return 0; });
}

int32_t kvc_check_policy(llama_context * ctx, const char * policy, const char * budget, const char * decode_budget) {
    return guarded([&]() { return need_engine(ctx).variant(policy, budget, decode_budget)->need.spans ? 1 : 0; });
}

int32_t kvc_set_spans(llama_context * ctx, llama_seq_id seq_id, const kvc_span * spans, size_t n_spans) {
    return guarded([&]() {
        std::vector<span> v;
        for (size_t i = 0; i < n_spans; ++i) {
            v.push_back({ spans[i].begin, spans[i].end });
        }
        need_engine(ctx).set_spans(seq_id, std::move(v));
        return 0;
    });
}

int32_t kvc_segment(const llama_vocab * vocab, const llama_token * tokens, int32_t n_tokens, const char * separator, kvc_span * out) {
    return guarded([&]() {
        const auto spans = segment(vocab, { tokens, tokens + n_tokens }, separator);
        for (size_t i = 0; out && i < spans.size(); ++i) {
            out[i] = { spans[i].begin, spans[i].end };
        }
        return (int32_t) spans.size();
    });
}

int32_t kvc_evict(llama_context * ctx, llama_seq_id seq_id) {
    return guarded([&]() { return need_engine(ctx).evict(ctx, seq_id) ? 1 : 0; });
}

int32_t kvc_begin_prompt(llama_context * ctx, llama_seq_id seq_id) {
    return guarded([&]() { need_engine(ctx).begin_prompt(seq_id); return 0; });
}

int32_t kvc_end_prompt(llama_context * ctx, llama_seq_id seq_id) {
    return guarded([&]() { need_engine(ctx).end_prompt(seq_id); return 0; });
}

llama_pos kvc_floor(llama_context * ctx, llama_seq_id seq_id) {
    return guarded([&]() {
        const auto & kv = need_cache(ctx, seq_id);
        auto * e = engine::of(ctx);
        return e ? e->floor(seq_id) : parts_of(ctx->get_memory()).recurrent ? kv.seq_pos_max(seq_id) + 1 : 0;
    });
}

llama_pos kvc_whole_from(llama_context * ctx, llama_seq_id seq_id) {
    return guarded([&]() {
        need_cache(ctx, seq_id);
        auto * e = engine::of(ctx);
        return e ? e->whole_from(seq_id) : 0;
    });
}

llama_pos kvc_heard_from(llama_context * ctx, llama_seq_id seq_id, llama_pos pos, llama_pos end, const char * policy) {
    return guarded([&]() { return need_engine(ctx).heard_from(seq_id, pos, end, policy); });
}

llama_pos kvc_back(llama_context * ctx, llama_seq_id seq_id, llama_pos pos) {
    return guarded([&]() { return need_engine(ctx).back(seq_id, pos); });
}

int32_t kvc_kept(llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t * out) {
    return guarded([&]() {
        auto & kv = need_cache(ctx, seq_id);
        const auto layers = kv.get_layer_ids();
        if (il < 0 || (size_t) il >= layers.size()) {
            throw std::invalid_argument("layer " + std::to_string(il) + ": this cache has 0 to " + std::to_string(layers.size() - 1));
        }
        const int32_t n_hkv = n_head_kv_of(ctx, il);
        if (n_hkv == 0) {
            return 0;
        }
        std::vector<int32_t> pos;
        if (auto * e = engine::of(ctx)) {
            pos = e->kept(seq_id, il);
        } else {
            const auto & cells = kv.get_cells(seq_id);
            for (uint32_t c = 0; c < cells.used_max_p1(); ++c) {
                if (!cells.is_empty(c) && cells.seq_has(c, seq_id)) {
                    pos.push_back(cells.pos_get(c));
                }
            }
            std::sort(pos.begin(), pos.end());
            const std::vector<int32_t> head = pos;
            for (int32_t h = 1; h < n_hkv; ++h) {
                pos.insert(pos.end(), head.begin(), head.end());
            }
        }
        if (out) {
            std::copy(pos.begin(), pos.end(), out);
        }
        return (int32_t) pos.size()/n_hkv;
    });
}

int32_t kvc_get_usage(llama_context * ctx, kvc_usage * out) {
    return guarded([&]() {
        auto & kv = need_cache(ctx, 0);
        const auto & hp = ctx->get_model().hparams;
        const auto layers = kv.get_layer_ids();
        *out = {};
        out->n_cells = (int32_t) kv.get_size();
        if (auto * e = engine::of(ctx)) {
            out->n_cells = e->conf().is_bounded() ? e->conf().n_cells : out->n_cells;
        }
        out->n_layer = (int32_t) layers.size();
        out->n_head_kv = (int32_t) hp.n_head_kv(layers.at(0));
        for (const uint32_t il : layers) {
            out->n_head_kv = (int32_t) hp.n_head_kv(il) == out->n_head_kv ? out->n_head_kv : 0;
        }
        for (const auto & it : ctx->get_memory()->memory_breakdown()) {
            out->bytes_allocated += it.second;
        }
        if (const auto * windows = parts_of(ctx->get_memory()).windows) { // the same with or without us
            out->bytes_used = out->bytes_full = n_used(*windows)*row_bytes(*windows);
        }
        auto * e = engine::of(ctx);
        if (!e) {
            const size_t n = n_used(kv)*row_bytes(kv);
            out->bytes_used += n;
            out->bytes_full += n;
            return 0;
        }
        for (uint32_t s = 0; s < kv.get_n_stream(); ++s) {
            for (int32_t l = 0; l < out->n_layer; ++l) {
                out->bytes_used += e->rows().held_bytes(s, l);
            }
            out->bytes_full += (kv.get_cells((llama_seq_id) s).seq_pos_max((llama_seq_id) s) + 1)*row_bytes(kv);
        }
        out->bytes_signals    = e->signal_bytes();
        out->bytes_past       = e->past_bytes();
        out->bytes_allocated += out->bytes_signals + out->bytes_past;
        out->n_evictions = e->st().n_evictions;
        out->n_evicted   = e->st().n_evicted;
        out->score_ms    = e->st().score_ms;
        out->plan_ms     = e->st().plan_ms;
        out->compact_ms  = e->st().compact_ms;
        return 0;
    });
}

int64_t kvc_resident_bytes(llama_context * ctx) {
    return guarded([&]() {
        const auto * windows = parts_of(ctx->get_memory()).windows;
        return (int64_t) (layout::resident_bytes(need_cache(ctx, 0)) + (windows ? layout::resident_bytes(*windows) : 0));
    });
}

int32_t kvc_get_seq_usage(llama_context * ctx, llama_seq_id seq_id, kvc_seq_usage * out) {
    return guarded([&]() {
        auto & kv = need_cache(ctx, seq_id);
        *out = {};
        out->n_tokens   = kv.get_cells(seq_id).seq_pos_max(seq_id) + 1;
        out->bytes_full = out->n_tokens*row_bytes(kv);
        auto * e = engine::of(ctx);
        if (!e) {
            out->n_cells    = out->n_tokens;
            out->bytes_used = out->bytes_full;
            return 0;
        }
        const uint32_t s = kv.get_n_stream() > 1 ? (uint32_t) seq_id : 0;
        for (int32_t l = 0; l < e->rows().n_layer(); ++l) {
            out->n_cells     = std::max(out->n_cells, e->rows().n_slots(s, l));
            out->bytes_used += e->rows().held_bytes(s, l);
        }
        e->count_evictions(s, out->n_evictions, out->n_evicted);
        out->evict_ms = e->evict_ms(s);
        return 0;
    });
}
