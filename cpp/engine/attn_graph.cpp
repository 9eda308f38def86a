// What some queries of the ring give to the cells of a layer, as graphs that any device runs. A graph takes as many
// rows of the ring and KV heads as its workspace holds, whatever n_kv, window and n_head are.

#include "graph.h"
#include "scorer.h"

#include "llama-context.h"
#include "llama-graph.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>

namespace kvc {

static const int64_t N_WORKSPACE = 16 << 20; // bytes of the probabilities of one graph; beside them lie a mask, queries and a copy

// softmax(scale * Q K^T + mask) of some rows of the ring and KV heads of a lane: F32 [n_kv, n_row, n_head], of a mask F32
// [n_kv, n_row].
ggml_tensor * scorer::graph_scores(ggml_context * ctx, uint32_t s, int32_t ikv, ggml_tensor * mask, const ring_part & p) const {
    const auto & hp    = model.hparams;
    const uint32_t il = kv.layers[ikv].il;
    const int64_t n_group = hp.n_head(il)/layout.n_head_kv(), head_dim = hp.n_embd_head_k(il), n_window = taps.n_ring(ikv);

    auto * k = layout.view_of(ctx, s, 1, ikv, { p.head, p.n_head }, mask->ne[0], false);
    auto * win = taps.tensors[ikv].win;
    const size_t q_head = ggml_row_size(win->type, head_dim);
    auto * q = ggml_view_3d(ctx, win, head_dim, p.n_head*n_group, p.n_row, q_head, win->nb[1], (s*n_window + p.row)*win->nb[1] + p.head*n_group*q_head);
    q = win->type == GGML_TYPE_F32 ? q : ggml_cast(ctx, q, GGML_TYPE_F32);

    auto * out = ggml_mul_mat(ctx, ggml_permute(ctx, k, 0, 2, 1, 3), ggml_permute(ctx, q, 0, 2, 1, 3)); // [n_kv, n_row, n_head]
    ggml_prec_set_acc(out, GGML_PREC_F32);
    if (hp.attn_soft_cap) {
        out = ggml_scale(ctx, out, 1.0f/hp.f_attn_logit_softcapping);
        out = ggml_scale(ctx, ggml_tanh(ctx, out), hp.f_attn_logit_softcapping);
    }
    out = ggml_soft_max_ext(ctx, out, mask, taps.attn[ikv].scale, 0.0f);
    if (auto * sinks = taps.attn[ikv].sinks) {
        ggml_soft_max_add_sinks(out, ggml_view_1d(ctx, sinks, p.n_head*n_group, p.head*n_group*sinks->nb[0]));
    }
    return out;
}

// Of probabilities [n_kv, n_row, n_head] and a weight F32 [1, n_row, n_head] of each row: [n_kv, 1, n_head] or, of the
// largest, [1, n_kv, n_head].
ggml_tensor * scorer::graph_reduced(ggml_context * ctx, int32_t ikv, ggml_tensor * each, ggml_tensor * weight, bool largest) const {
    if (!largest) {
        return taps.graph_dot(ctx, ikv, each, weight);
    }
    const int n_row = (int) each->ne[1];
    each = ggml_cont(ctx, ggml_permute(ctx, ggml_mul(ctx, each, weight), 1, 0, 2, 3)); // [n_row, n_kv, n_head]
    return ggml_pool_2d(ctx, each, GGML_OP_POOL_MAX, n_row, 1, n_row, 1, 0, 0);
}

// What a graph is to mask: F32 [n_kv, n_row], by rows of the ring.
static std::vector<float> mask_of(const std::vector<ring_query> & queries, const std::vector<int32_t> & ends, const ring_part & p, int32_t n_kv,
        const std::vector<int32_t> & slots) {
    std::vector<float> seen(n_kv, slots.empty() ? 0.0f : -INFINITY);
    for (const int32_t j : slots) {
        seen[j] = 0.0f;
    }
    std::vector<float> mask((size_t) p.n_row*n_kv, 0.0f);
    for (size_t i = 0; i < queries.size(); ++i) {
        if (p.has(queries[i])) {
            float * row = mask.data() + (size_t) (queries[i].row - p.row)*n_kv;
            std::copy(seen.begin(), seen.end(), row);
            std::fill(row + ends[i], row + n_kv, -INFINITY);
        }
    }
    return mask;
}

// The parts of a layer's ring and of some of its KV heads, [h0, h0 + n_head_kv), one after the other.
static std::vector<ring_part> parts_of_ring(int64_t n_kv, int64_t n_row, int64_t h0, int64_t n_head_kv, int64_t n_group) {
    const int64_t a_row = std::max<int64_t>(1, n_kv*n_group*(int64_t) sizeof(float)); // of one KV head
    const int64_t rows  = std::min(n_row, std::max<int64_t>(1, N_WORKSPACE/a_row));
    const int64_t heads = std::min(n_head_kv, std::max<int64_t>(1, N_WORKSPACE/(a_row*rows)));
    std::vector<ring_part> res;
    for (int64_t r = 0; r < n_row; r += rows) {
        for (int64_t h = 0; h < n_head_kv; h += heads) {
            res.push_back({ (int32_t) r, (int32_t) std::min(rows, n_row - r), (int32_t) (h0 + h), (int32_t) std::min(heads, n_head_kv - h) });
        }
    }
    return res;
}

ring_part scorer::largest_part(int32_t ikv) const {
    return parts_of_ring(kv.layers[ikv].k->ne[1], taps.n_ring(ikv), 0, layout.n_head_kv(), model.hparams.n_head(kv.layers[ikv].il)/layout.n_head_kv())[0];
}

std::vector<float> scorer::attention_graph(llama_context * lctx, uint32_t s, const layer_signals & sig, const watched & w,
        const queries_of & queries, bool largest) const {
    const int32_t n_group = sig.n_head/layout.n_head_kv();
    const auto ends = seen_by(queries, w.pos, w.n_kv);
    std::vector<float> res((size_t) w.n_kv*w.x.n_head*n_group, 0.0f), part;
    for (const auto & p : parts_of_ring(w.n_kv, taps.n_ring(sig.il), w.x.head, w.x.n_head, n_group)) {
        std::vector<float> weight(p.n_row, 0.0f); // 0: a row of the ring that is not asked for
        for (const auto & query : queries) {
            if (p.has(query)) {
                weight[query.row - p.row] = query.weight;
            }
        }
        const int32_t n_part = p.n_head*n_group;
        const auto mask = mask_of(queries, ends, p, w.n_kv, w.slots);
        std::vector<float> weights;
        for (int32_t h = 0; h < n_part; ++h) {
            weights.insert(weights.end(), weight.begin(), weight.end());
        }

        auto * graph = begin_graph(lctx);
        auto * ctx = graph->get_ctx();
        auto * seen   = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, w.n_kv, p.n_row);
        auto * shares = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 1, p.n_row, n_part);
        ggml_set_input(seen);
        ggml_set_input(shares);
        auto * out = graph_reduced(ctx, sig.il, graph_scores(ctx, s, sig.il, seen, p), shares, largest);
        run_graph(lctx, graph, out, [&]() {
            ggml_backend_tensor_set(seen,   mask.data(),    0, ggml_nbytes(seen));
            ggml_backend_tensor_set(shares, weights.data(), 0, ggml_nbytes(shares));
        });
        part.resize((size_t) w.n_kv*n_part);
        ggml_backend_tensor_get(out, part.data(), 0, ggml_nbytes(out));
        float * to = res.data() + (size_t) (p.head - w.x.head)*n_group*w.n_kv;
        for (size_t i = 0; i < part.size(); ++i) {
            to[i] = largest ? std::max(to[i], part[i]) : to[i] + part[i];
        }
    }
    return res;
}

