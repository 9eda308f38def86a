// The graph: what attention leaves behind for a policy to look at, and the masks of layers that hold fewer cells.

#include "engine.h"
#include "select.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-graph.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <stdexcept>

namespace kvc {

layer_view layer_signals::view(int32_t n_layer) const {
    const auto ptr = [](const std::vector<float> & v) { return v.empty() ? nullptr : v.data(); };
    return { il, n_layer, n_kv, n_head, n_head_kv, head_dim, n_query, pos.data(), ptr(attn), ptr(sums), ptr(keys), ptr(probed),
        ptr(q_mean), ptr(q_cov), ptr(v_norm) };
}

void engine::alloc_signals(const llama_cparams & cparams) {
    tensors.resize(kv.layers.size());
    if (cfg->need.window == 0 && !cfg->need.sums) {
        return;
    }
    const auto & hp = model.hparams;
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctx_map;
    for (size_t l = 0; l < kv.layers.size(); ++l) {
        const auto & layer = kv.layers[l];
        auto & ctx = ctx_map[ggml_backend_buffer_get_type(layer.k->buffer)];
        if (!ctx) {
            ctx.reset(ggml_init({ 3*kv.layers.size()*ggml_tensor_overhead(), nullptr, true }));
        }
        auto & t = tensors[l];
        if (cfg->need.window > 0) {
            t.win = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, (int64_t) hp.n_embd_head_k(layer.il)*hp.n_head(layer.il),
                    (int64_t) cfg->need.window*kv.n_stream);
            ggml_format_name(t.win, "kvc_window_l%d", layer.il);
        }
        if (cfg->need.sums) {
            t.sums = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, layer.k->ne[1], n_hkv, kv.n_stream);
            // llama.cpp reserves for a multiple of the sequences
            const int64_t n_tokens = (cparams.n_ubatch + kv.n_stream - 1)/kv.n_stream*kv.n_stream;
            t.ones = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, n_tokens*hp.n_head(layer.il));
            ggml_format_name(t.sums, "kvc_sums_l%d", layer.il);
            ggml_set_name(t.ones, "1");
        }
    }
    for (auto & it : ctx_map) {
        ggml_backend_buffer_t buf = ggml_backend_alloc_ctx_tensors_from_buft(it.second.get(), it.first);
        if (!buf) {
            throw std::runtime_error("no memory for the attention signals of " + cfg->spec);
        }
        ggml_backend_buffer_clear(buf, 0);
        ctxs_bufs.emplace_back(std::move(it.second), buf);
    }
    for (size_t l = 0; l < kv.layers.size(); ++l) {
        ask_device((int32_t) l, (int32_t) cparams.n_ubatch);
        if (tensors[l].ones) {
            const std::vector<float> ones(tensors[l].ones->ne[0], (float) n_hkv/hp.n_head(kv.layers[l].il));
            ggml_backend_tensor_set(tensors[l].ones, ones.data(), 0, ggml_nbytes(tensors[l].ones));
        }
    }
}

//
// inside the model's graph
//

namespace {

class window_input : public llm_graph_input_i {
public:
    window_input(const engine * e, ggml_tensor * rows, int64_t n_tokens) : e(e), rows(rows), n_tokens(n_tokens) {}
    void set_input(const llama_ubatch * ubatch) override { e->set_window_rows(rows, ubatch); }
    bool can_reuse(const llm_graph_params & params) override { return params.ubatch.n_tokens == n_tokens; }
private:
    const engine * e;
    ggml_tensor  * rows; // I64 [n_rows]
    int64_t        n_tokens;
};

class rows_input : public llm_graph_input_i {
public:
    rows_input(const engine * e, ggml_tensor * rows, int64_t n_tokens, int32_t ikv, bool trans) :
        e(e), rows(rows), n_tokens(n_tokens), ikv(ikv), trans(trans) {}
    void set_input(const llama_ubatch * ubatch) override { e->set_cache_rows(rows, ubatch, ikv, trans); }
    bool can_reuse(const llm_graph_params & params) override { return params.ubatch.n_tokens == n_tokens; }
private:
    const engine * e;
    ggml_tensor  * rows; // I64 [n_tokens], or [n_embd_v_gqa, n_tokens] of a transposed V
    int64_t        n_tokens;
    int32_t        ikv;
    bool           trans;
};

class bias_input : public llm_graph_input_i {
public:
    bias_input(const engine * e, ggml_tensor * bias, int32_t ikv) : e(e), bias(bias), ikv(ikv) {}
    void set_input(const llama_ubatch *) override { e->set_bias(bias, ikv); }
    bool can_reuse(const llm_graph_params &) override { return true; }
private:
    const engine * e;
    ggml_tensor  * bias; // F32 [n_kv, 1, n_head]
    int32_t        ikv;
};

class empty_input : public llm_graph_input_i {
public:
    empty_input(const engine * e, ggml_tensor * bias, int32_t ikv) : e(e), bias(bias), ikv(ikv) {}
    void set_input(const llama_ubatch *) override { e->set_empty(bias, ikv); }
    bool can_reuse(const llm_graph_params &) override { return true; }
private:
    const engine * e;
    ggml_tensor  * bias; // F16 or F32, as the mask, [n_rows, 1, n_head_kv]
    int32_t        ikv;
};

} // namespace

