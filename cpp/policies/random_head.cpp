// Random eviction while decoding, the prompt kept whole: the control of arXiv:2609.03430.
//
//   score(l, h, j) = hash of the seed, the layer, the head and the position of slot j
//
// Variant: a position keeps its number, so what is left after many evictions is still a fair sample of all generated tokens; a new draw
// each time would favour the newest. The last `recent` generated tokens are kept. The paper's control has a kv_decode_budget alone;
// a kv_budget evicts the prompt by lot, too.

#include "policies.h"

#include <algorithm>

namespace kvc {

namespace {

struct random_head : policy {
    const uint64_t seed;
    const int32_t  recent;

    explicit random_head(const params & p) : seed((uint64_t) p.i("seed")), recent(p.i("recent")) {}

    needs need() const override {
        return {};
    }

    int32_t n_recent(int32_t budget) const override {
        return std::min(budget, recent);
    }

    int32_t min_budget() const override {
        return recent + 1;
    }

    void score(const layer_view & v, float * out) const override {
        for (int32_t h = 0; h < v.n_head_kv; ++h) {
            for (int32_t j = 0; j < v.n_kv; ++j) {
                const size_t at = (size_t) h * v.n_kv + j;
                out[at] = hash_slot(seed, v.il, h, v.pos[at]);
            }
        }
    }
};

const std::vector<param_info> & list_params() {
    static const std::vector<param_info> list = {
        seed_param(),
        { "recent", "1", "last tokens always kept", 0, 4096 },
        interval_param(),
    };
    return list;
}

std::unique_ptr<policy> make(const params & p) {
    return std::make_unique<random_head>(p);
}

} // namespace

const policy_info random_head_info = {
    "random_head", "Keeps tokens drawn by a seeded hash, each KV head its own, and the prompt whole while it evicts an answer: the control for "
    "what is claimed of long answers.", "2609.03430", decode_mode::generated, false, list_params, make,
};

} // namespace kvc
