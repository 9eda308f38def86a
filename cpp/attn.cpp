// What some queries of the ring give to the cells of a layer: steps of our own on the CPU (ggml/attn_scores.h),
// elsewhere a small graph.

#include "engine.h"
#include "attn_ops.h"

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

// Lanes, whose slots are counted from their own first. slots: of all heads, as the longest counts them.
std::vector<engine::watched> engine::watch(uint32_t s, const layer_signals & sig, const std::vector<int32_t> & slots) const {
    std::vector<watched> res;
    for (const lane & x : lanes(sig.il, s, s)) {
        const int32_t n = n_slots(s, sig.il, x.head), lack = sig.n_kv - n;
        watched w = { x, n, sig.pos.data() + (size_t) x.head*sig.n_kv + lack, {} };
        for (const int32_t j : slots) {
            if (j >= lack) {
                w.slots.push_back(j - lack);
            }
        }
        if (n > 0 && (slots.empty() || !w.slots.empty())) {
            res.push_back(std::move(w));
        }
    }
    return res;
}

// Up to which slot each query sees. By the positions of a lane's first head: from the floor on all agree.
std::vector<int32_t> seen_by(const std::vector<ring_query> & queries, const int32_t * pos, int32_t n_kv) {
    std::vector<int32_t> res;
    for (const auto & q : queries) {
        res.push_back((int32_t) (std::upper_bound(pos, pos + n_kv, q.pos) - pos));
    }
    return res;
}

// A step of attn_scores.h; null where the layer is not on the CPU.
static ggml_custom_op_t cpu_step(const ggml_tensor * k, const char * name) {
    auto * dev = device_of(k);
    return ggml_backend_dev_type(dev) != GGML_BACKEND_DEVICE_TYPE_CPU ? nullptr :
        (ggml_custom_op_t) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(dev), name);
}

std::vector<float> engine::attention_of(llama_context * lctx, uint32_t s, const layer_signals & sig, const std::vector<ring_query> & queries,
        bool largest, const std::vector<int32_t> & slots) const {
    // The tiles know neither attention sinks nor a soft cap.
    const bool tiles = !getenv("PYKVC_STOCK_ATTENTION") && !attn[sig.il].sinks && !model.hparams.attn_soft_cap &&
        cpu_step(kv.layers[sig.il].k, "kvc_attn_tiles");
    const int32_t n_group = sig.n_head/n_hkv;
    std::vector<float> res((size_t) sig.n_head*sig.n_kv, 0.0f);
    for (const watched & w : watch(s, sig, slots)) {
        const auto given = tiles ? attention_tiles(lctx, s, sig, w, queries, largest) : attention_graph(lctx, s, sig, w, queries, largest);
        for (int32_t i = 0; i < w.x.n_head*n_group; ++i) { // F32 [n_head of the lane, its n_kv]
            std::copy_n(given.begin() + (size_t) i*w.n_kv, w.n_kv, res.begin() + ((size_t) w.x.head*n_group + i + 1)*sig.n_kv - w.n_kv);
        }
    }
    return res;
}

