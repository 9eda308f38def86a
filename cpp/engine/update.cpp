// Evictions run inside llama_context::memory_update(), which drops the graphs of before and reserves again.

#include "engine.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <exception>
#include <stdexcept>
#include <utility>

namespace kvc {

void engine::update(llama_context * lctx) {
    // Nothing may leave here but by last_error(): llama_decode is C. What fails for one sequence is not what fails for
    // the others.
    const auto attempt = [&](const auto & fn) {
        try {
            fn();
        } catch (const std::exception & e) {
            last_error() = e.what();
            LLAMA_LOG_ERROR("%s: %s\n", cfg->spec.c_str(), e.what());
        }
    };
    attempt([&]() { llama_synchronize(lctx); });
    for (const auto & fn : std::exchange(jobs, {})) {
        attempt(fn);
    }
    for (const auto & j : std::exchange(due, {})) {
        attempt([&]() {
            evictor.run(lctx, j);
            if (j.why == cause::prompt) {
                end_prompt((llama_seq_id) j.s);
            }
        });
    }
    stale = false;
}

// Evictions that are due before a batch. llama.cpp splits it again into the same ubatches.
int engine::before_batch(llama_context * lctx, llama_batch_allocr & balloc) {
    auto * e = of(lctx);
    if (!e) {
        return 0;
    }
    if (const std::string why = e->why_not(balloc); !why.empty()) {
        last_error() = why;
        LLAMA_LOG_ERROR("%s: %s\n", e->cfg->spec.c_str(), why.c_str());
        return -1;
    }
    const uint32_t n_ubatch = lctx->n_ubatch();
    std::vector<llama_ubatch> ubatches;
    balloc.split_reset();
    do {
        ubatches.push_back(e->kv.n_stream == 1 ? balloc.split_simple(n_ubatch) : balloc.split_equal(n_ubatch, true, 0));
    } while (ubatches.back().n_tokens > 0);
    ubatches.pop_back();
    if (balloc.get_n_used() < balloc.get_n_tokens()) {
        return 0; // llama.cpp says why
    }
    if (e->is_due(ubatches)) {
        lctx->memory_update(true);
        if (e->is_due(ubatches)) {
            e->due.clear(); // an eviction failed, and last_error() says why
            return 1;
        }
    }
    return 0;
}

// Between the ubatches of one batch. Every ubatch comes by here, before it is computed.
bool engine::before_ubatch(llama_context * lctx, const llama_ubatch & ubatch) {
    auto * e = of(lctx);
    if (!e) {
        return true;
    }
    e->computes = lctx;
    for (uint32_t i = 0; i < ubatch.n_seqs_unq; ++i) {
        e->take_past(e->kv.seq_to_stream[ubatch.seq_id_unq[i]]);
    }
    if (e->lacks_room(ubatch)) {
        lctx->memory_update(true);
    }
    return !e->cfg->is_bounded() || e->has_room(ubatch);
}

// Several components of a position, and positions that leave gaps: an image, or text behind one. What is kept is
// counted in tokens.
std::string engine::why_not(const llama_batch_allocr & balloc) const {
    if (model.hparams.n_pos_per_embd() == 1) {
        return "";
    }
    const auto & batch = balloc.get_batch();
    if (!batch.token) {
        return "images cannot be evaluated while " + cfg->spec + " evicts: in this model (" + model.arch_name() +
                ") their positions are no count of tokens, so use the policy full";
    }
    std::vector<size_t> next;
    for (const auto & q : sequences) {
        next.push_back(q.tokens.size());
    }
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        size_t & pos = next[kv.seq_to_stream[batch.seq_id[i][0]]];
        if (batch.pos[i] != (llama_pos) pos) {
            return "positions leave no gaps while " + cfg->spec + " evicts: the next one is " + std::to_string(pos) + ", not " +
                    std::to_string(batch.pos[i]);
        }
        ++pos;
    }
    return "";
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
        evictor.mask.on = false;
        res = evictor.run(lctx, { s, cause::prompt, 0 }, mask_only);
    });
    return res;
}

void engine::make_room(llama_context * lctx, llama_seq_id seq_id, int32_t n_new) {
    const uint32_t s = stream_of(seq_id);
    if (cfg->is_bounded() && !evictor.has_room(s, n_new)) {
        in_update(lctx, [&]() { evictor.run(lctx, { s, cause::room, n_new }); });
    }
}

std::vector<layer_signals> engine::signals(llama_context * lctx, llama_seq_id seq_id) {
    const uint32_t s = stream_of(seq_id);
    std::vector<layer_signals> res;
    in_update(lctx, [&]() {
        for (int32_t l = 0; l < layout.n_layer(); ++l) {
            res.push_back(scorer.read_signals(lctx, s, l, true));
        }
    });
    return res;
}

std::vector<std::vector<float>> engine::scores(llama_context * lctx, llama_seq_id seq_id) {
    const uint32_t s = stream_of(seq_id);
    std::vector<std::vector<float>> res;
    in_update(lctx, [&]() {
        const int32_t budget = evictor.target(s, cause::prompt, 0, {});
        for (int32_t l = 0; l < layout.n_layer(); ++l) {
            res.push_back(scorer.score(s, scorer.read_signals(lctx, s, l), budget));
        }
    });
    return res;
}

} // namespace kvc
