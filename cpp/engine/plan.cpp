// What has to hold of a plan before anything moves.

#include "evictor.h"
#include "select.h"

#include <algorithm>
#include <stdexcept>

namespace kvc {

// Each head's slots ascend, are there, and a shorter head begins with -1s.
static void check_slots(const std::string & who, int32_t il, const layer_plan & lp, int32_t n_hkv, int32_t n_keep, bool heads_differ,
        const std::vector<int32_t> & slots) {
    for (int32_t h = 0; h < n_hkv; ++h) {
        const int32_t * keep = slots.data() + (size_t) h*n_keep;
        const int32_t first = first_slot(lp.pos + (size_t) h*lp.n_kv, lp.n_kv);
        for (int32_t i = heads_differ ? first_slot(keep, n_keep) : 0; i < n_keep; ++i) {
            const int32_t cur  = keep[i];
            const int32_t prev = i > 0 ? keep[i - 1] : -1;
            if (cur <= prev || cur < first || cur >= lp.n_kv) {
                throw std::invalid_argument(who + ": keep() of layer " + std::to_string(il) + " must give ascending slots in [" +
                        std::to_string(first) + ", " + std::to_string(lp.n_kv) + "), got " + std::to_string(cur) + " after " + std::to_string(prev));
            }
        }
    }
}

// The one place that says what views of the cache are off the host: they begin at whole blocks, and so are whole blocks
// themselves.
static void check_blocks(const std::string & who, int32_t n_base, const std::vector<int32_t> & n_held, int32_t n_block) {
    const int32_t n = off_blocks(n_base, n_held, n_block);
    if (n >= 0) {
        throw std::invalid_argument(who + ": off the CPU what layers and heads keep differs by whole blocks of " + std::to_string(n_block) +
                " rows, and here are " + std::to_string(n_base) + " and " + std::to_string(n) + ": keep the cache on the CPU (n_gpu_layers 0, "
                "or offload_kqv off)");
    }
}

void evictor::check(const request & r, const config & conf, const std::vector<std::vector<int32_t>> & slots, const std::vector<int32_t> & n_keep,
        int32_t n_new) const {
    std::vector<int32_t> n_held; // [n_layer, n_head_kv]
    for (int32_t l = 0; l < layout.n_layer(); ++l) {
        check_slots(conf.spec, l, r.layers[l], r.n_head_kv, n_keep[l], conf.pol->heads_differ(), slots[l]);
        for (int32_t h = 0; h < r.n_head_kv; ++h) {
            n_held.push_back(n_keep[l] - first_slot(slots[l].data() + (size_t) h*n_keep[l], n_keep[l]));
        }
    }
    check_blocks(conf.spec, *std::max_element(n_keep.begin(), n_keep.end()), n_held, layout.n_block());
    if (cfg->pooled && layout.n_to_share(n_held) < n_new) { // rounded to blocks, they may be more than there is room for
        throw std::invalid_argument(conf.spec + ": kv_cells have too few rows for what its layers keep, in whole blocks of " +
                std::to_string(layout.n_block()) + ": give more, or share=head");
    }
}

} // namespace kvc
