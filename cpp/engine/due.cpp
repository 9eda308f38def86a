// Budgets, and when an eviction is due.

#include "engine.h"
#include "spans.h"

#include "llama-batch.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <stdexcept>

namespace kvc {

// Tokens of each sequence of an ubatch.
int32_t engine::n_of_each(const llama_ubatch & ubatch) const {
    return (int32_t) (ubatch.n_tokens/(kv.n_stream > 1 ? ubatch.n_seqs_unq : 1));
}

// Before a batch, whose ubatches may each have other sequences: whether a prompt is over, and what an answer may hold,
// are matters of all of it.
bool engine::is_due(const std::vector<llama_ubatch> & ubatches) {
    due.clear();
    std::map<llama_seq_id, int32_t> n_new;
    for (const auto & ubatch : ubatches) {
        for (uint32_t i = 0; i < ubatch.n_seqs_unq; ++i) {
            n_new[ubatch.seq_id_unq[i]] += n_of_each(ubatch);
        }
    }
    for (const auto & [seq_id, n] : n_new) {
        const uint32_t s = kv.seq_to_stream[seq_id];
        auto & q = sequences[s];
        const int32_t n_next = cfg->is_bounded() ? std::min(n, cfg->n_reserve) : n;
        if (q.tokens.empty()) {
            continue;
        }
        const bool can_score = q.has_queries(); // if not, the tokens to come are queries: the next call evicts
        if (guess && q.gen < 0 && n == 1) {
            if (!evictor.is_over(s, cause::prompt, n_next, evictor.target(s, cause::prompt, n_next, {}))) {
                end_prompt(seq_id);
            } else if (can_score) {
                due.push_back({ s, cause::prompt, n_next });
            }
        }
        if (can_score && evictor.over_budget(s, n_next)) {
            due.push_back({ s, cause::decode, n_next });
        }
    }
    add_room(ubatches.at(0)); // if the evictions before it did not make it
    return !due.empty();
}

bool engine::lacks_room(const llama_ubatch & ubatch) {
    due.clear();
    add_room(ubatch);
    return !due.empty();
}

void engine::add_room(const llama_ubatch & ubatch) {
    for (uint32_t i = 0; cfg->is_bounded() && i < ubatch.n_seqs_unq; ++i) {
        const uint32_t s = kv.seq_to_stream[ubatch.seq_id_unq[i]];
        if (!sequences[s].tokens.empty() && !evictor.has_room(s, n_of_each(ubatch))) {
            due.push_back({ s, cause::room, n_of_each(ubatch) });
        }
    }
}

void engine::begin_prompt(llama_seq_id seq_id) {
    sequences[stream_of(seq_id)].gen = -1;
}

void engine::end_prompt(llama_seq_id seq_id) {
    const uint32_t s = stream_of(seq_id);
    auto & q = sequences[s];
    if (q.tokens.empty()) {
        return;
    }
    q.gen      = q.end();
    q.n_prompt = (int32_t) std::lround((double) layout.n_slots(s)/layout.n_layer());
    remember(seq_id);
}

void engine::check_budgets(const config & c, const budget & prompt, const budget & decode) const {
    kvc::check_budgets(*c.pol, c.spec, c.decode, prompt, decode);
    if (cfg->is_bounded() && prompt.kind == budget::tokens && prompt.value > cfg->n_cells - cfg->n_reserve) {
        throw std::invalid_argument("kv_budget " + prompt.str() + ": kv_cells leave it at most " +
                std::to_string(cfg->n_cells - cfg->n_reserve));
    }
}

void engine::check_budget(const budget & prompt, const budget & decode) const {
    check_budgets(*cfg, prompt, decode);
}

void engine::set_budget(llama_seq_id seq_id, const budget & prompt, const budget & decode) {
    auto & q = sequences[stream_of(seq_id)];
    check_budgets(*q.cfg, prompt, decode);
    q.prompt_budget = cfg->is_bounded() && prompt.kind == budget::none ? cfg->prompt_budget : prompt;
    q.decode_budget = decode;
}

void engine::set_guess(bool guess) {
    this->guess = guess;
}

int32_t engine::n_until_eviction(llama_seq_id seq_id) const {
    return evictor.n_until_eviction(stream_of(seq_id));
}

void engine::set_policy(llama_seq_id seq_id, const char * policy, const char * prompt, const char * decode) {
    auto & q = sequences[stream_of(seq_id)];
    q.cfg = variant(policy, prompt, decode);
    q.prompt_budget = q.cfg->prompt_budget;
    q.decode_budget = q.cfg->decode_budget;
}

void engine::set_spans(llama_seq_id seq_id, std::vector<span> spans) {
    check_spans(spans);
    auto & q = sequences[stream_of(seq_id)];
    q.spans     = std::move(spans);
    q.has_spans = true;
}

bool engine::has_room(llama_seq_id seq_id, int32_t n_new) const {
    return evictor.has_room(stream_of(seq_id), n_new);
}

bool engine::has_room(const llama_ubatch & ubatch) const {
    for (uint32_t i = 0; i < ubatch.n_seqs_unq; ++i) {
        if (!evictor.has_room(kv.seq_to_stream[ubatch.seq_id_unq[i]], n_of_each(ubatch))) {
            return false;
        }
    }
    return true;
}

} // namespace kvc
