// Inside the model's graph: where the rows of new tokens go, and attention over what each layer and head holds. One call
// of llama.cpp's attention where all heads of a layer, and all sequences of a batch, begin somewhere in strides; else one
// for each lane, and for each sequence, put side by side.

#include "engine.h"

#include "llama-batch.h"
#include "llama-graph.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace kvc {

namespace {

class filled_input : public llm_graph_input_i {
public:
    filled_input(int64_t n_tokens, std::function<void(const llama_ubatch *)> fill) : n_tokens(n_tokens), fill(std::move(fill)) {}
    void set_input(const llama_ubatch * ubatch) override { fill(ubatch); }
    bool can_reuse(const llm_graph_params & params) override { return n_tokens == 0 || params.ubatch.n_tokens == n_tokens; }
private:
    int64_t n_tokens;
    std::function<void(const llama_ubatch *)> fill;
};

} // namespace

std::unique_ptr<llm_graph_input_i> filled(int64_t n_tokens, std::function<void(const llama_ubatch *)> fill) {
    return std::make_unique<filled_input>(n_tokens, std::move(fill));
}

// Layers that agree on these numbers share an input: a name for it.
std::string name_of(const char * what, const std::vector<int64_t> & numbers) {
    uint64_t hash = 14695981039346656037u; // FNV-1a, a number at a time
    for (const int64_t x : numbers) {
        hash = (hash ^ (uint64_t) x)*1099511628211u;
    }
    char name[GGML_MAX_NAME];
    snprintf(name, sizeof(name), "kvc_%s_%016llx", what, (unsigned long long) hash);
    return name;
}

// Inputs of our own are one for all layers that agree.
ggml_tensor * engine::build_rows(llm_graph_result * res, int il, ggml_tensor * idxs, bool values) const {
    auto * ctx = res->get_ctx();
    const int32_t ikv = kv.map_layer_ids.at(il);
    const bool trans = values && kv.v_trans; // an index for each channel
    const int64_t n_tokens = trans ? idxs->ne[0]/kv.layers[ikv].v->ne[0] : idxs->ne[0], n_rows = kv.layers[ikv].k->ne[1];

    bool own = layout.by_head() || ((kv.n_stream > 1 || trans) && n_rows != (int64_t) kv.get_size());
    std::vector<int64_t> begins;
    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        for (int32_t h = 0; h < layout.n_parts(); ++h) {
            begins.push_back(layout.cell_begin(s, ikv, h));
            own |= begins.back() > 0;
            if (layout.has_pool()) {
                begins.push_back(layout.pool_begin(s, ikv, h));
            }
        }
    }
    if (!own) {
        return idxs;
    }
    ggml_build_forward_expand(res->get_gf(), idxs); // llama.cpp fills its own whether a layer uses them or not
    begins.push_back(n_rows);
    const std::string name = name_of(trans ? "rows_trans" : "rows", begins);
    auto * rows = ggml_get_tensor(ctx, name.c_str());
    if (!rows) {
        rows = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, trans ? idxs->ne[0] : n_tokens*layout.n_parts());
        ggml_set_input(rows);
        ggml_set_name(rows, name.c_str());
        res->add_input(filled(n_tokens, [=](const llama_ubatch * ubatch) { set_cache_rows(rows, ubatch, ikv, trans); }));
    }
    return rows;
}

ggml_tensor * engine::store(ggml_context * ctx, int32_t ikv, ggml_tensor * cur, ggml_tensor * rows, bool values) const {
    const auto p = layout.place_of(0, ikv, 0, values);
    if (!layout.by_head()) { // a row is all heads of a cell
        GGML_ASSERT(cur->nb[1] == ggml_row_size(cur->type, cur->ne[0]));
        cur = ggml_view_2d(ctx, cur, cur->ne[0]*cur->ne[1], cur->ne[2], cur->nb[2], 0);
        return ggml_set_rows(ctx, kv.n_stream > 1 ? ggml_reshape_2d(ctx, p.t, p.t->ne[0], p.t->ne[1]*p.t->ne[2]) : p.t, cur, rows);
    }
    const int64_t n_dim = cur->ne[0];
    auto * all = layout.has_pool() ? p.t : ggml_reshape_2d(ctx, p.t, n_dim, ggml_nelements(p.t)/n_dim);
    cur = ggml_is_contiguous(cur) ? cur : ggml_cont(ctx, cur);
    return ggml_set_rows(ctx, all, ggml_reshape_2d(ctx, cur, n_dim, ggml_nelements(cur)/n_dim), rows);
}