std::vector<float> engine::attention_tiles(llama_context * lctx, uint32_t s, const layer_signals & sig, const watched & w,
        const std::vector<ring_query> & queries, bool largest) const {
    const auto & slots = w.slots;
    const int32_t n_query = (int32_t) queries.size(), n_group = sig.n_head/n_hkv, n_heads = w.x.n_head, n_head = n_heads*n_group;
    const int32_t n_lane = GGML_PAD(n_query, KVC_ATTN_LANES); // of a head; those that no query takes see all and weigh nothing
    const int32_t n_seen = slots.empty() ? w.n_kv : (int32_t) slots.size();
    const int32_t n_tile = (n_seen + KVC_ATTN_TILE - 1)/KVC_ATTN_TILE;
    const auto seen_before = [&](int32_t j) { // slots before j, as the tiles count them
        return slots.empty() ? j : (int32_t) (std::lower_bound(slots.begin(), slots.end(), j) - slots.begin());
    };

    std::vector<float>   q     ((size_t) n_heads*sig.head_dim*n_group*n_lane, 0.0f); // [n_head_kv, head_dim, n_group*n_lane]
    std::vector<int32_t> range ((size_t) n_heads*2*n_group*n_lane, n_seen);          // [n_head_kv, 2, n_group*n_lane]
    std::vector<float>   weight((size_t) n_heads*n_group*n_lane, 0.0f);              // [n_head_kv, n_group*n_lane]
    const auto ring = read_ring(s, sig.il);
    const auto ends = seen_by(queries, w.pos, w.n_kv);
    for (int32_t h = 0; h < n_heads; ++h) {
        std::fill_n(range.begin() + (size_t) 2*h*n_group*n_lane, n_group*n_lane, 0);
    }
    for (int32_t i = 0; i < n_query; ++i) {
        const float * row = ring.data() + (size_t) queries[i].row*sig.n_head*sig.head_dim;
        for (int32_t h = 0; h < n_head; ++h) {
            const size_t kv_head = h/n_group, lane = (size_t) (h % n_group)*n_lane + i, stride = (size_t) n_group*n_lane;
            for (int32_t d = 0; d < sig.head_dim; ++d) {
                q[(kv_head*sig.head_dim + d)*stride + lane] = row[(w.x.head*n_group + h)*sig.head_dim + d]*attn[sig.il].scale;
            }
            range [(2*kv_head + 1)*stride + lane] = seen_before(ends[i]);
            weight[kv_head*stride + lane] = queries[i].weight;
        }
    }

    auto * res = begin_graph(lctx);
    auto * ctx = res->get_ctx();
    auto * k = view_of(ctx, s, 1, sig.il, w.x, w.n_kv, false);
    auto * inputs = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_group*n_lane, sig.head_dim, n_heads);
    auto * bounds = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, n_group*n_lane, 2, n_heads);
    auto * shares = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_group*n_lane, n_heads);
    auto * chosen = slots.empty() ? nullptr : ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_seen);
    for (auto * input : { inputs, bounds, shares, chosen }) {
        if (input) {
            ggml_set_input(input);
        }
    }
    ggml_tensor * args[] = { k, inputs, bounds, chosen };
    auto * at = kv.layers[sig.il].k;
    auto * tiles = ggml_custom_4d(ctx, GGML_TYPE_F32, n_group*n_lane, n_seen + 2*n_tile, n_heads, 1, args, chosen ? 4 : 3,
            cpu_step(at, "kvc_attn_tiles"), GGML_N_TASKS_MAX, nullptr);
    ggml_tensor * summed[] = { tiles, shares };
    auto * out = ggml_custom_4d(ctx, GGML_TYPE_F32, n_seen, n_head, 1, 1, summed, 2, cpu_step(at, largest ? "kvc_attn_max" : "kvc_attn_sum"),
            GGML_N_TASKS_MAX, nullptr);
    run_graph(lctx, res, out, [&]() {
        ggml_backend_tensor_set(inputs, q.data(),      0, ggml_nbytes(inputs));
        ggml_backend_tensor_set(bounds, range.data(),  0, ggml_nbytes(bounds));
        ggml_backend_tensor_set(shares, weight.data(), 0, ggml_nbytes(shares));
        if (chosen) {
            ggml_backend_tensor_set(chosen, slots.data(), 0, ggml_nbytes(chosen));
        }
    });
    std::vector<float> given((size_t) n_seen*n_head);
    ggml_backend_tensor_get(out, given.data(), 0, ggml_nbytes(out));
    if (slots.empty()) {
        return given;
    }
    std::vector<float> all((size_t) w.n_kv*n_head, 0.0f);
    for (size_t i = 0; i < given.size(); ++i) {
        all[i/n_seen*w.n_kv + slots[i % n_seen]] = given[i];
    }
    return all;
}

} // namespace kvc
