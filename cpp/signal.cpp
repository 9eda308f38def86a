// What a policy looks at: the tensors that hold it beside the cache, and one layer's signals, read back.

#include "engine.h"
#include "select.h"

#include "llama-context.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
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

// Attention over F16 or quantized keys rounds its queries at least as coarsely.
static ggml_type ring_type(ggml_type k) {
    return k == GGML_TYPE_F16 || ggml_is_quantized(k) ? GGML_TYPE_F16 : GGML_TYPE_F32;
}

void engine::alloc_signals(const llama_cparams & cparams) {
    tensors.resize(kv.layers.size());
    if (cfg->need.window == 0 && !cfg->need.sums) {
        return;
    }
    const auto & hp = model.hparams;
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctx_map;
    for (size_t l = 0; l < kv.layers.size(); ++l) {
        const auto & layer = kv.layers[l];
        auto & ctx = ctx_map[ggml_backend_buffer_get_type(layer.k->buffer)];
        if (!ctx) {
            ctx.reset(ggml_init({ 4*kv.layers.size()*ggml_tensor_overhead(), nullptr, true }));
        }
        auto & t = tensors[l];
        if (cfg->need.window > 0) {
            t.win = ggml_new_tensor_2d(ctx.get(), ring_type(layer.k->type), (int64_t) hp.n_embd_head_k(layer.il)*hp.n_head(layer.il),
                    (int64_t) n_ring(l)*kv.n_stream);
            ggml_format_name(t.win, "kvc_window_l%d", layer.il);
        }
        if (cfg->need.plus) {
            t.inputs = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, 1, (int64_t) cfg->need.window*kv.n_stream);
            ggml_format_name(t.inputs, "kvc_inputs_l%d", layer.il);
        }
        if (cfg->need.sums) {
            t.sums = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, layer.k->ne[1], n_hkv, kv.n_stream);
            // llama.cpp reserves for a multiple of the sequences
            const int64_t n_tokens = (cparams.n_ubatch + kv.n_stream - 1)/kv.n_stream*kv.n_stream;
            t.ones = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, n_tokens*hp.n_head(layer.il));
            ggml_format_name(t.sums, "kvc_sums_l%d", layer.il);
            ggml_set_name(t.ones, "1");
        }
    }
    for (auto & it : ctx_map) {
        ggml_backend_buffer_t buf = ggml_backend_alloc_ctx_tensors_from_buft(it.second.get(), it.first);
        if (!buf) {
            throw std::runtime_error("no memory for the attention signals of " + cfg->spec);
        }
        ggml_backend_buffer_clear(buf, 0);
        ctxs_bufs.emplace_back(std::move(it.second), buf);
    }
    for (size_t l = 0; l < kv.layers.size(); ++l) {
        ask_device((int32_t) l, (int32_t) cparams.n_ubatch);
        if (tensors[l].ones) {
            const std::vector<float> ones(tensors[l].ones->ne[0], (float) n_hkv/hp.n_head(kv.layers[l].il)/readers[l].size());
            ggml_backend_tensor_set(tensors[l].ones, ones.data(), 0, ggml_nbytes(tensors[l].ones));
        }
    }
}

// Whoever reads a layer's cache has a say in what it keeps.
void engine::find_readers() {
    const auto & hp = model.hparams;
    readers.resize(kv.layers.size());
    for (const auto & [il, ikv] : kv.map_layer_ids) {
        readers[ikv].push_back(il);
    }
    for (size_t l = 0; l < kv.layers.size(); ++l) {
        std::sort(readers[l].begin(), readers[l].end());
        for (const int32_t il : readers[l]) {
            if (hp.n_head(il) != hp.n_head(kv.layers[l].il) || hp.n_embd_head_k(il) != hp.n_embd_head_k(kv.layers[l].il)) {
                throw std::invalid_argument("this model (" + model.arch_name() + ") cannot evict: layers that share a cache have different heads");
            }
        }
        if (readers[l].size() > 1 && (cfg->need.future > 0 || cfg->need.outputs || cfg->need.plus)) {
            throw std::invalid_argument(cfg->spec + " looks at one layer's queries or output, and in this model (" + model.arch_name() +
                    ") several layers read one cache: name a policy that does not, for example snapkv");
        }
    }
}

int32_t engine::n_ring(int32_t ikv) const {
    return cfg->need.window*(int32_t) readers[ikv].size();
}

std::vector<ring_query> engine::of_all_readers(int32_t ikv, const std::vector<ring_query> & queries) const {
    const int32_t n = (int32_t) readers[ikv].size();
    std::vector<ring_query> res;
    for (int32_t i = 0; i < n; ++i) {
        for (const auto & q : queries) {
            res.push_back({ q.pos, i*cfg->need.window + q.row, q.weight/n });
        }
    }
    return res;
}

