// What a policy looks at: one layer's signals, and the scores that it gives.

#include "graph.h"
#include "scorer.h"
#include "select.h"

#include "llama-context.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace kvc {

layer_view layer_signals::view(int32_t n_layer, int32_t budget) const {
    const auto ptr = [](const std::vector<float> & v) { return v.empty() ? nullptr : v.data(); };
    return { il, n_layer, n_kv, n_head, n_head_kv, head_dim, n_query, value_dim, budget, pos.data(), ptr(attn), ptr(sums), ptr(keys), ptr(probed),
        ptr(q_mean), ptr(q_cov), ptr(v_norm), ptr(o_norm), ptr(attn_rows), ptr(value_rows), ptr(reduced) };
}

size_t layer_signals::n_bytes() const {
    size_t n = pos.size();
    for (const auto * x : { &attn, &sums, &keys, &probed, &q_mean, &q_cov, &v_norm, &o_norm, &attn_rows, &value_rows, &reduced }) {
        n += x->size();
    }
    return n*sizeof(float);
}

scorer::scorer(std::shared_ptr<const config> cfg_, const llama_model & model, llama_kv_cache & kv, const kvc::layout & layout, const kvc::taps & taps,
        const std::vector<sequence> & sequences) :
    cfg(std::move(cfg_)), model(model), kv(kv), layout(layout), taps(taps), sequences(sequences) {
    if (cfg->need.outputs || cfg->need.plus) {
        find_outputs();
    }
}

