#include "engine.h"
#include "select.h"

#include "llama-batch.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

namespace kvc {

// A batch of more tokens than this is a prompt to a caller that does not say so; fewer may be a speculative draft.
static const uint32_t N_DRAFT_MAX = 32;

engine::engine(std::shared_ptr<const config> cfg_, const llama_model & model, const llama_cparams & cparams, llama_kv_cache & kv) :
    cfg(std::move(cfg_)), model(model), kv(kv) {
    if (kv.layers.empty()) {
        throw std::invalid_argument("this model has no layer with full attention, and sliding-window layers do not evict");
    }
    n_hkv = model.hparams.n_head_kv(kv.layers[0].il);
    for (const auto & layer : kv.layers) {
        if ((int32_t) model.hparams.n_head_kv(layer.il) != n_hkv) {
            throw std::invalid_argument("this model cannot evict: its layers have different numbers of KV heads");
        }
    }
    if (kv.n_stream > 1 && cfg->layers_differ) {
        throw std::invalid_argument(cfg->spec + " gives layers different budgets, which several sequences in one context "
                "do not support yet: use n_seq_max 1");
    }
    for (const auto & layer : kv.layers) {
        if (cfg->pol->heads_differ() && !ggml_backend_buffer_is_host(layer.k->buffer)) {
            throw std::invalid_argument(cfg->spec + " gives KV heads different budgets, which takes a mask for each head: only the "
                    "CPU's attention has been tested with one, so use n_gpu_layers 0, or offload_kqv off");
        }
    }
    streams.resize(kv.n_stream);
    for (auto & q : streams) {
        reset(q);
    }
    attn.resize(kv.layers.size());
    alloc_signals(cparams);
}

//
// bookkeeping
//

void engine::reset(stream & q) const {
    q = stream();
    q.n_kept.assign(kv.layers.size(), 0);
    q.kept.resize(kv.layers.size());
    q.probed.resize(kv.layers.size());
    q.win_pos.assign(cfg->need.window, -1);
    q.cfg           = cfg;
    q.prompt_budget = cfg->prompt_budget;
    q.decode_budget = cfg->decode_budget;
}

int32_t engine::n_layer() const {
    return (int32_t) kv.layers.size();
}

int32_t engine::n_cells(uint32_t s) const {
    return (int32_t) kv.v_cells[s].used_max_p1();
}

int32_t engine::n_slots(uint32_t s, int32_t ikv) const {
    return n_cells(s) - streams[s].n_base + streams[s].n_kept[ikv];
}

// Slots at the beginning of a layer that a shorter head does not have.
int32_t engine::n_empty(uint32_t s, int32_t ikv, int32_t h) const {
    const auto & q = streams[s];
    const int32_t n = q.n_kept[ikv];
    return cfg->pol->heads_differ() ? first_slot(q.kept[ikv].data() + (size_t) h*n, n) : 0;
}

// Slots of all heads of a layer that hold a token.
int64_t engine::n_held(uint32_t s, int32_t ikv) const {
    int64_t n = (int64_t) n_slots(s, ikv)*n_hkv;
    for (int32_t h = 0; h < n_hkv; ++h) {
        n -= n_empty(s, ikv, h);
    }
    return n;
}

uint32_t engine::cell_begin(int32_t ikv) const {
    // several streams are read through one view, so their layers all begin at 0 (checked in run())
    return kv.n_stream > 1 ? 0 : streams[0].n_base - streams[0].n_kept[ikv];
}

// I32 [n_head_kv, n_slots], -1 where a slot is empty
std::vector<int32_t> engine::slot_pos(uint32_t s, int32_t ikv) const {
    const auto & q = streams[s];
    const auto & cells = kv.v_cells[s];
    const int32_t n_kept = q.n_kept[ikv];
    const int32_t n = n_slots(s, ikv);
    std::vector<int32_t> res((size_t) n_hkv*n);
    for (int32_t h = 0; h < n_hkv; ++h) {
        std::copy_n(q.kept[ikv].begin() + (size_t) h*n_kept, n_kept, res.begin() + (size_t) h*n);
        for (int32_t j = n_kept; j < n; ++j) {
            res[(size_t) h*n + j] = cells.pos_get(q.n_base + j - n_kept);
        }
    }
    return res;
}

std::vector<int32_t> engine::kept(llama_seq_id seq_id, int32_t ikv) const {
    return slot_pos(stream_of(seq_id), ikv);
}

llama_pos engine::floor(llama_seq_id seq_id) const {
    return streams[stream_of(seq_id)].floor;
}

uint32_t engine::stream_of(llama_seq_id seq_id) const {
    if (seq_id < 0 || (uint32_t) seq_id >= kv.n_seq_max) {
        throw std::invalid_argument("sequence " + std::to_string(seq_id) + ": this context has 0 to " + std::to_string(kv.n_seq_max - 1));
    }
    return kv.seq_to_stream[seq_id];
}

size_t engine::row_bytes(int32_t ikv) const {
    const auto & layer = kv.layers[ikv];
    return ggml_row_size(layer.k->type, model.hparams.n_embd_k_gqa(layer.il)) +
           ggml_row_size(layer.v->type, model.hparams.n_embd_v_gqa(layer.il));
}

void engine::count_evictions(uint32_t s, int64_t & n_evictions, int64_t & n_evicted) const {
    n_evictions = streams[s].n_evictions;
    n_evicted   = streams[s].n_evicted;
}

size_t engine::signal_bytes() const {
    size_t res = 0;
    for (const auto & it : ctxs_bufs) {
        res += ggml_backend_buffer_get_size(it.second.get());
    }
    return res;
}

//
// hooks
//

void engine::on_clear() {
    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        reset(streams[s]);
    }
    for (auto & it : ctxs_bufs) {
        for (auto * t = ggml_get_first_tensor(it.first.get()); t; t = ggml_get_next_tensor(it.first.get(), t)) {
            if (t->name[0] != '1') { // the ones
                ggml_backend_tensor_memset(t, 0, 0, ggml_nbytes(t));
            }
        }
    }
    due.clear();
    mask_only = false;
    stale = true;
}

