// kv_cells, and layers that share a budget. Nobody knows their lengths before an eviction. So layers draw their rows from
// one pool: the memory that n_layer * kv_cells rows take. An eviction says how long each layer is. All layers have as many
// free rows, since the next token takes one of each.
//
// The pool is the buffer that llama.cpp allocated. A layer's tensors are moved in it by their `data`, and so are the views
// of them that llama.cpp made. Graphs of before are dropped, as at every eviction. On the host, one sequence, V not transposed.

#include "engine.h"

#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace kvc {

void engine::find_pool() const {
    const auto & first = kv.layers[0];
    for (const auto & layer : kv.layers) {
        const bool alike = layer.k->buffer == first.k->buffer && layer.k->nb[1] == first.k->nb[1] &&
            (!layer.v || (layer.v->buffer == first.k->buffer && layer.v->nb[1] == first.v->nb[1]));
        if (!alike || !ggml_backend_buffer_is_host(first.k->buffer) || kv.v_trans || kv.n_stream > 1) {
            throw std::invalid_argument(cfg->spec + ": with kv_cells layers share their rows only in one buffer of the CPU, with rows of one "
                    "size and flash attention: give share=head");
        }
    }
}

// Bytes that a tensor takes with so many rows.
static size_t n_bytes(const ggml_tensor * t, int64_t n_rows) {
    const size_t alignment = ggml_backend_buffer_get_alignment(t->buffer);
    return (n_rows*t->nb[1] + alignment - 1)/alignment*alignment;
}

// Rows that every layer can have beyond those it holds, I32 [n_layer]; negative: even those are more than there are.
int32_t engine::n_to_share(const std::vector<int32_t> & n_held) const {
    const auto & first = kv.layers[0];
    const size_t size = ggml_backend_buffer_get_size(first.k->buffer);
    const int64_t n_rest = (int64_t) n_layer()*cfg->n_cells - std::accumulate(n_held.begin(), n_held.end(), (int64_t) 0);
    const int64_t n_most = (int64_t) kv.get_size() - *std::max_element(n_held.begin(), n_held.end());
    const auto fits = [&](int64_t n_free) {
        size_t n = 0;
        for (const int32_t n_rows : n_held) {
            n += n_bytes(first.k, n_rows + n_free) + (first.v ? n_bytes(first.v, n_rows + n_free) : 0);
        }
        return n <= size;
    };
    int64_t n = n_rest < 0 ? -1 : std::min(n_rest/n_layer(), n_most);
    while (n >= 0 && !fits(n)) { // tensors begin at whole alignments
        --n;
    }
    return (int32_t) n;
}

// Gives every layer the rows it holds, which are moved, and what is free to all alike.
void engine::lay_out(const std::vector<int32_t> & n_held) {
    struct block { ggml_tensor * t; ggml_tensor * view; char * to; int64_t n_held, n_rows; };
    const int32_t n_free = n_to_share(n_held);
    if (n_free < 0) {
        throw std::invalid_argument(cfg->spec + ": kv_cells have too few rows for what the layers hold");
    }
    char * at = (char *) ggml_backend_buffer_get_base(kv.layers[0].k->buffer);
    std::vector<block> blocks;
    for (int32_t l = 0; l < n_layer(); ++l) {
        const auto & layer = kv.layers[l];
        for (const auto & [t, view] : { std::pair(layer.k, layer.k_stream[0]), std::pair(layer.v, layer.v_stream[0]) }) {
            if (!t) {
                continue; // values are a part of the keys
            }
            blocks.push_back({ t, view, at, std::min<int64_t>(n_held[l], t->ne[1]), n_held[l] + n_free }); // fewer before a state is read
            at += n_bytes(t, n_held[l] + n_free);
        }
    }
    // They lie in one order before and after: those that move down do so from the first on, then those that move up from the last.
    for (auto b = blocks.begin(); b != blocks.end(); ++b) {
        if (b->to < (char *) b->t->data) {
            memmove(b->to, b->t->data, b->n_held*b->t->nb[1]);
        }
    }
    for (auto b = blocks.rbegin(); b != blocks.rend(); ++b) {
        if (b->to > (char *) b->t->data) {
            memmove(b->to, b->t->data, b->n_held*b->t->nb[1]);
        }
    }
    for (const auto & b : blocks) {
        for (auto * t : { b.t, b.view }) {
            t->data  = b.to;
            t->ne[1] = b.n_rows;
            t->nb[2] = t->nb[3] = b.n_rows*t->nb[1];
        }
        memset(b.to + b.n_held*b.t->nb[1], 0, (b.n_rows - b.n_held)*b.t->nb[1]); // attention reads free rows, and NaN is not masked away
    }
    stale = true;
}

// Of an empty cache: as many rows for each layer.
void engine::even_out() {
    if (is_pooled() && ggml_backend_buffer_get_size(kv.layers[0].k->buffer) > 0) { // 0: only measured, by llama.cpp's --fit
        lay_out(std::vector<int32_t>(n_layer(), 0));
    }
}

} // namespace kvc
