// DropKV: what a head's output changes by when one cell goes. From a proposal to kvpress, without a paper of its own.
//
//   score(j) = sum over the group's query heads and the last w queries i of (p_ij / (1 - p_ij))^2 * |v_j - o_i|^2
//
// p_ij is attention and o_i = sum over j of p_ij v_j the head's output. Without cell j, the rest renormalised, the
// output is o_i - p_ij / (1 - p_ij) * (v_j - o_i): the score is its change, exactly, and can be compared between heads.
// The last w tokens are kept. Variant: 1 - p is at least 1e-6. Cost: 3 * n_head * window * n_kv * value_dim products a
// layer, a thread a layer; memory while it scores: n_head * window * n_kv floats.

#include "policies.h"

#include <algorithm>
#include <functional>
#include <numeric>

namespace kvc {

namespace {

struct dropkv : policy {
    const int32_t window;

    explicit dropkv(const params & p) : window(p.i("window")) {}

    needs need() const override {
        needs n;
        n.window     = window;
        n.attn_rows  = true;
        n.value_rows = true;
        return n;
    }

    int32_t n_recent(int32_t budget) const override {
        return std::min(budget, window);
    }

    int32_t min_budget() const override {
        return window + 1;
    }

    void score(const layer_view & v, float * out) const override {
        const int32_t n_group = v.n_head / v.n_head_kv, n_dim = v.value_dim;
        std::vector<double> output(n_dim);
        std::vector<float>  rounded(n_dim);
        for (int32_t h = 0; h < v.n_head_kv; ++h) {
            const float * values = v.value_rows + (size_t) h * v.n_kv * n_dim;
            float *       score  = out + (size_t) h * v.n_kv;
            std::fill(score, score + v.n_kv, 0.0f);
            for (int32_t i = 0; i < n_group * v.n_query; ++i) {
                const float * attn = v.attn_rows + ((size_t) h * n_group * v.n_query + i) * v.n_kv;
                std::fill(output.begin(), output.end(), 0.0f);
                for (int32_t j = 0; j < v.n_kv; ++j) {
                    for (int32_t k = 0; k < n_dim; ++k) {
                        output[k] += (double) attn[j] * values[(size_t) j * n_dim + k];
                    }
                }
                std::copy(output.begin(), output.end(), rounded.begin());
                for (int32_t j = 0; j < v.n_kv; ++j) {
                    const float * value = values + (size_t) j * n_dim;
                    const float   ratio = attn[j] / std::max(1 - attn[j], 1e-6f);
                    // of a cell with much of the attention v - o is a small difference
                    const double  far   = attn[j] > 0.1f ? std::inner_product(value, value + n_dim, output.begin(), 0.0, std::plus<double>(),
                        [](double a, double b) { return (a - b) * (a - b); }) : distance_squared(value, rounded.data(), n_dim);
                    score[j] += (float) (ratio * ratio * far);
                }
            }
        }
    }
};

const std::vector<param_info> & list_params() {
    static const std::vector<param_info> list = {
        { "window", "32", "last queries whose outputs count, and last tokens always kept", 1, 1024 },
    };
    return list;
}

std::unique_ptr<policy> make(const params & p) {
    return std::make_unique<dropkv>(p);
}

} // namespace

const policy_info dropkv_info = {
    "dropkv", "Keeps, for each KV head, the tokens without which the outputs of the last queries would change most; loses facts "
    "that are asked for later. Evicts the prompt only.", "",
    decode_mode::none, false, list_params, make,
    "auto",
};

} // namespace kvc
