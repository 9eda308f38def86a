// H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, arXiv:2306.14048.
//
//   score(j) = sum over all queries i >= j so far of A_ij, for each KV head the mean over its group's query heads
//
// Variant: causal sums (the best-known re-implementation scored the prompt without a causal mask until June 2026), one
// share of the budget for the most recent tokens and the rest for the heavy hitters, sums carried on while decoding.

#include "policies.h"

#include <algorithm>
#include <cmath>

namespace kvc {

namespace {

struct h2o : policy {
    const double recent;

    explicit h2o(const params & p) : recent(p.f("recent")) {}

    needs need() const override {
        needs n;
        n.sums = true;
        return n;
    }

    int32_t n_recent(int32_t budget) const override {
        return (int32_t) (recent * budget);
    }

    int32_t min_budget() const override {
        return 2; // one recent, one heavy
    }

    void score(const layer_view & v, float * out) const override {
        std::copy(v.sums, v.sums + (size_t) v.n_head_kv * v.n_kv, out);
    }
};

const std::vector<param_info> & list_params() {
    static const std::vector<param_info> list = {
        { "recent", "0.5", "share of the budget that goes to the most recent tokens", 0, 1, {}, false },
        interval_param(),
    };
    return list;
}

std::unique_ptr<policy> make(const params & p) {
    return std::make_unique<h2o>(p);
}

} // namespace

const policy_info h2o_info = {
    "h2o", "Keeps the most recent tokens and those with the most attention summed over all queries so far; runs with flash "
    "attention off; loses facts that are asked for later.", "2306.14048", decode_mode::whole, false, list_params, make,
    "head", "plain",
};

} // namespace kvc
