// SnapKV: LLM Knows What You are Looking for Before Generation, arXiv:2404.14469.
//
//   score(j) = mean over the group's query heads of pool_j(mean over the last w queries i of A_ij), j < n - w
//
// Variant: kvpress' SnapKVPress, with w 32 for its 64 and max pooling as an option (the original's LongBench settings
// are w 32, kernel 7, max). Zero padding counts in an average at the ends. The last w tokens are always kept and
// count in the budget.

#include "policies.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

namespace kvc {

pool_params::pool_params(const params & p) : kernel(p.i("kernel")) {
    const std::string & word = p.s("pool");
    kind = word == "avg" ? pooling::avg : word == "max" ? pooling::max : pooling::none;
    if (kernel % 2 == 0) {
        throw std::invalid_argument("'kernel' is " + std::to_string(kernel) + ": it must be odd, to have a middle");
    }
}

void pool_row(float * row, int32_t n, const pool_params & pool) {
    if (pool.kind == pooling::none) {
        return;
    }
    const int32_t half = pool.kernel / 2;
    std::vector<float> padded(n + 2 * half, 0.0f); // attention is not negative: zeros pad a maximum as well as a sum
    for (int32_t j = 0; j < n; ++j) {
        padded[j + half] = std::isinf(row[j]) ? 0.0f : row[j];
    }
    std::vector<float> pooled(padded.begin(), padded.begin() + n);
    for (int32_t k = 1; k <= 2 * half; ++k) { // a shift at a time: vectors
        const float * shifted = padded.data() + k;
        for (int32_t j = 0; j < n; ++j) {
            pooled[j] = pool.kind == pooling::max ? std::max(pooled[j], shifted[j]) : pooled[j] + shifted[j];
        }
    }
    for (int32_t j = 0; j < n; ++j) {
        row[j] = std::isinf(row[j]) ? row[j] : pool.kind == pooling::avg ? pooled[j] / pool.kernel : pooled[j];
    }
}

void pooled_window_score(const layer_view & v, int32_t window, const pool_params & pool, float * out) {
    const int32_t n       = std::max(v.n_kv - window, 0); // cells that are scored
    const int32_t n_group = v.n_head / v.n_head_kv;

    std::vector<float> pooled(n);
    float best = n > 0 ? -std::numeric_limits<float>::infinity() : 0.0f;
    for (int32_t h = 0; h < v.n_head_kv; ++h) {
        float * score = out + (size_t) h * v.n_kv;
        std::fill(score, score + n, 0.0f);
        for (int32_t g = 0; g < n_group; ++g) {
            const float * attn = v.attn + (size_t) (h * n_group + g) * v.n_kv;
            std::copy(attn, attn + n, pooled.begin());
            pool_row(pooled.data(), n, pool);
            for (int32_t j = 0; j < n; ++j) {
                score[j] += pooled[j];
            }
        }
        for (int32_t j = 0; j < n; ++j) {
            score[j] /= n_group;
            best = std::max(best, score[j]);
        }
    }
    for (int32_t h = 0; h < v.n_head_kv; ++h) {
        float * score = out + (size_t) h * v.n_kv;
        std::fill(score + n, score + v.n_kv, best);
    }
}

window_policy::window_policy(const params & p) : window(p.i("window")), pool(p) {}

needs window_policy::need() const {
    needs n;
    n.window = window;
    return n;
}

int32_t window_policy::n_recent(int32_t budget) const {
    (void) budget;
    return window;
}

namespace {

const std::vector<param_info> & list_params() {
    static const std::vector<param_info> list = {
        { "window", "32",  "last queries whose attention counts, and last tokens always kept", 1, 1024 },
        { "kernel", "5",   "keys under the pooling kernel, odd; 1 does not pool", 1, 63 },
        { "pool",   "avg", "how attention is pooled along the keys", 0, 0, { "avg", "max" } },
    };
    return list;
}

std::unique_ptr<policy> make(const params & p) {
    return std::make_unique<window_policy>(p);
}

} // namespace

const policy_info snapkv_info = {
    "snapkv", "Keeps the tokens the last queries attend to most, pooled along the keys, for each KV head; loses facts "
    "that are asked for later. Evicts the prompt only.", "2404.14469", decode_mode::none, false, list_params, make,
    "head", "plain",
};

} // namespace kvc
