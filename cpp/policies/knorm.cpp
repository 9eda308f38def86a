// A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, arXiv:2406.11430.
//
//   score(j) = -||k_j||
//
// Variant: kvpress' KnormPress, every layer alike. The original code leaves layers 0 and 1 whole, which an exact
// budget per layer cannot: it is not offered.

#include "graph_ops.h"
#include "policies.h"

#include <algorithm>
#include <cmath>

namespace kvc {

namespace {

struct knorm : policy {
    explicit knorm(const params &) {}

    needs need() const override {
        needs n;
        n.keys = true;
        return n;
    }

    ggml_tensor * reduce_keys(ggml_context * ctx, const head_keys & head) const override {
        return ggml_scale(ctx, ggml_sqrt(ctx, graph_squares(ctx, head.keys, head.on_cpu)), -1.0f); // [n_kv, 1]
    }

    void score(const layer_view & v, float * out) const override {
        if (v.reduced) {
            std::copy_n(v.reduced, v.n_head_kv * v.n_kv, out);
            return;
        }
        for (int32_t i = 0; i < v.n_head_kv * v.n_kv; ++i) {
            const float * k = v.keys + (size_t) i * v.head_dim;
            out[i] = -std::sqrt(dot(k, k, v.head_dim));
        }
    }
};

const std::vector<param_info> & list_params() {
    static const std::vector<param_info> list = { interval_param() };
    return list;
}

std::unique_ptr<policy> make(const params & p) {
    return std::make_unique<knorm>(p);
}

} // namespace

const policy_info knorm_info = {
    "knorm", "Keeps the tokens whose keys have the smallest L2 norm, for each KV head; loses facts that are asked for later.", "2406.11430",
    decode_mode::whole, false, list_params, make,
    "head",
};

} // namespace kvc
