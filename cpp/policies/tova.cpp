// Transformers are Multi-State RNNs (TOVA), arXiv:2401.06104.
//
//   score(j) = mean over all query heads of A_ij, i the last query
//
// Variant: kvpress' TOVAPress. One set of tokens for all heads of a layer, and the last token is always kept; its
// score is the greatest of the layer.

#include "policies.h"

#include <algorithm>

namespace kvc {

namespace {

struct tova : policy {
    explicit tova(const params &) {}

    needs need() const override {
        needs n;
        n.window = 1;
        return n;
    }

    int32_t n_recent(int32_t budget) const override {
        return std::min(budget, 1);
    }

    int32_t min_budget() const override {
        return 2;
    }

    void score(const layer_view & v, float * out) const override {
        mean_over_heads(v, out);
        const float best = v.n_kv > 1 ? *std::max_element(out, out + v.n_kv - 1) : out[0];
        for (int32_t h = 0; h < v.n_head_kv; ++h) {
            out[(size_t) h * v.n_kv + v.n_kv - 1] = best;
        }
    }
};

const std::vector<param_info> & list_params() {
    static const std::vector<param_info> list = { interval_param() };
    return list;
}

std::unique_ptr<policy> make(const params & p) {
    return std::make_unique<tova>(p);
}

} // namespace

const policy_info tova_info = {
    "tova", "Keeps the tokens the last query attends to most, averaged over all heads: one set per layer; loses facts that are asked for later.", "2401.06104",
    decode_mode::whole, false, list_params, make,
    "head", "plain",
};

} // namespace kvc
