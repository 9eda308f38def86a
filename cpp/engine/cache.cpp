// The cache of a context that evicts: llama.cpp's, but for what its engine knows better.

#include "engine.h"

#include "llama-kv-cache.h"

#include <algorithm>
#include <limits>

namespace kvc {

class cache : public llama_kv_cache {
public:
    using llama_kv_cache::llama_kv_cache;

    // -- sequences

    void clear(bool data) override {
        llama_kv_cache::clear(false);
        kvc->on_clear();
        if (data) {
            llama_kv_cache::clear(true);
        }
    }

    bool seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) override {
        GGML_ASSERT(seq_id == -1 || (seq_id >= 0 && (size_t) seq_id < seq_to_stream.size()));
        return kvc->on_seq_rm(seq_id, std::max(p0, 0), p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1) &&
            llama_kv_cache::seq_rm(seq_id, p0, p1);
    }

    void seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override {
        llama_kv_cache::seq_cp(seq_id_src, seq_id_dst, p0, p1);
        const uint32_t s0 = seq_to_stream[seq_id_src], s1 = seq_to_stream[seq_id_dst];
        if (s0 != s1 && kvc->on_seq_cp(s0, s1)) {
            sc_info.ssrc.pop_back(); // keys and values are copied already
            sc_info.sdst.pop_back();
        }
    }

    void seq_add(llama_seq_id, llama_pos, llama_pos, llama_pos) override { kvc->refuse_shift(__func__); }
    void seq_div(llama_seq_id, llama_pos, llama_pos, int)       override { kvc->refuse_shift(__func__); }
    bool get_can_shift() const override { return false; }

    llama_pos seq_pos_min(llama_seq_id seq_id) const override {
        const llama_pos first = llama_kv_cache::seq_pos_min(seq_id);
        return kvc->pos_min(seq_to_stream[seq_id], first);
    }

    // -- batches and updates

    // Where there are fewer cells than tokens, they are found when the ubatch is computed.
    slot_info_vec_t prepare(const std::vector<llama_ubatch> & ubatches) override {
        return kvc->conf().is_bounded() ? slot_info_vec_t(ubatches.size()) : llama_kv_cache::prepare(ubatches);
    }

    bool place(slot_info & sinfo, const llama_ubatch & ubatch) override {
        if (kvc->conf().is_bounded()) {
            sinfo = kvc->has_room(ubatch) ? find_slot(ubatch, false) : slot_info();
            if (sinfo.empty()) {
                return false;
            }
        }
        apply_ubatch(sinfo, ubatch);
        kvc->on_ubatch(ubatch);
        return true;
    }

    llama_memory_context_ptr init_update(llama_context * lctx, bool) override {
        return std::make_unique<llama_kv_cache_context>(this, lctx, kvc->wants_update(), std::move(sc_info));
    }

    bool update(llama_context * lctx, bool, const stream_copy_info & copies) override {
        llama_kv_cache::update(lctx, false, copies);
        for (const auto & streams : { copies.ssrc, copies.sdst }) { // a copy reads and writes all rows, used or not
            for (const uint32_t s : streams) {
                kvc->rows().give_back_rows(s, false);
            }
        }
        kvc->update(lctx);
        return true;
    }

    // -- graphs: a layer has as many rows as it was given, and of them as many are read as its sequences hold

    ggml_tensor * get_k(ggml_context * ctx, int32_t il, uint32_t n_kv, const slot_info & sinfo) const override {
        auto * k = layers[map_layer_ids.at(il)].k;
        return rows_of(ctx, k, hparams.n_embd_head_k(il), il, n_kv, sinfo);
    }

    ggml_tensor * get_v(ggml_context * ctx, int32_t il, uint32_t n_kv, const slot_info & sinfo) const override {
        const int32_t ikv = map_layer_ids.at(il);
        auto * v = layers[ikv].v;
        const int64_t n_dim = hparams.n_embd_head_v(il);
        if (!v_trans) {
            return rows_of(ctx, v, n_dim, il, n_kv, sinfo);
        }
        const size_t channel = ggml_row_size(v->type, v->ne[1]);
        return ggml_view_4d(ctx, v, kvc->rows().n_rows(ikv, n_kv, sinfo.s0, sinfo.s1), hparams.n_head_kv(il), n_dim,
                sinfo.s1 - sinfo.s0 + 1, channel*n_dim, channel, v->nb[2], v->nb[2]*sinfo.s0);
    }

