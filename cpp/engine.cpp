// One engine per cache: what a new one holds, and what its sequences hold.

#include "engine.h"

#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

namespace kvc {

engine::engine(std::shared_ptr<const config> cfg_, const llama_model & model, const llama_cparams & cparams, llama_kv_cache & kv) :
    cfg(std::move(cfg_)), model(model), kv(kv) {
    if (kv.layers.empty()) {
        throw std::invalid_argument("this model has no layer with full attention, and sliding-window layers do not evict");
    }
    n_hkv = model.hparams.n_head_kv(kv.layers[0].il);
    for (const auto & layer : kv.layers) {
        if ((int32_t) model.hparams.n_head_kv(layer.il) != n_hkv) {
            throw std::invalid_argument("this model cannot evict: its layers have different numbers of KV heads");
        }
    }
    refuse_latent(*cfg);
    check_weights(cfg->pol->share, kv.layers.size());
    heads_apart = std::all_of(kv.layers.begin(), kv.layers.end(), [](const auto & layer) { return ggml_backend_buffer_is_host(layer.k->buffer); });
    if (cfg->pol->heads_differ() && !heads_apart) {
        throw std::invalid_argument(cfg->spec + " gives KV heads different budgets: only the CPU's attention has been tested with "
                    "heads of different lengths, so use n_gpu_layers 0, or offload_kqv off");
    }
    streams.resize(kv.n_stream);
    for (auto & q : streams) {
        reset(q);
    }
    if (is_pooled()) {
        find_pool();
    }
    attn.resize(kv.layers.size());
    find_readers();
    if (cfg->need.outputs || cfg->need.plus) {
        find_outputs();
    }
    alloc_signals(cparams);
    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        give_back_rows(s, true); // llama.cpp has written zeros into all
    }
}

// A latent row (MLA) is key and value in one, of all heads: a head's value is what its matrix makes of the row behind
// attention, and its query has been through one, too, but for the part that is rotated.
void engine::refuse_latent(const config & c) const {
    if (kv.layers[0].v) {
        return;
    }
    const std::string has = ", and this model's (" + model.arch_name() + ") ";
    if (c.need.future > 0) {
        throw std::invalid_argument(c.spec + " rotates queries to the positions to come" + has +
                "are latent, rotated in a part of them: name a policy without such a fit, for example keydiff");
    }
    if (c.need.values || c.need.value_rows || c.need.outputs || c.need.plus) {
        throw std::invalid_argument(c.spec + " weighs values" + has +
                "are latent, a part of the rows that keys are: name a policy or parameters that do not, for example snapkv");
    }
}

void engine::reset(stream & q) const {
    q = stream();
    q.n_kept.assign(kv.layers.size(), 0);
    q.kept.resize(kv.layers.size());
    q.lacks.assign(kv.layers.size()*n_hkv, 0);
    q.probed.resize(kv.layers.size());
    q.win_pos.assign(cfg->need.window, -1);
    q.cfg           = cfg;
    q.prompt_budget = cfg->prompt_budget;
    q.decode_budget = cfg->decode_budget;
}

int32_t engine::n_layer() const {
    return (int32_t) kv.layers.size();
}

int32_t engine::n_cells(uint32_t s) const {
    return (int32_t) kv.v_cells[s].used_max_p1();
}

int32_t engine::n_slots(uint32_t s, int32_t ikv) const {
    return n_cells(s) - streams[s].n_base + streams[s].n_kept[ikv];
}

// I32 [n_head_kv, n_slots], -1 where a slot is empty
std::vector<int32_t> engine::slot_pos(uint32_t s, int32_t ikv) const {
    const auto & q = streams[s];
    const auto & cells = kv.v_cells[s];
    const int32_t n_kept = q.n_kept[ikv];
    const int32_t n = n_slots(s, ikv);
    std::vector<int32_t> res((size_t) n_hkv*n);
    for (int32_t h = 0; h < n_hkv; ++h) {
        std::copy_n(q.kept[ikv].begin() + (size_t) h*n_kept, n_kept, res.begin() + (size_t) h*n);
        for (int32_t j = n_kept; j < n; ++j) {
            res[(size_t) h*n + j] = cells.pos_get(q.n_base + j - n_kept);
        }
    }
    return res;
}

std::vector<int32_t> engine::kept(llama_seq_id seq_id, int32_t ikv) const {
    return slot_pos(stream_of(seq_id), ikv);
}

// Every head of every layer that evicts holds what lies from here on. Behind sums there is no way back: what the
// queries of a tail gave cannot be taken out. A caller that knows nothing of us is led back no further than to the last
// eviction: one that asks the same prompt again evaluates its last token alone, and would get the answer of a cache
// that this prompt has been evicted from.
llama_pos engine::held_from(uint32_t s) const {
    const auto & q = streams[s];
    return cfg->need.sums ? (llama_pos) q.tokens.size() : cfg->guess ? q.seen : q.floor;
}

// The sliding windows of the first token there have to be whole, too; at the end they are.
llama_pos engine::whole_from(llama_seq_id seq_id) const {
    const uint32_t  s   = stream_of(seq_id);
    const llama_pos end = (llama_pos) streams[s].tokens.size();
    const auto * windows = mem.windows;
    const llama_pos gone = windows ? windows->seq_pos_min(seq_id) - 1 : -1;
    llama_pos res = held_from(s);
    while (gone >= 0 && res < end && !llama_hparams::is_masked_swa(windows->n_swa, windows->swa_type, gone, res)) {
        ++res;
    }
    return res;
}

llama_pos engine::floor(llama_seq_id seq_id) const {
    const uint32_t  s = stream_of(seq_id);
    const llama_pos first = whole_from(seq_id);
    llama_pos res = (llama_pos) streams[s].tokens.size();
    for (const llama_pos at : ways_back(s)) {
        res = at >= first ? std::min(res, at) : res;
    }
    return mem.recurrent ? res : first;
}

uint32_t engine::stream_of(llama_seq_id seq_id) const {
    if (seq_id < 0 || (uint32_t) seq_id >= kv.n_seq_max) {
        throw std::invalid_argument("sequence " + std::to_string(seq_id) + ": this context has 0 to " + std::to_string(kv.n_seq_max - 1));
    }
    return kv.seq_to_stream[seq_id];
}

void engine::count_evictions(uint32_t s, int64_t & n_evictions, int64_t & n_evicted) const {
    n_evictions = streams[s].n_evictions;
    n_evicted   = streams[s].n_evicted;
}

size_t engine::past_bytes() const {
    size_t res = 0;
    for (const auto & q : streams) {
        res += q.past.size();
    }
    return res;
}

size_t engine::signal_bytes() const {
    size_t res = 0;
    for (const auto & it : ctxs_bufs) {
        res += ggml_backend_buffer_get_size(it.second.get());
    }
    return res;
}

} // namespace kvc
