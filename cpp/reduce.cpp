// What a policy needs of keys and values, computed where they lie: one KV head after the other, so that the workspace
// is one head's keys as F32. On the CPU that is ggml's threads and vectors, on a device rows do not cross.

#include "engine.h"

#include "llama-context.h"
#include "llama-graph.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

namespace kvc {

// One head of K, or of V that is not transposed: F32 [head_dim, n_kv].
ggml_tensor * engine::graph_head(ggml_context * ctx, ggml_tensor * t, uint32_t s, int64_t head_dim, int32_t h, int64_t n_kv) const {
    auto * head = ggml_view_2d(ctx, t, head_dim, n_kv, t->nb[1], s*t->nb[2] + h*ggml_row_size(t->type, head_dim));
    return ggml_cast(ctx, head, GGML_TYPE_F32);
}

// A graph of one output for each head, and what it gives: F32, one head after the other.
static std::vector<float> run_heads(llama_context * lctx, llm_graph_result * graph, const std::vector<ggml_tensor *> & heads,
        const std::function<void()> & set_inputs) {
    for (auto * head : heads) {
        ggml_set_output(head);
        ggml_build_forward_expand(graph->get_gf(), head);
    }
    run_graph(lctx, graph, heads.back(), set_inputs);
    std::vector<float> res;
    for (auto * head : heads) {
        const size_t at = res.size();
        res.resize(at + ggml_nelements(head));
        ggml_backend_tensor_get(head, res.data() + at, 0, ggml_nbytes(head));
    }
    return res;
}

bool engine::reduce_keys(llama_context * lctx, uint32_t s, layer_signals & sig) const {
    const auto & pol = *streams[s].cfg->pol;
    auto * k = kv.layers[sig.il].k;
    const int64_t n_dim = sig.head_dim, n_group = sig.n_head/n_hkv;
    const bool fit = !sig.q_mean.empty();

    auto * graph = begin_graph(lctx);
    auto * ctx   = graph->get_ctx();
    auto * mean  = fit ? ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_dim, sig.n_head) : nullptr;
    auto * cov   = fit ? ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_dim, n_dim, sig.n_head) : nullptr;
    std::vector<ggml_tensor *> heads;
    for (int32_t h = 0; h < n_hkv; ++h) {
        auto * m = mean ? ggml_view_2d(ctx, mean, n_dim, n_group, mean->nb[1], h*n_group*mean->nb[1]) : nullptr;
        auto * c = cov  ? ggml_view_3d(ctx, cov, n_dim, n_dim, n_group, cov->nb[1], cov->nb[2], h*n_group*cov->nb[2]) : nullptr;
        heads.push_back(pol.reduce_keys(ctx, graph_head(ctx, k, s, n_dim, h, sig.n_kv), m, c));
        if (!heads.back() || (h == 0 && !can_run_all(device_of(k), ctx))) {
            return false;
        }
    }
    for (auto * input : { mean, cov }) {
        if (input) {
            ggml_set_input(input);
        }
    }
    sig.reduced = run_heads(lctx, graph, heads, [&]() {
        if (fit) {
            ggml_backend_tensor_set(mean, sig.q_mean.data(), 0, ggml_nbytes(mean));
            ggml_backend_tensor_set(cov,  sig.q_cov.data(),  0, ggml_nbytes(cov));
        }
    });
    return true;
}

// L2 norms. A Hadamard rotation of quantized values leaves them as they are.
bool engine::reduce_values(llama_context * lctx, uint32_t s, layer_signals & sig) const {
    auto * v = kv.layers[sig.il].v;
    if (kv.v_trans) {
        return false;
    }
    auto * graph = begin_graph(lctx);
    auto * ctx   = graph->get_ctx();
    std::vector<ggml_tensor *> heads;
    for (int32_t h = 0; h < n_hkv; ++h) {
        heads.push_back(ggml_sqrt(ctx, ggml_sum_rows(ctx, ggml_sqr(ctx, graph_head(ctx, v, s, sig.value_dim, h, sig.n_kv)))));
        if (h == 0 && !can_run_all(device_of(v), ctx)) {
            return false;
        }
    }
    sig.v_norm = run_heads(lctx, graph, heads, []() {});
    return true;
}

} // namespace kvc