std::vector<float> engine::read_ring(uint32_t s, int32_t ikv) const {
    const auto * win = tensors[ikv].win;
    std::vector<float> res((size_t) win->ne[0]*n_ring(ikv));
    const size_t n_bytes = ggml_row_size(win->type, res.size());
    if (win->type == GGML_TYPE_F32) {
        ggml_backend_tensor_get(win, res.data(), s*n_bytes, n_bytes);
    } else {
        std::vector<ggml_fp16_t> half(res.size());
        ggml_backend_tensor_get(win, half.data(), s*n_bytes, n_bytes);
        ggml_fp16_to_fp32_row(half.data(), res.data(), (int64_t) res.size());
    }
    return res;
}

layer_signals engine::no_signals(uint32_t s, int32_t ikv) const {
    const auto & hp = model.hparams;
    const uint32_t il = kv.layers[ikv].il;
    return { ikv, n_slots(s, ikv), (int32_t) hp.n_head(il), n_hkv, (int32_t) hp.n_embd_head_k(il), 0, (int32_t) hp.n_embd_head_v(il),
            slot_pos(s, ikv), {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {} };
}

layer_signals engine::read_signals(llama_context * lctx, uint32_t s, int32_t ikv, bool whole) const {
    layer_signals sig = no_signals(s, ikv);
    if (sig.n_kv == 0) {
        throw std::invalid_argument("the sequence is empty");
    }
    const auto & need = streams[s].cfg->need;
    const bool probed = !streams[s].probed[ikv].empty(); // its queries have taken the place of the last ones
    if (need.future > 0)                   { read_fit(lctx, s, sig); }
    else if (need.window > 0 && !probed)   { read_attn(lctx, s, sig); }
    if (need.sums)       { read_sums(s, sig); }
    if (need.keys   && (whole || !reduce_keys(lctx, s, sig)))   { sig.keys = read_rows(s, sig.il, false); }
    if (need.values && (whole || !reduce_values(lctx, s, sig))) { read_values(s, sig); }
    if (need.outputs)    { sig.o_norm = output_norms(lctx, s, ikv); }
    if (need.value_rows) { sig.value_rows = plain_values(s, ikv); }
    if (probed)               { read_probed(s, sig); }
    return sig;
}

std::vector<float> engine::score(uint32_t s, const layer_signals & sig, int32_t budget) const {
    std::vector<float> res(sig.pos.size());
    streams[s].cfg->pol->score(sig.view(n_layer(), std::min(budget, sig.n_kv)), res.data());
    for (size_t i = 0; i < res.size(); ++i) {
        res[i] = sig.pos[i] < 0 ? -INFINITY : res[i];
    }
    return res;
}

void engine::read_attn(llama_context * lctx, uint32_t s, layer_signals & sig) const {
    const auto & q = streams[s];

    // Queries that came before all that some head holds are left out, too.
    llama_pos first = first_query(s);
    for (int32_t h = 0; h < n_hkv; ++h) {
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
        throw std::invalid_argument("the queries of the window were removed with the tail: at least one token has to be evaluated after it");
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
        sig.attn = attention_of(lctx, s, sig, of_all_readers(sig.il, queries), false);
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
std::vector<float> engine::read_rows(uint32_t s, int32_t ikv, bool values) const {
    const auto & hp = model.hparams;
    const uint32_t il = kv.layers[ikv].il;
    const int64_t n_dim = values ? hp.n_embd_head_v(il) : hp.n_embd_head_k(il), n_kv = n_slots(s, ikv);
    const int64_t n_side = by_head() ? 1 : n_hkv; // heads side by side in a row
    std::vector<float> res((size_t) n_hkv*n_kv*n_dim, 0.0f);
    for (int32_t h = 0; h < n_hkv; ++h) {
        const place   p = place_of(s, ikv, h, values);
        const int64_t n = n_slots(s, ikv, h);
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
void engine::read_values(uint32_t s, layer_signals & sig) const {
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
void engine::read_probed(uint32_t s, layer_signals & sig) const {
    const auto & q = streams[s];
    const auto & probed = q.probed[sig.il];
    sig.probed.resize((size_t) n_hkv*sig.n_kv);
    for (int32_t h = 0; h < n_hkv; ++h) {
        for (int32_t j = 0; j < sig.n_kv; ++j) {
            const size_t i = (size_t) j*n_hkv + h, at = (size_t) h*sig.n_kv + j;
            const float  x = i < probed.size() ? probed[i] : INFINITY;
            sig.probed[at] = std::isinf(x) && q.gen >= 0 && sig.pos[at] >= q.gen ? 0.0f : x;
        }
    }
}

void engine::read_sums(uint32_t s, layer_signals & sig) const {
    auto * t = tensors[sig.il].sums;
    sig.sums.resize((size_t) sig.n_kv*n_hkv, 0.0f);
    for (int32_t h = 0; h < n_hkv; ++h) {
        const int32_t n = n_slots(s, sig.il, h);
        ggml_backend_tensor_get(t, &sig.sums[(size_t) (h + 1)*sig.n_kv - n], s*t->nb[2] + h*t->nb[1], n*sizeof(float));
    }
}

} // namespace kvc
