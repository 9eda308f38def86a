// KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction, arXiv:2505.23416; KVzip+: 2601.07891.
//
//   score(l, h, j) = max over the group's query heads and the queries i of the repetition of A_ij
//   plus=1:          A_ij |W_O v_j| / |x_i| for A_ij, x_i what query i was made from (the input of the attention block)
//
// The context is cut into chunks. Behind the whole context the model is shown a request to repeat a chunk, what its chat template
// puts between a user's turn and the answer, and the chunk itself; then all of that is taken out again (pykvc/probe.py).
// softmax=chunk, as published: A is over the first `sinks` cells, the chunk's cells and what was shown. softmax=all: over all cells.
// A cell keeps the score of its own chunk. One ranking decides for all layers (share, share.h). It costs a second evaluation.
// Variant: the last `recent` tokens are kept, too (the authors': 0); W_O v and x in the L2 norm, as kvpress 0.5.5 has them.

#include "policies.h"

#include <algorithm>
#include <stdexcept>

namespace kvc {

namespace {

struct kvzip : policy {
    const int32_t window;
    const int32_t sinks;
    const int32_t recent;
    const bool    chunk;
    const bool    plus;

    explicit kvzip(const params & p) : window(p.i("window")), sinks(p.i("sinks")), recent(p.i("recent")), chunk(p.s("softmax") == "chunk"),
        plus(p.i("plus") == 1) {}

    needs need() const override {
        needs n;
        n.window = window;
        n.probe  = probe::max;
        n.chunk  = chunk;
        n.plus   = plus;
        return n;
    }

    int32_t n_sink() const override {
        return sinks;
    }

    int32_t n_recent(int32_t budget) const override {
        return std::min(budget, recent);
    }

    int32_t min_budget() const override {
        return sinks + recent + 1;
    }

    void score(const layer_view & v, float * out) const override {
        if (!v.probed) {
            throw std::invalid_argument("kvzip scores cells by a repetition of the context, which pykvc.LLM asks for and "
                "other programs do not: use keydiff there");
        }
        std::copy(v.probed, v.probed + (size_t) v.n_head_kv * v.n_kv, out);
    }
};

const std::vector<param_info> & list_params() {
    static const std::vector<param_info> list = {
        { "chunk",   "2048",  "tokens of the context that one repetition repeats; fewer where n_ctx or kv_cells leave no room", 64, 1048576 },
        { "softmax", "chunk", "what a repetition's attention is shared among: the first tokens, the chunk and itself, or all cells", 0, 0,
            { "chunk", "all" } },
        { "plus",    "0",     "1: KVzip+, attention times |W_O v| of the cell over the norm of what the query was made from", 0, 1 },
        { "window",  "256",   "tokens of a repetition that are looked at together: memory against speed", 16, 4096 },
        { "sinks",   "4",     "first tokens always kept", 0, 4096 },
        { "recent",  "32",    "last tokens always kept", 0, 4096 },
    };
    return list;
}

std::unique_ptr<policy> make(const params & p) {
    return std::make_unique<kvzip>(p);
}

} // namespace

const policy_info kvzip_info = {
    "kvzip", "Asks the context to repeat itself and keeps, for each KV head, the tokens that the repetition attends to most, whatever is "
    "asked later; evicts the prompt only.", "2505.23416", decode_mode::none, false, list_params, make,
    "auto", "plain",
};

} // namespace kvc
