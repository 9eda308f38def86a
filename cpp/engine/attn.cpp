// What some queries of the ring give to the cells of a layer: steps of our own on the CPU (attn_tiles.cpp), elsewhere a
// small graph (attn_graph.cpp).

#include "graph.h"
#include "scorer.h"

#include "llama-context.h"
#include "llama-graph.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>

namespace kvc {

// Lanes, whose slots are counted from their own first. slots: of all heads, as the longest counts them.
std::vector<scorer::watched> scorer::watch(uint32_t s, const layer_signals & sig, const std::vector<int32_t> & slots) const {
    std::vector<watched> res;
    for (const lane & x : layout.lanes(sig.il, s, s)) {
        const int32_t n = layout.n_slots(s, sig.il, x.head), lack = sig.n_kv - n;
        watched w = { x, n, sig.pos.data() + (size_t) x.head*sig.n_kv + lack, {} };
        for (const int32_t j : slots) {
            if (j >= lack) {
                w.slots.push_back(j - lack);
            }
        }
        if (n > 0 && (slots.empty() || !w.slots.empty())) {
            res.push_back(std::move(w));
        }
    }
    return res;
}

// Up to which slot each query sees. By the positions of a lane's first head: from the floor on all agree.
std::vector<int32_t> seen_by(const std::vector<ring_query> & queries, const int32_t * pos, int32_t n_kv) {
    std::vector<int32_t> res;
    for (const auto & q : queries) {
        res.push_back((int32_t) (std::upper_bound(pos, pos + n_kv, q.pos) - pos));
    }
    return res;
}

std::vector<float> scorer::attention_of(llama_context * lctx, uint32_t s, const layer_signals & sig, const queries_of & queries,
        bool largest, const std::vector<int32_t> & slots) const {
    const int32_t n_group = sig.n_head/layout.n_head_kv();
    std::vector<float> res((size_t) sig.n_head*sig.n_kv, 0.0f);
    for (const watched & w : watch(s, sig, slots)) {
        auto given = has_tiles(sig.il) ? attention_tiles(lctx, s, sig, w, queries, largest) : attention_graph(lctx, s, sig, w, queries, largest);
        if (given.size() == res.size()) { // all heads are of one length
            return given;
        }
        for (int32_t i = 0; i < w.x.n_head*n_group; ++i) { // F32 [n_head of the lane, its n_kv]
            std::copy_n(given.begin() + (size_t) i*w.n_kv, w.n_kv, res.begin() + ((size_t) w.x.head*n_group + i + 1)*sig.n_kv - w.n_kv);
        }
    }
    return res;
}

std::vector<float> scorer::attention_rows(llama_context * lctx, uint32_t s, const layer_signals & sig, const queries_of & queries) const {
    const int32_t n_query = (int32_t) queries.size(), n_reader = (int32_t) taps.readers[sig.il].size();
    const auto all = taps.of_all_readers(sig.il, queries);
    std::vector<float> rows((size_t) sig.n_head*n_query*sig.n_kv, 0.0f);
    for (const watched & w : watch(s, sig, {})) {
        const auto add_row = [&](int32_t h, size_t i, const float * row) { // of query head h and all[i]: the mean over readers
            float * mean = rows.data() + ((size_t) h*n_query + i % n_query + 1)*sig.n_kv - w.n_kv;
            for (int32_t j = 0; j < w.n_kv; ++j) {
                mean[j] += n_reader == 1 ? row[j] : row[j]/n_reader;
            }
        };
        has_tiles(sig.il) ? tiles_rows(lctx, s, sig, w, all, add_row) : graph_rows(lctx, s, sig, w, all, add_row);
    }
    return rows;
}

} // namespace kvc
