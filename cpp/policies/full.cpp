// No eviction: the reference every other policy is measured against.
//
// The engine does not evict under it at all; asked anyway, it keeps every slot whatever the budget.

#include "policies.h"

#include <algorithm>

namespace kvc {

namespace {

struct full : policy {
    explicit full(const params &) {}

    needs need() const override {
        return {};
    }

    int32_t n_recent(int32_t budget) const override {
        return budget;
    }

    std::vector<int32_t> budgets(const request & r) const override {
        std::vector<int32_t> n_keep;
        for (const layer_plan & lp : r.layers) {
            n_keep.push_back(lp.n_kv);
        }
        return n_keep;
    }

    void score(const layer_view & v, float * out) const override {
        std::fill(out, out + (size_t) v.n_head_kv * v.n_kv, 0.0f);
    }
};

const std::vector<param_info> & list_params() {
    static const std::vector<param_info> list;
    return list;
}

std::unique_ptr<policy> make(const params & p) {
    return std::make_unique<full>(p);
}

} // namespace

const policy_info full_info = {
    "full", "Keeps every token: the reference.", "", decode_mode::none, false, list_params, make,
};

} // namespace kvc
