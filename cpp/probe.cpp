// A probe: a text that is evaluated after the context to see what it attends to, and taken out again.

#include "engine.h"

#include "llama-context.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace kvc {

void engine::listen(llama_context * lctx, llama_seq_id seq_id, int32_t n_new, int32_t n_probe, llama_pos begin, llama_pos end,
        std::vector<std::vector<float>> & heard) {
    const uint32_t s = stream_of(seq_id);
    if (cfg->need.probe == probe::none || n_new < 1 || n_new > n_probe || n_probe >= (int32_t) streams[s].tokens.size()) {
        throw std::invalid_argument(cfg->spec + ": nothing to ask for");
    }
    heard.resize(n_layer());
    in_update(lctx, [&]() {
        for (int32_t l = 0; l < n_layer(); ++l) {
            const auto now = read_probe(lctx, s, l, n_new, n_probe, begin, end);
            const size_t n_kv = n_slots(s, l), n_context = n_kv - n_probe, n_head = now.size()/n_kv;
            heard[l].resize(n_head*n_context, 0.0f);
            for (size_t i = 0; i < heard[l].size(); ++i) {
                const float x = now[i/n_context*n_kv + i % n_context];
                heard[l][i] = cfg->need.probe == probe::max ? std::max(heard[l][i], x) : heard[l][i] + x;
            }
        }
    });
}

void engine::take_out(llama_context * lctx, llama_seq_id seq_id, int32_t n_probe, llama_pos begin, llama_pos end,
        const std::vector<std::vector<float>> & heard) {
    const uint32_t s = stream_of(seq_id);
    auto & q = streams[s];
    std::vector<std::vector<float>> norms(n_layer());
    if (cfg->need.plus) {
        in_update(lctx, [&]() {
            for (int32_t l = 0; l < n_layer(); ++l) {
                norms[l] = output_norms(lctx, s, l);
            }
        });
    }
    std::vector<std::vector<float>> probed(n_layer());
    for (int32_t l = 0; l < n_layer(); ++l) {
        const auto pos = slot_pos(s, l);
        const int32_t n = n_slots(s, l), n_context = n - n_probe, n_old = (int32_t) q.probed[l].size()/n_hkv;
        const int32_t n_group = (int32_t) heard.at(l).size()/n_context/n_hkv;
        for (int32_t j = 0; j < n_context; ++j) {
            for (int32_t h = 0; h < n_hkv; ++h) {
                const llama_pos p = pos[(size_t) h*n + j];
                float x = 0;
                for (int32_t i = h*n_group; i < (h + 1)*n_group; ++i) {
                    const float y = heard[l][(size_t) i*n_context + j]*(norms[l].empty() ? 1.0f : norms[l][(size_t) i*n + j]);
                    x = cfg->need.probe == probe::max ? std::max(x, y) : x + y/n_group;
                }
                probed[l].push_back(p >= begin && p < end ? x : j < n_old ? q.probed[l][(size_t) j*n_hkv + h] : INFINITY);
            }
        }
    }
    if (!llama_memory_seq_rm(llama_get_memory(lctx), seq_id, (llama_pos) q.tokens.size() - n_probe, -1)) {
        throw std::runtime_error("the probe cannot be taken out");
    }
    q.probed = std::move(probed);
}

// The first tokens, which draw attention whatever stands there, those that are asked about, and the probe.
std::vector<int32_t> engine::slots_of_chunk(uint32_t s, const layer_signals & sig, llama_pos begin, llama_pos end, llama_pos n_context) const {
    const llama_pos n_first = std::min<llama_pos>(streams[s].cfg->pol->n_sink(), begin);
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

// What the last n_new queries gave each slot: F32 [n_head, n_kv], the mean or the largest. KVzip+ divides by |h| of the query.
std::vector<float> engine::read_probe(llama_context * lctx, uint32_t s, int32_t ikv, int32_t n_new, int32_t n_probe, llama_pos begin,
        llama_pos end) const {
    const auto & q = streams[s];
    const layer_signals sig = no_signals(s, ikv);
    const bool    largest  = cfg->need.probe == probe::max;
    const int32_t n_tokens = (int32_t) q.tokens.size();

    std::vector<float> squared(cfg->need.plus ? cfg->need.window : 0);
    if (cfg->need.plus) {
        const size_t n_bytes = squared.size()*sizeof(float);
        ggml_backend_tensor_get(tensors[ikv].inputs, squared.data(), s*n_bytes, n_bytes);
    }
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
