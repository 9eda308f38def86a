// One eviction: signals -> scores -> plan -> compaction. Nothing is moved before the whole plan stands.

#include "evictor.h"
#include "graph.h"
#include "gather.h"
#include "select.h"
#include "spans.h"

#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace kvc {

static const size_t N_SIGNALS = 32u << 20; // bytes of signals that wait for their scores; one layer's at least

static double ms_since(int64_t t0) {
    return 1e-3*(ggml_time_us() - t0);
}

// A prompt that was never compressed leaves no room beside it: it is not frozen.
static void unfreeze(request & r) {
    for (auto & layer : r.layers) {
        layer.n_frozen = 0;
    }
    r.prompt = true;
}

// Does the budget hold a frozen prompt and what is always kept beside it?
static bool holds_frozen(const request & r, const policy & pol) {
    int64_t n = 0;
    for (const auto & layer : r.layers) {
        n += layer.n_frozen;
    }
    return n <= (int64_t) r.layers.size()*std::max(0, r.budget - pol.min_budget());
}

static void check_alike(const request & r, const config & conf) {
    for (const auto & layer : r.layers) {
        for (int32_t h = 1; h < r.n_head_kv; ++h) {
            if (!std::equal(layer.pos, layer.pos + layer.n_kv, layer.pos + (size_t) h*layer.n_kv)) {
                throw std::invalid_argument(conf.spec + " keeps the same tokens in every head, and the heads of this sequence hold "
                        "different ones: evict with it first, or clear the sequence");
            }
        }
    }
}

// Work on n layers, at once if the policy can be asked so.
static void each_layer(llama_context * lctx, const policy & pol, int32_t n, const std::function<void(int32_t)> & f) {
    if (pol.on_any_thread()) {
        return on_threads(lctx, n, f);
    }
    for (int32_t i = 0; i < n; ++i) {
        f(i);
    }
}

// Positions and scores of all layers. The signals of as many as N_SIGNALS holds lie side by side, and are scored at
// once.
void evictor::score_layers(llama_context * lctx, uint32_t s, int32_t budget, std::vector<std::vector<int32_t>> & pos,
        std::vector<std::vector<float>> & score) const {
    std::vector<layer_signals> some;
    size_t n_bytes = 0;
    for (int32_t l = 0; l < layout.n_layer(); ++l) {
        some.push_back(scorer.read_signals(lctx, s, l));
        n_bytes += some.back().n_bytes();
        if (n_bytes < N_SIGNALS && l + 1 < layout.n_layer()) {
            continue;
        }
        each_layer(lctx, *sequences[s].cfg->pol, (int32_t) some.size(), [&](int32_t i) {
            score[some[i].il] = scorer.score(s, some[i], budget);
        });
        for (auto & sig : some) {
            pos[sig.il] = std::move(sig.pos);
        }
        some.clear();
        n_bytes = 0;
    }
}

evictor::evictor(std::shared_ptr<const config> cfg_, const llama_model & model, llama_kv_cache & kv, kvc::layout & layout, const kvc::taps & taps,
        const kvc::scorer & scorer, std::vector<sequence> & sequences) :
    cfg(std::move(cfg_)), model(model), kv(kv), layout(layout), taps(taps), scorer(scorer), sequences(sequences) {}

