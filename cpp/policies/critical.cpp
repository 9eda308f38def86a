// Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective, arXiv:2502.03805 (CriticalKV).
//
//   the best half of the budget, by the score s it wraps:  as good as can be
//   the others:                                            score(j) = (s(j) + 1e-4) * mean over the group's query heads of |W_O^h v_j|
//
// Variant: the L2 norm, where the paper and kvpress take the L1 norm: it comes from a small matrix a head (output.cpp). The half is
// rounded down and counts the tokens that are always kept, as kvpress' does.

#include "critical.h"

#include "policy.h"
#include "select.h"

#include <cmath>

namespace kvc {

namespace {

struct critical : policy {
    const std::unique_ptr<policy> base;

    explicit critical(std::unique_ptr<policy> base) : base(std::move(base)) {}

    needs need() const override {
        needs n = base->need();
        n.outputs = true;
        return n;
    }

    int32_t n_sink() const override { return base->n_sink(); }
    int32_t n_recent(int32_t budget) const override { return base->n_recent(budget); }
    int32_t min_budget() const override { return base->min_budget(); }

    void score(const layer_view & v, float * out) const override {
        base->score(v, out);
        std::vector<float> norm((size_t) v.n_head_kv * v.n_kv);
        mean_over_group(v, v.o_norm, norm.data());
        for (int32_t h = 0; h < v.n_head_kv; ++h) {
            const int32_t first = first_slot(v.pos + (size_t) h * v.n_kv, v.n_kv);
            float *       row   = out + (size_t) h * v.n_kv;
            slot_marks    best(v.n_kv, 0);
            mark_best(best, row, first, v.n_kv, v.budget / 2);
            for (int32_t j = first; j < v.n_kv; ++j) {
                if (!std::isinf(row[j])) { // of a probe that did not ask for it
                    row[j] = best[j] ? BEST_SCORE : (row[j] + 1e-4f) * norm[(size_t) h * v.n_kv + j];
                }
            }
        }
    }
};

} // namespace

param_info values_param(const std::string & value) {
    return { "values", value, "whether a token's value counts beside its attention: wo, by its norm behind the output projection "
        "(CriticalKV), or plain, not at all", 0, 0, { "plain", "wo" } };
}

std::unique_ptr<policy> weigh_values(std::unique_ptr<policy> base) {
    return std::make_unique<critical>(std::move(base));
}

} // namespace kvc
