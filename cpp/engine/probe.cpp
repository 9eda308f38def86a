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
    if (cfg->need.probe == probe::none || n_new < 1 || n_new > n_probe || n_probe >= (int32_t) sequences[s].tokens.size()) {
        throw std::invalid_argument(cfg->spec + ": nothing to ask for");
    }
    heard.resize(layout.n_layer());
    in_update(lctx, [&]() {
        for (int32_t l = 0; l < layout.n_layer(); ++l) {
            const auto now = scorer.read_probe(lctx, s, l, n_new, n_probe, begin, end);
            const size_t n_kv = layout.n_slots(s, l), n_context = n_kv - n_probe, n_head = now.size()/n_kv;
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
    auto & q = sequences[s];
    std::vector<std::vector<float>> norms(layout.n_layer());
    if (cfg->need.plus) {
        in_update(lctx, [&]() {
            for (int32_t l = 0; l < layout.n_layer(); ++l) {
                norms[l] = scorer.output_norms(lctx, s, l);
            }
        });
    }
    std::vector<std::vector<float>> probed(layout.n_layer());
    for (int32_t l = 0; l < layout.n_layer(); ++l) {
        const auto pos = layout.slot_pos(s, l);
        const int32_t n = layout.n_slots(s, l), n_context = n - n_probe, n_old = (int32_t) q.probed[l].size()/layout.n_head_kv();
        const int32_t n_group = (int32_t) heard.at(l).size()/n_context/layout.n_head_kv();
        for (int32_t j = 0; j < n_context; ++j) {
            for (int32_t h = 0; h < layout.n_head_kv(); ++h) {
                const llama_pos p = pos[(size_t) h*n + j];
                float x = 0;
                for (int32_t i = h*n_group; i < (h + 1)*n_group; ++i) {
                    const float y = heard[l][(size_t) i*n_context + j]*(norms[l].empty() ? 1.0f : norms[l][(size_t) i*n + j]);
                    x = cfg->need.probe == probe::max ? std::max(x, y) : x + y/n_group;
                }
                probed[l].push_back(p >= begin && p < end ? x : j < n_old ? q.probed[l][(size_t) j*layout.n_head_kv() + h] : INFINITY);
            }
        }
    }
    if (!llama_memory_seq_rm(llama_get_memory(lctx), seq_id, (llama_pos) q.tokens.size() - n_probe, -1)) {
        throw std::runtime_error("the probe cannot be taken out");
    }
    q.probed = std::move(probed);
}

} // namespace kvc
