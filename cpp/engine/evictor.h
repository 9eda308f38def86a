#pragma once

// Evictions: what a sequence may hold, and one eviction, from its signals to moved rows. limits.cpp says how many slots
// stay, evict.cpp which, and moves them.

#include "layout.h"
#include "scorer.h"
#include "taps.h"

#include <cstdint>
#include <memory>
#include <vector>

namespace kvc {

struct cache_rows; // gather.h

// Why a sequence is evicted: its prompt ended; its generated tokens are over their budget; the next tokens have no
// room.
enum class cause { prompt, decode, room };

struct job { uint32_t s; cause why; int32_t n_new; };

struct stats {
    int64_t n_evictions = 0;
    int64_t n_evicted   = 0;  // slots of the mean layer
    double  score_ms = 0, plan_ms = 0, compact_ms = 0;
};

class evictor {
public:
    evictor(std::shared_ptr<const config> cfg, const llama_model & model, llama_kv_cache & kv, kvc::layout & layout, const kvc::taps & taps,
            const kvc::scorer & scorer, std::vector<sequence> & sequences);

    // false: nothing was over budget. Throws, and then nothing has moved. mask_only (tests): nothing does, see mask
    bool run(llama_context * lctx, const job & j, bool mask_only = false);

    // -- limits
    int32_t target(uint32_t s, cause why, int32_t n_new, const std::vector<int32_t> & n_frozen) const; // slots the mean layer keeps
    bool    is_over(uint32_t s, cause why, int32_t n_new, int32_t n_target) const; // is there anything to evict?
    bool    over_budget(uint32_t s, int32_t n_new) const; // would n_new more tokens of an answer take it over its limit and one interval?
    bool    has_room(uint32_t s, int32_t n_new) const;
    int32_t n_until_eviction(uint32_t s) const; // as many tokens of an answer can be evaluated at once as if one by one

    stats st;

    // test only: kept slots of a layer as a per-head mask over an uncompacted cache
    struct mask_of_slots {
        bool on = false;
        std::vector<std::vector<int32_t>> slots; // a layer [n_head_kv, n_keep]
        int32_t n = 0;                           // cells that it is of
    } mask;

private:
    // limits.cpp
    std::vector<int32_t> frozen(uint32_t s, cause why) const;
    int64_t n_over(uint32_t s) const;
    int32_t n_to_free(uint32_t s, int32_t n_new) const;

    // plan.cpp
    void    check(const request & r, const config & conf, const std::vector<std::vector<int32_t>> & slots, const std::vector<int32_t> & n_keep,
                  int32_t n_new) const; // throws

    // evict.cpp
    void    score_layers(llama_context * lctx, uint32_t s, int32_t budget, std::vector<std::vector<int32_t>> & pos,
                         std::vector<std::vector<float>> & score) const;
    void    compact(llama_context * lctx, uint32_t s, const std::vector<std::vector<int32_t>> & slots, const std::vector<int32_t> & n_keep);
    std::vector<cache_rows> rows_of_part(uint32_t s, int32_t ikv, int32_t h) const;
    std::vector<span> sentences(const sequence & q) const;

    std::shared_ptr<const config> cfg;
    const llama_model & model;
    llama_kv_cache    & kv;
    kvc::layout       & layout;
    const kvc::taps   & taps;
    const kvc::scorer & scorer;
    std::vector<sequence> & sequences;
};

} // namespace kvc
