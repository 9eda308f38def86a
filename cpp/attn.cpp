// What some queries of the ring give to the cells of a layer: steps of our own on the CPU (ggml/attn_scores.h),
// elsewhere a small graph.

#include "engine.h"
#include "attn_ops.h"
#include "select.h"

#include "llama-context.h"
#include "llama-graph.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
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

// Which slots a query head's queries see: I32 [2, n_query, n_mask], from and up to. By the positions of head 0, since
// from the floor on all agree; of each head where one has empty slots.
std::vector<int32_t> ranges_of(const layer_signals & sig, const std::vector<ring_query> & queries, int32_t n_mask) {
    std::vector<int32_t> res;
    for (int32_t h = 0; h < n_mask; ++h) {
        const int32_t * pos = sig.pos.data() + (size_t) (h/(sig.n_head/sig.n_head_kv))*sig.n_kv;
        const int32_t first = first_slot(pos, sig.n_kv);
        for (const auto & q : queries) {
            res.push_back(first);
            res.push_back((int32_t) (std::upper_bound(pos + first, pos + sig.n_kv, q.pos) - pos));
        }
    }
    return res;
}

int32_t engine::n_masks(uint32_t s, const layer_signals & sig) const {
    return n_held(s, sig.il) < (int64_t) sig.pos.size() ? sig.n_head : 1;
}

// A step of attn_scores.h; null where the layer is not on the CPU.
static ggml_custom_op_t cpu_step(const ggml_tensor * k, const char * name) {
    auto * dev = device_of(k);
    return ggml_backend_dev_type(dev) != GGML_BACKEND_DEVICE_TYPE_CPU ? nullptr :
        (ggml_custom_op_t) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(dev), name);
}

std::vector<float> engine::attention_of(llama_context * lctx, uint32_t s, const layer_signals & sig, const std::vector<ring_query> & queries,
        bool largest, const std::vector<int32_t> & slots) const {
    const int32_t n_mask = n_masks(s, sig);
    const auto ranges = ranges_of(sig, queries, n_mask);
    // The tiles know neither attention sinks nor a soft cap.
    const bool tiles = !getenv("PYKVC_STOCK_ATTENTION") && !attn[sig.il].sinks && !model.hparams.attn_soft_cap &&
        cpu_step(kv.layers[sig.il].k, "kvc_attn_tiles");
    return tiles ? attention_tiles(lctx, s, sig, queries, ranges, n_mask, largest, slots) :
                   attention_graph(lctx, s, sig, queries, ranges, n_mask, largest, slots);
}

std::vector<float> engine::attention_tiles(llama_context * lctx, uint32_t s, const layer_signals & sig, const std::vector<ring_query> & queries,
        const std::vector<int32_t> & ranges, int32_t n_mask, bool largest, const std::vector<int32_t> & slots) const {
    const int32_t n_query = (int32_t) queries.size(), n_group = sig.n_head/n_hkv;
    const int32_t n_lane = GGML_PAD(n_query, KVC_ATTN_LANES); // of a head; those that no query takes see all and weigh nothing
    const int32_t n_seen = slots.empty() ? sig.n_kv : (int32_t) slots.size();
    const int32_t n_tile = (n_seen + KVC_ATTN_TILE - 1)/KVC_ATTN_TILE;
    const auto seen_before = [&](int32_t j) { // slots before j, as the tiles count them
        return slots.empty() ? j : (int32_t) (std::lower_bound(slots.begin(), slots.end(), j) - slots.begin());
    };

    std::vector<float>   q     ((size_t) n_hkv*sig.head_dim*n_group*n_lane, 0.0f); // [n_head_kv, head_dim, n_group*n_lane]
    std::vector<int32_t> range ((size_t) n_hkv*2*n_group*n_lane, n_seen);          // [n_head_kv, 2, n_group*n_lane]
    std::vector<float>   weight((size_t) n_hkv*n_group*n_lane, 0.0f);              // [n_head_kv, n_group*n_lane]
    const auto ring = read_ring(s, sig.il);
    for (int32_t h = 0; h < n_hkv; ++h) {
        std::fill_n(range.begin() + (size_t) 2*h*n_group*n_lane, n_group*n_lane, 0);
    }
    for (int32_t i = 0; i < n_query; ++i) {
        const float * row = ring.data() + (size_t) queries[i].row*sig.n_head*sig.head_dim;
        for (int32_t h = 0; h < sig.n_head; ++h) {
            const size_t kv_head = h/n_group, lane = (size_t) (h % n_group)*n_lane + i, stride = (size_t) n_group*n_lane;
            for (int32_t d = 0; d < sig.head_dim; ++d) {
                q[(kv_head*sig.head_dim + d)*stride + lane] = row[h*sig.head_dim + d]*attn[sig.il].scale;
            }
            const int32_t * from = &ranges[2*((size_t) (n_mask > 1 ? h : 0)*n_query + i)];
            range [(2*kv_head + 0)*stride + lane] = seen_before(from[0]);
            range [(2*kv_head + 1)*stride + lane] = seen_before(from[1]);
            weight[kv_head*stride + lane] = queries[i].weight;
        }
    }

    auto * res = begin_graph(lctx);
    auto * ctx = res->get_ctx();
    auto * k = kv.layers[sig.il].k;
    auto * inputs = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_group*n_lane, sig.head_dim, n_hkv);
    auto * bounds = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, n_group*n_lane, 2, n_hkv);
    auto * shares = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_group*n_lane, n_hkv);
    auto * chosen = slots.empty() ? nullptr : ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_seen);
    for (auto * input : { inputs, bounds, shares, chosen }) {
        if (input) {
            ggml_set_input(input);
        }
    }
    ggml_tensor * args[] = {
        ggml_view_3d(ctx, k, sig.head_dim, n_hkv, sig.n_kv, ggml_row_size(k->type, sig.head_dim), k->nb[1], s*k->nb[2]), inputs, bounds, chosen,
    };
    auto * tiles = ggml_custom_4d(ctx, GGML_TYPE_F32, n_group*n_lane, n_seen + 2*n_tile, n_hkv, 1, args, chosen ? 4 : 3, cpu_step(k, "kvc_attn_tiles"),
            GGML_N_TASKS_MAX, nullptr);
    ggml_tensor * summed[] = { tiles, shares };
    auto * out = ggml_custom_4d(ctx, GGML_TYPE_F32, n_seen, sig.n_head, 1, 1, summed, 2, cpu_step(k, largest ? "kvc_attn_max" : "kvc_attn_sum"),
            GGML_N_TASKS_MAX, nullptr);
    run_graph(lctx, res, out, [&]() {
        ggml_backend_tensor_set(inputs, q.data(),      0, ggml_nbytes(inputs));
        ggml_backend_tensor_set(bounds, range.data(),  0, ggml_nbytes(bounds));
        ggml_backend_tensor_set(shares, weight.data(), 0, ggml_nbytes(shares));
        if (chosen) {
            ggml_backend_tensor_set(chosen, slots.data(), 0, ggml_nbytes(chosen));
        }
    });
    std::vector<float> given((size_t) n_seen*sig.n_head);
    ggml_backend_tensor_get(out, given.data(), 0, ggml_nbytes(out));
    if (slots.empty()) {
        return given;
    }
    std::vector<float> all((size_t) sig.n_kv*sig.n_head, 0.0f);
    for (size_t i = 0; i < given.size(); ++i) {
        all[i/n_seen*sig.n_kv + slots[i % n_seen]] = given[i];
    }
    return all;
}

} // namespace kvc