bool engine::on_seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    struct removal { uint32_t s; llama_pos end; };
    std::vector<removal> todo;

    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        if (seq_id >= 0 && kv.seq_to_stream[seq_id] != s) {
            continue;
        }
        const llama_pos last = (llama_pos) streams[s].tokens.size() - 1;
        if (last < 0) {
            reset(streams[s]); // spans may have been set
            continue;
        }
        if (p0 > last || p1 <= p0) {
            continue;
        }
        if (p1 <= last) {
            return false; // a hole: cells would no longer be in the order of their positions
        }
        if (p0 > 0 && (p0 < streams[s].floor || cfg->need.sums)) {
            return false; // gone for good; or its queries are in the sums, and cannot be taken out
        }
        todo.push_back({ s, p0 });
    }

    for (const auto & r : todo) {
        auto & q = streams[r.s];
        due.erase(std::remove_if(due.begin(), due.end(), [&](const job & j) { return j.s == r.s; }), due.end());
        stale = true;
        if (r.end == 0) {
            clear_sums(r.s);
            reset(q);
            continue;
        }
        // cells of the compacted part that hold removed positions: every head has them last, in order
        const int32_t n_left = n_cells(r.s) - ((int32_t) q.tokens.size() - r.end);
        const int32_t n_rm   = std::max(0, q.n_base - n_left);
        for (size_t l = 0; n_rm > 0 && l < q.kept.size(); ++l) {
            const int32_t n_new = q.n_kept[l] - n_rm;
            std::vector<int32_t> kept;
            for (int32_t h = 0; h < n_hkv; ++h) {
                const auto * row = q.kept[l].data() + (size_t) h*q.n_kept[l];
                kept.insert(kept.end(), row, row + n_new);
            }
            q.kept[l]   = std::move(kept);
            q.n_kept[l] = n_new;
        }
        for (int32_t l = 0; l < n_layer(); ++l) {
            q.probed[l].resize(std::min(q.probed[l].size(), (size_t) (n_left - q.n_base + q.n_kept[l] + n_rm)*n_hkv));
        }
        q.n_base -= n_rm;
        q.tokens.resize(r.end);
        q.gen = r.end <= q.gen ? -1 : q.gen;
        for (auto & p : q.win_pos) {
            p = p >= r.end ? -1 : p;
        }
    }
    return true;
}

void engine::on_seq_cp(uint32_t s0, uint32_t s1) {
    const budget prompt = streams[s1].prompt_budget, decode = streams[s1].decode_budget; // a sequence's own
    auto own = std::move(streams[s1].cfg);
    streams[s1] = streams[s0];
    streams[s1].cfg           = std::move(own);
    streams[s1].prompt_budget = prompt;
    streams[s1].decode_budget = decode;
    stale = true;
}

bool engine::refuse_shift(const char * what) const {
    LLAMA_LOG_ERROR("%s: ignored: positions cannot be shifted while %s evicts (llama_memory_can_shift says so)\n", what, cfg->spec.c_str());
    return true;
}

