// Semantic Integrity Matters: Benchmarking and Preserving High-Density Reasoning in KV Cache Compression (ShotKV),
// arXiv:2502.01941.
//
//   score(shot of k tokens) = 1/k * sum over its tokens and the layer's heads of the attention they got
//   score(generated token)  = sum over the layer's heads of the attention it got
//
// Variant: where the paper leaves it open, a parameter says it. What is outside every shot, the first `sinks` and the
// last `window` tokens are always kept and count in the budget; a shot's slots among them are not its own, neither to
// score nor to fit. The budget is a hard limit: slots left over after whole shots go to the best tokens of the best
// shot not taken, and if not even one shot fits, its best tokens are all that is kept of it. Generated tokens are
// scored by the same attention, the last `recent` of them (or the whole decode budget, if that is less) always kept.

#include "shots.h"

#include <stdexcept>

namespace kvc {

namespace {

struct shotkv : shot_policy {
    const bool all_queries;
    const bool shared;

    explicit shotkv(const params & p) :
        shot_policy(p), all_queries(p.s("queries") == "all"), shared(p.s("layers") == "shared") {}

    needs need() const override {
        needs n = shot_policy::need();
        n.window = all_queries ? 0 : window;
        n.sums   = all_queries;
        return n;
    }

    void score(const layer_view & v, float * out) const override {
        if (!all_queries) {
            shot_policy::score(v, out);
            return;
        }
        const int32_t last = v.pos[v.n_kv - 1];
        for (int32_t i = 0; i < v.n_head_kv * v.n_kv; ++i) {
            out[i] = v.sums[i] / (last - v.pos[i] + 1); // the queries that could see it
        }
    }

    std::vector<float> token_scores(const request & r, int32_t il) const override {
        if (!shared) {
            return sum_over_heads(r, il);
        }
        std::vector<float> sum(r.layers[il].n_kv, 0.0f);
        for (int32_t i = 0; i < (int32_t) r.layers.size(); ++i) {
            const std::vector<float> layer = sum_over_heads(r, i);
            if (layer.size() != sum.size()) {
                throw std::invalid_argument("layers=shared needs layers that hold the same tokens");
            }
            for (size_t j = 0; j < sum.size(); ++j) {
                sum[j] += layer[j];
            }
        }
        return sum;
    }

    float shot_score(const span & s, float mean) const override {
        (void) s;
        return mean;
    }
};

const std::vector<param_info> & list_params() {
    static const std::vector<param_info> list = [] {
        std::vector<param_info> l = shot_params();
        l.push_back({ "queries", "window", "whose attention counts: the last `window` queries, or all (flash attention off), "
            "each cell divided by the queries that could see it", 0, 0, { "window", "all" } });
        l.push_back({ "layers", "own", "each layer chooses for itself, or all keep the same, by scores summed over layers", 0, 0,
            { "own", "shared" } });
        return l;
    }();
    return list;
}

std::unique_ptr<policy> make(const params & p) {
    return std::make_unique<shotkv>(p);
}

} // namespace

const policy_info shotkv_info = {
    "shotkv", "Keeps whole shots (spans given by the caller, or sentences) by their mean attention; then freezes the prompt and "
    "keeps generated tokens by theirs.", "2502.01941", decode_mode::generated, false, list_params, make,
};

} // namespace kvc
