// VaSE: value-aware stochastic eviction for reasoning, arXiv:2606.03928.
//
//   a quarter of the budget   the tokens with the largest value range, max - min over the channels of v_j
//   the rest                  drawn without replacement, in proportion to the attention of the last w queries
//
// A draw without replacement in proportion to a_j keeps the greatest log(u_j) / a_j, u_j uniform in (0, 1] (Efraimidis and Spirakis 2006).
// Variant: u is a hash of the seed, the layer, the head and the position, so that a token keeps its number from one eviction to the
// next, and what is left after many is a draw from all. a_j is the mean over the window and the group, plus 1e-9. The last w tokens are kept.

#include "policies.h"

#include <algorithm>
#include <cmath>

namespace kvc {

namespace {

struct vase : policy {
    const int32_t  window;
    const int32_t  sinks;
    const double   part;
    const uint64_t seed;

    explicit vase(const params & p) : window(p.i("window")), sinks(p.i("sinks")), part(p.f("range")), seed((uint64_t) p.i("seed")) {}

    needs need() const override {
        needs n;
        n.window     = window;
        n.value_rows = true;
        return n;
    }

    int32_t n_sink() const override {
        return sinks;
    }

    int32_t n_recent(int32_t budget) const override {
        return std::max(0, std::min(budget - sinks, window));
    }

    int32_t min_budget() const override {
        return sinks + window + 1;
    }

    void score(const layer_view & v, float * out) const override {
        mean_over_group(v, v.attn, out);
        std::vector<float> range(v.n_kv);
        for (int32_t h = 0; h < v.n_head_kv; ++h) {
            const int32_t * pos   = v.pos + (size_t) h * v.n_kv;
            const int32_t   first = first_slot(pos, v.n_kv);
            float *         score = out + (size_t) h * v.n_kv;
            for (int32_t j = first; j < v.n_kv; ++j) {
                const float * value = v.value_rows + ((size_t) h * v.n_kv + j) * v.value_dim;
                const auto    ends  = std::minmax_element(value, value + v.value_dim);
                range[j] = *ends.second - *ends.first;
                score[j] = std::log(1 - hash_slot(seed, v.il, h, pos[j])) / (score[j] + 1e-9f);
            }
            slot_marks widest(v.n_kv, 0);
            mark_best(widest, range.data(), first, v.n_kv, (int32_t) (part * v.budget));
            for (int32_t j = first; j < v.n_kv; ++j) {
                score[j] = widest[j] ? BEST_SCORE : score[j];
            }
        }
    }
};

const std::vector<param_info> & list_params() {
    static const std::vector<param_info> list = {
        { "window", "32",   "last queries whose attention counts, and last tokens always kept", 1, 1024 },
        { "sinks",  "4",    "first tokens always kept", 0, 4096 },
        { "range",  "0.25", "share of the budget for the tokens with the largest value range", 0, 1, {}, false },
        seed_param(),
        interval_param("64"),
    };
    return list;
}

std::unique_ptr<policy> make(const params & p) {
    return std::make_unique<vase>(p);
}

} // namespace

const policy_info vase_info = {
    "vase", "Keeps the tokens whose values have the largest range, and a draw of the others in proportion to the last queries' attention; for "
    "long answers.", "2606.03928", decode_mode::whole, false, list_params, make,
};

} // namespace kvc