void engine::set_cache_rows(ggml_tensor * rows, const llama_ubatch * ubatch, int32_t ikv, bool trans) const {
    struct start { int64_t row, step; }; // of a head: where position 0 would be, and from a channel to the next
    const int64_t n_each = rows->ne[0]/ubatch->n_tokens, n_dim = trans ? model.hparams.n_embd_head_v(kv.layers[ikv].il) : 1;
    std::vector<int64_t> data(n_each*ubatch->n_tokens);
    std::vector<start> heads;
    for (int64_t i = 0, of = -1; i < (int64_t) ubatch->n_tokens; ++i) {
        const int64_t s = kv.seq_to_stream[ubatch->seq_id[i][0]];
        if (s != of) {
            heads.clear();
            for (int32_t h = 0; h < layout.n_head_kv(); ++h) {
                const auto p = layout.place_of(s, ikv, h, trans);
                heads.push_back({ (int64_t) (p.offset/p.row) + layout.row_of_origin(s, ikv, h), (int64_t) (p.channel/p.row) });
            }
            of = s;
        }
        for (int64_t j = 0; j < n_each; ++j) {
            const int64_t h = std::min<int64_t>(j/n_dim, layout.n_head_kv() - 1); // channels may be padded
            data[i*n_each + j] = heads[h].row + (j - h*n_dim)*heads[h].step + ubatch->pos[i];
        }
    }
    ggml_backend_tensor_set(rows, data.data(), 0, ggml_nbytes(rows));
}

// The rows [begin, begin + n) of llama.cpp's mask, as far as they are of these sequences and of a head: one for all layers
// and heads that read the same cells.
ggml_tensor * engine::mask_of_lane(llm_graph_result * res, ggml_tensor * kq_mask, uint32_t s0, int64_t i_seq, int64_t n_seq, int32_t ikv, int32_t h,
        int64_t n) const {
    auto * ctx = res->get_ctx();
    const int64_t first = layout.cell_begin(s0 + i_seq, ikv, h);
    std::vector<int64_t> key = { n, i_seq, n_seq };
    bool agree = true; // all sequences hold cells from the same one on
    for (int64_t i = i_seq; i < i_seq + n_seq; ++i) {
        key.push_back(layout.cell_begin(s0 + i, ikv, h));
        agree &= key.back() == first;
    }
    if (n == kq_mask->ne[0] && agree && n_seq == kq_mask->ne[3]) {
        return kq_mask;
    }
    const std::string name = name_of("mask", key);
    auto * mask = ggml_get_tensor(ctx, name.c_str());
    if (!mask && agree) {
        mask = ggml_view_4d(ctx, kq_mask, n, kq_mask->ne[1], kq_mask->ne[2], n_seq, kq_mask->nb[1], kq_mask->nb[2], kq_mask->nb[3],
                i_seq*kq_mask->nb[3] + first*ggml_element_size(kq_mask));
        mask = ggml_is_contiguous(mask) ? mask : ggml_cont(ctx, mask); // attention wants it so
    } else if (!mask) {
        ggml_build_forward_expand(res->get_gf(), kq_mask); // llama.cpp fills its own, whether a layer uses it or not
        mask = ggml_new_tensor_4d(ctx, kq_mask->type, n, kq_mask->ne[1], kq_mask->ne[2], n_seq);
        ggml_set_input(mask);
        res->add_input(filled(kq_mask->ne[1]*kq_mask->ne[3], [=](const llama_ubatch * ubatch) { set_seen(mask, ubatch, ikv, h, i_seq); }));
    }
    ggml_set_name(mask, name.c_str());
    return mask;
}

