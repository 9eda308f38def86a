// One engine per cache: what a new one holds, and what its sequences hold.

#include "engine.h"

#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

namespace kvc {

engine::engine(std::shared_ptr<const config> cfg_, const llama_model & model, const llama_cparams & cparams, llama_kv_cache & kv) :
    cfg(std::move(cfg_)), guess(cfg->guess), model(model), kv(kv), sequences(kv.n_stream), layout(cfg, model, kv, sequences),
    taps(cfg, model, kv, layout, cparams), scorer(cfg, model, kv, layout, taps, sequences),
    evictor(cfg, model, kv, layout, taps, scorer, sequences), stale(layout.has_pool()) {
    check_weights(cfg->pol->share, kv.layers.size());
    for (int32_t l = 0; l < layout.n_layer(); ++l) {
        ask_device(l, (int32_t) cparams.n_ubatch);
    }
    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        reset(sequences[s]);
        layout.give_back_rows(s, true); // llama.cpp has written zeros into all
    }
}

// A latent row (MLA) is key and value in one, of all heads: a head's value is what its matrix makes of the row behind
// attention, and its query has been through one, too, but for the part that is rotated.
void engine::refuse_latent(const config & c, const llama_model & model, const llama_kv_cache & kv) {
    if (kv.layers.empty() || kv.layers[0].v) {
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

void engine::reset(sequence & q) const {
    q = sequence();
    q.n_kept.assign(kv.layers.size(), 0);
    q.kept.resize(kv.layers.size());
    q.lacks.assign(kv.layers.size()*layout.n_head_kv(), 0);
    q.probed.resize(kv.layers.size());
    q.win_pos.assign(cfg->need.window, -1);
    q.cfg           = cfg;
    q.prompt_budget = cfg->prompt_budget;
    q.decode_budget = cfg->decode_budget;
}

std::vector<int32_t> engine::kept(llama_seq_id seq_id, int32_t ikv) const {
    return layout.slot_pos(stream_of(seq_id), ikv);
}

// Every head of every layer that evicts holds what lies from here on. Behind sums there is no way back: what the
// queries of a tail gave cannot be taken out. A caller that knows nothing of us is led back no further than to the last
// eviction: one that asks the same prompt again evaluates its last token alone, and would get the answer of a cache
// that this prompt has been evicted from.
llama_pos engine::held_from(uint32_t s) const {
    const auto & q = sequences[s];
    return cfg->need.sums ? (llama_pos) q.tokens.size() : guess ? q.seen : q.floor;
}

// The sliding windows of the first token there have to be whole, too; at the end they are.
llama_pos engine::whole_from(llama_seq_id seq_id) const {
    const uint32_t  s   = stream_of(seq_id);
    const llama_pos end = (llama_pos) sequences[s].tokens.size();
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
    llama_pos res = (llama_pos) sequences[s].tokens.size();
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
    n_evictions = sequences[s].n_evictions;
    n_evicted   = sequences[s].n_evicted;
}

size_t engine::past_bytes() const {
    size_t res = 0;
    for (const auto & q : sequences) {
        res += q.past.size();
    }
    return res;
}

} // namespace kvc
