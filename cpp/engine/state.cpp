// A saved state of a context that evicts: a head, llama.cpp's own state, and after it what was kept. Where the head
// lies, stock llama.cpp (or a context without a policy) has a count of streams: it refuses the state instead of
// misreading it.

#include "engine.h"
#include "select.h"

#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache.h"
#include "llama-memory-recurrent.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

namespace kvc {

static const uint32_t STATE_TAG     = 0x4b560000; // "KV"
static const uint32_t STATE_VERSION = 8;
static const uint64_t N_MAX         = 1u << 28;   // no array of a real state is longer

template <typename T>
static void put(llama_io_write_i & io, const std::vector<T> & v) {
    const uint64_t n = v.size();
    io.write(&n, sizeof(n));
    if (n > 0) { // llama.cpp copies from data(), which may be null
        io.write(v.data(), n*sizeof(T));
    }
}

template <typename T>
static void get(llama_io_read_i & io, std::vector<T> & v, uint64_t n_max = N_MAX) {
    uint64_t n = 0;
    io.read(&n, sizeof(n));
    if (n > n_max) {
        throw std::runtime_error("the state is damaged: an array of " + std::to_string(n) + " elements");
    }
    v.resize(n);
    if (n > 0) {
        io.read(v.data(), n*sizeof(T));
    }
}

static void put_part(llama_io_write_i & io, ggml_tensor * t, size_t offset, size_t size) {
    std::vector<uint8_t> buf(t ? size : 0);
    if (t) {
        ggml_backend_tensor_get(t, buf.data(), offset, size);
    }
    put(io, buf);
}

static void get_part(llama_io_read_i & io, ggml_tensor * t, size_t offset, size_t size) {
    std::vector<uint8_t> buf;
    get(io, buf);
    if (buf.size() != (t ? size : 0)) {
        throw std::runtime_error("the state holds other attention signals than this context");
    }
    if (t) {
        ggml_backend_tensor_set(t, buf.data(), offset, size);
    }
}

// K and V of a sequence, where llama.cpp writes rows by cell: each layer, or each head, has a number of its own.
void engine::state_write_rows(llama_io_write_i & io, uint32_t s) const {
    const auto n_rows = layout.rows_held(s);
    put(io, n_rows);
    for (size_t i = 0; i < n_rows.size(); ++i) {
        const int32_t l = (int32_t) i/layout.n_parts(), h = (int32_t) i % layout.n_parts();
        for (const bool values : layout.sides()) {
            const auto * t = values ? kv.layers[l].v : kv.layers[l].k;
            const int32_t head[] = { t->type, (int32_t) t->ne[0], values && kv.v_trans };
            io.write(head, sizeof(head));
            for (const auto & run : layout.runs_of(s, l, h, n_rows[i], values)) {
                io.write_tensor(run.t, run.offset, run.size);
            }
        }
    }
}

bool engine::state_read_rows(llama_io_read_i & io, uint32_t s) {
    std::vector<int32_t> n_rows;
    get(io, n_rows);
    const bool fits = (int32_t) n_rows.size() == layout.n_layer()*layout.n_parts() && *std::min_element(n_rows.begin(), n_rows.end()) >= 0;
    if (fits && off_blocks(*std::max_element(n_rows.begin(), n_rows.end()), n_rows, layout.n_block()) >= 0) {
        LLAMA_LOG_ERROR("%s: off the CPU what layers and heads hold differs by whole blocks of %d rows, and this state was "
                "saved on the CPU\n", __func__, layout.n_block());
        return false;
    }
    if (!fits || (cfg->pooled && layout.n_to_share(n_rows) < 0)) {
        LLAMA_LOG_ERROR("%s: the state has other layers than this context, or more rows\n", __func__);
        return false;
    }
    if (cfg->pooled) {
        layout.lay_out(s, n_rows);
        layout.clear_free(s, n_rows);
        stale = true;
    }
    for (size_t i = 0; i < n_rows.size(); ++i) {
        const int32_t l = (int32_t) i/layout.n_parts(), h = (int32_t) i % layout.n_parts();
        for (const bool values : layout.sides()) {
            const auto * t = values ? kv.layers[l].v : kv.layers[l].k;
            int32_t head[3];
            io.read(head, sizeof(head));
            if (n_rows[i] > layout.place_of(s, l, h, values).n_rows || head[0] != t->type || head[1] != t->ne[0] || head[2] != (values && kv.v_trans)) {
                LLAMA_LOG_ERROR("%s: layer %d of the state has other rows than this context\n", __func__, l);
                return false;
            }
            for (const auto & run : layout.runs_of(s, l, h, n_rows[i], values)) {
                io.read_tensor(run.t, run.offset, run.size);
            }
        }
    }
    return true;
}

void engine::state_write_head(llama_io_write_i & io) const {
    io.write(&STATE_TAG,     sizeof(STATE_TAG));
    io.write(&STATE_VERSION, sizeof(STATE_VERSION));
    put(io, std::vector<char>(cfg->spec.begin(), cfg->spec.end()));
}

void engine::state_read_head(llama_io_read_i & io) const {
    uint32_t tag = 0, version = 0;
    io.read(&tag, sizeof(tag));
    if (tag != STATE_TAG) {
        throw std::runtime_error("the state is of a context without a policy, or of an earlier version");
    }
    io.read(&version, sizeof(version));
    if (version != STATE_VERSION) {
        throw std::runtime_error("the state has version " + std::to_string(version) + ", this build reads " + std::to_string(STATE_VERSION));
    }
    std::vector<char> chars;
    get(io, chars);
    const std::string text(chars.begin(), chars.end());
    if (text != cfg->spec) {
        const bool plain = std::all_of(text.begin(), text.end(), [](char c) { return c >= ' ' && c <= '~'; }); // else it is damaged, or no ASCII
        throw std::runtime_error("the state was saved under " + (plain ? "the policy " + text : "another policy") + ", this context has " + cfg->spec);
    }
}

void engine::state_write(llama_io_write_i & io, llama_seq_id seq_id) const {
    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        if (seq_id >= 0 && kv.seq_to_stream[seq_id] != s) {
            continue;
        }
        const auto & q = sequences[s];
        const int32_t head[] = { q.n_base, q.floor, q.gen, q.n_prompt, q.past_end, q.has_spans };
        io.write(head, sizeof(head));
        put(io, q.past);
        put(io, q.tokens);
        put(io, q.spans);
        put(io, q.n_kept);
        for (const auto & kept : q.kept) {
            put(io, kept);
        }
        for (const auto & probed : q.probed) {
            put(io, probed);
        }
        put(io, q.win_pos);
        for (const auto & t : taps.tensors) {
            put_part(io, t.win,  s*(t.win  ? ggml_nbytes(t.win)/kv.n_stream  : 0), t.win  ? ggml_nbytes(t.win)/kv.n_stream  : 0);
            put_part(io, t.sums, s*(t.sums ? ggml_nbytes(t.sums)/kv.n_stream : 0), t.sums ? ggml_nbytes(t.sums)/kv.n_stream : 0);
        }
    }
}

