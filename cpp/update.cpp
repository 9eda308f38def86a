// Evictions run inside llama_context::memory_update(), which drops the graphs of before and reserves again.

#include "engine.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"

#include <cmath>
#include <exception>
#include <stdexcept>
#include <utility>

namespace kvc {

void engine::update(llama_context * lctx) {
    // nothing may leave here but by last_error(): llama_decode is C
    try {
        llama_synchronize(lctx);
        for (const auto & fn : std::exchange(jobs, {})) {
            fn();
        }
        for (const auto & j : std::exchange(due, {})) {
            run(lctx, j);
            if (j.why == cause::prompt) {
                end_prompt((llama_seq_id) j.s);
            }
        }
    } catch (const std::exception & e) {
        last_error() = e.what();
        LLAMA_LOG_ERROR("%s: %s\n", cfg->spec.c_str(), e.what());
    }
    stale = false;
}

// Runs fn inside a memory update of the context, so that graphs of before are dropped, and rethrows what it threw.
void engine::in_update(llama_context * lctx, std::function<void()> fn) {
    std::exception_ptr error;
    jobs.push_back([&]() {
        try {
            fn();
        } catch (...) {
            error = std::current_exception();
        }
    });
    lctx->memory_update(true);
    if (error) {
        std::rethrow_exception(error);
    }
}

bool engine::evict(llama_context * lctx, llama_seq_id seq_id, bool mask_only) {
    const uint32_t s = stream_of(seq_id);
    bool res = false;
    in_update(lctx, [&]() {
        this->mask_only = mask_only;
        res = run(lctx, { s, cause::prompt, 0 });
    });
    return res;
}

void engine::make_room(llama_context * lctx, llama_seq_id seq_id, int32_t n_new) {
    const uint32_t s = stream_of(seq_id);
    if (is_bounded() && !has_room(s, n_new)) {
        in_update(lctx, [&]() { run(lctx, { s, cause::room, n_new }); });
    }
}

std::vector<layer_signals> engine::signals(llama_context * lctx, llama_seq_id seq_id) {
    const uint32_t s = stream_of(seq_id);
    std::vector<layer_signals> res;
    in_update(lctx, [&]() {
        for (int32_t l = 0; l < n_layer(); ++l) {
            res.push_back(read_signals(lctx, s, l));
        }
    });
    return res;
}

std::vector<std::vector<float>> engine::scores(llama_context * lctx, llama_seq_id seq_id) {
    const uint32_t s = stream_of(seq_id);
    std::vector<std::vector<float>> res;
    in_update(lctx, [&]() {
        const int32_t budget = target(s, cause::prompt, 0, {});
        for (int32_t l = 0; l < n_layer(); ++l) {
            res.push_back(score(s, read_signals(lctx, s, l), budget));
        }
    });
    return res;
}

} // namespace kvc
