// What a sequence may hold: how many slots an eviction leaves, and whether there is anything to evict.

#include "evictor.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace kvc {

// Of a layer's first slots those that stay: a frozen prompt, while generated tokens are evicted.
std::vector<int32_t> evictor::frozen(uint32_t s, cause why) const {
    const auto & q = sequences[s];
    std::vector<int32_t> res(layout.n_layer(), 0);
    for (int32_t l = 0; why != cause::prompt && q.gen >= 0 && q.cfg->decode == decode_mode::generated && l < layout.n_layer(); ++l) {
        const auto pos = layout.slot_pos(s, l);
        res[l] = std::lower_bound(pos.begin(), pos.begin() + layout.n_slots(s, l), q.gen) - pos.begin();
    }
    return res;
}

// Slots the mean layer keeps.
int32_t evictor::target(uint32_t s, cause why, int32_t n_new, const std::vector<int32_t> & n_frozen) const {
    const auto & q = sequences[s];
    const int32_t n_tokens = (int32_t) q.tokens.size();
    const int32_t n_most = cfg->is_bounded() ? cfg->n_cells - n_to_free(s, n_new) : std::numeric_limits<int32_t>::max();
    if (why == cause::room) {
        return n_most;
    }
    if (why == cause::prompt) {
        // a ratio of a short prompt is not below what the policy always keeps; a number of tokens was checked when it
        // was given
        return q.prompt_budget.kind == budget::none ? std::numeric_limits<int32_t>::max() :
            std::min(std::max(q.prompt_budget.of(n_tokens), q.cfg->pol->min_budget()), n_most);
    }
    if (q.cfg->decode == decode_mode::whole) { // a short prompt may hold less than what is always kept
        return (int32_t) std::min<int64_t>(std::max<int64_t>(q.n_prompt + q.n_decode(), q.cfg->pol->min_budget()), n_most);
    }
    const int64_t sum = std::accumulate(n_frozen.begin(), n_frozen.end(), (int64_t) 0);
    return (int32_t) std::min<int64_t>(std::lround((double) sum/layout.n_layer()) + q.n_decode(), n_most);
}

// By how many slots is the mean layer of a sequence that generates over its limit?
int64_t evictor::n_over(uint32_t s) const {
    const auto & q = sequences[s];
    const int64_t n_mean  = (layout.n_slots(s) + layout.n_layer() - 1)/layout.n_layer();
    const int64_t n_limit = q.n_prompt + q.n_decode();
    return n_mean - (q.cfg->decode == decode_mode::whole ? std::max<int64_t>(n_limit, q.cfg->pol->min_budget()) : n_limit);
}

// Would n_new more tokens take it over its limit and one interval, and is there anything to evict?
bool evictor::over_budget(uint32_t s, int32_t n_new) const {
    const auto & q = sequences[s];
    const int64_t n = q.has_limit() ? n_over(s) : 0;
    return n > 0 && n + n_new > q.cfg->interval;
}

int32_t evictor::n_until_eviction(uint32_t s) const {
    const auto & q = sequences[s];
    const int64_t n_most = std::numeric_limits<int32_t>::max();
    const int64_t n = std::min(q.has_limit() ? q.cfg->interval - n_over(s) : n_most, cfg->is_bounded() ? layout.n_room(s) : n_most);
    return (int32_t) std::max<int64_t>(n, 1);
}

// Is there anything to evict?
bool evictor::is_over(uint32_t s, cause why, int32_t n_new, int32_t n_target) const {
    if (why == cause::room) {
        return !has_room(s, n_new);
    }
    // of all layers where they differ: one may hold more than the mean
    const bool differ = sequences[s].cfg->layers_differ;
    int64_t n_all = 0;
    for (int32_t l = 0; l < layout.n_layer(); ++l) {
        const int64_t n = layout.n_held(s, l);
        if (n > (int64_t) n_target*layout.n_head_kv() && !differ) {
            return true;
        }
        n_all += n;
    }
    return differ && n_all > (int64_t) n_target*layout.n_head_kv()*layout.n_layer();
}

bool evictor::has_room(uint32_t s, int32_t n_new) const {
    return n_new <= layout.n_room(s);
}

// Slots to free in every layer so that n_new tokens fit: a whole ubatch of a prompt; of an answer half of what the
// prompt left, so that generated tokens are not evicted at every step.
int32_t evictor::n_to_free(uint32_t s, int32_t n_new) const {
    const auto & q = sequences[s];
    const int32_t n_left = std::max((cfg->n_cells - q.n_prompt)/2, q.cfg->interval);
    return std::max(q.gen < 0 ? cfg->n_reserve : std::min(n_left, cfg->n_reserve), n_new);
}

} // namespace kvc
