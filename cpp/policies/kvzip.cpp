// KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction, arXiv:2505.23416.
//
//   score(j) = max over the group's query heads and the tokens i of the repetition of A_ij
//
// Variant: after each chunk the context is asked to repeat that chunk ("Repeat the previous context:" and the chunk
// itself, as the authors' code does), and the repetition is taken out again; a cell keeps the score of its own chunk.
// Every head keeps the same number; the paper also shares a layer's and the model's budget among heads. It costs a
// second evaluation of the context.

#include "policies.h"

#include <algorithm>
#include <stdexcept>

namespace kvc {

namespace {

struct kvzip : policy {
    const int32_t window;
    const int32_t sinks;
    const int32_t recent;

    explicit kvzip(const params & p) : window(p.i("window")), sinks(p.i("sinks")), recent(p.i("recent")) {}

    needs need() const override {
        needs n;
        n.window = window;
        n.probe  = probe::max;
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
        { "window", "512", "tokens of one repetition, its prompt included", 64, 4096 },
        { "sinks",  "4",   "first tokens always kept", 0, 4096 },
        { "recent", "32",  "last tokens always kept", 1, 4096 },
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
};

} // namespace kvc
