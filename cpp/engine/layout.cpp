// Where the rows of layers and heads lie.
//
//   on a device             as llama.cpp has them: a row is all heads of a cell, [n_embd_k, n_rows, n_seq]
//   on the host, and where  the rows of a head lie together: [head_dim, n_rows, n_head_kv, n_seq] in the same memory.
//   heads differ            What a query reads of a head is one piece then, and heads may have different lengths
//   from one pool           the same, and pool.cpp says where a head begins
//
// Transposed values lie by channel, so by head, anyway. Row 0 of a head stands for cell cell_begin(layer, head).

#include "layout.h"
#include "select.h"

#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace kvc {

layout::layout(std::shared_ptr<const config> cfg_, const llama_model & model, llama_kv_cache & kv, const std::vector<sequence> & sequences) :
    cfg(std::move(cfg_)), model(model), kv(kv), sequences(sequences) {
    if (kv.layers.empty()) {
        throw std::invalid_argument("this model has no layer with full attention, and sliding-window layers do not evict");
    }
    n_hkv = model.hparams.n_head_kv(kv.layers[0].il);
    for (const auto & layer : kv.layers) {
        if ((int32_t) model.hparams.n_head_kv(layer.il) != n_hkv) {
            throw std::invalid_argument("this model cannot evict: its layers have different numbers of KV heads");
        }
    }
    all_on_host = std::all_of(kv.layers.begin(), kv.layers.end(), [](const auto & layer) { return ggml_backend_buffer_is_host(layer.k->buffer); });
    heads_apart = all_on_host || cfg->pol->heads_differ() || cfg->pooled;
    if (cfg->pooled) {
        find_pool();
    }
}

int32_t layout::n_layer() const {
    return (int32_t) kv.layers.size();
}

int32_t layout::n_cells(uint32_t s) const {
    return (int32_t) kv.v_cells[s].used_max_p1();
}

int32_t layout::n_slots(uint32_t s, int32_t ikv) const {
    return n_cells(s) - sequences[s].n_base + sequences[s].n_kept[ikv];
}

int64_t layout::n_slots(uint32_t s) const {
    int64_t n = 0;
    for (int32_t l = 0; l < n_layer(); ++l) {
        n += n_slots(s, l);
    }
    return n;
}