layer_signals scorer::no_signals(uint32_t s, int32_t ikv) const {
    const auto & hp = model.hparams;
    const uint32_t il = kv.layers[ikv].il;
    return { ikv, layout.n_slots(s, ikv), (int32_t) hp.n_head(il), layout.n_head_kv(), (int32_t) hp.n_embd_head_k(il), 0, (int32_t) hp.n_embd_head_v(il),
            layout.slot_pos(s, ikv), {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {} };
}

layer_signals scorer::read_signals(llama_context * lctx, uint32_t s, int32_t ikv, bool whole) const {
    layer_signals sig = no_signals(s, ikv);
    if (sig.n_kv == 0) {
        throw std::invalid_argument("the sequence is empty");
    }
    const auto & need = sequences[s].cfg->need;
    // whose queries have taken the place of the last ones
    const bool probed = need.probe != probe::none && !sequences[s].probed[ikv].empty();
    if (need.future > 0)                   { read_fit(lctx, s, sig); }
    else if (need.window > 0 && !probed)   { read_attn(lctx, s, sig); }
    if (need.sums)       { sig.sums = taps.read_sums(s, ikv); }
    if (need.keys   && (whole || !reduce_keys(lctx, s, sig)))   { sig.keys = read_rows(s, sig.il, false); }
    if (need.values && (whole || !reduce_values(lctx, s, sig))) { read_values(s, sig); }
    if (need.outputs)    { sig.o_norm = output_norms(lctx, s, ikv); }
    if (need.value_rows) { sig.value_rows = plain_values(s, ikv); }
    if (probed)               { read_probed(s, sig); }
    return sig;
}

std::vector<float> scorer::score(uint32_t s, const layer_signals & sig, int32_t budget) const {
    std::vector<float> res(sig.pos.size());
    sequences[s].cfg->pol->score(sig.view(layout.n_layer(), std::min(budget, sig.n_kv)), res.data());
    for (size_t i = 0; i < res.size(); ++i) {
        res[i] = sig.pos[i] < 0 ? -INFINITY : res[i];
    }
    return res;
}

void scorer::read_attn(llama_context * lctx, uint32_t s, layer_signals & sig) const {
    const auto & q = sequences[s];

    // Queries that came before all that some head holds are left out, too.
    llama_pos first = q.first_query();
    for (int32_t h = 0; h < layout.n_head_kv(); ++h) {
        const int32_t * pos = sig.pos.data() + (size_t) h*sig.n_kv;
        const int32_t j = first_slot(pos, sig.n_kv);
        first = std::max(first, j < sig.n_kv ? pos[j] : (llama_pos) q.tokens.size());
    }
    std::vector<ring_query> queries;
    for (int32_t r = 0; r < cfg->need.window; ++r) {
        if (q.win_pos[r] >= first) {
            queries.push_back({ q.win_pos[r], r, 1.0f });
        }
    }
    std::sort(queries.begin(), queries.end(), [](const ring_query & a, const ring_query & b) { return a.pos < b.pos; });
    sig.n_query = (int32_t) queries.size();
    if (queries.empty()) {
        throw std::invalid_argument("the queries of the window are gone, removed with the tail or taken by the questions of another "
                "policy: at least one token has to be evaluated first");
    }

    float total = 0;
    for (size_t i = 0; i < queries.size(); ++i) {
        const float x = queries.size() > 1 ? (float) i/(queries.size() - 1) : 1.0f;
        total += queries[i].weight = 1.0f + (q.cfg->need.newest - 1.0f)*x;
    }
    for (auto & query : queries) {
        query.weight /= total;
    }
    if (q.cfg->need.attn_rows) {
        sig.attn_rows = attention_rows(lctx, s, sig, queries);
    } else {
        sig.attn = attention_of(lctx, s, sig, taps.of_all_readers(sig.il, queries), false);
    }
}

// n values of a cache tensor, dequantized: they lie together.
static std::vector<float> read_f32(const ggml_tensor * t, size_t offset, int64_t n) {
    std::vector<uint8_t> raw(ggml_row_size(t->type, n));
    ggml_backend_tensor_get(t, raw.data(), offset, raw.size());
    std::vector<float> res(n);
    if (t->type == GGML_TYPE_F32) {
        memcpy(res.data(), raw.data(), raw.size());
    } else {
        ggml_get_type_traits(t->type)->to_float(raw.data(), res.data(), n);
    }
    return res;
}

// Keys or values as they lie in the cache: F32 [n_head_kv, n_kv, head_dim], 0 in empty slots.
std::vector<float> scorer::read_rows(uint32_t s, int32_t ikv, bool values) const {
    const auto & hp = model.hparams;
    const uint32_t il = kv.layers[ikv].il;
    const int64_t n_dim = values ? hp.n_embd_head_v(il) : hp.n_embd_head_k(il), n_kv = layout.n_slots(s, ikv);
    const int64_t n_side = layout.by_head() ? 1 : layout.n_head_kv(); // heads side by side in a row
    std::vector<float> res((size_t) layout.n_head_kv()*n_kv*n_dim, 0.0f);
    for (int32_t h = 0; h < layout.n_head_kv(); ++h) {
        const auto    p = layout.place_of(s, ikv, h, values);
        const int64_t n = layout.n_slots(s, ikv, h);
        float * out = res.data() + (h*n_kv + n_kv - n)*n_dim;
        if (p.channel) {
            for (int64_t i = 0; i < n_dim; ++i) {
                const auto data = read_f32(p.t, p.offset + i*p.channel, n);
                for (int64_t j = 0; j < n; ++j) {
                    out[j*n_dim + i] = data[j];
                }
            }
        } else if (h % n_side == 0) { // of all heads that lie side by side, at once
            const auto data = read_f32(p.t, p.offset, n*n_side*n_dim);
            for (int64_t i = 0; i < n_side; ++i) {
                for (int64_t j = 0; j < n; ++j) {
                    std::copy_n(data.data() + (j*n_side + i)*n_dim, n_dim, out + (i*n_kv + j)*n_dim);
                }
            }
        }
    }
    return res;
}

// A Hadamard rotation of quantized values leaves their norms as they are.
void scorer::read_values(uint32_t s, layer_signals & sig) const {
    const auto values = read_rows(s, sig.il, true);
    const size_t n_dim = values.size()/sig.pos.size();
    sig.v_norm.resize(sig.pos.size());
    for (size_t i = 0; i < sig.v_norm.size(); ++i) {
        double sum = 0;
        for (size_t k = 0; k < n_dim; ++k) {
            sum += (double) values[i*n_dim + k]*values[i*n_dim + k];
        }
        sig.v_norm[i] = (float) std::sqrt(sum);
    }
}

// What nobody asked for stays, as a question may have come since; of an answer it gives way, or a long one would drive
// out the context.
void scorer::read_probed(uint32_t s, layer_signals & sig) const {
    const auto & q = sequences[s];
    const auto & probed = q.probed[sig.il];
    sig.probed.resize((size_t) layout.n_head_kv()*sig.n_kv);
    for (int32_t h = 0; h < layout.n_head_kv(); ++h) {
        for (int32_t j = 0; j < sig.n_kv; ++j) {
            const size_t i = (size_t) j*layout.n_head_kv() + h, at = (size_t) h*sig.n_kv + j;
            const float  x = i < probed.size() ? probed[i] : INFINITY;
            sig.probed[at] = std::isinf(x) && q.gen >= 0 && sig.pos[at] >= q.gen ? 0.0f : x;
        }
    }
}

} // namespace kvc
