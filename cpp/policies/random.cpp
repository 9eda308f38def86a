// A control: which tokens stay is drawn by lot.
//
//   score(position) = hash(seed, position)
//
// Variant: the same draw for all layers and heads. No sinks and no recent tokens are protected, the last one included.
// A position keeps its number, so what is left after many evictions is still a fair sample of all positions seen.

#include "policies.h"

namespace kvc {

namespace {

struct random : policy {
    const int32_t seed;

    explicit random(const params & p) : seed(p.i("seed")) {}

    needs need() const override {
        return {};
    }

    void score(const layer_view & v, float * out) const override {
        for (int32_t i = 0; i < v.n_head_kv * v.n_kv; ++i) {
            out[i] = hash_unit(seed, v.pos[i]);
        }
    }
};

const std::vector<param_info> & list_params() {
    static const std::vector<param_info> list = { seed_param(), interval_param() };
    return list;
}

std::unique_ptr<policy> make(const params & p) {
    return std::make_unique<random>(p);
}

} // namespace

const policy_info random_info = {
    "random", "Keeps tokens drawn by a seeded hash of their position, the same in all layers and heads: a control.", "",
    decode_mode::whole, false, list_params, make,
};

} // namespace kvc
