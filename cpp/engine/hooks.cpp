// What happened to the cache: llama.cpp says so as it happens.

#include "engine.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"

#include <algorithm>

namespace kvc {

// A batch of more tokens than this is a prompt to a caller that does not say so; fewer may be a speculative draft.
static const uint32_t N_DRAFT_MAX = 32;

// What is being computed may still write into the signals.
void engine::synchronize() const {
    if (computes) {
        llama_synchronize(computes);
    }
}

void engine::on_clear() {
    synchronize();
    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        reset(sequences[s]);
        layout.even_out(s);
        layout.give_back_rows(s, true);
    }
    taps.clear();
    due.clear();
    evictor.mask.on = false;
    stale = true;
}

void engine::empty(uint32_t s) {
    synchronize();
    taps.clear_sums(s);
    reset(sequences[s]);
    evictor.mask.on = false;
    stale |= layout.even_out(s);
    layout.give_back_rows(s, true);
}

// Changes nothing: a memory of several parts is asked before one of them changes.
bool engine::can_seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    if (seq_id >= (llama_seq_id) kv.seq_to_stream.size()) {
        return true; // llama.cpp says that there is none
    }
    p0 = std::max(p0, 0);
    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        const llama_pos last = (llama_pos) sequences[s].tokens.size() - 1;
        if ((seq_id >= 0 && kv.seq_to_stream[seq_id] != s) || p0 > last || (p1 >= 0 && p1 <= p0)) {
            continue;
        }
        if (p1 >= 0 && p1 <= last) {
            return false; // a hole: cells would no longer be in the order of their positions
        }
        if (p0 > 0 && (p0 < floor((llama_seq_id) s) || (is_back(s) && back((llama_seq_id) s, p0) != p0))) {
            return false; // gone for good
        }
    }
    return true;
}

bool engine::seq_rm(llama_memory_i * mem, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (const auto * cache = parts_of(mem).cache; cache && cache->kvc) {
        if (!cache->kvc->can_seq_rm(seq_id, p0, p1)) {
            return false;
        }
        cache->kvc->go_back(seq_id, p0, p1);
    }
    return mem->seq_rm(seq_id, p0, p1);
}

bool engine::on_seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (!can_seq_rm(seq_id, p0, p1)) {
        return false;
    }
    struct removal { uint32_t s; llama_pos end; };
    std::vector<removal> todo;

    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        if (seq_id >= 0 && kv.seq_to_stream[seq_id] != s) {
            continue;
        }
        const llama_pos last = (llama_pos) sequences[s].tokens.size() - 1;
        if (last < 0) {
            empty(s); // spans may have been set, or a state read in part
        } else if (p0 <= last && p1 > p0) {
            todo.push_back({ s, p0 });
        }
    }

    for (const auto & r : todo) {
        auto & q = sequences[r.s];
        due.erase(std::remove_if(due.begin(), due.end(), [&](const job & j) { return j.s == r.s; }), due.end());
        // where layers differ, maybe by a policy of its own; else every one begins at its first row, whatever is removed
        stale |= cfg->layers_differ || std::any_of(q.n_kept.begin(), q.n_kept.end(), [&](int32_t n) { return n != q.n_base; });
        if (r.end == 0) {
            empty(r.s);
            continue;
        }
        // cells of the compacted part that hold removed positions: every head has them last, in order
        const int32_t n_left = layout.n_cells(r.s) - ((int32_t) q.tokens.size() - r.end);
        const int32_t n_rm   = std::max(0, q.n_base - n_left);
        for (size_t l = 0; n_rm > 0 && l < q.kept.size(); ++l) {
            const int32_t n_new = q.n_kept[l] - n_rm;
            std::vector<int32_t> kept;
            for (int32_t h = 0; h < layout.n_head_kv(); ++h) {
                const auto * row = q.kept[l].data() + (size_t) h*q.n_kept[l];
                kept.insert(kept.end(), row, row + n_new);
            }
            q.kept[l]   = std::move(kept);
            q.n_kept[l] = n_new;
        }
        for (int32_t l = 0; l < layout.n_layer(); ++l) {
            q.probed[l].resize(std::min(q.probed[l].size(), (size_t) (n_left - q.n_base + q.n_kept[l] + n_rm)*layout.n_head_kv()));
        }
        q.n_base -= n_rm;
        layout.count_lacks(q);
        q.tokens.resize(r.end);
        if (q.past_end > r.end) {
            q.past_end = -1;
            q.past     = {};
        }
        q.gen = r.end <= q.gen ? -1 : q.gen;
        for (auto & p : q.win_pos) {
            p = p >= r.end ? -1 : p;
        }
    }
    return true;
}

bool engine::on_seq_cp(uint32_t s0, uint32_t s1) {
    // Signals now, although K and V wait for the next update: by then the source or the copy may have been removed,
    // which clears sums at once. (K and V may wait: removing cells leaves their rows, and copies come first in an
    // update, in the order they were asked for.)
    synchronize();
    taps.copy(s0, s1);
    const budget prompt = sequences[s1].prompt_budget, decode = sequences[s1].decode_budget; // a sequence's own
    auto own = std::move(sequences[s1].cfg);
    sequences[s1] = sequences[s0];
    sequences[s1].cfg           = std::move(own);
    sequences[s1].prompt_budget = prompt;
    sequences[s1].decode_budget = decode;
    stale = true;
    if (layout.has_pool()) {
        layout.copy_rows(s0, s1);
    }
    return layout.has_pool();
}

void engine::refuse_shift(const char * what) const {
    LLAMA_LOG_ERROR("%s: ignored: positions cannot be shifted while %s evicts (llama_memory_can_shift says so)\n", what, cfg->spec.c_str());
}

// What llama_memory_seq_pos_min() says. A llama-server goes on from n_past tokens if this is below n_past - n_swa: the
// edge of the window, where windows forget, else n_past itself. So that it goes on from the floor and from what is
// behind it.
llama_pos engine::pos_min(uint32_t s, llama_pos p0) const {
    const bool forget = mem.windows && mem.windows->get_size() < kv.get_size();
    return p0 < 0 ? p0 : std::max(held_from(s) - 1 - (forget ? (llama_pos) mem.windows->n_swa : 0), 0);
}

void engine::on_ubatch(const llama_ubatch & ubatch) {
    const uint32_t n_seqs = kv.n_stream > 1 ? ubatch.n_seqs_unq : 1;
    const uint32_t n_tps  = ubatch.n_tokens/n_seqs;

    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        auto & q = sequences[kv.seq_to_stream[ubatch.seq_id[i][0]]];
        const llama_pos pos = ubatch.pos[i];
        q.tokens.resize(pos);
        q.tokens.push_back(ubatch.token ? ubatch.token[i] : LLAMA_TOKEN_NULL);
        if (!q.win_pos.empty()) {
            q.win_pos[pos % q.win_pos.size()] = pos;
        }
        if (guess && n_tps > N_DRAFT_MAX) {
            q.gen = -1; // another prompt follows what was generated
        }
    }
}

} // namespace kvc
