// R-KV: Redundancy-aware KV Cache Compression for Reasoning Models, arXiv:2505.24133.
//
//   score(j) = lambda * a_j - (1 - lambda) * r_j
//   a_j      the largest of the group's attention, mean over the last w queries, pooled (max) along the keys
//   r_j      softmax over j of the mean over i of c_ij, c_ij = cos(k_i, k_j); of each key's likes (c_ij above 0.5) the newest counts as 0
//
// So of keys that say the same the newest is kept. Variant: a is the mean of each query head's softmax over all cells,
// the largest of the group (the authors' code takes the largest logit of the group first, and leaves the window out of
// the softmax); a key without a like lets none off (theirs lets off the first); lambda is the paper's 0.1. The last w
// tokens are kept, an answer's evictions are 128 tokens apart. Cost: n_head_kv * n_kv^2 dot products of keys a layer,
// a thread a layer: meant for budgets of an answer, slow for long prompts.

#include "policies.h"

#include <algorithm>
#include <cmath>

namespace kvc {

namespace {

struct rkv : window_policy {
    const float lambda;

    explicit rkv(const params & p) : window_policy(p), lambda((float) p.f("lambda")) {}

    needs need() const override {
        needs n = window_policy::need();
        n.keys = true;
        return n;
    }

    int32_t n_recent(int32_t budget) const override {
        return std::min(budget, window);
    }

    void score(const layer_view & v, float * out) const override {
        const int32_t n_group = v.n_head / v.n_head_kv;
        for (int32_t h = 0; h < v.n_head_kv; ++h) {
            const int32_t first = first_slot(v.pos + (size_t) h * v.n_kv, v.n_kv), n = v.n_kv - first;
            float * score = out + (size_t) h * v.n_kv + first;
            std::fill(score, score + n, 0.0f);
            for (int32_t g = h * n_group; g < (h + 1) * n_group; ++g) {
                const float * attn = v.attn + (size_t) g * v.n_kv + first;
                std::transform(attn, attn + n, score, score, [](float a, float b) { return std::max(a, b); });
            }
            pool_row(score, n, pool);
            const auto redundancy = redundancy_of(v.keys + ((size_t) h * v.n_kv + first) * v.head_dim, n, v.head_dim);
            for (int32_t j = 0; j < n; ++j) {
                score[j] = lambda * score[j] - (1 - lambda) * redundancy[j];
            }
        }
    }

    // F32 [n] r of keys F32 [n, n_dim].
    static std::vector<float> redundancy_of(const float * keys, int32_t n, int32_t n_dim) {
        std::vector<float> unit(keys, keys + (size_t) n * n_dim), cosine(n);
        for (int32_t j = 0; j < n; ++j) {
            float * k = &unit[(size_t) j * n_dim];
            const float norm = std::sqrt(dot(k, k, n_dim)) + 1e-8f;
            std::transform(k, k + n_dim, k, [norm](float x) { return x / norm; });
        }
        std::vector<double> mean(n, 0.0);
        for (int32_t i = 0; i < n; ++i) {
            int32_t newest = -1;
            for (int32_t j = 0; j < n; ++j) {
                cosine[j] = i == j ? 0.0f : dot(&unit[(size_t) i * n_dim], &unit[(size_t) j * n_dim], n_dim);
                newest    = cosine[j] > 0.5f ? j : newest;
            }
            for (int32_t j = 0; j < n; ++j) {
                mean[j] += j == newest ? 0.0f : cosine[j] / n;
            }
        }
        const double most = n > 0 ? *std::max_element(mean.begin(), mean.end()) : 0;
        double total = 0;
        for (double & x : mean) {
            total += x = std::exp(x - most);
        }
        std::vector<float> res(n);
        std::transform(mean.begin(), mean.end(), res.begin(), [total](double x) { return (float) (x / total); });
        return res;
    }
};

const std::vector<param_info> & list_params() {
    static const std::vector<param_info> list = {
        { "window", "8",   "last queries whose attention counts, and last tokens always kept", 1, 1024 },
        { "kernel", "7",   "keys under the pooling kernel, odd; 1 does not pool", 1, 63 },
        { "pool",   "max", "how attention is pooled along the keys", 0, 0, { "avg", "max" } },
        { "lambda", "0.1", "weight of attention; the rest is that of redundancy", 0, 1, {}, false },
        interval_param("128"),
    };
    return list;
}

std::unique_ptr<policy> make(const params & p) {
    return std::make_unique<rkv>(p);
}

} // namespace

const policy_info rkv_info = {
    "rkv", "Keeps tokens with much attention whose keys are unlike the others', of alike ones the newest; for long answers, slow on long prompts.",
    "2505.24133", decode_mode::whole, false, list_params, make,
    "head",
};

} // namespace kvc