// Which rows of a head each token sees: those up to its own. Rows are in the order of the tokens they hold.
void engine::set_seen(ggml_tensor * mask, const llama_ubatch * ubatch, int32_t ikv, int32_t h, int64_t i_seq) const {
    const int64_t n = mask->ne[0], n_tokens = mask->ne[1]*mask->ne[3], first = i_seq*mask->ne[1];
    const auto fill = [&](auto * data, auto inf) {
        for (int64_t i = 0; i < n_tokens; ++i) {
            const int64_t n_seen = layout.row_of_origin(kv.seq_to_stream[ubatch->seq_id[first + i][0]], ikv, h) + ubatch->pos[first + i] + 1;
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

void engine::set_bias(ggml_tensor * bias, int32_t ikv) const {
    const int64_t n_kv = bias->ne[0], n_head = bias->ne[2], g = n_head/layout.n_head_kv();
    const auto & slots = evictor.mask.slots[ikv];
    const size_t n_keep = slots.size()/layout.n_head_kv();
    std::vector<float> data(n_kv*n_head, 0.0f);
    for (int64_t h = 0; h < n_head; ++h) {
        std::fill_n(data.begin() + h*n_kv, evictor.mask.n, -INFINITY);
        for (size_t i = 0; i < n_keep; ++i) {
            const int32_t slot = slots[(h/g)*n_keep + i];
            if (slot >= 0) {
                data[h*n_kv + slot] = 0.0f;
            }
        }
    }
    ggml_backend_tensor_set(bias, data.data(), 0, ggml_nbytes(bias));
}

// llama.cpp's build_attn_mha() with flash attention. That takes values of several heads whose rows lie together for
// transposed ones.
static ggml_tensor * flash_attn(const llm_graph_context & g, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * mask,
        ggml_tensor * sinks, float scale, int il) {
    auto * ctx = g.ctx0;
    const int64_t n_seq = k->ne[3], n_tps = q->ne[2]/n_seq;
    q = ggml_view_4d(ctx, q, q->ne[0], q->ne[1], n_tps, n_seq, q->nb[1], q->nb[2], q->nb[2]*n_tps, 0);
    const auto of_heads = [&](ggml_tensor * t) {
        t = ggml_permute(ctx, t, 0, 2, 1, 3);
        return t->type == GGML_TYPE_F32 ? ggml_cast(ctx, t, GGML_TYPE_F16) : t;
    };
    auto * cur = ggml_flash_attn_ext(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), of_heads(k), of_heads(v), mask, scale, g.hparams.f_max_alibi_bias,
            g.hparams.attn_soft_cap ? g.hparams.f_attn_logit_softcapping : 0.0f);
    g.res->add_fused_node({ LLM_FUSED_OP_FLASH_ATTN, cur, il });
    ggml_flash_attn_ext_add_sinks(cur, sinks);
    ggml_prec_set_acc(cur, GGML_PREC_F32);
    return ggml_reshape_2d(ctx, cur, cur->ne[0]*cur->ne[1], cur->ne[2]*cur->ne[3]);
}

ggml_tensor * engine::build_attn(const llm_graph_context & graph, uint32_t s0, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b,
        ggml_tensor * kq_mask, ggml_tensor * sinks, ggml_tensor * v_mla, float kq_scale, int il) {
    auto * ctx = graph.ctx0;
    const int32_t ikv = kv.map_layer_ids.at(il);
    const int64_t n_seqs = kq_mask->ne[3], n_tps = q->ne[2]/n_seqs, n_group = model.hparams.n_head(il)/layout.n_head_kv();
    taps.tap_queries(graph.res, il, q, n_seqs, sinks, kq_scale);

    if (evictor.mask.on) {
        kq_b = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, kq_mask->ne[0], 1, model.hparams.n_head(il));
        ggml_set_input(kq_b);
        graph.res->add_input(filled(0, [=](const llama_ubatch *) { set_bias(kq_b, ikv); }));
    }
    const auto attend = [&](uint32_t s, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * mask, ggml_tensor * sinks, const layout::lane & x) {
        auto * bias = kq_b && x.n_head < layout.n_head_kv() ? ggml_view_3d(ctx, kq_b, kq_b->ne[0], kq_b->ne[1], x.n_head*n_group,
                kq_b->nb[1], kq_b->nb[2], x.head*n_group*kq_b->nb[2]) : kq_b;
        auto * cur = layout.by_head() && !kv.v_trans && !bias && !v_mla ? flash_attn(graph, q, k, v, mask, sinks, kq_scale, il) :
            graph.build_attn_mha(q, k, v, bias, mask, sinks, v_mla, 0, kq_scale, il);
        if (taps.tensors[ikv].sums) {
            // cur = cont(permute(v * softmax)): without flash attention the probabilities are there to be summed
            auto * kq = cur->src[0]->src[0]->src[1]; // F32 [n_kv, n_tps, n_head, n_seqs]
            kq = kv.layers[ikv].v ? kq : kq->src[1]; // latent values go through a matrix behind it
            GGML_ASSERT(kq->op == GGML_OP_SOFT_MAX);
            ggml_build_forward_expand(graph.res->get_gf(), taps.graph_sums(ctx, ikv, kq, s, x.head));
        }
        return cur;
    };
    if (!layout.by_head()) {
        return attend(s0, q, k, v, mask_of_lane(graph.res, kq_mask, s0, 0, n_seqs, ikv, 0, k->ne[2]), sinks, { 0, layout.n_head_kv() });
    }
    ggml_tensor * res = nullptr;
    const int64_t step = layout.has_pool() ? 1 : n_seqs; // from a pool each sequence's rows begin anywhere
    for (int64_t i = 0; i < n_seqs; i += step) {
        const uint32_t s = s0 + (uint32_t) i;
        auto * q_seq = ggml_view_3d(ctx, q, q->ne[0], q->ne[1], n_tps*step, q->nb[1], q->nb[2], i*n_tps*q->nb[2]);
        ggml_tensor * of_seq = nullptr;
        for (auto x : layout.lanes(ikv, s, s + (uint32_t) step - 1)) {
            for (const int32_t end = x.head + x.n_head; x.head < end; x.head += x.n_head) {
                x.n_head = kq_b && !kv.v_trans ? 1 : end - x.head; // see flash_attn()
                const int64_t n = layout.rows_of_lane(s, step, ikv, x.head, kq_mask->ne[0]);
                const int64_t h = x.head*n_group, n_h = x.n_head*n_group; // query heads
                auto * k_rows = layout.view_of(ctx, s, step, ikv, x, n, false);
                auto * v_rows = kv.layers[ikv].v ? layout.view_of(ctx, s, step, ikv, x, n, true) : // a part of the keys
                    ggml_view_4d(ctx, k_rows, v->ne[0], k_rows->ne[1], n, step, k_rows->nb[1], k_rows->nb[2], k_rows->nb[3], 0);
                auto * cur = attend(s, ggml_view_3d(ctx, q_seq, q->ne[0], n_h, q_seq->ne[2], q->nb[1], q->nb[2], h*q->nb[1]), k_rows, v_rows,
                        mask_of_lane(graph.res, kq_mask, s0, i, step, ikv, x.head, n),
                        sinks ? ggml_view_1d(ctx, sinks, n_h, h*sinks->nb[0]) : nullptr, x);
                of_seq = of_seq ? ggml_concat(ctx, of_seq, cur, 0) : cur;
            }
        }
        res = res ? ggml_concat(ctx, res, of_seq, 1) : of_seq;
    }
    ggml_build_forward_expand(graph.res->get_gf(), res);
    return res;
}

uint32_t engine::n_more_nodes(llama_memory_i * mem) {
    const auto * cache = mem ? parts_of(mem).cache : nullptr;
    if (!cache || !cache->kvc) {
        return 0;
    }
    const engine & e = *cache->kvc;
    const uint32_t n_calls = (e.cfg->pol->heads_differ() ? e.layout.n_head_kv() : 1)*(e.cfg->pooled ? e.kv.n_stream : 1), n_nodes = 32; // of a call
    return n_calls > 1 ? e.layout.n_layer()*n_calls*n_nodes : 0;
}

} // namespace kvc
