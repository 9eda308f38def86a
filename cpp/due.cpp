// Budgets, and when an eviction is due.

#include "engine.h"

#include "llama-batch.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <stdexcept>

namespace kvc {

// Of a layer's first slots those that stay: a frozen prompt, while generated tokens are evicted.
std::vector<int32_t> engine::frozen(uint32_t s, cause why) const {
    const auto & q = streams[s];
    std::vector<int32_t> res(n_layer(), 0);
    for (int32_t l = 0; why != cause::prompt && q.gen >= 0 && q.cfg->decode == decode_mode::generated && l < n_layer(); ++l) {
        const auto pos = slot_pos(s, l);
        res[l] = std::lower_bound(pos.begin(), pos.begin() + n_slots(s, l), q.gen) - pos.begin();
    }
    return res;
}

// A budget may be as large as an int32 is.
int64_t engine::n_decode(uint32_t s) const {
    const auto & q = streams[s];
    return q.decode_budget.of(std::max(1, (int32_t) q.tokens.size() - q.gen));
}

// Slots the mean layer keeps.
int32_t engine::target(uint32_t s, cause why, int32_t n_new, const std::vector<int32_t> & n_frozen) const {
    const auto & q = streams[s];
    const int32_t n_tokens = (int32_t) q.tokens.size();
    const int32_t n_most = is_bounded() ? cfg->n_cells - n_to_free(s, n_new) : std::numeric_limits<int32_t>::max();
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
        return (int32_t) std::min<int64_t>(std::max<int64_t>(q.n_prompt + n_decode(s), q.cfg->pol->min_budget()), n_most);
    }
    const int64_t sum = std::accumulate(n_frozen.begin(), n_frozen.end(), (int64_t) 0);
    return (int32_t) std::min<int64_t>(std::lround((double) sum/n_layer()) + n_decode(s), n_most);
}

bool engine::has_limit(uint32_t s) const {
    return streams[s].decode_budget.kind != budget::none && streams[s].gen >= 0;
}

// By how many slots is the mean layer of a sequence that generates over its limit?
int64_t engine::n_over(uint32_t s) const {
    const auto & q = streams[s];
    int64_t n = 0;
    for (int32_t l = 0; l < n_layer(); ++l) {
        n += n_slots(s, l);
    }
    const int64_t n_mean  = (n + n_layer() - 1)/n_layer();
    const int64_t n_limit = q.n_prompt + n_decode(s);
    return n_mean - (q.cfg->decode == decode_mode::whole ? std::max<int64_t>(n_limit, q.cfg->pol->min_budget()) : n_limit);
}

// Would n_new more tokens take it over its limit and one interval, and is there anything to evict?
bool engine::over_budget(uint32_t s, int32_t n_new) const {
    const int64_t n = has_limit(s) ? n_over(s) : 0;
    return n > 0 && n + n_new > streams[s].cfg->interval;
}

int32_t engine::n_until_eviction(llama_seq_id seq_id) const {
    const uint32_t s = stream_of(seq_id);
    const int64_t n_most = std::numeric_limits<int32_t>::max();
    const int64_t n = std::min(has_limit(s) ? streams[s].cfg->interval - n_over(s) : n_most, is_bounded() ? n_room(s) : n_most);
    return (int32_t) std::max<int64_t>(n, 1);
}

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
        auto & q = streams[s];
        const int32_t n_next = is_bounded() ? std::min(n, cfg->n_reserve) : n;
        if (q.tokens.empty()) {
            continue;
        }
        const bool can_score = has_queries(s); // if not, the tokens to come are queries: the next call evicts
        if (cfg->guess && q.gen < 0 && n == 1) {
            if (!is_over(s, cause::prompt, n_next, target(s, cause::prompt, n_next, {}))) {
                end_prompt(seq_id);
            } else if (can_score) {
                due.push_back({ s, cause::prompt, n_next });
            }
        }
        if (can_score && over_budget(s, n_next)) {
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
    for (uint32_t i = 0; is_bounded() && i < ubatch.n_seqs_unq; ++i) {
        const uint32_t s = kv.seq_to_stream[ubatch.seq_id_unq[i]];
        if (!streams[s].tokens.empty() && !has_room(s, n_of_each(ubatch))) {
            due.push_back({ s, cause::room, n_of_each(ubatch) });
        }
    }
}