// Where the new tokens' rows go: llama.cpp's cells where a layer's rows are the cells, else inputs of our own, one for
// all layers that agree.
void engine::build_rows(llm_graph_result * res, int il, ggml_tensor *& k_idxs, ggml_tensor *& v_idxs) const {
    auto * ctx = res->get_ctx();
    const int32_t ikv = kv.map_layer_ids.at(il);
    const int64_t n_tokens = k_idxs->ne[0];

    const auto rows = [&](bool trans) {
        char name[GGML_MAX_NAME];
        snprintf(name, sizeof(name), "kvc_rows_%d_%d", (int) cell_begin(ikv), trans ? n_rows_max(ikv) : 0);
        auto * t = ggml_get_tensor(ctx, name);
        if (!t) {
            t = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, trans ? v_idxs->ne[0] : n_tokens);
            ggml_set_input(t);
            ggml_set_name(t, name);
            res->add_input(std::make_unique<rows_input>(this, t, n_tokens, ikv, trans));
        }
        return t;
    };
    if (cell_begin(ikv) > 0) {
        k_idxs = rows(false);
        v_idxs = kv.v_trans ? v_idxs : k_idxs;
    }
    if (kv.v_trans && (cell_begin(ikv) > 0 || n_rows_max(ikv) != (int32_t) kv.get_size())) {
        v_idxs = rows(true);
    }
}

void engine::build_mask(llm_graph_result * res, int il, ggml_tensor *& kq_mask, ggml_tensor *& kq_b) const {
    auto * ctx = res->get_ctx();
    const int32_t ikv = kv.map_layer_ids.at(il);

    if (mask_only) {
        kq_b = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, kq_mask->ne[0], 1, model.hparams.n_head(il));
        ggml_set_input(kq_b);
        res->add_input(std::make_unique<bias_input>(this, kq_b, ikv));
        return;
    }
    const int64_t i0 = cell_begin(ikv), n = n_rows(ikv, kq_mask->ne[0]);
    if (n != kq_mask->ne[0]) {
        // one copy for all layers that read the same cells: attention wants a contiguous mask
        char name[GGML_MAX_NAME];
        snprintf(name, sizeof(name), "kvc_mask_%d_%d", (int) i0, (int) n);
        auto * mask = ggml_get_tensor(ctx, name);
        if (!mask) {
            mask = ggml_view_4d(ctx, kq_mask, n, kq_mask->ne[1], kq_mask->ne[2], kq_mask->ne[3],
                    kq_mask->nb[1], kq_mask->nb[2], kq_mask->nb[3], i0*ggml_element_size(kq_mask));
            mask = ggml_cont(ctx, mask);
            ggml_set_name(mask, name);
        }
        kq_mask = mask;
    }
    if (n_held(0, ikv) < (int64_t) n_slots(0, ikv)*n_hkv) {
        // a mask for each head: all query heads of a KV head, and all tokens, are without the rows it does not have
        const int64_t n_head = model.hparams.n_head(il), n_tokens = kq_mask->ne[1];
        auto * bias = ggml_new_tensor_3d(ctx, kq_mask->type, n, 1, n_hkv);
        ggml_set_input(bias);
        res->add_input(std::make_unique<empty_input>(this, bias, ikv));
        bias = ggml_repeat_4d(ctx, bias, n, n_head/n_hkv*n_tokens, n_hkv, 1);
        kq_mask = ggml_add(ctx, ggml_reshape_3d(ctx, bias, n, n_tokens, n_head), kq_mask);
    }
}

