// PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling, arXiv:2406.02069.
//
//   score as SnapKV; with b = B - w, layer l of L keeps w + max - l * (max - min) / (L - 1),
//   min = b / beta, max = 2b - min, so that the layers keep B on average
//
// Variant: the authors' rule, window outside the pyramid (kvpress 0.5.5 puts b = B and the window inside it, and falls
// back to SnapKV where that does not fit). Ours flattens the pyramid as little as needed instead: max is at most n - w,
// min at least 1. Rounded down, the slots left over go one each to the first layers: the sum is exactly L * B.

#include "policies.h"

#include <algorithm>
#include <stdexcept>

namespace kvc {

namespace {

struct pyramidkv : window_policy {
    const double beta;

    explicit pyramidkv(const params & p) : window_policy(p), beta(p.f("beta")) {}

    std::vector<int32_t> budgets(const request & r) const override {
        const int32_t n_layer = (int32_t) r.layers.size();

        int32_t n_kv = 0;
        for (const layer_plan & lp : r.layers) {
            n_kv = std::max(n_kv, lp.n_kv);
        }
        if (r.budget < std::min(n_kv, min_budget())) {
            throw std::invalid_argument("a budget of " + std::to_string(r.budget) + " tokens is too small for pyramidkv: the "
                "least that works is " + std::to_string(min_budget()) + ", window + 1");
        }

        const double b   = std::min(r.budget, n_kv) - window;
        double       min = std::max(b / beta, 1.0);
        double       max = 2 * b - min;
        if (max > n_kv - window) {
            max = n_kv - window;
            min = 2 * b - max;
        }

        std::vector<double> ideal;
        for (int32_t il = 0; il < n_layer; ++il) {
            ideal.push_back(window + (n_layer == 1 ? b : max - il * (max - min) / (n_layer - 1)));
        }
        return whole_budgets(r, ideal, min_budget());
    }
};

const std::vector<param_info> & list_params() {
    static const std::vector<param_info> list = {
        { "window", "32",  "last queries whose attention counts, and last tokens always kept", 1, 1024 },
        { "kernel", "5",   "keys under the pooling kernel, odd; 1 does not pool", 1, 63 },
        { "pool",   "avg", "how attention is pooled along the keys", 0, 0, { "avg", "max" } },
        { "beta",   "20",  "steepness: the last layer keeps its window and 1/beta of an even share", 1, 1000, {}, false },
    };
    return list;
}

std::unique_ptr<policy> make(const params & p) {
    return std::make_unique<pyramidkv>(p);
}

} // namespace

const policy_info pyramidkv_info = {
    "pyramidkv", "Scores as snapkv, with a budget that falls linearly from the first layer to the last; loses facts that are asked for later. "
    "Evicts the prompt only.", "2406.02069", decode_mode::none, true, list_params, make,
};

} // namespace kvc