std::vector<int32_t> layout::slot_pos(uint32_t s, int32_t ikv) const {
    const auto & q = sequences[s];
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

void layout::count_lacks(sequence & q) const {
    for (int32_t l = 0; l < n_layer(); ++l) {
        for (int32_t h = 0; h < n_hkv; ++h) {
            const int32_t n = q.n_kept[l];
            q.lacks[(size_t) l*n_hkv + h] = cfg->pol->heads_differ() ? first_slot(q.kept[l].data() + (size_t) h*n, n) : 0;
        }
    }
}

int32_t layout::n_slots(uint32_t s, int32_t ikv, int32_t h) const {
    return n_slots(s, ikv) - sequences[s].lacks[(size_t) ikv*n_hkv + h];
}

// Slots of all heads of a layer that hold a token.
int64_t layout::n_held(uint32_t s, int32_t ikv) const {
    int64_t n = 0;
    for (int32_t h = 0; h < n_hkv; ++h) {
        n += n_slots(s, ikv, h);
    }
    return n;
}

std::vector<int32_t> layout::rows_held(uint32_t s) const {
    std::vector<int32_t> res;
    for (int32_t l = 0; l < n_layer(); ++l) {
        for (int32_t h = 0; h < n_parts(); ++h) {
            res.push_back(n_slots(s, l, h));
        }
    }
    return res;
}

uint32_t layout::cell_begin(uint32_t s, int32_t ikv, int32_t h) const {
    const auto & q = sequences[s];
    return q.n_base - q.n_kept[ikv] + q.lacks[(size_t) ikv*n_hkv + h];
}

// Where position 0 would be, were it there: behind an eviction all positions are neighbours.
int64_t layout::row_of_origin(uint32_t s, int32_t ikv, int32_t h) const {
    return n_cells(s) - (int64_t) sequences[s].tokens.size() - cell_begin(s, ikv, h);
}

layout::place layout::place_of(uint32_t s, int32_t ikv, int32_t h, bool values) const {
    const auto & hp    = model.hparams;
    const auto & layer = kv.layers[ikv];
    auto * t = values ? layer.v : layer.k;
    const int64_t n_dim = values ? hp.n_embd_head_v(layer.il) : hp.n_embd_head_k(layer.il), n_rows = t->ne[1];
    if (values && kv.v_trans) {
        const size_t es = ggml_type_size(t->type), channel = n_rows*es;
        return { t, s*t->nb[2] + h*n_dim*channel, es, channel, n_rows };
    }
    const size_t n_head = ggml_row_size(t->type, n_dim);
    if (pool.k) {
        const auto & r = pool.regions[s][ikv*n_hkv + h];
        return { pool_of(values), r.at*n_head, n_head, 0, r.n_rows };
    }
    if (by_head()) {
        return { t, s*t->nb[2] + h*n_rows*n_head, n_head, 0, n_rows };
    }
    return { t, s*t->nb[2] + h*n_head, t->nb[1], 0, n_rows };
}

// Rows that are free in every layer and head.
int64_t layout::n_room(uint32_t s) const {
    int64_t n = std::numeric_limits<int32_t>::max();
    for (int32_t l = 0; l < n_layer(); ++l) {
        for (int32_t h = 0; h < n_parts(); ++h) {
            n = std::min<int64_t>(n, place_of(s, l, h, false).n_rows - n_slots(s, l, h));
        }
    }
    return n;
}

std::vector<layout::lane> layout::lanes(int32_t ikv, uint32_t s0, uint32_t s1) const {
    std::vector<lane> res = { { 0, 1 } };
    for (int32_t h = 1; h < n_hkv; ++h) {
        bool alike = true;
        for (uint32_t s = s0; s <= s1 && by_head(); ++s) {
            alike &= n_slots(s, ikv, h) == n_slots(s, ikv, h - 1) &&
                place_of(s, ikv, h, false).n_rows == place_of(s, ikv, h - 1, false).n_rows;
        }
        if (alike) {
            res.back().n_head++;
        } else {
            res.push_back({ h, 1 });
        }
    }
    return res;
}

ggml_tensor * layout::view_of(ggml_context * ctx, uint32_t s0, int64_t n_seq, int32_t ikv, const lane & x, int64_t n, bool values) const {
    const auto & hp = model.hparams;
    const uint32_t il = kv.layers[ikv].il;
    const int64_t n_dim = values ? hp.n_embd_head_v(il) : hp.n_embd_head_k(il);
    const place p = place_of(s0, ikv, x.head, values);
    const size_t head = x.n_head > 1 ? place_of(s0, ikv, x.head + 1, values).offset - p.offset : p.channel ? n_dim*p.channel : p.row;
    const size_t seq  = n_seq > 1 ? place_of(s0 + 1, ikv, x.head, values).offset - p.offset : head*x.n_head;
    return p.channel ? ggml_view_4d(ctx, p.t, n, x.n_head, n_dim, n_seq, head, p.channel, seq, p.offset) :
                       ggml_view_4d(ctx, p.t, n_dim, x.n_head, n, n_seq, head, p.row, seq, p.offset);
}

// What all heads of some sequences hold, as far as llama.cpp's own view of the layer reaches.
uint32_t layout::n_rows(int32_t ikv, uint32_t n_kv, uint32_t s0, uint32_t s1) const {
    uint32_t begin = cell_begin(s0, ikv);
    for (uint32_t s = s0; s <= s1; ++s) {
        for (int32_t h = 0; h < n_hkv; ++h) {
            begin = std::min(begin, cell_begin(s, ikv, h));
        }
    }
    return std::min(n_kv - std::min(begin, n_kv), (uint32_t) kv.layers[ikv].k->ne[1]);
}

// All that the longest of some sequences has of a head.
int64_t layout::rows_of_lane(uint32_t s0, int64_t n_seq, int32_t ikv, int32_t h, int64_t n_kv) const {
    int64_t begin = n_kv, n_most = 0;
    for (uint32_t s = s0; s < s0 + n_seq; ++s) {
        begin  = std::min<int64_t>(begin, cell_begin(s, ikv, h));
        n_most = std::max(n_most, place_of(s, ikv, h, false).n_rows);
    }
    return std::min(n_kv - begin, (n_most + n_block() - 1)/n_block()*n_block()); // what is not the head's is masked
}

// Of a layer's keys or values, or of one head's where they differ: a run, or of transposed values one for each channel.
std::vector<layout::run_of_rows> layout::runs_of(uint32_t s, int32_t ikv, int32_t h, int64_t n, bool values) const {
    const place p = place_of(s, ikv, h, values);
    const int64_t n_channels = p.channel ? (int64_t) model.hparams.n_embd_head_v(kv.layers[ikv].il)*n_hkv/n_parts() : 1;
    std::vector<run_of_rows> res;
    for (int64_t i = 0; i < n_channels; ++i) {
        res.push_back({ p.t, p.offset + i*p.channel, n*p.row });
    }
    return res;
}

std::vector<bool> layout::sides() const {
    return kv.layers[0].v ? std::vector<bool>{ false, true } : std::vector<bool>{ false };
}

size_t layout::row_bytes(const llama_kv_cache & kv, int32_t ikv) {
    const auto & layer = kv.layers[ikv];
    return ggml_row_size(layer.k->type, kv.hparams.n_embd_k_gqa(layer.il)) +
           (layer.v ? ggml_row_size(layer.v->type, kv.hparams.n_embd_v_gqa(layer.il)) : 0);
}

size_t layout::held_bytes(uint32_t s, int32_t ikv) const {
    return n_held(s, ikv)*row_bytes(kv, ikv)/n_hkv;
}

} // namespace kvc
