// Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference, arXiv:2407.11550.
//
//   score as SnapKV; with b = B - w, each of the H KV heads of a layer keeps its w last tokens and its alpha * b best others;
//   what that leaves of H * b goes to the best other scores of all heads together
//
// Variant: the authors' first code (their later one gives a head round((1 - alpha) * count + alpha * b), count of the head's
// among the H * b best, which need not add up). alpha * b is rounded down. Layers keep H * B each, exactly; equal scores go to
// the older slot, then to the lower head. With kv_cells and no pool of rows (pool.cpp) a head keeps at most what its layer has
// room for, the others get what it leaves.

#include "policies.h"

#include <algorithm>
#include <stdexcept>

namespace kvc {

namespace {

struct adakv : window_policy {
    const double alpha;

    explicit adakv(const params & p) : window_policy(p), alpha(p.f("alpha")) {}

    bool heads_differ() const override {
        return true;
    }

    std::vector<std::vector<int32_t>> heads(const request & r) const override {
        std::vector<std::vector<int32_t>> res;
        for (const layer_plan & lp : r.layers) {
            res.emplace_back();
            for (const slot_marks & head : choose(r, lp, lp.n_kv)) {
                res.back().push_back(count_marked(head));
            }
        }
        return res;
    }

    void keep(const request & r, int32_t il, int32_t n_keep, int32_t * out) const override {
        if (!r.heads.empty() && n_keep >= *std::max_element(r.heads[il].begin(), r.heads[il].end())) {
            return policy::keep(r, il, n_keep, out); // the best of each head, as many as it was given
        }
        for (const slot_marks & head : choose(r, r.layers[il], n_keep)) {
            const int32_t n = count_marked(head);
            std::fill(out, out + n_keep - n, -1);
            write_marked(head, n, out + n_keep - n);
            out += n_keep;
        }
    }

    // What each head keeps, n_most slots at most.
    std::vector<slot_marks> choose(const request & r, const layer_plan & lp, int32_t n_most) const {
        if (r.budget < std::min(lp.n_kv, min_budget())) {
            throw std::invalid_argument("a budget of " + std::to_string(r.budget) + " tokens is too small for adakv: the "
                "least that works is " + std::to_string(min_budget()) + ", window + 1");
        }
        const int32_t n_head = r.n_head_kv, n_kv = lp.n_kv;
        const int32_t n_safe = (int32_t) (alpha * std::max(r.budget - window, 0));

        std::vector<slot_marks> kept(n_head, slot_marks(n_kv, 0));
        slot_marks         all((size_t) n_kv * n_head, 1); // [n_kv, n_head_kv] the heads' slots in one list, 1: not to be had
        std::vector<float> score(all.size());
        int64_t n_left = (int64_t) n_head * r.budget;
        for (int32_t h = 0; h < n_head; ++h) {
            const float * row   = lp.score + (size_t) h * n_kv;
            const int32_t first = first_slot(lp.pos + (size_t) h * n_kv, n_kv);

            mark_range(kept[h], std::max(first, n_kv - window), n_kv);
            slot_marks most = kept[h];
            mark_best(most, row, first, n_kv, n_most - count_marked(most));
            mark_best(kept[h], row, first, n_kv, std::min(n_safe, n_most - count_marked(kept[h])));
            n_left -= count_marked(kept[h]);

            for (int32_t j = 0; j < n_kv; ++j) {
                all  [(size_t) j * n_head + h] = kept[h][j] || !most[j];
                score[(size_t) j * n_head + h] = row[j];
            }
        }
        const slot_marks before = all;
        mark_best(all, score.data(), 0, (int32_t) all.size(), (int32_t) std::min<int64_t>(n_left, (int64_t) all.size()));
        for (size_t i = 0; i < all.size(); ++i) {
            kept[i % n_head][i / n_head] |= all[i] && !before[i];
        }
        return kept;
    }
};

const std::vector<param_info> & list_params() {
    static const std::vector<param_info> list = {
        { "window", "32",  "last queries whose attention counts, and last tokens always kept", 1, 1024 },
        { "kernel", "5",   "keys under the pooling kernel, odd; 1 does not pool", 1, 63 },
        { "pool",   "avg", "how attention is pooled along the keys", 0, 0, { "avg", "max" } },
        { "alpha",  "0.2", "share of an even budget, the window apart, that every head keeps; 1 is snapkv", 0, 1, {}, false },
    };
    return list;
}

std::unique_ptr<policy> make(const params & p) {
    return std::make_unique<adakv>(p);
}

} // namespace

const policy_info adakv_info = {
    "adakv", "Scores as snapkv, with a budget that the KV heads of a layer share, the best scores of all of them first. Each head takes "
    "the rows it keeps. Loses facts that are asked for later. Evicts the prompt only.",
    "2407.11550", decode_mode::none, true, list_params, make,
};

} // namespace kvc
