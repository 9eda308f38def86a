// PyramidInfer: Pyramid KV Cache Compression for High-throughput LLM Inference, arXiv:2405.12532.
//
//   score(j) = mean over all heads and over the recent queries of weight_i * A_ij, weight 1 (oldest) to 1.2 (newest)
//   budget of layer l ~ product over m < l of d + (1 - d) * (1 + cos(pi * m / L)) / 2,  d = decay
//
// Variant: the official schedule and weights, one set of tokens for all heads of a layer. The official code takes the
// recent 20 % of the prompt as queries and drops tokens while it computes the prompt, so a token gone from a layer is
// gone from those above, and the schedule alone decides how many stay. Here the queries are the last `window`, layers
// choose for themselves after the whole prompt, the schedule is scaled so that the layers keep B on average, and the
// recent tokens always kept are a share of the layer's budget. While decoding, the prompt's tokens are frozen and
// every layer has room for the same number of generated ones.

#include "policies.h"

#include <algorithm>
#include <cmath>

namespace kvc {

namespace {

struct pyramidinfer : policy {
    const int32_t window;
    const int32_t sinks;
    const double  recent;
    const double  decay;

    explicit pyramidinfer(const params & p) :
        window(p.i("window")), sinks(p.i("sinks")), recent(p.f("recent")), decay(p.f("decay")) {}

    needs need() const override {
        needs n;
        n.window = window;
        n.newest = 1.2f;
        return n;
    }

    int32_t n_sink() const override {
        return sinks;
    }

    // At least one, and never so many that the sinks do not fit.
    int32_t n_recent(int32_t budget) const override {
        return std::min(budget, std::max<int32_t>(1, (int32_t) (recent * std::max(budget - sinks, 0))));
    }

    int32_t min_budget() const override {
        return sinks + 2;
    }

    std::vector<int32_t> budgets(const request & r) const override {
        if (!r.prompt) {
            return policy::budgets(r);
        }
        const int32_t n_layer = (int32_t) r.layers.size();

        std::vector<double> ideal;
        double share = 1;
        double sum   = 0;
        for (int32_t il = 0; il < n_layer; ++il) {
            ideal.push_back(share);
            sum   += share;
            share *= decay + (1 - decay) * (1 + std::cos(3.14159265358979323846 * il / n_layer)) / 2;
        }
        for (double & n : ideal) {
            n *= n_layer * (double) r.budget / sum;
        }
        return whole_budgets(r, ideal, min_budget());
    }

    void score(const layer_view & v, float * out) const override {
        mean_over_heads(v, out);
    }
};

const std::vector<param_info> & list_params() {
    static const std::vector<param_info> list = {
        { "window", "256", "last queries whose attention counts", 1, 1024 },
        { "sinks",  "4",   "first tokens always kept", 0, 4096 },
        { "recent", "0.2", "share of a layer's budget that goes to the most recent tokens", 0, 1, {}, false },
        { "decay",  "0.9", "where the cosine schedule of the layers ends; 1 gives every layer the same", 0.1, 1, {}, false },
        interval_param(),
    };
    return list;
}

std::unique_ptr<policy> make(const params & p) {
    return std::make_unique<pyramidinfer>(p);
}

} // namespace

const policy_info pyramidinfer_info = {
    "pyramidinfer", "Keeps the tokens the recent queries attend to most, averaged over all heads, with a budget that decays "
    "with depth; the prompt is then frozen.", "2405.12532", decode_mode::generated, true, list_params, make,
};

} // namespace kvc
