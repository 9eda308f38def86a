// DefensiveKV: Taming the Fragility of KV Cache Eviction in LLM Inference, arXiv:2510.13334.
//
//   a_hij     attention of query i of the last w to a cell j before them, pooled along j, each query's sum as before the pooling
//   r_j       = max over the group's query heads h and the queries i of a_hij, at least this KV head's mean of r
//   score(j)  = r_j * n_j / (sum of n_j over the layer's KV heads), n_j = mean over the group of |W_O^h v_j|
//
// A cell is worth its largest attention, not its mean, and none is worth less than average: a defence against what the
// last queries have not asked. Those that hold the first 90 % of a head's mean attention, less what falls on the window
// itself, are kept first, as many as the budget holds beside the window. Layer-DefensiveKV is share=all. Variant: the
// L2 norm for the paper's L1 (output.cpp); the window's share is the mean over the layer's heads (the authors' code
// takes it from the keys before the window). Memory while it scores: n_head * window * n_kv floats of one layer.

#include "policies.h"

#include <algorithm>
#include <functional>
#include <numeric>

namespace kvc {

namespace {

struct defensive : window_policy {
    const float mass;

    explicit defensive(const params & p) : window_policy(p), mass((float) p.f("mass")) {}

    needs need() const override {
        needs n = window_policy::need();
        n.attn_rows = true;
        n.outputs   = true;
        return n;
    }

    void score(const layer_view & v, float * out) const override {
        const int32_t n = std::max(v.n_kv - window, 0), n_group = v.n_head / v.n_head_kv; // cells that are scored
        std::vector<float> mean((size_t) v.n_head_kv * n, 0.0f), norm((size_t) v.n_head_kv * v.n_kv);
        mean_over_group(v, v.o_norm, norm.data());

        double before = 0; // the window, of all attention
        for (int32_t h = 0; h < v.n_head_kv; ++h) {
            float * score = out + (size_t) h * v.n_kv;
            std::fill(score, score + v.n_kv, 0.0f);
            for (int32_t i = 0; i < n_group * v.n_query; ++i) {
                const float * attn = v.attn_rows + ((size_t) h * n_group * v.n_query + i) * v.n_kv;
                before += worst_case(attn, n, mean.data() + (size_t) h * n, score) / (v.n_head * v.n_query);
            }
            const float least = n > 0 ? (float) (std::accumulate(score, score + n, 0.0) / n) : 0.0f;
            std::transform(score, score + n, score, [least](float x) { return std::max(x, least); });
        }
        for (int32_t j = 0; j < n; ++j) {
            double sum = 0;
            for (int32_t h = 0; h < v.n_head_kv; ++h) {
                sum += norm[(size_t) h * v.n_kv + j];
            }
            for (int32_t h = 0; h < v.n_head_kv; ++h) {
                out[(size_t) h * v.n_kv + j] *= sum > 0 ? (float) (norm[(size_t) h * v.n_kv + j] / sum) : 0.0f;
            }
        }
        keep_first(v, n, mean, (float) (mass - (1 - before)), out);
    }

    // One query's row: added to the mean, and the largest of its pooled ones taken. Returns its sum.
    double worst_case(const float * attn, int32_t n, float * mean, float * most) const {
        std::vector<float> pooled(attn, attn + n);
        pool_row(pooled.data(), n, pool);
        const float whole = sum(attn, n), sum_pooled = sum(pooled.data(), n);
        const float scale = sum_pooled > 0 ? whole / sum_pooled : 0.0f;
        for (int32_t j = 0; j < n; ++j) {
            mean[j] += attn[j];
            most[j] = std::max(most[j], pooled[j] * scale);
        }
        return whole;
    }

    // The layer's greatest score for the window and, in each head, for the cells that hold the first `part` of its mean
    // attention.
    void keep_first(const layer_view & v, int32_t n, const std::vector<float> & mean, float part, float * out) const {
        float best = 0;
        for (int32_t h = 0; h < v.n_head_kv; ++h) {
            best = std::max(best, *std::max_element(out + (size_t) h * v.n_kv, out + (size_t) h * v.n_kv + v.n_kv));
        }
        const int32_t n_most = std::min(n, std::max(0, v.budget - window));
        std::vector<uint64_t> keys(n);
        for (int32_t h = 0; h < v.n_head_kv; ++h) {
            const float * row = mean.data() + (size_t) h * n;
            float *     score = out + (size_t) h * v.n_kv;
            for (int32_t j = 0; j < n; ++j) {
                keys[j] = rank_key(row[j], j);
            }
            std::partial_sort(keys.begin(), keys.begin() + n_most, keys.end(), std::greater<uint64_t>());
            double left = part * std::accumulate(row, row + n, 0.0);
            for (int32_t i = 0; i < n_most && left > row[ranked_slot(keys[i])]; ++i) {
                left -= row[ranked_slot(keys[i])];
                score[ranked_slot(keys[i])] = best;
            }
            std::fill(score + n, score + v.n_kv, best);
        }
    }
};

const std::vector<param_info> & list_params() {
    static const std::vector<param_info> list = {
        { "window", "32",  "last queries whose attention counts, and last tokens always kept", 1, 1024 },
        { "kernel", "5",   "keys under the pooling kernel, odd; 1 does not pool", 1, 63 },
        { "pool",   "avg", "how attention is pooled along the keys", 0, 0, { "avg", "max" } },
        { "mass",   "0.9", "share of a head's mean attention whose cells are kept first", 0, 1, {}, false },
    };
    return list;
}

std::unique_ptr<policy> make(const params & p) {
    return std::make_unique<defensive>(p);
}

} // namespace

const policy_info defensive_info = {
    "defensive", "Keeps, for each KV head, the tokens that some of the last queries attends to most, none taken for less than average, by what "
    "their values add behind the output projection; with an eighth of the cells it loses facts that are asked for later. Evicts the prompt only.", "2510.13334", decode_mode::none, false, list_params, make,
    "auto",
};

} // namespace kvc
