#pragma once

// What the policy files share among themselves. Each of them defines one policy_info; policies.cpp lists them.

#include "policy.h"
#include "select.h"

namespace kvc {

extern const policy_info full_info;
extern const policy_info random_info;
extern const policy_info random_head_info;
extern const policy_info streaming_llm_info;
extern const policy_info h2o_info;
extern const policy_info tova_info;
extern const policy_info knorm_info;
extern const policy_info keydiff_info;
extern const policy_info snapkv_info;
extern const policy_info pyramidkv_info;
extern const policy_info criticalkv_info;
extern const policy_info defensive_info;
extern const policy_info dropkv_info;
extern const policy_info adakv_info;
extern const policy_info pyramidinfer_info;
extern const policy_info chunkkv_info;
extern const policy_info finch_info;
extern const policy_info kvzip_info;
extern const policy_info expected_attention_info;
extern const policy_info shotkv_info;
extern const policy_info random_shot_info;
extern const policy_info vase_info;
extern const policy_info rkv_info;

// Read by the engine, declared by every policy that evicts generated tokens.
inline param_info interval_param(const std::string & value = "32") {
    return { "interval", value, "generated tokens between two evictions", 1, 65536 };
}

inline param_info seed_param() {
    return { "seed", "0", "seed of the hash", 0, 2147483647 };
}

enum class pooling { none, avg, max };

// Of the parameters kernel and pool. Throws if the kernel has no middle.
struct pool_params {
    pooling kind;
    int32_t kernel; // keys under the kernel, odd

    explicit pool_params(const params & p);
};

// One head's scores, F32 [n], pooled along the keys; infinite ones stay what they are and add nothing to the others.
void pool_row(float * row, int32_t n, const pool_params & pool);

// SnapKV's score, F32 [n_head_kv, n_kv]: the attention each cell before the last `window` ones got, pooled along the
// keys for each query head, then averaged over the group. The last `window` cells get the greatest score of the layer.
void pooled_window_score(const layer_view & v, int32_t window, const pool_params & pool, float * out);

// SnapKV's signal, for those that spend the budget otherwise: the pooled attention of the last `window` queries, whose
// tokens are always kept and count in the budget.
struct window_policy : policy {
    const int32_t     window;
    const pool_params pool;

    explicit window_policy(const params & p);

    needs   need() const override;
    int32_t n_recent(int32_t budget) const override;
    int32_t min_budget() const override { return window + 1; }
    void    score(const layer_view & v, float * out) const override { pooled_window_score(v, window, pool, out); }
};

} // namespace kvc
