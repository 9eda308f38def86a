// Finch: Prompt-guided Key-Value Cache Compression for Large Language Models, arXiv:2408.00167.
//
//   score(j) = mean over the group's query heads and the question's tokens i of A_ij
//
// Variant: the question (kv_query) is evaluated as a probe after each chunk of the context and taken out again, so it
// attends to all that is left of the context, and the paper's division by the queries that could see a cell divides all
// by the same. Keys keep their positions; the paper rotates them anew. Pooled as in SnapKV, which the paper does not (pool=none):
// the answer is beside the words that the question attends to, and is lost without (docs/benchmarks.md). Where nobody asked
// (another program), the last `window` tokens of the context are the question.

#include "policies.h"

#include <algorithm>

namespace kvc {

namespace {

struct finch : policy {
    const int32_t     window;
    const int32_t     recent;
    const pool_params pool;

    explicit finch(const params & p) : window(p.i("window")), recent(p.i("recent")), pool(p) {}

    needs need() const override {
        needs n;
        n.window = window;
        n.probe  = probe::mean;
        return n;
    }

    int32_t n_recent(int32_t budget) const override {
        return std::min(budget, recent);
    }

    int32_t min_budget() const override {
        return recent + 1;
    }

    void score(const layer_view & v, float * out) const override {
        if (v.probed) {
            std::copy(v.probed, v.probed + (size_t) v.n_head_kv * v.n_kv, out);
        } else {
            mean_over_group(v, v.attn, out);
        }
        for (int32_t h = 0; h < v.n_head_kv; ++h) {
            pool_row(out + (size_t) h * v.n_kv, v.n_kv, pool);
        }
    }
};

const std::vector<param_info> & list_params() {
    static const std::vector<param_info> list = {
        { "window", "64",   "last tokens of the question that are asked", 1, 1024 },
        { "recent", "32",   "last tokens of the context always kept", 1, 4096 },
        { "kernel", "31",   "keys under the pooling kernel, odd", 1, 63 },
        { "pool",   "max",  "how attention is pooled along the keys; none as in the paper", 0, 0, { "none", "avg", "max" } },
    };
    return list;
}

std::unique_ptr<policy> make(const params & p) {
    return std::make_unique<finch>(p);
}

} // namespace

const policy_info finch_info = {
    "finch", "Asks the question (kv_query) after each chunk of the context, keeps the tokens it attends to most for each KV head, and "
    "takes it out again; evicts the prompt only.", "2408.00167", decode_mode::none, false, list_params, make,
    "head", "plain",
};

} // namespace kvc
