// ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference, arXiv:2502.00299.
//
//   score(chunk) = sum over its tokens and the layer's heads of the attention from the last w queries
//
// Variant: chunks of c tokens before the window live or die whole, best first, for all heads of a layer; the budget
// left when the next best does not fit goes to that chunk's best tokens. Chunks are ranked by the mean over their
// tokens, which is the same as the sum but for a shorter last one. Beside kvpress' ChunkKVPress(SnapKVPress) with
// pool=avg, chunk=20: there the window is cut into chunks with the rest and may be lost in part, and the number kept
// is a share of the chunks, so the number of tokens is not exact.

#include "policies.h"

#include <algorithm>
#include <stdexcept>

namespace kvc {

namespace {

struct chunkkv : window_policy {
    const int32_t chunk;
    const int32_t reuse;

    explicit chunkkv(const params & p) : window_policy(p), chunk(p.i("chunk")), reuse(p.i("reuse")) {}

    bool heads_alike() const override { return true; }

    void keep(const request & r, int32_t il, int32_t n_keep, int32_t * out) const override {
        const layer_plan & lp = r.layers[il];

        // Layers that share indices did so from the first eviction on: they hold the same tokens.
        const std::vector<float> token = sum_over_heads(r, il - il % reuse);
        if ((int32_t) token.size() != lp.n_kv) {
            throw std::invalid_argument("chunkkv: reuse needs layers that hold the same tokens");
        }

        const int32_t end = std::max(lp.n_kv - window, lp.n_frozen); // of the chunks

        slot_marks marks(lp.n_kv, 0);
        mark_range(marks, 0, lp.n_frozen);
        mark_range(marks, end, lp.n_kv);
        const int32_t n_left = count_left(marks, n_keep, "the last " + std::to_string(window));

        std::vector<unit> chunks;
        for (int32_t begin = lp.n_frozen; begin < end; begin += chunk) {
            chunks.push_back({ begin, std::min(begin + chunk, end), 0 });
            chunks.back().score = mean_score(marks, chunks.back(), token);
        }
        mark_units(marks, chunks, token, n_left, false);

        for (int32_t h = 0; h < r.n_head_kv; ++h) {
            write_marked(marks, n_keep, out + (size_t) h * n_keep);
        }
    }
};

const std::vector<param_info> & list_params() {
    static const std::vector<param_info> list = {
        { "chunk",  "10",   "tokens of a chunk", 1, 4096 },
        { "window", "32",   "last queries whose attention counts, and last tokens always kept", 1, 1024 },
        { "pool",   "none", "how attention is pooled along the keys first", 0, 0, { "none", "avg", "max" } },
        { "kernel", "5",    "keys under the pooling kernel, odd; unused with pool=none", 1, 63 },
        { "reuse",  "1",    "consecutive layers that share the choice of the first of them", 1, 1024 },
    };
    return list;
}

std::unique_ptr<policy> make(const params & p) {
    return std::make_unique<chunkkv>(p);
}

} // namespace

const policy_info chunkkv_info = {
    "chunkkv", "Keeps the chunks of consecutive tokens the last queries attend to most, one set per layer; loses facts that are asked for later. "
    "Evicts the prompt only.", "2502.00299", decode_mode::none, false, list_params, make,
};

} // namespace kvc
