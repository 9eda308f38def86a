// What a probe's queries gave to the cells of a layer.

#include "scorer.h"

#include <algorithm>
#include <cmath>

namespace kvc {

// The first tokens, which draw attention whatever stands there, those that are asked about, and the probe.
std::vector<int32_t> scorer::slots_of_chunk(uint32_t s, const layer_signals & sig, llama_pos begin, llama_pos end, llama_pos n_context) const {
    const llama_pos n_first = std::min<llama_pos>(sequences[s].cfg->pol->n_sink(), begin);
    std::vector<uint8_t> seen(sig.n_kv, 0); // where heads hold different positions, all that one of them holds
    for (size_t i = 0; i < sig.pos.size(); ++i) {
        const llama_pos p = sig.pos[i];
        seen[i % sig.n_kv] |= (p >= 0 && p < n_first) || (p >= begin && p < end) || p >= n_context;
    }
    std::vector<int32_t> res;
    for (int32_t j = 0; j < sig.n_kv; ++j) {
        if (seen[j]) {
            res.push_back(j);
        }
    }
    return res;
}

std::vector<float> scorer::read_probe(llama_context * lctx, uint32_t s, int32_t ikv, int32_t n_new, int32_t n_probe, llama_pos begin,
        llama_pos end) const {
    const auto & q = sequences[s];
    const layer_signals sig = no_signals(s, ikv);
    const bool    largest  = cfg->need.probe == probe::max;
    const int32_t n_tokens = (int32_t) q.tokens.size();

    const auto squared = cfg->need.plus ? taps.read_inputs(s, ikv) : std::vector<float>();
    std::vector<ring_query> queries;
    for (int32_t r = 0; r < cfg->need.window; ++r) {
        if (q.win_pos[r] >= n_tokens - n_new) {
            queries.push_back({ q.win_pos[r], r, largest ? 1.0f : 1.0f/n_new });
            queries.back().weight /= cfg->need.plus ? std::sqrt(std::max(squared[r], 1e-12f)) : 1.0f;
        }
    }
    return attention_of(lctx, s, sig, queries, largest,
            cfg->need.chunk ? slots_of_chunk(s, sig, begin, end, n_tokens - n_probe) : std::vector<int32_t>());
}

} // namespace kvc