void engine::build_tap(llm_graph_result * res, int il, ggml_tensor * q, ggml_tensor * k, ggml_tensor * cur,
        ggml_tensor * kq_mask, ggml_tensor * sinks, float kq_scale) {
    auto * ctx = res->get_ctx();
    auto * gf  = res->get_gf();
    const int32_t ikv = kv.map_layer_ids.at(il);
    const auto & t = tensors[ikv];
    attn[ikv] = { sinks, kq_scale, {} };
    if (cfg->need.future > 0 && !rotation::find(q, attn[ikv].turn)) { // found out when the context is created: graphs are reserved there
        throw std::invalid_argument(cfg->spec + " rotates queries to the positions to come, but this model (" + model.arch_name() +
                ") changes them after their rotation: name a policy without such a fit, for example keydiff");
    }

    const int64_t n_seqs = kq_mask->ne[3];
    const int64_t n_tps  = q->ne[2]/n_seqs;

    if (t.win) {
        const int64_t n_row = std::min<int64_t>(n_tps, cfg->need.window); // only the last ones can be in the window
        auto * rows = ggml_get_tensor(ctx, "kvc_window_rows");
        if (!rows) {
            rows = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_row*n_seqs);
            ggml_set_input(rows);
            ggml_set_name(rows, "kvc_window_rows");
            res->add_input(std::make_unique<window_input>(this, rows, q->ne[2]));
        }
        q = ggml_reshape_2d(ctx, ggml_is_contiguous(q) ? q : ggml_cont(ctx, q), q->ne[0]*q->ne[1], q->ne[2]);
        for (int64_t s = 0; s < n_seqs; ++s) {
            auto * src = ggml_view_2d(ctx, q, q->ne[0], n_row, q->nb[1], (s*n_tps + n_tps - n_row)*q->nb[1]);
            auto * idx = ggml_view_1d(ctx, rows, n_row, s*n_row*sizeof(int64_t));
            ggml_build_forward_expand(gf, ggml_set_rows(ctx, t.win, src, idx));
        }
    }

    if (t.sums) {
        // cur = cont(permute(v * softmax)): without flash attention the probabilities are there to be summed
        auto * kq = cur->src[0]->src[0]->src[1]; // F32 [n_kv, n_tps, n_head, n_seqs]
        GGML_ASSERT(kq->op == GGML_OP_SOFT_MAX);
        ggml_build_forward_expand(gf, graph_sums(ctx, ikv, kq, k->view_offs/k->nb[3]));
    }
}

// Adds probabilities, F32 [n_kv, n_tps, n_head, n_seqs], to the sums of the streams from s0 on.
ggml_tensor * engine::graph_sums(ggml_context * ctx, int32_t ikv, ggml_tensor * kq, int64_t s0) const {
    const auto & t = tensors[ikv];
    const int64_t n_kv = kq->ne[0], n_seqs = kq->ne[3];
    const int64_t n_q  = kq->ne[1]*kq->ne[2]/n_hkv; // queries of a KV head: those of its whole group lie together
    kq = ggml_reshape_4d(ctx, kq, n_kv, n_q, n_hkv, n_seqs);
    auto * ones = ggml_view_4d(ctx, t.ones, 1, n_q, n_hkv, n_seqs, sizeof(float), n_q*sizeof(float), n_q*n_hkv*sizeof(float), 0);
    auto * add  = graph_dot(ctx, ikv, kq, ones); // F32 [n_kv, 1, n_head_kv, n_seqs]
    auto * sums = ggml_view_4d(ctx, t.sums, n_kv, 1, n_hkv, n_seqs, t.sums->nb[1], t.sums->nb[1], t.sums->nb[2],
            s0*t.sums->nb[2]);
    return ggml_cpy(ctx, ggml_add(ctx, add, sums), sums);
}