bool evictor::run(llama_context * lctx, const job & j, bool mask_only) {
    const uint32_t s = j.s;
    auto & q = sequences[s];
    const auto & conf = *q.cfg;
    const auto    n_frozen = frozen(s, j.why);
    const int32_t n_target = target(s, j.why, j.n_new, n_frozen);
    if (q.tokens.empty() || !is_over(s, j.why, j.n_new, n_target)) {
        return false;
    }
    if (j.why == cause::prompt && conf.need.spans && q.has_spans && q.spans.empty()) {
        return false; // what lies in no span stays
    }
    for (int32_t l = 0; !conf.pol->heads_differ() && l < layout.n_layer(); ++l) {
        if (layout.n_held(s, l) < (int64_t) layout.n_slots(s, l)*layout.n_head_kv()) {
            throw std::invalid_argument(conf.spec + " keeps the same number of every head, and the heads of this sequence hold different ones: "
                    "go on with " + cfg->spec + ", or clear it");
        }
    }
    request r;
    r.prompt    = j.why == cause::prompt || q.gen < 0;
    r.room      = j.why == cause::room;
    r.at_least  = j.why == cause::prompt && q.prompt_budget.kind == budget::ratio;
    r.n_head_kv = layout.n_head_kv();
    r.budget    = n_target;

    const int64_t t_start = ggml_time_us();
    int64_t t0 = t_start;
    std::vector<std::vector<int32_t>> pos(layout.n_layer());
    std::vector<std::vector<float>> score(layout.n_layer());
    score_layers(lctx, s, n_target, pos, score);
    for (int32_t l = 0; l < layout.n_layer(); ++l) {
        r.layers.push_back({ layout.n_slots(s, l), n_frozen[l], pos[l].data(), score[l].data() });
    }
    st.score_ms += ms_since(t0);
    if (conf.pol->heads_alike()) {
        check_alike(r, conf);
    }

    t0 = ggml_time_us();
    if (conf.need.spans) {
        r.spans = q.has_spans ? q.spans : sentences(q);
    }
    const bool alike = j.why == cause::room && !cfg->pooled; // room is then a matter of each layer's own rows
    if (j.why == cause::room && cfg->pooled && !holds_frozen(r, *conf.pol)) {
        unfreeze(r);
    }
    const int32_t n_block = layout.n_block(); // where only some layers are offloaded, those on the host come by a few rows more
    const auto n_most = [&](int32_t l) { // rows that kv_cells have for a layer, those that blocks round up to apart
        const int32_t n_rows = (int32_t) (cfg->pooled ? kv.get_size() : kv.layers[l].k->ne[1]);
        return n_rows - n_to_free(s, j.n_new) - (conf.layers_differ ? n_block - 1 : 0);
    };
    if (!alike) {
        auto heads = conf.pol->heads(r);
        for (size_t l = 0; n_block > 1 && cfg->is_bounded() && l < heads.size(); ++l) {
            for (int32_t & n : heads[l]) {
                n = std::min(n, n_most((int32_t) l));
            }
        }
        r.heads = heads_in_blocks(r, std::move(heads), n_block, conf.pol->min_budget());
    }
    std::vector<int32_t> n_keep = alike ? std::vector<int32_t>(layout.n_layer(), n_target) : conf.pol->budgets(r);
    if ((int32_t) n_keep.size() != layout.n_layer()) {
        throw std::invalid_argument(conf.spec + ": budgets() must give one number per layer, " + std::to_string(layout.n_layer()));
    }
    const bool capped = n_block > 1 && !r.heads.empty(); // above; cut once more they would be no blocks
    for (int32_t l = 0; cfg->is_bounded() && l < layout.n_layer(); ++l) {
        if (j.why != cause::room && !conf.layers_differ && n_keep[l] > n_most(l)) {
            throw std::invalid_argument(conf.spec + ": budgets() gives layer " + std::to_string(l) + " " + std::to_string(n_keep[l]) +
                    " slots, kv_cells leaves it " + std::to_string(n_most(l)));
        }
        n_keep[l] = std::min(alike ? n_most(l) : capped ? n_keep[l] : std::min(n_keep[l], n_most(l)), r.layers[l].n_kv);
        if (r.layers[l].n_frozen > n_keep[l]) {
            unfreeze(r);
        }
    }
    n_keep = in_blocks(r, n_keep, n_block, conf.pol->min_budget());
    std::vector<std::vector<int32_t>> slots(layout.n_layer());
    each_layer(lctx, *conf.pol, layout.n_layer(), [&](int32_t l) {
        if (n_keep[l] < 1 || n_keep[l] > r.layers[l].n_kv) {
            throw std::invalid_argument(conf.spec + ": budgets() gives layer " + std::to_string(l) + " " + std::to_string(n_keep[l]) +
                    " slots, it has " + std::to_string(r.layers[l].n_kv));
        }
        slots[l].resize((size_t) layout.n_head_kv()*n_keep[l]);
        conf.pol->keep(r, l, n_keep[l], slots[l].data());
    });
    check(r, conf, slots, n_keep, j.n_new);
    st.plan_ms += ms_since(t0);

    if (mask_only) { // the same keep sets as a mask over the cache as it is
        mask = { true, std::move(slots), layout.n_cells(s) };
        return true;
    }

    t0 = ggml_time_us();
    int64_t n_before = 0, n_after = 0;
    for (int32_t l = 0; l < layout.n_layer(); ++l) {
        n_before += r.layers[l].n_kv;
        n_after  += n_keep[l];
    }
    compact(lctx, s, slots, n_keep);
    q.seen = (llama_pos) q.tokens.size();
    st.compact_ms += ms_since(t0);
    const int64_t n_evicted = (n_before - n_after)/layout.n_layer();
    st.n_evictions++;
    st.n_evicted += n_evicted;
    q.n_evictions++;
    q.n_evicted += n_evicted;
    q.evict_ms  += ms_since(t_start);
    return true;
}

