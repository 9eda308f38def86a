// What a policy needs of keys and values, computed where they lie: one KV head after the other, so that the workspace
// is one head's keys as F32. On the CPU that is ggml's threads and vectors, on a device rows do not cross.

#include "graph.h"
#include "scorer.h"
#include "graph_ops.h"

#include "llama-context.h"
#include "llama-graph.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

namespace kvc {

// What one head holds of K, or of V that is not transposed: F32 [head_dim, n].
ggml_tensor * scorer::graph_head(ggml_context * ctx, uint32_t s, int32_t ikv, int32_t h, bool values) const {
    auto * head = layout.view_of(ctx, s, 1, ikv, { h, 1 }, layout.n_slots(s, ikv, h), values); // [head_dim, 1, n]
    if (on_cpu(kv.layers[ikv].k)) {
        return graph_step(ctx, "kvc_to_f32", head->ne[0], head->ne[2], { head });
    }
    return ggml_cast(ctx, ggml_permute(ctx, head, 0, 2, 1, 3), GGML_TYPE_F32);
}

// A graph of one output for each head, F32 [n, n_out] of its n slots (null: it has none), and what it gives: F32
// [n_head_kv, n_out, n_kv], 0 where a head has no slot.
std::vector<float> scorer::run_heads(llama_context * lctx, uint32_t s, int32_t ikv, llm_graph_result * graph, const std::vector<ggml_tensor *> & heads,
        const std::function<void()> & set_inputs) const {
    ggml_tensor * last = nullptr;
    for (auto * head : heads) {
        if (head) {
            ggml_set_output(head);
            ggml_build_forward_expand(graph->get_gf(), head);
            last = head;
        }
    }
    run_graph(lctx, graph, last, set_inputs);
    const size_t n_kv = layout.n_slots(s, ikv), n_out = ggml_nelements(last)/last->ne[0];
    std::vector<float> res(heads.size()*n_out*n_kv, 0.0f);
    for (size_t i = 0; i < heads.size()*n_out; ++i) {
        if (auto * head = heads[i/n_out]) {
            const size_t n = head->ne[0];
            ggml_backend_tensor_get(head, res.data() + (i + 1)*n_kv - n, i % n_out*n*sizeof(float), n*sizeof(float));
        }
    }
    return res;
}

bool scorer::reduce_keys(llama_context * lctx, uint32_t s, layer_signals & sig) const {
    const auto & pol = *sequences[s].cfg->pol;
    auto * k = kv.layers[sig.il].k;
    const int64_t n_dim = sig.head_dim, n_group = sig.n_head/layout.n_head_kv();
    const bool fit = !sig.q_mean.empty(), here = on_cpu(k);

    auto * graph = begin_graph(lctx);
    auto * ctx   = graph->get_ctx();
    auto * mean  = fit ? ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_dim, sig.n_head) : nullptr;
    auto * cov   = fit ? ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_dim, n_dim, sig.n_head) : nullptr;
    std::vector<ggml_tensor *> heads;
    for (int32_t h = 0; h < layout.n_head_kv(); ++h) {
        auto * m = mean ? ggml_view_2d(ctx, mean, n_dim, n_group, mean->nb[1], h*n_group*mean->nb[1]) : nullptr;
        auto * c = cov  ? ggml_view_3d(ctx, cov, n_dim, n_dim, n_group, cov->nb[1], cov->nb[2], h*n_group*cov->nb[2]) : nullptr;
        if (layout.n_slots(s, sig.il, h) == 0) {
            heads.push_back(nullptr);
            continue;
        }
        heads.push_back(pol.reduce_keys(ctx, { graph_head(ctx, s, sig.il, h, false), m, c, here }));
        if (!heads.back()) {
            return false;
        }
    }
    if (!can_run_all(device_of(k), ctx)) {
        return false;
    }
    for (auto * input : { mean, cov }) {
        if (input) {
            ggml_set_input(input);
        }
    }
    sig.reduced = run_heads(lctx, s, sig.il, graph, heads, [&]() {
        if (fit) {
            ggml_backend_tensor_set(mean, sig.q_mean.data(), 0, ggml_nbytes(mean));
            ggml_backend_tensor_set(cov,  sig.q_cov.data(),  0, ggml_nbytes(cov));
        }
    });
    return true;
}

// L2 norms. A Hadamard rotation of quantized values leaves them as they are.
bool scorer::reduce_values(llama_context * lctx, uint32_t s, layer_signals & sig) const {
    auto * v = kv.layers[sig.il].v;
    if (kv.v_trans) {
        return false;
    }
    auto * graph = begin_graph(lctx);
    auto * ctx   = graph->get_ctx();
    std::vector<ggml_tensor *> heads;
    for (int32_t h = 0; h < layout.n_head_kv(); ++h) {
        const bool any = layout.n_slots(s, sig.il, h) > 0;
        heads.push_back(any ? ggml_sqrt(ctx, graph_squares(ctx, graph_head(ctx, s, sig.il, h, true), on_cpu(v))) : nullptr);
    }
    if (!can_run_all(device_of(v), ctx)) {
        return false;
    }
    sig.v_norm = run_heads(lctx, s, sig.il, graph, heads, []() {});
    return true;
}

} // namespace kvc
