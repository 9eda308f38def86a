// kv_cells, and layers that share a budget, or heads. Nobody knows their lengths before an eviction. So they draw their rows
// from one pool: the memory that n_layer * kv_cells rows take. An eviction says how long each is. All have as many free
// rows, since the next token takes one of each.
//
// The pool is the buffer that llama.cpp allocated: its first bytes are rows of keys, behind them lie rows of values, one
// sequence after the other. A row is one head's. What moves is where a head begins (place_of); graphs of before are
// dropped, as at every eviction. V is not transposed. Off the host attention reads whole blocks: of the last heads as
// far as a block each behind the pool.

#include "layout.h"

#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace kvc {

void layout::find_pool() {
    const auto & first = kv.layers[0];
    for (const auto & layer : kv.layers) {
        const bool alike = layer.k->buffer == first.k->buffer && layer.k->nb[1] == first.k->nb[1] &&
            (!layer.v || (layer.v->buffer == first.k->buffer && layer.v->nb[1] == first.v->nb[1]));
        if (!alike || kv.v_trans) {
            throw std::invalid_argument(cfg->spec + ": with kv_cells layers share their rows only in one buffer of one device, with rows of one "
                    "size and flash attention: give share=head");
        }
    }
    if (ggml_backend_buffer_get_size(first.k->buffer) == 0) {
        return; // only measured, by llama.cpp's --fit
    }
    pool.n_rows = (int64_t) n_layer()*cfg->n_cells*n_hkv;
    pool.ctx.reset(ggml_init({ 2*ggml_tensor_overhead(), nullptr, true }));
    char * at = (char *) ggml_backend_buffer_get_base(first.k->buffer);
    const auto place_rows = [&](const ggml_tensor * of) {
        auto * t = ggml_new_tensor_2d(pool.ctx.get(), of->type, of->ne[0]/n_hkv, pool.n_rows*kv.n_stream + (n_block() - 1)*n_hkv);
        ggml_backend_tensor_alloc(first.k->buffer, t, at);
        at += GGML_PAD(ggml_nbytes(t), ggml_backend_buffer_get_alignment(first.k->buffer));
        return t;
    };
    pool.k = place_rows(first.k);
    pool.v = first.v ? place_rows(first.v) : nullptr;
    pool.regions.assign(kv.n_stream, std::vector<region>((size_t) n_layer()*n_hkv, { 0, 0 }));
    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        even_out(s);
    }
}

// Rows that every head can have beyond those it holds, I32 [n_layer, n_head_kv]; negative: even those are more than there are.
int32_t layout::n_to_share(const std::vector<int32_t> & n_held) const {
    const int64_t n_rest = pool.n_rows - std::accumulate(n_held.begin(), n_held.end(), (int64_t) 0);
    const int64_t n_most = (int64_t) kv.get_size() - *std::max_element(n_held.begin(), n_held.end());
    return (int32_t) (n_rest < 0 ? -1 : std::min(n_rest/(int64_t) n_held.size(), n_most));
}

std::vector<row_move> layout::lay_out(uint32_t s, const std::vector<int32_t> & n_held) {
    const int32_t n_free = n_to_share(n_held);
    if (n_free < 0) {
        throw std::invalid_argument(cfg->spec + ": kv_cells have too few rows for what the layers hold");
    }
    const auto before = pool.regions[s];
    auto & now = pool.regions[s];
    int64_t at = (int64_t) s*pool.n_rows;
    for (size_t i = 0; i < now.size(); ++i) {
        now[i] = { at, n_held[i] + n_free };
        at += now[i].n_rows;
    }
    // They lie in one order before and after: those that move down do so from the first on, then those that move up from the last.
    std::vector<row_move> down, up;
    for (size_t i = 0; i < now.size(); ++i) {
        if (now[i].at != before[i].at && n_held[i] > 0) {
            (now[i].at < before[i].at ? down : up).push_back({ before[i].at, now[i].at, n_held[i] });
        }
    }
    down.insert(down.end(), up.rbegin(), up.rend());
    return down;
}

// Attention reads free rows, too, and NaN is not masked away. On a device, where this may not be possible, they are
// zeros or what a head held once.
void layout::clear_free(uint32_t s, const std::vector<int32_t> & n_held) const {
    if (!all_on_host) {
        return;
    }
    for (const bool values : sides()) {
        auto * t = pool_of(values);
        for (size_t i = 0; i < n_held.size(); ++i) {
            const region & r = pool.regions[s][i];
            memset((char *) t->data + (r.at + n_held[i])*t->nb[1], 0, (r.n_rows - n_held[i])*t->nb[1]);
        }
    }
}

// Of an empty sequence: as many rows for each head.
bool layout::even_out(uint32_t s) {
    if (has_pool()) {
        const std::vector<int32_t> none((size_t) n_layer()*n_hkv, 0);
        lay_out(s, none);
        clear_free(s, none);
    }
    return has_pool();
}

// A sequence's rows become another's, at the same places.
void layout::copy_rows(uint32_t s0, uint32_t s1) {
    const int64_t n_apart = ((int64_t) s1 - s0)*pool.n_rows;
    for (size_t i = 0; i < pool.regions[s0].size(); ++i) {
        const region & r = pool.regions[s0][i];
        pool.regions[s1][i] = { r.at + n_apart, r.n_rows };
    }
    for (const bool values : sides()) {
        auto * t = pool_of(values);
        ggml_context_ptr ctx(ggml_init({ 2*ggml_tensor_overhead(), nullptr, true }));
        const auto rows_of = [&](uint32_t s) {
            auto * view = ggml_view_2d(ctx.get(), t, t->ne[0], pool.n_rows, t->nb[1], s*pool.n_rows*t->nb[1]);
            ggml_backend_view_init(view);
            return view;
        };
        auto * from = rows_of(s0), * to = rows_of(s1);
        ggml_backend_tensor_copy(from, to);
    }
}

// What a failed restore may have left behind: attention reads free rows, too, and NaN is not masked away.
void layout::clear_rows(uint32_t s) {
    for (const bool values : sides()) {
        if (auto * t = pool_of(values)) {
            ggml_backend_tensor_memset(t, 0, s*pool.n_rows*t->nb[1], pool.n_rows*t->nb[1]);
        }
    }
    for (const auto & layer : kv.layers) {
        for (ggml_tensor * t : { layer.k_stream[s], layer.v_stream[s] }) {
            if (t && !pool.k) {
                ggml_backend_tensor_memset(t, 0, 0, ggml_nbytes(t));
            }
        }
    }
}

} // namespace kvc