void scorer::graph_rows(llama_context * lctx, uint32_t s, const layer_signals & sig, const watched & w, const queries_of & queries,
        const add_row & add) const {
    const int32_t n_group = sig.n_head/layout.n_head_kv();
    const auto ends = seen_by(queries, w.pos, w.n_kv);
    std::vector<float> row(w.n_kv);
    for (const auto & p : parts_of_ring(w.n_kv, taps.n_ring(sig.il), w.x.head, w.x.n_head, n_group)) {
        const auto mask = mask_of(queries, ends, p, w.n_kv, {});
        auto * graph = begin_graph(lctx);
        auto * seen  = ggml_new_tensor_2d(graph->get_ctx(), GGML_TYPE_F32, w.n_kv, p.n_row);
        ggml_set_input(seen);
        auto * out = graph_scores(graph->get_ctx(), s, sig.il, seen, p); // [n_kv, n_row, n_head]
        run_graph(lctx, graph, out, [&]() { ggml_backend_tensor_set(seen, mask.data(), 0, ggml_nbytes(seen)); });
        for (int32_t h = 0; h < p.n_head*n_group; ++h) {
            for (size_t i = 0; i < queries.size(); ++i) {
                if (p.has(queries[i])) {
                    ggml_backend_tensor_get(out, row.data(), h*out->nb[2] + (queries[i].row - p.row)*out->nb[1], w.n_kv*sizeof(float));
                    add(p.head*n_group + h, i, row.data());
                }
            }
        }
    }
}

} // namespace kvc
