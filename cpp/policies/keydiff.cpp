// KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference, arXiv:2504.15364.
//
//   score(j) = -cos(k_j, mean over the head's keys of k / ||k||)
//
// Variant: kvpress' KeyDiffPress with share=head. By default one ranking says how long each layer is (share.h): that
// keeps more of what nobody has asked for (docs/benchmarks.md). Needs no query, so it does not depend on what is asked
// later. sinks and recent are ours.

#include "graph_ops.h"
#include "policies.h"

#include <algorithm>
#include <cmath>

namespace kvc {

namespace {

struct keydiff : policy {
    const int32_t sinks;
    const double  recent;

    explicit keydiff(const params & p) : sinks(p.i("sinks")), recent(p.f("recent")) {}

    needs need() const override {
        needs n;
        n.keys = true;
        return n;
    }

    int32_t n_sink() const override {
        return sinks;
    }

    int32_t n_recent(int32_t budget) const override {
        return (int32_t) (recent * std::max(budget - sinks, 0));
    }

    int32_t min_budget() const override {
        return sinks + 1;
    }

    ggml_tensor * reduce_keys(ggml_context * ctx, const head_keys & head) const override {
        const int64_t n_dim = head.keys->ne[0], n_kv = head.keys->ne[1];
        if (!head.on_cpu) {
            auto * unit   = ggml_l2_norm(ctx, head.keys, 1e-12f);
            auto * sum    = ggml_sum_rows(ctx, ggml_cont(ctx, ggml_transpose(ctx, unit)));
            auto * anchor = ggml_l2_norm(ctx, ggml_scale(ctx, ggml_reshape_2d(ctx, sum, n_dim, 1), 1.0f / n_kv), 1e-8f);
            return ggml_scale(ctx, ggml_mul_mat(ctx, unit, anchor), -1.0f); // [n_kv, 1]
        }
        // A CPU multiplies fastest: no key is divided by its norm, what is made of it is.
        auto * norms  = ggml_clamp(ctx, ggml_sqrt(ctx, graph_squares(ctx, head.keys, true)), 1e-12f, INFINITY); // [n_kv, 1]
        auto * ones   = ggml_fill(ctx, ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_kv, 1), 1.0f);
        auto * scales = ggml_div(ctx, ones, norms);
        auto * sum    = ggml_out_prod(ctx, head.keys, ggml_reshape_2d(ctx, scales, 1, n_kv)); // [n_dim, 1]
        auto * anchor = ggml_l2_norm(ctx, ggml_scale(ctx, sum, 1.0f / n_kv), 1e-8f);
        return ggml_mul(ctx, ggml_mul_mat(ctx, head.keys, ggml_scale(ctx, anchor, -1.0f)), scales);
    }

    void score(const layer_view & v, float * out) const override {
        if (v.reduced) {
            std::copy_n(v.reduced, v.n_head_kv * v.n_kv, out);
            return;
        }
        const int32_t n = v.head_dim;

        std::vector<float> norm(v.n_kv);
        std::vector<float> anchor(n);
        for (int32_t h = 0; h < v.n_head_kv; ++h) {
            const float * keys  = v.keys + (size_t) h * v.n_kv * n;
            float       * score = out    + (size_t) h * v.n_kv;

            std::fill(anchor.begin(), anchor.end(), 0.0f);
            for (int32_t j = 0; j < v.n_kv; ++j) {
                const float * k = keys + (size_t) j * n;
                norm[j] = std::sqrt(dot(k, k, n));
                const float scale = 1.0f / std::max(norm[j], 1e-12f) / v.n_kv;
                for (int32_t i = 0; i < n; ++i) {
                    anchor[i] += scale * k[i];
                }
            }
            const float norm_anchor = std::sqrt(dot(anchor.data(), anchor.data(), n));
            for (int32_t j = 0; j < v.n_kv; ++j) {
                // 1e-8 is torch's: a key of zeros is unlike every other
                const float norms = std::max(norm[j], 1e-8f) * std::max(norm_anchor, 1e-8f);
                score[j] = -dot(keys + (size_t) j * n, anchor.data(), n) / norms;
            }
        }
    }
};

const std::vector<param_info> & list_params() {
    static const std::vector<param_info> list = {
        { "sinks",  "0", "first tokens always kept", 0, 4096 },
        { "recent", "0", "share of the budget beside them that goes to the most recent tokens", 0, 1, {}, false },
        interval_param(),
    };
    return list;
}

std::unique_ptr<policy> make(const params & p) {
    return std::make_unique<keydiff>(p);
}

} // namespace

const policy_info keydiff_info = {
    "keydiff", "Keeps the tokens whose keys are least like the mean key, for each KV head.", "2504.15364",
    decode_mode::whole, false, list_params, make,
    "auto",
};

} // namespace kvc
