// What some queries of the ring give to the cells of a layer, by steps of our own on the CPU (ggml/attn_scores.h).
//
// One KV head follows the other, so that a head's tiles stay in a core's cache, and as many queries are taken at a time
// as the workspace holds, whatever n_kv and the window are.

#include "graph.h"
#include "scorer.h"
#include "attn_ops.h"
#include "graph_ops.h"

#include "llama-context.h"
#include "llama-graph.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace kvc {

static const int64_t N_WORKSPACE = 16 << 20; // bytes of the tiles of a KV head

// They know neither attention sinks nor a soft cap.
bool scorer::has_tiles(int32_t ikv) const {
    return !getenv("PYKVC_STOCK_ATTENTION") && !taps.attn[ikv].sinks && !model.hparams.attn_soft_cap && on_cpu(kv.layers[ikv].k);
}

// Queries that tiles of n_seen cells take at once.
static std::vector<std::vector<ring_query>> parts_of(const std::vector<ring_query> & queries, int64_t n_seen, int64_t n_group) {
    const int64_t n_most = std::max<int64_t>(1, N_WORKSPACE/(n_seen*n_group*(int64_t) sizeof(float))/KVC_ATTN_LANES)*KVC_ATTN_LANES;
    std::vector<std::vector<ring_query>> res;
    for (size_t i = 0; i < queries.size(); i += n_most) {
        res.emplace_back(queries.begin() + i, queries.begin() + std::min(queries.size(), i + n_most));
    }
    return res;
}

// What `step` makes of the tiles of the KV heads x: each F32 [n_out of its query heads, n_seen].
std::vector<float> scorer::run_tiles(llama_context * lctx, uint32_t s, const layer_signals & sig, const watched & w, const lane & x,
        const std::vector<float> & ring, const queries_of & queries, const char * step) const {
    const auto & slots = w.slots;
    const int64_t n_query = (int64_t) queries.size(), n_group = sig.n_head/layout.n_head_kv();
    const int64_t n_lane = GGML_PAD(n_query, KVC_ATTN_LANES); // of a query head; without a query: sees all, weighs nothing
    const int64_t n_all  = n_group*n_lane;
    const int64_t n_seen = slots.empty() ? w.n_kv : (int64_t) slots.size();
    const int64_t n_tile = (n_seen + KVC_ATTN_TILE - 1)/KVC_ATTN_TILE;
    const bool rows = !strcmp(step, "kvc_attn_rows");
    const auto seen_before = [&](int32_t j) { // slots before j, as the tiles count them
        return slots.empty() ? j : (int32_t) (std::lower_bound(slots.begin(), slots.end(), j) - slots.begin());
    };

    std::vector<float>   q     (x.n_head*sig.head_dim*n_all, 0.0f);      // [n_head_kv, head_dim, n_all]
    std::vector<int32_t> range (x.n_head*2*n_all, (int32_t) n_seen);     // [n_head_kv, 2, n_all]
    std::vector<float>   weight(x.n_head*n_all, 0.0f);                   // [n_head_kv, n_all]
    const auto ends = seen_by(queries, w.pos, w.n_kv);
    for (int64_t h = 0; h < x.n_head; ++h) {
        std::fill_n(range.begin() + 2*h*n_all, n_all, 0);
    }
    for (int64_t i = 0; i < n_query; ++i) {
        const float * row = ring.data() + (int64_t) queries[i].row*sig.n_head*sig.head_dim;
        for (int64_t h = 0; h < x.n_head*n_group; ++h) {
            const int64_t kv_head = h/n_group, lane = h % n_group*n_lane + i;
            for (int64_t d = 0; d < sig.head_dim; ++d) {
                q[(kv_head*sig.head_dim + d)*n_all + lane] = row[(x.head*n_group + h)*sig.head_dim + d]*taps.attn[sig.il].scale;
            }
            range [(2*kv_head + 1)*n_all + lane] = seen_before(ends[i]);
            weight[kv_head*n_all + lane] = rows ? 1.0f : queries[i].weight;
        }
    }

    auto * graph = begin_graph(lctx);
    auto * ctx = graph->get_ctx();
    auto * inputs = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_all, sig.head_dim, x.n_head);
    auto * bounds = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, n_all, 2, x.n_head);
    auto * shares = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_all, x.n_head);
    auto * chosen = slots.empty() ? nullptr : ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_seen);
    for (auto * input : { inputs, bounds, shares, chosen }) {
        if (input) {
            ggml_set_input(input);
        }
    }
    std::vector<ggml_tensor *> outs;
    for (int64_t h = 0; h < x.n_head; ++h) {
        std::vector<ggml_tensor *> args = {
            layout.view_of(ctx, s, 1, sig.il, { x.head + (int32_t) h, 1 }, w.n_kv, false),
            ggml_view_2d(ctx, inputs, n_all, sig.head_dim, inputs->nb[1], h*inputs->nb[2]),
            ggml_view_2d(ctx, bounds, n_all, 2, bounds->nb[1], h*bounds->nb[2]),
        };
        if (chosen) {
            args.push_back(chosen);
        }
        auto * tiles = graph_step(ctx, "kvc_attn_tiles", n_all, n_seen + 2*n_tile, args);
        auto * share = ggml_view_1d(ctx, shares, n_all, h*shares->nb[1]);
        outs.push_back(graph_step(ctx, step, n_seen, rows ? n_all : n_group, { tiles, share }));
        ggml_set_output(outs.back());
        ggml_build_forward_expand(graph->get_gf(), outs.back());
    }
    run_graph(lctx, graph, outs.back(), [&]() {
        ggml_backend_tensor_set(inputs, q.data(),      0, ggml_nbytes(inputs));
        ggml_backend_tensor_set(bounds, range.data(),  0, ggml_nbytes(bounds));
        ggml_backend_tensor_set(shares, weight.data(), 0, ggml_nbytes(shares));
        if (chosen) {
            ggml_backend_tensor_set(chosen, slots.data(), 0, ggml_nbytes(chosen));
        }
    });
    std::vector<float> res(outs.size()*ggml_nelements(outs[0]));
    for (size_t h = 0; h < outs.size(); ++h) {
        ggml_backend_tensor_get(outs[h], res.data() + h*ggml_nelements(outs[h]), 0, ggml_nbytes(outs[h]));
    }
    return res;
}