// Heads disagree on what lies below the floor. Queries from the floor on see all of that; earlier ones are left out.
// The ring may be longer than the window of the sequence's policy.
llama_pos engine::first_query(uint32_t s) const {
    const auto & q = streams[s];
    return std::max({ q.floor - 1, (llama_pos) q.tokens.size() - q.cfg->need.window, 0 });
}

// Does a policy that scores by the last queries have one? A removed tail took its own along.
bool engine::has_queries(uint32_t s) const {
    const auto & q = streams[s];
    return q.cfg->need.window == 0 || *std::max_element(q.win_pos.begin(), q.win_pos.end()) >= first_query(s);
}

// Is there anything to evict?
bool engine::is_over(uint32_t s, cause why, int32_t n_new, int32_t n_target) const {
    if (why == cause::room) {
        return !has_room(s, n_new);
    }
    // of all layers where they share: one may hold more than the mean
    const auto & share = streams[s].cfg->pol->share;
    int64_t n_all = 0;
    for (int32_t l = 0; l < n_layer(); ++l) {
        const int64_t n = n_held(s, l);
        if (n > (int64_t) n_target*n_hkv && !share.layers_differ()) {
            return true;
        }
        n_all += n;
    }
    return share.layers_differ() && n_all > (int64_t) n_target*n_hkv*n_layer();
}

void engine::begin_prompt(llama_seq_id seq_id) {
    streams[stream_of(seq_id)].gen = -1;
}

void engine::end_prompt(llama_seq_id seq_id) {
    const uint32_t s = stream_of(seq_id);
    auto & q = streams[s];
    if (q.tokens.empty()) {
        return;
    }
    int64_t n = 0;
    for (int32_t l = 0; l < n_layer(); ++l) {
        n += n_slots(s, l);
    }
    q.gen      = (llama_pos) q.tokens.size();
    q.n_prompt = (int32_t) std::lround((double) n/n_layer());
    remember(seq_id);
}

void engine::check_budgets(const config & c, const budget & prompt, const budget & decode) const {
    kvc::check_budgets(*c.pol, c.spec, c.decode, prompt, decode);
    if (is_bounded() && prompt.kind == budget::tokens && prompt.value > cfg->n_cells - cfg->n_reserve) {
        throw std::invalid_argument("kv_budget " + prompt.str() + ": kv_cells leave it at most " +
                std::to_string(cfg->n_cells - cfg->n_reserve));
    }
}

void engine::check_budget(const budget & prompt, const budget & decode) const {
    check_budgets(*cfg, prompt, decode);
}

void engine::set_budget(llama_seq_id seq_id, const budget & prompt, const budget & decode) {
    auto & q = streams[stream_of(seq_id)];
    check_budgets(*q.cfg, prompt, decode);
    q.prompt_budget = is_bounded() && prompt.kind == budget::none ? cfg->prompt_budget : prompt;
    q.decode_budget = decode;
}

void engine::set_guess(bool guess) {
    auto c = std::make_shared<config>(*cfg);
    c->guess = guess;
    cfg = c;
}

void engine::set_policy(llama_seq_id seq_id, const char * policy, const char * prompt, const char * decode) {
    auto & q = streams[stream_of(seq_id)];
    q.cfg = variant(policy, prompt, decode);
    q.prompt_budget = q.cfg->prompt_budget;
    q.decode_budget = q.cfg->decode_budget;
}

void engine::set_spans(llama_seq_id seq_id, std::vector<span> spans) {
    int32_t end = 0;
    for (const auto & sp : spans) {
        if (sp.begin < end || sp.end <= sp.begin) {
            throw std::invalid_argument("span [" + std::to_string(sp.begin) + ", " + std::to_string(sp.end) +
                    ") overlaps another, is empty or out of order: spans are ascending, disjoint [begin, end)");
        }
        end = sp.end;
    }
    streams[stream_of(seq_id)].spans = std::move(spans);
}

} // namespace kvc
