// A control for ShotKV, arXiv:2502.01941: whole shots, drawn by lot.
//
//   score(shot) = hash(seed, position of its first token)
//
// Variant: what is always kept, how shots fit and how generated tokens are evicted are as in shotkv. The tokens of a
// shot that is kept in part are drawn by a hash of their position. The same draw for all layers.

#include "shots.h"

namespace kvc {

namespace {

struct random_shot : shot_policy {
    const int32_t seed;

    explicit random_shot(const params & p) : shot_policy(p), seed(p.i("seed")) {}

    std::vector<float> token_scores(const request & r, int32_t il) const override {
        if (!r.prompt) {
            return sum_over_heads(r, il);
        }
        const layer_plan & lp = r.layers[il];

        std::vector<float> token(lp.n_kv);
        for (int32_t j = 0; j < lp.n_kv; ++j) {
            token[j] = hash_unit(seed, lp.pos[j]);
        }
        return token;
    }

    float shot_score(const span & s, float mean) const override {
        (void) mean;
        return hash_unit(seed, s.begin);
    }
};

const std::vector<param_info> & list_params() {
    static const std::vector<param_info> list = [] {
        std::vector<param_info> l = shot_params();
        l.push_back(seed_param());
        return l;
    }();
    return list;
}

std::unique_ptr<policy> make(const params & p) {
    return std::make_unique<random_shot>(p);
}

} // namespace

const policy_info random_shot_info = {
    "random_shot", "Keeps whole shots drawn by a seeded hash of their first position: a control for shotkv.", "2502.01941",
    decode_mode::generated, false, list_params, make,
};

} // namespace kvc