std::vector<float> scorer::attention_tiles(llama_context * lctx, uint32_t s, const layer_signals & sig, const watched & w,
        const queries_of & queries, bool largest) const {
    const int64_t n_group = sig.n_head/layout.n_head_kv(), n_seen = w.slots.empty() ? w.n_kv : (int64_t) w.slots.size();
    const auto ring = taps.read_ring(s, sig.il);
    std::vector<float> given;
    for (const auto & part : parts_of(queries, n_seen, n_group)) {
        auto more = run_tiles(lctx, s, sig, w, w.x, ring, part, largest ? "kvc_attn_max" : "kvc_attn_sum");
        for (size_t i = 0; i < given.size(); ++i) {
            more[i] = largest ? std::max(given[i], more[i]) : given[i] + more[i];
        }
        given = std::move(more);
    }
    if (w.slots.empty()) {
        return given;
    }
    std::vector<float> all((size_t) w.n_kv*w.x.n_head*n_group, 0.0f);
    for (size_t i = 0; i < given.size(); ++i) {
        all[i/n_seen*w.n_kv + w.slots[i % n_seen]] = given[i];
    }
    return all;
}

void scorer::tiles_rows(llama_context * lctx, uint32_t s, const layer_signals & sig, const watched & w, const queries_of & queries,
        const add_row & add) const {
    const auto ring = taps.read_ring(s, sig.il);
    const int32_t n_group = sig.n_head/layout.n_head_kv();
    for (int32_t h = w.x.head; h < w.x.head + w.x.n_head; ++h) {
        size_t first = 0;
        for (const auto & part : parts_of(queries, w.n_kv, n_group)) {
            const auto rows = run_tiles(lctx, s, sig, w, { h, 1 }, ring, part, "kvc_attn_rows"); // F32 [n_group, n_lane, n_kv]
            const size_t n_lane = rows.size()/w.n_kv/n_group;
            for (int32_t g = 0; g < n_group; ++g) {
                for (size_t i = 0; i < part.size(); ++i) {
                    add(h*n_group + g, first + i, rows.data() + (g*n_lane + i)*w.n_kv);
                }
            }
            first += part.size();
        }
    }
}

} // namespace kvc