    ggml_tensor * cpy_k(ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * k_idxs, int32_t il,
            const slot_info &) const override {
        return kvc->store(ctx, map_layer_ids.at(il), k_cur, k_idxs, false);
    }

    ggml_tensor * cpy_v(ggml_context * ctx, ggml_tensor * v_cur, ggml_tensor * v_idxs, int32_t il,
            const slot_info & sinfo) const override {
        return v_trans ? llama_kv_cache::cpy_v(ctx, v_cur, v_idxs, il, sinfo) :
            kvc->store(ctx, map_layer_ids.at(il), v_cur, v_idxs, true);
    }

    // -- states

    void state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const override {
        kvc->state_write_head(io);
        llama_kv_cache::state_write(io, seq_id, flags);
        kvc->state_write(io, seq_id);
    }

    void state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) override {
        kvc->state_read_head(io);
        llama_kv_cache::state_read(io, seq_id, flags);
        try {
            kvc->state_read(io, seq_id);
        } catch (...) {
            llama_kv_cache::state_clear(seq_id);
            throw;
        }
    }

private:
    void state_write_data(llama_io_write_i & io, const cell_ranges_t & cr) const override {
        kvc->state_write_rows(io, cr.strm);
    }

    bool state_read_data(llama_io_read_i & io, uint32_t strm, uint32_t, const slot_info &) override {
        return kvc->state_read_rows(io, strm);
    }

    void state_clear(llama_seq_id seq_id, uint32_t strm, const slot_info &) override {
        llama_kv_cache::state_clear(seq_id, strm, {}); // cells alone
        if (seq_id >= 0) {
            kvc->clear_rows(strm);
        }
    }

    ggml_tensor * rows_of(ggml_context * ctx, ggml_tensor * t, int64_t n_dim, int32_t il, uint32_t n_kv,
            const slot_info & sinfo) const {
        const int64_t n_rows = kvc->rows().n_rows(map_layer_ids.at(il), n_kv, sinfo.s0, sinfo.s1);
        return ggml_view_4d(ctx, t, n_dim, hparams.n_head_kv(il), n_rows,
                sinfo.s1 - sinfo.s0 + 1, ggml_row_size(t->type, n_dim), t->nb[1], t->nb[2], t->nb[2]*sinfo.s0);
    }
};

ggml_tensor * build_rows(llm_graph_result * res, const llama_kv_cache_context * mctx, int il, ggml_tensor * idxs,
        bool values) {
    const auto * e = mctx->get_kvc();
    return e ? e->build_rows(res, il, idxs, values) : idxs;
}

ggml_tensor * build_attn(const llm_graph_context & graph, const llama_kv_cache_context * mctx, ggml_tensor * q,
        ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b, ggml_tensor * kq_mask, ggml_tensor * sinks,
        ggml_tensor * v_mla, float kq_scale, int il) {
    auto * e = mctx->get_kvc();
    return e ? e->build_attn(graph, mctx->get_s0(), q, k, v, kq_b, kq_mask, sinks, v_mla, kq_scale, il) :
        graph.build_attn_mha(q, k, v, kq_b, kq_mask, sinks, v_mla, 0, kq_scale, il);
}

llama_kv_cache * new_cache(
        const llama_model & model, const llama_hparams & hparams, ggml_type type_k, ggml_type type_v, bool v_trans,
        bool offload, bool unified, uint32_t kv_size, uint32_t n_seq_max, uint32_t n_pad, uint32_t n_swa,
        llama_swa_type swa_type, llama_memory_t mem_other, const llama_memory_i::layer_filter_cb & filter,
        const llama_memory_i::layer_reuse_cb & reuse, const llama_memory_i::layer_share_cb & share) {
    if (is_creating()) {
        return new cache(model, hparams, type_k, type_v, v_trans, offload, unified, kv_size, n_seq_max, n_pad, n_swa,
                swa_type, mem_other, filter, reuse, share);
    }
    return new llama_kv_cache(model, hparams, type_k, type_v, v_trans, offload, unified, kv_size, n_seq_max, n_pad,
            n_swa, swa_type, mem_other, filter, reuse, share);
}

} // namespace kvc
