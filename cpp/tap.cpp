// Inside the model's graph: rows and masks of layers that hold fewer cells, and what attention leaves behind.

#include "engine.h"

#include "llama-batch.h"
#include "llama-graph.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace kvc {

namespace {

class window_input : public llm_graph_input_i {
public:
    window_input(const engine * e, ggml_tensor * rows, int64_t n_tokens, int32_t i_reader, int32_t n_reader) :
        e(e), rows(rows), n_tokens(n_tokens), i_reader(i_reader), n_reader(n_reader) {}
    void set_input(const llama_ubatch * ubatch) override { e->set_window_rows(rows, ubatch, i_reader, n_reader); }
    bool can_reuse(const llm_graph_params & params) override { return params.ubatch.n_tokens == n_tokens; }
private:
    const engine * e;
    ggml_tensor  * rows; // I64 [n_rows]
    int64_t        n_tokens;
    int32_t        i_reader, n_reader;
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

class seen_input : public llm_graph_input_i {
public:
    seen_input(const engine * e, ggml_tensor * mask, int64_t n_tokens, int32_t ikv) : e(e), mask(mask), n_tokens(n_tokens), ikv(ikv) {}
    void set_input(const llama_ubatch * ubatch) override { e->set_seen(mask, ubatch, ikv); }
    bool can_reuse(const llm_graph_params & params) override { return params.ubatch.n_tokens == n_tokens; }
private:
    const engine * e;
    ggml_tensor  * mask; // F16 or F32, as the mask, [n_rows, n_tokens of a sequence, 1, n_seqs]
    int64_t        n_tokens;
    int32_t        ikv;
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

// Layers that agree on these numbers share an input: a name for it.
static std::string name_of(const char * what, const std::vector<uint32_t> & numbers) {
    uint64_t hash = 14695981039346656037u; // FNV-1a, a number at a time
    for (const uint32_t x : numbers) {
        hash = (hash ^ x)*1099511628211u;
    }
    char name[GGML_MAX_NAME];
    snprintf(name, sizeof(name), "kvc_%s_%016llx", what, (unsigned long long) hash);
    return name;
}

// Where the new tokens' rows go: llama.cpp's cells where a layer's rows are the cells, else inputs of our own, one for
// all layers that agree. v_idxs: null where values are a part of the keys.
void engine::build_rows(llm_graph_result * res, int il, ggml_tensor *& k_idxs, ggml_tensor *& v_idxs) const {
    auto * ctx = res->get_ctx();
    const int32_t ikv = kv.map_layer_ids.at(il);
    const int64_t n_tokens = k_idxs->ne[0];

    bool own = kv.n_stream > 1 && n_rows_max(ikv) != (int32_t) kv.get_size();
    std::vector<uint32_t> begins;
    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        begins.push_back(cell_begin(s, ikv));
        own |= begins.back() > 0;
    }
    begins.push_back(n_rows_max(ikv));
    const auto rows = [&](bool trans) {
        const std::string name = name_of(trans ? "rows_trans" : "rows", begins);
        auto * t = ggml_get_tensor(ctx, name.c_str());
        if (!t) {
            t = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, trans ? v_idxs->ne[0] : n_tokens);
            ggml_set_input(t);
            ggml_set_name(t, name.c_str());
            res->add_input(std::make_unique<rows_input>(this, t, n_tokens, ikv, trans));
        }
        return t;
    };
    // llama.cpp fills its own whether a layer uses them or not
    ggml_build_forward_expand(res->get_gf(), k_idxs);
    if (v_idxs) {
        ggml_build_forward_expand(res->get_gf(), v_idxs);
    }
    if (own) {
        k_idxs = rows(false);
        v_idxs = kv.v_trans || !v_idxs ? v_idxs : k_idxs;
    }
    if (v_idxs && kv.v_trans && (own || n_rows_max(ikv) != (int32_t) kv.get_size())) {
        v_idxs = rows(true);
    }
}

void engine::build_mask(llm_graph_result * res, int il, const ggml_tensor * k, ggml_tensor *& kq_mask, ggml_tensor *& kq_b) const {
    auto * ctx = res->get_ctx();
    const int32_t ikv = kv.map_layer_ids.at(il);

    if (mask_only) {
        kq_b = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, kq_mask->ne[0], 1, model.hparams.n_head(il));
        ggml_set_input(kq_b);
        res->add_input(std::make_unique<bias_input>(this, kq_b, ikv));
        return;
    }
    const uint32_t s0 = (uint32_t) (k->view_offs/k->nb[3]), i0 = cell_begin(s0, ikv);
    const int64_t n = k->ne[2];
    std::vector<uint32_t> begins = { (uint32_t) n };
    bool agree = true; // all sequences of the batch hold cells from the same one on
    for (uint32_t s = s0; s < s0 + k->ne[3]; ++s) {
        begins.push_back(cell_begin(s, ikv));
        agree &= begins.back() == i0;
    }
    if (n != kq_mask->ne[0] || !agree) {
        // one for all layers that read the same cells: attention wants a contiguous mask
        const std::string name = name_of("mask", begins);
        auto * mask = ggml_get_tensor(ctx, name.c_str());
        if (!mask && agree) {
            mask = ggml_view_4d(ctx, kq_mask, n, kq_mask->ne[1], kq_mask->ne[2], kq_mask->ne[3],
                    kq_mask->nb[1], kq_mask->nb[2], kq_mask->nb[3], i0*ggml_element_size(kq_mask));
            mask = ggml_cont(ctx, mask);
        } else if (!mask) {
            ggml_build_forward_expand(res->get_gf(), kq_mask); // llama.cpp fills its own, whether a layer uses it or not
            mask = ggml_new_tensor_4d(ctx, kq_mask->type, n, kq_mask->ne[1], kq_mask->ne[2], kq_mask->ne[3]);
            ggml_set_input(mask);
            res->add_input(std::make_unique<seen_input>(this, mask, kq_mask->ne[1]*kq_mask->ne[3], ikv));
        }
        ggml_set_name(mask, name.c_str());
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

void engine::build_tap(llm_graph_result * res, int il, ggml_tensor * q, ggml_tensor * k, ggml_tensor * cur,
        ggml_tensor * kq_mask, ggml_tensor * sinks, float kq_scale) {
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

    const int64_t n_seqs = kq_mask->ne[3];
    const int64_t n_tps  = q->ne[2]/n_seqs;

    if (t.win) {
        const int64_t n_row = std::min<int64_t>(n_tps, cfg->need.window); // only the last ones can be in the window
        const std::string name = name_of("window_rows", { (uint32_t) i_reader, (uint32_t) n_reader });
        auto * rows = ggml_get_tensor(ctx, name.c_str());
        if (!rows) {
            rows = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_row*n_seqs);
            ggml_set_input(rows);
            ggml_set_name(rows, name.c_str());
            res->add_input(std::make_unique<window_input>(this, rows, q->ne[2], i_reader, n_reader));
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

    if (t.sums) {
        // cur = cont(permute(v * softmax)): without flash attention the probabilities are there to be summed
        auto * kq = cur->src[0]->src[0]->src[1]; // F32 [n_kv, n_tps, n_head, n_seqs]
        kq = kv.layers[ikv].v ? kq : kq->src[1]; // latent values go through a matrix behind it
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

void engine::set_cache_rows(ggml_tensor * rows, const llama_ubatch * ubatch, int32_t ikv, bool trans) const {
    const int64_t n_embd = trans ? model.hparams.n_embd_v_gqa_max() : 1, stride = n_rows_max(ikv);
    std::vector<int64_t> data(n_embd*ubatch->n_tokens);
    for (int64_t i = 0; i < (int64_t) ubatch->n_tokens; ++i) {
        const uint32_t s = kv.seq_to_stream[ubatch->seq_id[i][0]];
        const int64_t  row = s*n_embd*stride + row_of_origin(s, ikv) + ubatch->pos[i];
        for (int64_t j = 0; j < n_embd; ++j) {
            data[i*n_embd + j] = j*stride + row;
        }
    }
    ggml_backend_tensor_set(rows, data.data(), 0, ggml_nbytes(rows));
}

// Which rows of a layer each token sees: those up to its own. Rows are in the order of the tokens they hold.
void engine::set_seen(ggml_tensor * mask, const llama_ubatch * ubatch, int32_t ikv) const {
    const int64_t n = mask->ne[0];
    const auto fill = [&](auto * data, auto inf) {
        for (int64_t i = 0; i < (int64_t) ubatch->n_tokens; ++i) {
            const int64_t n_seen = row_of_origin(kv.seq_to_stream[ubatch->seq_id[i][0]], ikv) + ubatch->pos[i] + 1;
            std::fill(data + i*n + std::min(n_seen, n), data + (i + 1)*n, inf);
        }
        ggml_backend_tensor_set(mask, data, 0, ggml_nbytes(mask));
    };
    if (mask->type == GGML_TYPE_F16) {
        fill(std::vector<ggml_fp16_t>(ggml_nelements(mask), 0).data(), ggml_fp32_to_fp16(-INFINITY));
    } else {
        fill(std::vector<float>(ggml_nelements(mask), 0.0f).data(), -INFINITY);
    }
}

void engine::set_window_rows(ggml_tensor * rows, const llama_ubatch * ubatch, int32_t i_reader, int32_t n_reader) const {
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

} // namespace kvc