// Moves the kept rows of every layer to its rows [0, n_keep), cells [n_base - n_keep, n_base), and rewrites the cell
// table to match.
void evictor::compact(llama_context * lctx, uint32_t s, const std::vector<std::vector<int32_t>> & slots, const std::vector<int32_t> & n_keep) {
    auto & q = sequences[s];
    const int32_t n_base = *std::max_element(n_keep.begin(), n_keep.end());
    const llama_pos last = (llama_pos) q.tokens.size() - 1;

    std::vector<piece> pieces;
    int32_t n_exact = n_base; // trailing slots in which all heads of all layers hold the same, newest positions
    std::vector<std::vector<int32_t>> own = slots; // where heads differ, each head's one after the other, counted from its own first
    const bool heads_differ = cfg->pol->heads_differ();
    for (int32_t l = 0; l < layout.n_layer(); ++l) {
        const auto    pos  = layout.slot_pos(s, l);
        const int32_t n_kv = layout.n_slots(s, l), n = n_keep[l];
        for (int32_t h = 0; h < layout.n_parts(); ++h) {
            int32_t * from = own[l].data() + (size_t) h*n, n_own = n;
            if (heads_differ) {
                const int32_t first = first_slot(from, n), lack = n_kv - layout.n_slots(s, l, h);
                from  += first;
                n_own -= first;
                std::for_each(from, from + n_own, [&](int32_t & slot) { slot -= lack; });
            }
            for (const auto & rows : rows_of_part(s, l, h)) {
                add_pieces(rows, n_own, from, pieces);
            }
        }

        std::vector<int32_t> kept((size_t) layout.n_head_kv()*n);
        for (int32_t h = 0; h < layout.n_head_kv(); ++h) {
            int32_t n_tail = 0;
            for (int32_t i = n - 1; i >= 0; --i) {
                const int32_t j = slots[l][(size_t) h*n + i];
                kept[(size_t) h*n + i] = j < 0 ? -1 : pos[(size_t) h*n_kv + j];
                n_tail += n_tail == n - 1 - i && kept[(size_t) h*n + i] == last - n_tail;
            }
            n_exact = std::min(n_exact, n_tail);
        }
        q.kept[l] = std::move(kept);

        std::vector<float> probed; // inf: nobody has asked for this one
        const int32_t n_probed = (int32_t) q.probed[l].size()/layout.n_head_kv();
        for (int32_t i = 0; n_probed > 0 && i < n; ++i) {
            for (int32_t h = 0; h < layout.n_head_kv(); ++h) {
                const int32_t j = slots[l][(size_t) h*n + i];
                probed.push_back(j >= 0 && j < n_probed ? q.probed[l][(size_t) j*layout.n_head_kv() + h] : INFINITY);
            }
        }
        q.probed[l] = std::move(probed);
    }
    move_rows(lctx, pieces);
    q.n_kept = n_keep;
    q.n_base = n_base;
    q.floor  = last + 1 - n_exact;
    layout.count_lacks(q);

    // the cells below the exact tail stand for different tokens in each head: positions that only say "before it"
    auto & cells = kv.v_cells[s];
    const llama_seq_id seq_id = (llama_seq_id) s;
    cells.reset();
    for (int32_t c = 0; c < n_base; ++c) {
        cells.pos_set(c, last - (n_base - 1 - c));
        cells.seq_add(c, seq_id);
    }
    kv.v_heads[s] = n_base;
    taps.clear_free_sums(s);
    if (cfg->pooled) {
        const auto n_held = layout.rows_held(s);
        const auto moves = layout.lay_out(s, n_held);
        for (const bool values : layout.sides()) {
            shift_rows(lctx, layout.pool_of(values), moves);
        }
        layout.clear_free(s, n_held);
    }
    layout.give_back_rows(s, false);
}

// What moves of a layer, or of one of its heads: keys, values and sums.
std::vector<cache_rows> evictor::rows_of_part(uint32_t s, int32_t ikv, int32_t h) const {
    const uint32_t il = kv.layers[ikv].il;
    const int32_t n_heads = layout.by_head() ? 1 : layout.n_head_kv();
    std::vector<cache_rows> res;
    for (const bool values : layout.sides()) {
        const auto p = layout.place_of(s, ikv, h, values);
        const int64_t n_dim = values ? model.hparams.n_embd_head_v(il) : model.hparams.n_embd_head_k(il);
        res.push_back(rows_of_cache(p.t, p.offset, p.row, p.channel, p.n_rows, n_dim, n_heads));
    }
    if (const auto * t = taps.tensors[ikv].sums) {
        res.push_back(rows_of_sums(taps.tensors[ikv].sums, s*t->nb[2] + h*t->nb[1], n_heads));
    }
    return res;
}

// Spans of a prompt nobody segmented; none without a tokenizer.
std::vector<span> evictor::sentences(const sequence & q) const {
    if (model.vocab.get_type() == LLAMA_VOCAB_TYPE_NONE) {
        return {};
    }
    const size_t n = q.gen >= 0 ? std::min<size_t>(q.gen, q.tokens.size()) : q.tokens.size();
    return segment(&model.vocab, { q.tokens.begin(), q.tokens.begin() + n }, nullptr);
}

} // namespace kvc
