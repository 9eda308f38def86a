// A small graph of one layer: what some queries give to its cells.

#include "engine.h"
#include "select.h"

#include "llama-context.h"
#include "llama-graph.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace kvc {

llm_graph_result * begin_graph(llama_context * lctx) {
    ggml_backend_sched_reset(lctx->get_sched());
    auto * res = lctx->get_gf_res_reserve();
    res->reset();
    return res;
}

void run_graph(llama_context * lctx, llm_graph_result * res, ggml_tensor * out, const std::function<void()> & set_inputs) {
    ggml_set_output(out);
    ggml_build_forward_expand(res->get_gf(), out);
    if (!ggml_backend_sched_alloc_graph(lctx->get_sched(), res->get_gf())) {
        throw std::runtime_error("no memory for the graph of a signal");
    }
    set_inputs();
    if (lctx->graph_compute(res->get_gf(), true) != GGML_STATUS_SUCCESS) {
        throw std::runtime_error("the graph of a signal failed");
    }
    llama_synchronize(lctx);
}

// softmax(scale * Q K^T + mask) of the ring's queries: F32 [n_kv, window, n_head], of a mask F32 [n_kv, window, 1 or n_head]. With a weight
// F32 [1, window, n_head] their sum: F32 [n_kv, 1, n_head].
ggml_tensor * engine::graph_scores(ggml_context * ctx, uint32_t s, int32_t ikv, ggml_tensor * mask, ggml_tensor * weight) const {
    const auto & hp    = model.hparams;
    const auto & layer = kv.layers[ikv];
    const int64_t n_head = hp.n_head(layer.il), head_dim = hp.n_embd_head_k(layer.il), n_window = cfg->need.window;

    auto * k = layer.k;
    k = ggml_view_3d(ctx, k, head_dim, n_hkv, mask->ne[0], ggml_row_size(k->type, head_dim), k->nb[1], s*k->nb[2]);
    auto * win = tensors[ikv].win;
    auto * q = ggml_view_3d(ctx, win, head_dim, n_head, n_window, head_dim*sizeof(float), win->nb[1], (size_t) s*n_window*win->nb[1]);

    auto * out = ggml_mul_mat(ctx, ggml_permute(ctx, k, 0, 2, 1, 3), ggml_permute(ctx, q, 0, 2, 1, 3)); // [n_kv, n_window, n_head]
    ggml_prec_set_acc(out, GGML_PREC_F32);
    if (hp.attn_soft_cap) {
        out = ggml_scale(ctx, out, 1.0f/hp.f_attn_logit_softcapping);
        out = ggml_scale(ctx, ggml_tanh(ctx, out), hp.f_attn_logit_softcapping);
    }
    out = ggml_soft_max_ext(ctx, out, mask, attn[ikv].scale, 0.0f);
    ggml_soft_max_add_sinks(out, attn[ikv].sinks);
    return weight ? graph_dot(ctx, ikv, out, weight) : out;
}

// The scores of some queries of the ring, computed in one small graph of the layer; weight [window]: a number for each row of
// the ring. F32 [n_kv, 1, n_head], without weights F32 [n_kv, window, n_head].
ggml_tensor * engine::build_attn(llama_context * lctx, uint32_t s, const layer_signals & sig,
        const std::vector<std::pair<llama_pos, int32_t>> & queries, const std::vector<float> * weight) const {
    const int32_t n_window = cfg->need.window;

    // one mask for all heads, by the positions of head 0: from the floor on they agree. One for each where a head has empty slots.
    const int32_t n_mask = n_held(s, sig.il) < (int64_t) sig.pos.size() ? sig.n_head : 1;
    std::vector<float> mask((size_t) n_mask*n_window*sig.n_kv, 0.0f); // F32 [n_kv, n_window, n_mask]
    for (const auto & query : queries) {
        for (int32_t h = 0; h < n_mask; ++h) {
            const int32_t * pos = sig.pos.data() + (size_t) (h/(sig.n_head/n_hkv))*sig.n_kv;
            float * row = mask.data() + ((size_t) h*n_window + query.second)*sig.n_kv;
            std::fill_n(row, first_slot(pos, sig.n_kv), -INFINITY);
            for (int32_t j = sig.n_kv - 1; j >= 0 && pos[j] > query.first; --j) {
                row[j] = -INFINITY;
            }
        }
    }

    auto * res = begin_graph(lctx);
    auto * ctx = res->get_ctx();

    auto * m = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, sig.n_kv, n_window, n_mask);
    auto * w = weight ? ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 1, n_window, sig.n_head) : nullptr;
    for (auto * input : { m, w }) {
        if (input) {
            ggml_set_input(input);
        }
    }
    auto * out = graph_scores(ctx, s, sig.il, m, w);
    run_graph(lctx, res, out, [&]() {
        ggml_backend_tensor_set(m, mask.data(), 0, ggml_nbytes(m));
        for (int32_t h = 0; w && h < sig.n_head; ++h) {
            ggml_backend_tensor_set(w, weight->data(), h*w->nb[2], weight->size()*sizeof(float));
        }
    });
    return out;
}

} // namespace kvc
