// Inside the model's graph: what attention leaves behind, its last queries and sums of its probabilities.

#include "graph.h"
#include "taps.h"

#include "llama-batch.h"
#include "llama-graph.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace kvc {

// What the queries were made from, the input of the attention block: behind the first matrix product on the way back.
// Quantized keys have queries mixed by a Hadamard matrix, a product of its own.
static ggml_tensor * input_of(ggml_tensor * q) {
    while (q && q->op != GGML_OP_NONE) {
        if (q->op != GGML_OP_MUL_MAT) {
            q = q->src[0];
        } else if (strcmp(q->src[0]->name, "attn_inp_k_rot") == 0) {
            q = q->src[1];
        } else {
            return q->src[1];
        }
    }
    return nullptr;
}

void taps::tap_queries(llm_graph_result * res, int il, ggml_tensor * q, int64_t n_seqs, ggml_tensor * sinks, float kq_scale) {
    auto * ctx = res->get_ctx();
    auto * gf  = res->get_gf();
    const int32_t ikv = kv.map_layer_ids.at(il);
    const auto & t = tensors[ikv];
    const int32_t n_reader = (int32_t) readers[ikv].size();
    const int32_t i_reader = (int32_t) (std::find(readers[ikv].begin(), readers[ikv].end(), il) - readers[ikv].begin());
    if (n_reader > 1 && (sinks || (i_reader > 0 && attn[ikv].scale != kq_scale))) { // found out when the context is created, as below
        throw std::invalid_argument("this model (" + model.arch_name() + ") cannot evict: layers that share a cache read it in different ways");
    }
    attn[ikv] = { sinks, kq_scale, {} };
    if (cfg->need.future > 0 && !rotation::find(q, attn[ikv].turn)) { // found out when the context is created: graphs are reserved there
        throw std::invalid_argument(cfg->spec + " rotates queries to the positions to come, but this model (" + model.arch_name() +
                ") changes them after their rotation: name a policy without such a fit, for example keydiff");
    }

    const int64_t n_tps = q->ne[2]/n_seqs;

    if (t.win) {
        const int64_t n_row = std::min<int64_t>(n_tps, cfg->need.window); // only the last ones can be in the window
        const std::string name = name_of("window_rows", { i_reader, n_reader });
        auto * rows = ggml_get_tensor(ctx, name.c_str());
        if (!rows) {
            rows = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_row*n_seqs);
            ggml_set_input(rows);
            ggml_set_name(rows, name.c_str());
            res->add_input(filled(q->ne[2], [=](const llama_ubatch * ubatch) { set_window_rows(rows, ubatch, i_reader, n_reader); }));
        }
        if (t.inputs) {
            auto * x = input_of(q);
            if (!x || x->ne[1] != q->ne[2]) { // found out when the context is created: graphs are reserved there
                throw std::invalid_argument(cfg->spec + " weighs queries by the input of their attention block, which is not found in this model (" +
                        model.arch_name() + "): leave plus out");
            }
            auto * norm = ggml_sum_rows(ctx, ggml_sqr(ctx, x)); // F32 [1, n_tokens]
            norm = ggml_cont(ctx, ggml_view_3d(ctx, norm, 1, n_row, n_seqs, norm->nb[1], n_tps*norm->nb[1], (n_tps - n_row)*norm->nb[1]));
            ggml_build_forward_expand(gf, ggml_set_rows(ctx, t.inputs, ggml_reshape_2d(ctx, norm, 1, n_row*n_seqs), rows));
        }
        q = ggml_reshape_2d(ctx, ggml_is_contiguous(q) ? q : ggml_cont(ctx, q), q->ne[0]*q->ne[1], q->ne[2]);
        // of all sequences at once: nodes for each would be more than llama.cpp allows
        auto * src = ggml_view_3d(ctx, q, q->ne[0], n_row, n_seqs, q->nb[1], n_tps*q->nb[1], (n_tps - n_row)*q->nb[1]);
        src = ggml_reshape_2d(ctx, ggml_is_contiguous(src) ? src : ggml_cont(ctx, src), q->ne[0], n_row*n_seqs);
        ggml_build_forward_expand(gf, ggml_set_rows(ctx, t.win, src, rows));
    }
}

// Adds probabilities, F32 [n_kv, n_tps, n_head, n_seqs] of the KV heads from h0 on, to the sums of the sequences from s0 on.
ggml_tensor * taps::graph_sums(ggml_context * ctx, int32_t ikv, ggml_tensor * kq, int64_t s0, int32_t h0) const {
    const auto & t = tensors[ikv];
    const int64_t n_kv = kq->ne[0], n_seqs = kq->ne[3], n_heads = kq->ne[2]*layout.n_head_kv()/model.hparams.n_head(kv.layers[ikv].il);
    const int64_t n_q  = kq->ne[1]*kq->ne[2]/n_heads; // queries of a KV head: those of its whole group lie together
    kq = ggml_reshape_4d(ctx, kq, n_kv, n_q, n_heads, n_seqs);
    auto * ones = ggml_view_4d(ctx, t.ones, 1, n_q, n_heads, n_seqs, sizeof(float), n_q*sizeof(float), n_q*n_heads*sizeof(float), 0);
    auto * add  = graph_dot(ctx, ikv, kq, ones); // F32 [n_kv, 1, n_head_kv, n_seqs]
    auto * sums = ggml_view_4d(ctx, t.sums, n_kv, 1, n_heads, n_seqs, t.sums->nb[1], t.sums->nb[1], t.sums->nb[2],
            s0*t.sums->nb[2] + h0*t.sums->nb[1]);
    return ggml_cpy(ctx, ggml_add(ctx, add, sums), sums);
}

// sum over i of x[:, i] * w[i]: x F32 [n, m, ...], w F32 [1, m, ...] -> F32 [n, 1, ...]
ggml_tensor * taps::graph_dot(ggml_context * ctx, int32_t ikv, ggml_tensor * x, ggml_tensor * w) const {
    if (tensors[ikv].out_prod) {
        return ggml_out_prod(ctx, x, w);
    }
    w = ggml_reshape_4d(ctx, w, w->ne[1], 1, w->ne[2], w->ne[3]);
    return ggml_mul_mat(ctx, ggml_cont(ctx, ggml_transpose(ctx, x)), w);
}

void taps::set_window_rows(ggml_tensor * rows, const llama_ubatch * ubatch, int32_t i_reader, int32_t n_reader) const {
    const int64_t n_window = cfg->need.window;
    const int64_t n_seqs = kv.n_stream > 1 ? ubatch->n_seqs_unq : 1;
    const int64_t n_tps  = ubatch->n_tokens/n_seqs;
    const int64_t n_row  = std::min(n_tps, n_window);
    std::vector<int64_t> data(n_row*n_seqs);
    for (int64_t s = 0; s < n_seqs; ++s) {
        for (int64_t i = 0; i < n_row; ++i) {
            const int64_t tok = s*n_tps + n_tps - n_row + i;
            const int64_t ring = (int64_t) kv.seq_to_stream[ubatch->seq_id[tok][0]]*n_reader + i_reader;
            data[s*n_row + i] = ring*n_window + ubatch->pos[tok] % n_window;
        }
    }
    ggml_backend_tensor_set(rows, data.data(), 0, ggml_nbytes(rows));
}

} // namespace kvc