void engine::state_read(llama_io_read_i & io, llama_seq_id seq_id) {
    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        if (seq_id >= 0 && kv.seq_to_stream[seq_id] != s) {
            continue;
        }
        sequence q;
        reset(q);
        int32_t head[6];
        io.read(head, sizeof(head));
        q.n_base = head[0]; q.floor = head[1]; q.gen = head[2]; q.n_prompt = head[3]; q.past_end = head[4]; q.has_spans = head[5];
        get(io, q.past, past_max());
        get(io, q.tokens);
        q.seen = q.n_base > 0 ? (llama_pos) q.tokens.size() : 0; // at the latest
        get(io, q.spans);
        get(io, q.n_kept);
        for (auto & kept : q.kept) {
            get(io, kept);
        }
        for (auto & probed : q.probed) {
            get(io, probed);
        }
        get(io, q.win_pos);

        if (q.tokens.empty() && seq_id >= 0) {
            kv.seq_rm(seq_id, -1, -1); // llama.cpp leaves a sequence alone when the state holds none of its cells
            if (mem.windows) {
                mem.windows->seq_rm(seq_id, -1, -1);
            }
            if (mem.recurrent) {
                mem.recurrent->seq_rm(seq_id, -1, -1);
            }
        }

        // what the rest of the engine relies on
        const int32_t n_used = layout.n_cells(s);
        bool ok = q.n_kept.size() == kv.layers.size() && q.win_pos.size() == (size_t) cfg->need.window &&
            q.n_base >= 0 && q.n_base <= n_used && q.tokens.size() <= N_MAX && q.floor >= 0 && q.floor <= (llama_pos) q.tokens.size() &&
            (llama_pos) q.tokens.size() == kv.v_cells[s].seq_pos_max((llama_seq_id) s) + 1;
        ok = ok && q.gen >= -1 && q.gen <= (llama_pos) q.tokens.size() && q.n_prompt >= 0;
        ok = ok && (q.past.empty() ? q.past_end == -1 || q.past_end == (llama_pos) q.tokens.size() :
            q.past_end > 0 && q.past_end < (llama_pos) q.tokens.size());
        for (size_t i = 0; ok && i < q.spans.size(); ++i) {
            ok = q.spans[i].begin >= (i ? q.spans[i - 1].end : 0) && q.spans[i].end > q.spans[i].begin;
        }
        for (size_t l = 0; ok && l < q.n_kept.size(); ++l) {
            ok = q.n_kept[l] >= 0 && q.n_kept[l] <= q.n_base && q.kept[l].size() == (size_t) layout.n_head_kv()*q.n_kept[l] &&
                q.probed[l].size() % layout.n_head_kv() == 0 &&
                (int64_t) q.probed[l].size()/layout.n_head_kv() <= n_used - q.n_base + q.n_kept[l];
            for (size_t i = 0; ok && i < q.kept[l].size(); ++i) { // ascending in each head, -1 where it has fewer
                const llama_pos pos = q.kept[l][i], prev = i % q.n_kept[l] ? q.kept[l][i - 1] : -1;
                ok = pos >= -1 && pos < (llama_pos) q.tokens.size() && (pos > prev || (pos == -1 && prev == -1));
            }
            for (int32_t h = 0; ok && h < layout.n_parts(); ++h) {
                const int32_t lack = cfg->pol->heads_differ() ? first_slot(q.kept[l].data() + (size_t) h*q.n_kept[l], q.n_kept[l]) : 0;
                ok = n_used - q.n_base + q.n_kept[l] - lack <= layout.place_of(s, (int32_t) l, h, false).n_rows;
            }
        }
        if (!ok) {
            throw std::runtime_error("the state is damaged: what it kept does not fit its cells");
        }
        for (auto & t : taps.tensors) {
            get_part(io, t.win,  s*(t.win  ? ggml_nbytes(t.win)/kv.n_stream  : 0), t.win  ? ggml_nbytes(t.win)/kv.n_stream  : 0);
            get_part(io, t.sums, s*(t.sums ? ggml_nbytes(t.sums)/kv.n_stream : 0), t.sums ? ggml_nbytes(t.sums)/kv.n_stream : 0);
        }
        layout.count_lacks(q);
        sequences[s] = std::move(q);
        if (!sequences[s].past.empty()) {
            check_past(s);
        }
    }
    stale = true;
}

} // namespace kvc
