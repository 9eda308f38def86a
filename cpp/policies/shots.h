#pragma once

// Shots: spans given by the caller live or die whole. What shotkv and random_shot have in common.

#include "policies.h"

namespace kvc {

struct shot_policy : policy {
    const int32_t window;
    const int32_t sinks;
    const int32_t recent;
    const bool    skip; // a shot that does not fit, for the next that does

    explicit shot_policy(const params & p);

    needs   need() const override;
    bool    heads_alike() const override { return true; }
    int32_t n_sink() const override { return sinks; }
    int32_t n_recent(int32_t budget) const override;
    int32_t min_budget() const override { return sinks + window + 1; }

    // Those of every policy, or where the budget is a ratio as many as are always kept.
    std::vector<int32_t> budgets(const request & r) const override;

    // Attention for each KV head, the mean over its group.
    void score(const layer_view & v, float * out) const override;

    // Prompt: every slot outside all spans, the first sinks and the last `window`, then shots best first.
    // Decode: the frozen prompt, the last `recent` generated tokens, then the best. One set for all heads of a layer.
    void keep(const request & r, int32_t il, int32_t n_keep, int32_t * out) const override;

    // F32 [n_kv]; and at prompt end the score of a shot whose tokens have the mean score `mean`.
    virtual std::vector<float> token_scores(const request & r, int32_t il) const = 0;
    virtual float shot_score(const span & s, float mean) const = 0;

private:
    // Slots of layer il that stay: the first and the last, those outside every span, spans whose end is still to come.
    slot_marks always(const request & r, int32_t il, bool outside, bool unfinished, int32_t & n_outside) const;
};

// The parameters of both, in order; a policy adds its own behind them.
std::vector<param_info> shot_params();

} // namespace kvc