// sum over i of x[:, i] * w[i]: x F32 [n, m, ...], w F32 [1, m, ...] -> F32 [n, 1, ...]
ggml_tensor * engine::graph_dot(ggml_context * ctx, int32_t ikv, ggml_tensor * x, ggml_tensor * w) const {
    if (tensors[ikv].out_prod) {
        return ggml_out_prod(ctx, x, w);
    }
    w = ggml_reshape_4d(ctx, w, w->ne[1], 1, w->ne[2], w->ne[3]);
    return ggml_mul_mat(ctx, ggml_cont(ctx, ggml_transpose(ctx, x)), w);
}

// Only layers of one sequence have rows of their own.
void engine::set_cache_rows(ggml_tensor * rows, const llama_ubatch * ubatch, int32_t ikv, bool trans) const {
    const int64_t first = n_cells(0) - (int64_t) streams[0].tokens.size() - cell_begin(ikv); // row of position 0, were it there
    const int64_t n_embd = trans ? model.hparams.n_embd_v_gqa_max() : 1, stride = n_rows_max(ikv);
    std::vector<int64_t> data(n_embd*ubatch->n_tokens);
    for (int64_t i = 0; i < (int64_t) ubatch->n_tokens; ++i) {
        for (int64_t j = 0; j < n_embd; ++j) {
            data[i*n_embd + j] = j*stride + first + ubatch->pos[i];
        }
    }
    ggml_backend_tensor_set(rows, data.data(), 0, ggml_nbytes(rows));
}

void engine::set_window_rows(ggml_tensor * rows, const llama_ubatch * ubatch) const {
    const int64_t n_window = cfg->need.window;
    const int64_t n_seqs = kv.n_stream > 1 ? ubatch->n_seqs_unq : 1;
    const int64_t n_tps  = ubatch->n_tokens/n_seqs;
    const int64_t n_row  = std::min(n_tps, n_window);
    std::vector<int64_t> data(n_row*n_seqs);
    for (int64_t s = 0; s < n_seqs; ++s) {
        for (int64_t i = 0; i < n_row; ++i) {
            const int64_t tok = s*n_tps + n_tps - n_row + i;
            data[s*n_row + i] = kv.seq_to_stream[ubatch->seq_id[tok][0]]*n_window + ubatch->pos[tok] % n_window;
        }
    }
    ggml_backend_tensor_set(rows, data.data(), 0, ggml_nbytes(rows));
}

void engine::set_bias(ggml_tensor * bias, int32_t ikv) const {
    const int64_t n_kv = bias->ne[0], n_head = bias->ne[2], g = n_head/n_hkv;
    const auto & slots = mask_slots[ikv];
    const size_t n_keep = slots.size()/n_hkv;
    std::vector<float> data(n_kv*n_head, 0.0f);
    for (int64_t h = 0; h < n_head; ++h) {
        std::fill_n(data.begin() + h*n_kv, mask_n, -INFINITY);
        for (size_t i = 0; i < n_keep; ++i) {
            const int32_t slot = slots[(h/g)*n_keep + i];
            if (slot >= 0) {
                data[h*n_kv + slot] = 0.0f;
            }
        }
    }
    ggml_backend_tensor_set(bias, data.data(), 0, ggml_nbytes(bias));
}

void engine::set_empty(ggml_tensor * bias, int32_t ikv) const {
    ggml_backend_tensor_memset(bias, 0, 0, ggml_nbytes(bias));
    const size_t es = ggml_element_size(bias);
    const std::vector<float>       f32(n_slots(0, ikv), -INFINITY);
    const std::vector<ggml_fp16_t> f16(n_slots(0, ikv), ggml_fp32_to_fp16(-INFINITY));
    for (int32_t h = 0; h < n_hkv; ++h) {
        const void * inf = bias->type == GGML_TYPE_F16 ? (const void *) f16.data() : f32.data();
        ggml_backend_tensor_set(bias, inf, h*bias->nb[2], n_empty(0, ikv, h)*es);
    }
}

//
// signals of one layer, read back
//

layer_signals engine::no_signals(uint32_t s, int32_t ikv) const {
    const auto & hp = model.hparams;
    const uint32_t il = kv.layers[ikv].il;
    return { ikv, n_slots(s, ikv), (int32_t) hp.n_head(il), n_hkv, (int32_t) hp.n_embd_head_k(il), 0, slot_pos(s, ikv), {}, {}, {}, {}, {}, {}, {} };
}

