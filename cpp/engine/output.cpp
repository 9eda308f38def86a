// What values become behind the output projection: |W_O^h v| for each query head h, W_O^h its slice of the projection. The
// Gram matrices G_h = W_O^h' W_O^h are small, and |W_O^h v|^2 = v' G_h v.

#include "graph.h"
#include "scorer.h"
#include "graph_ops.h"

#include "llama-context.h"
#include "llama-graph.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <stdexcept>

namespace kvc {

void scorer::find_outputs() {
    for (const auto & layer : kv.layers) {
        const auto & of = model.layers[layer.il];
        const int64_t n_in = (int64_t) model.hparams.n_head(layer.il)*model.hparams.n_embd_head_v(layer.il);
        if (!of.wo || of.wo->ne[0] != n_in || of.wo_s) {
            throw std::invalid_argument(cfg->spec + " weighs values by the output projection, and this model (" + model.arch_name() +
                    ") has no plain one: name a policy or parameters that do not");
        }
    }
    static std::mutex mutex; // one set of matrices a model and kind of cache, computed by whoever needs them first
    static std::map<std::pair<const llama_model *, bool>, std::weak_ptr<std::vector<std::vector<float>>>> known;
    const std::lock_guard<std::mutex> lock(mutex);
    auto & of = known[{ &model, kv.attn_rot_v }];
    grams = of.lock();
    if (!grams) {
        grams = std::make_shared<std::vector<std::vector<float>>>(kv.layers.size());
        of = grams;
    }
}

static const int64_t N_MIX = 64; // as llama_kv_cache::build_input_v_rot() has it

// Quantized values lie in the cache mixed by a Hadamard matrix, block by block; it is its own inverse.
static void unmix(const std::vector<float> & hadamard, int64_t n, std::vector<float> & values) {
    std::vector<float> x(n);
    for (size_t at = 0; at + n <= values.size(); at += n) {
        std::copy_n(values.begin() + at, n, x.begin());
        for (int64_t i = 0; i < n; ++i) {
            float sum = 0;
            for (int64_t k = 0; k < n; ++k) {
                sum += hadamard[i*n + k]*x[k];
            }
            values[at + i] = sum;
        }
    }
}

// G [n, n] becomes H G H: of a mixed value v it gives what G gives of H v.
static void mix_sides(const std::vector<float> & hadamard, int64_t n, float * g) {
    for (int side = 0; side < 2; ++side) {
        std::vector<float> mixed(g, g + n*n);
        unmix(hadamard, N_MIX, mixed);
        for (int64_t i = 0; i < n*n; ++i) { // transposed: the other side is next
            g[i] = mixed[i % n*n + i/n];
        }
    }
}

// W_O^h is the product with unit vectors: whatever type and layout the weights have, the backend that holds them can
// multiply.
const std::vector<float> & scorer::gram_of(llama_context * lctx, int32_t ikv) const {
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    auto & gram = grams->at(ikv);
    if (!gram.empty()) {
        return gram;
    }
    const auto & hp = model.hparams;
    const uint32_t il = kv.layers[ikv].il;
    const int64_t n_head = hp.n_head(il), n_dim = hp.n_embd_head_v(il), n_in = n_head*n_dim;
    std::vector<float> res((size_t) n_head*n_dim*n_dim);
    for (int64_t h = 0; h < n_head; ++h) {
        std::vector<float> unit(n_in*n_dim, 0.0f);
        for (int64_t i = 0; i < n_dim; ++i) {
            unit[i*n_in + h*n_dim + i] = 1.0f;
        }
        auto * graph = begin_graph(lctx);
        auto * ctx   = graph->get_ctx();
        auto * x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_in, n_dim);
        ggml_set_input(x);
        auto * w   = ggml_mul_mat(ctx, model.layers[il].wo, x); // [n_embd, head_dim]
        auto * out = ggml_mul_mat(ctx, w, w);                   // [head_dim, head_dim]
        ggml_prec_set_acc(out, GGML_PREC_F32);
        run_graph(lctx, graph, out, [&]() { ggml_backend_tensor_set(x, unit.data(), 0, ggml_nbytes(x)); });
        ggml_backend_tensor_get(out, res.data() + h*n_dim*n_dim, 0, ggml_nbytes(out));
    }
    for (int64_t h = 0; kv.attn_rot_v && h < n_head; ++h) {
        mix_sides(kv.attn_rot_hadamard.at(N_MIX), n_dim, res.data() + h*n_dim*n_dim);
    }
    gram = std::move(res);
    return gram;
}

std::vector<float> scorer::plain_values(uint32_t s, int32_t ikv) const {
    auto values = read_rows(s, ikv, true);
    if (kv.attn_rot_v) {
        unmix(kv.attn_rot_hadamard.at(N_MIX), N_MIX, values);
    }
    return values;
}

// Of the values as they lie in the cache: the matrices are of those, too.
std::vector<float> scorer::output_norms(llama_context * lctx, uint32_t s, int32_t ikv) const {
    const auto & hp = model.hparams;
    const uint32_t il = kv.layers[ikv].il;
    const int64_t n_head = hp.n_head(il), n_dim = hp.n_embd_head_v(il), n_group = n_head/layout.n_head_kv(), n_kv = layout.n_slots(s, ikv);
    const auto & gram = gram_of(lctx, ikv);
    const bool here = on_cpu(kv.layers[ikv].v);
    for (const bool in_place : { !kv.v_trans, false }) { // where the device cannot, or they are transposed: of a copy
        const auto values = in_place ? std::vector<float>() : read_rows(s, ikv, true);
        auto * graph = begin_graph(lctx);
        auto * ctx   = graph->get_ctx();
        auto * g = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_dim, n_dim, n_head);
        ggml_set_input(g);
        std::vector<ggml_tensor *> heads, copies;
        for (int32_t h = 0; h < layout.n_head_kv(); ++h) {
            const int32_t n = layout.n_slots(s, ikv, h);
            if (n == 0) {
                heads.push_back(nullptr);
                copies.push_back(nullptr);
                continue;
            }
            auto * v = in_place ? graph_head(ctx, s, ikv, h, true) : ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_dim, n);
            if (!in_place) {
                ggml_set_input(v);
            }
            copies.push_back(in_place ? nullptr : v);
            auto * of_head = ggml_view_3d(ctx, g, n_dim, n_dim, n_group, g->nb[1], g->nb[2], h*n_group*g->nb[2]);
            auto * squares = graph_forms(ctx, of_head, v, here || !in_place);
            heads.push_back(ggml_sqrt(ctx, ggml_clamp(ctx, squares, 0.0f, INFINITY))); // [n, n_group]
        }
        if (in_place && !can_run_all(device_of(kv.layers[ikv].v), ctx)) {
            continue;
        }
        return run_heads(lctx, s, ikv, graph, heads, [&]() {
            ggml_backend_tensor_set(g, gram.data(), 0, ggml_nbytes(g));
            for (size_t h = 0; h < copies.size(); ++h) {
                if (auto * v = copies[h]) {
                    ggml_backend_tensor_set(v, values.data() + (h*n_kv + n_kv - v->ne[1])*n_dim, 0, ggml_nbytes(v));
                }
            }
        });
    }
    return {};
}

} // namespace kvc