llama_pos engine::pos_min(uint32_t s, llama_pos p0) const {
    // after an eviction: what a caller may roll back to, and still evaluate one token
    const auto & q = streams[s];
    if (cfg->need.sums && p0 >= 0) {
        return (llama_pos) q.tokens.size() - 1; // no tail can be removed
    }
    return q.n_base == 0 || p0 < 0 ? p0 : std::min(q.floor + 1, (llama_pos) q.tokens.size() - 1);
}

void engine::on_ubatch(const llama_ubatch & ubatch) {
    const uint32_t n_seqs = kv.n_stream > 1 ? ubatch.n_seqs_unq : 1;
    const uint32_t n_tps  = ubatch.n_tokens/n_seqs;

    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        auto & q = streams[kv.seq_to_stream[ubatch.seq_id[i][0]]];
        const llama_pos pos = ubatch.pos[i];
        q.tokens.resize(pos);
        q.tokens.push_back(ubatch.token ? ubatch.token[i] : LLAMA_TOKEN_NULL);
        if (!q.win_pos.empty()) {
            q.win_pos[pos % q.win_pos.size()] = pos;
        }
        if (cfg->guess && n_tps > N_DRAFT_MAX) {
            q.gen = -1; // another prompt follows what was generated
        }
    }
}

//
// when
//

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

// Slots the mean layer keeps.
int32_t engine::target(uint32_t s, cause why, int32_t n_new, const std::vector<int32_t> & n_frozen) const {
    const auto & q = streams[s];
    const int32_t n_tokens = (int32_t) q.tokens.size();
    const int32_t n_most = is_bounded() ? cfg->n_cells - n_to_free(s, n_new) : std::numeric_limits<int32_t>::max();
    if (why == cause::room) {
        return n_most;
    }
    if (why == cause::prompt) {
        // a ratio of a short prompt is not below what the policy always keeps; a number of tokens was checked when it was given
        return q.prompt_budget.kind == budget::none ? std::numeric_limits<int32_t>::max() :
            std::min(std::max(q.prompt_budget.of(n_tokens), q.cfg->pol->min_budget()), n_most);
    }
    const int32_t n_decode = q.decode_budget.of(n_tokens - q.gen);
    if (q.cfg->decode == decode_mode::whole) {
        return std::min(q.n_prompt + n_decode, n_most);
    }
    const int64_t sum = std::accumulate(n_frozen.begin(), n_frozen.end(), (int64_t) 0);
    return std::min((int32_t) std::lround((double) sum/n_layer()) + n_decode, n_most);
}

// Would n_new more tokens take a sequence that generates over its limit and one interval, and is there anything to evict?
bool engine::over_budget(uint32_t s, int32_t n_new) const {
    const auto & q = streams[s];
    if (q.decode_budget.kind == budget::none || q.gen < 0) {
        return false;
    }
    const int32_t n_decode = q.decode_budget.of(std::max(1, (int32_t) q.tokens.size() - q.gen));
    int64_t n = 0;
    for (int32_t l = 0; l < n_layer(); ++l) {
        n += n_slots(s, l);
    }
    const int64_t n_gen = (n + n_layer() - 1)/n_layer() - q.n_prompt;
    return n_gen > n_decode && n_gen + n_new > n_decode + q.cfg->interval;
}

bool engine::is_due(const llama_ubatch & ubatch) {
    due.clear();
    const int32_t n_new = (int32_t) (ubatch.n_tokens/(kv.n_stream > 1 ? ubatch.n_seqs_unq : 1)); // of each sequence
    for (uint32_t i = 0; i < ubatch.n_seqs_unq; ++i) {
        const llama_seq_id seq_id = ubatch.seq_id_unq[i];
        const uint32_t s = kv.seq_to_stream[seq_id];
        auto & q = streams[s];
        if (q.tokens.empty()) {
            continue;
        }
        const bool can_score = has_queries(s); // if not, the tokens to come are queries: the next call evicts
        if (cfg->guess && q.gen < 0 && n_new == 1) {
            if (!is_over(s, cause::prompt, n_new, target(s, cause::prompt, n_new, {}))) {
                end_prompt(seq_id);
            } else if (can_score) {
                due.push_back({ s, cause::prompt, n_new });
            }
        }
        if (can_score && over_budget(s, n_new)) {
            due.push_back({ s, cause::decode, n_new });
        }
        if (is_bounded() && !has_room(s, n_new)) { // if the evictions before it did not make it
            due.push_back({ s, cause::room, n_new });
        }
    }
    return !due.empty();
}

// Heads disagree on what lies below the floor. Queries from the floor on see all of that; earlier ones are left out. The ring
// may be longer than the window of the sequence's policy.
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
    for (int32_t l = 0; l < n_layer(); ++l) {
        if (n_held(s, l) > (int64_t) n_target*n_hkv) {
            return true;
        }
    }
    return false;
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