layer_signals engine::read_signals(llama_context * lctx, uint32_t s, int32_t ikv) const {
    layer_signals sig = no_signals(s, ikv);
    if (sig.n_kv == 0) {
        throw std::invalid_argument("the sequence is empty");
    }
    const bool probed = !streams[s].probed[ikv].empty(); // its queries have taken the place of the last ones
    if (cfg->need.future > 0)                   { read_fit(lctx, s, sig); }
    else if (cfg->need.window > 0 && !probed)   { read_attn(lctx, s, sig); }
    if (cfg->need.sums)       { read_sums(s, sig); }
    if (cfg->need.keys)       { read_keys(s, sig); }
    if (cfg->need.values)     { read_values(s, sig); }
    if (probed)               { read_probed(s, sig); }
    return sig;
}

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

std::vector<float> engine::score(const layer_signals & sig) const {
    std::vector<float> res(sig.pos.size());
    cfg->pol->score(sig.view(n_layer()), res.data());
    for (size_t i = 0; i < res.size(); ++i) {
        res[i] = sig.pos[i] < 0 ? -INFINITY : res[i];
    }
    return res;
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

void engine::read_attn(llama_context * lctx, uint32_t s, layer_signals & sig) const {
    const auto & q = streams[s];
    const int32_t n_window = cfg->need.window;

    // Heads disagree on what lies below the floor. Queries from the floor on see all of that; earlier ones are left out.
    // So are those that came before all that some head holds.
    llama_pos first = std::max(q.floor - 1, 0);
    for (int32_t h = 0; h < n_hkv; ++h) {
        const int32_t * pos = sig.pos.data() + (size_t) h*sig.n_kv;
        const int32_t j = first_slot(pos, sig.n_kv);
        first = std::max(first, j < sig.n_kv ? pos[j] : (llama_pos) q.tokens.size());
    }
    std::vector<std::pair<llama_pos, int32_t>> queries; // position, ring row
    for (int32_t r = 0; r < n_window; ++r) {
        if (q.win_pos[r] >= first) {
            queries.emplace_back(q.win_pos[r], r);
        }
    }
    std::sort(queries.begin(), queries.end());
    sig.n_query = (int32_t) queries.size();
    if (queries.empty()) {
        throw std::invalid_argument("the queries of the window were removed with the tail: at least one token has to be evaluated after it");
    }

    std::vector<float> weight(n_window, 0.0f); // 0: not in the window
    float total = 0;
    for (size_t i = 0; i < queries.size(); ++i) {
        const float x = queries.size() > 1 ? (float) i/(queries.size() - 1) : 1.0f;
        total += weight[queries[i].second] = 1.0f + (cfg->need.newest - 1.0f)*x;
    }
    for (auto & w : weight) {
        w /= total;
    }
    auto * out = build_attn(lctx, s, sig, queries, &weight);
    sig.attn.resize((size_t) sig.n_kv*sig.n_head);
    ggml_backend_tensor_get(out, sig.attn.data(), 0, ggml_nbytes(out));
}

// What the last n_probe queries gave each slot, over a KV head's query heads: F32 [n_kv, n_head_kv].
std::vector<float> engine::read_probe(llama_context * lctx, uint32_t s, int32_t ikv, int32_t n_probe) const {
    const auto & q = streams[s];
    const layer_signals sig = no_signals(s, ikv);

    std::vector<std::pair<llama_pos, int32_t>> queries;
    for (int32_t r = 0; r < cfg->need.window; ++r) {
        if (q.win_pos[r] >= (llama_pos) q.tokens.size() - n_probe) {
            queries.emplace_back(q.win_pos[r], r);
        }
    }
    const bool    mean = cfg->need.probe == probe::mean;
    const int32_t n_group = sig.n_head/n_hkv;
    std::vector<float> weight(cfg->need.window, 0.0f);
    for (const auto & query : queries) {
        weight[query.second] = 1.0f/queries.size()/n_group;
    }
    auto * out = build_attn(lctx, s, sig, queries, mean ? &weight : nullptr);
    std::vector<float> attn(ggml_nelements(out)); // F32 [n_kv, 1 or n_window, n_head]
    ggml_backend_tensor_get(out, attn.data(), 0, ggml_nbytes(out));

    std::vector<float> res((size_t) sig.n_kv*n_hkv, 0.0f);
    for (int32_t h = 0; h < sig.n_head; ++h) {
        for (const auto & query : queries) {
            const float * row = attn.data() + ((size_t) h*out->ne[1] + (mean ? 0 : query.second))*sig.n_kv;
            for (int32_t j = 0; j < sig.n_kv; ++j) {
                float & x = res[(size_t) j*n_hkv + h/n_group];
                x = mean ? x + row[j] : std::max(x, row[j]);
            }
            if (mean) {
                break; // the graph has summed them
            }
        }
    }
    return res;
}

// n values of a cache tensor, dequantized.
static std::vector<float> read_f32(const ggml_tensor * t, size_t offset, int64_t n) {
    std::vector<uint8_t> raw(ggml_row_size(t->type, n));
    ggml_backend_tensor_get(t, raw.data(), offset, raw.size());
    std::vector<float> res(n);
    if (t->type == GGML_TYPE_F32) {
        memcpy(res.data(), raw.data(), raw.size());
    } else {
        ggml_get_type_traits(t->type)->to_float(raw.data(), res.data(), n);
    }
    return res;
}

void engine::read_keys(uint32_t s, layer_signals & sig) const {
    const auto * k = kv.layers[sig.il].k;
    const size_t n_embd = (size_t) sig.head_dim*n_hkv;
    const auto rows = read_f32(k, s*k->nb[2], (int64_t) n_embd*sig.n_kv); // F32 [n_kv, n_head_kv, head_dim]
    sig.keys.resize(rows.size());
    for (int32_t h = 0; h < n_hkv; ++h) {
        for (int32_t j = 0; j < sig.n_kv; ++j) {
            memcpy(&sig.keys[((size_t) h*sig.n_kv + j)*sig.head_dim], &rows[j*n_embd + (size_t) h*sig.head_dim], sig.head_dim*sizeof(float));
        }
    }
}

// A Hadamard rotation of quantized values leaves their norms as they are.
void engine::read_values(uint32_t s, layer_signals & sig) const {
    const auto * v = kv.layers[sig.il].v;
    const int32_t n_dim = model.hparams.n_embd_head_v(kv.layers[sig.il].il);
    const int64_t n_row = kv.v_trans ? v->ne[1] : v->ne[0]; // what lies together: a channel of all slots, or a slot
    const int64_t n_used = kv.v_trans ? (int64_t) n_dim*n_hkv*n_row : n_row*sig.n_kv;
    const auto data = read_f32(v, s*v->nb[2], n_used);
    sig.v_norm.resize((size_t) sig.n_kv*n_hkv);
    for (int32_t h = 0; h < n_hkv; ++h) {
        for (int32_t j = 0; j < sig.n_kv; ++j) {
            double sum = 0;
            for (int64_t i = (int64_t) h*n_dim; i < (int64_t) (h + 1)*n_dim; ++i) {
                const float x = data[kv.v_trans ? i*n_row + j : j*n_row + i];
                sum += x*x;
            }
            sig.v_norm[(size_t) h*sig.n_kv + j] = (float) std::sqrt(sum);
        }
    }
}

void engine::read_probed(uint32_t s, layer_signals & sig) const {
    const auto & probed = streams[s].probed[sig.il];
    sig.probed.assign((size_t) n_hkv*sig.n_kv, INFINITY);
    for (size_t i = 0; i < probed.size(); ++i) {
        sig.probed[(i % n_hkv)*sig.n_kv + i/n_hkv] = probed[i];
    }
}

void engine::read_sums(uint32_t s, layer_signals & sig) const {
    auto * t = tensors[sig.il].sums;
    sig.sums.resize((size_t) sig.n_kv*n_hkv);
    for (int32_t h = 0; h < n_hkv; ++h) {
        ggml_backend_tensor_get(t, &sig.sums[(size_t) h*sig.n_kv], s*t->nb[2] + h*t->nb[1], sig.n_kv*sizeof(float));
    }
}

} // namespace kvc
