// What values become behind the output projection: |W_O^h v| for each query head h, W_O^h its slice of the projection. The
// Gram matrices G_h = W_O^h' W_O^h are small, and |W_O^h v|^2 = v' G_h v.

#include "engine.h"

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

void engine::find_outputs() {
    for (const auto & layer : kv.layers) {
        const auto & of = model.layers[layer.il];
        const int64_t n_in = (int64_t) model.hparams.n_head(layer.il)*model.hparams.n_embd_head_v(layer.il);
        if (!of.wo || of.wo->ne[0] != n_in || of.wo_s) {
            throw std::invalid_argument(cfg->spec + " weighs values by the output projection, and this model (" + model.arch_name() +
                    ") has no plain one: name a policy or parameters that do not");
        }
    }
    static std::mutex mutex; // one set of matrices a model, computed by whoever needs them first
    static std::map<const llama_model *, std::weak_ptr<std::vector<std::vector<float>>>> known;
    const std::lock_guard<std::mutex> lock(mutex);
    grams = known[&model].lock();
    if (!grams) {
        grams = std::make_shared<std::vector<std::vector<float>>>(kv.layers.size());
        known[&model] = grams;
    }
}

// W_O^h is the product with unit vectors: whatever type and layout the weights have, the backend that holds them can multiply.
const std::vector<float> & engine::gram_of(llama_context * lctx, int32_t ikv) const {
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
    gram = std::move(res);
    return gram;
}

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

std::vector<float> engine::plain_values(uint32_t s, int32_t ikv) const {
    auto values = read_rows(s, ikv, true);
    if (kv.attn_rot_v) {
        const int64_t n_mix = 64; // as llama_kv_cache::build_input_v_rot() has it
        unmix(kv.attn_rot_hadamard.at(n_mix), n_mix, values);
    }
    return values;
}

std::vector<float> engine::output_norms(llama_context * lctx, uint32_t s, int32_t ikv) const {
    const auto & hp = model.hparams;
    const uint32_t il = kv.layers[ikv].il;
    const int64_t n_head = hp.n_head(il), n_dim = hp.n_embd_head_v(il), n_group = n_head/n_hkv, n_kv = n_slots(s, ikv), n_most = 1024;
    const auto & gram = gram_of(lctx, ikv);
    const auto values = plain_values(s, ikv);
    std::vector<float> res((size_t) n_head*n_kv), part;
    for (int64_t first = 0; first < n_kv; first += n_most) {
        const int64_t n = std::min(n_most, n_kv - first);
        auto * graph = begin_graph(lctx);
        auto * ctx   = graph->get_ctx();
        auto * g = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_dim, n_dim*n_group, n_hkv);
        auto * v = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_dim, n, n_hkv);
        ggml_set_input(g);
        ggml_set_input(v);
        auto * gv = ggml_mul_mat(ctx, g, v); // [head_dim*n_group, n, n_head_kv]
        ggml_prec_set_acc(gv, GGML_PREC_F32);
        gv = ggml_mul(ctx, ggml_reshape_4d(ctx, gv, n_dim, n_group, n, n_hkv), ggml_reshape_4d(ctx, v, n_dim, 1, n, n_hkv));
        auto * out = ggml_sum_rows(ctx, gv); // [1, n_group, n, n_head_kv]
        run_graph(lctx, graph, out, [&]() {
            ggml_backend_tensor_set(g, gram.data(), 0, ggml_nbytes(g));
            for (int64_t h = 0; h < n_hkv; ++h) {
                ggml_backend_tensor_set(v, values.data() + (h*n_kv + first)*n_dim, h*v->nb[2], v->nb[2]);
            }
        });
        part.resize(ggml_nelements(out));
        ggml_backend_tensor_get(out, part.data(), 0, ggml_nbytes(out));
        for (size_t i = 0; i < part.size(); ++i) {
            const int64_t j = (int64_t) i/n_group % n, h = (int64_t) i/n_group/n*n_group + (int64_t) i % n_group;
            res[h*n_kv + first + j] = std::sqrt(std::max(part[i], 0.0f));
        }
    }
    return res;
}

} // namespace kvc
