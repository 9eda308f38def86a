// Efficient Streaming Language Models with Attention Sinks (StreamingLLM), arXiv:2309.17453.
//
//   keep the first s tokens and the last B - s
//
// Variant: keys keep the RoPE position they were written with. The original numbers positions anew inside the cache,
// which a quantized cache cannot do without loss.

#include "policies.h"

#include <algorithm>

namespace kvc {

namespace {

struct streaming_llm : policy {
    const int32_t sinks;

    explicit streaming_llm(const params & p) : sinks(p.i("sinks")) {}

    needs need() const override {
        return {};
    }

    int32_t n_sink() const override {
        return sinks;
    }

    int32_t n_recent(int32_t budget) const override {
        return std::max(budget - sinks, 0);
    }

    int32_t min_budget() const override {
        return sinks + 1;
    }

    // recency in [0, 1]
    void score(const layer_view & v, float * out) const override {
        const float last = (float) std::max(v.pos[v.n_kv - 1], 1); // every head holds the newest token
        for (int32_t i = 0; i < v.n_head_kv * v.n_kv; ++i) {
            out[i] = v.pos[i] / last;
        }
    }
};

const std::vector<param_info> & list_params() {
    static const std::vector<param_info> list = {
        { "sinks", "4", "first tokens always kept", 0, 4096 },
        interval_param(),
    };
    return list;
}

std::unique_ptr<policy> make(const params & p) {
    return std::make_unique<streaming_llm>(p);
}

} // namespace

const policy_info streaming_llm_info = {
    "streaming_llm", "Keeps the first and the last tokens, at their original positions; loses facts that are asked for later.", "2309.17453",
    decode_mode::whole, false, list_params, make,
};

} // namespace kvc
