// The tensors beside a cache that hold what attention leaves behind.

#include "taps.h"

#include "llama-context.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <map>
#include <stdexcept>

namespace kvc {

taps::taps(std::shared_ptr<const config> cfg_, const llama_model & model, llama_kv_cache & kv, const kvc::layout & layout, const llama_cparams & cparams) :
    tensors(kv.layers.size()), attn(kv.layers.size()), cfg(std::move(cfg_)), model(model), kv(kv), layout(layout) {
    find_readers();
    alloc(cparams);
}

// Attention over F16 or quantized keys rounds its queries at least as coarsely.
static ggml_type ring_type(ggml_type k) {
    return k == GGML_TYPE_F16 || ggml_is_quantized(k) ? GGML_TYPE_F16 : GGML_TYPE_F32;
}

void taps::alloc(const llama_cparams & cparams) {
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
            t.sums = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, layer.k->ne[1], layout.n_head_kv(), kv.n_stream);
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
        if (tensors[l].ones) {
            const std::vector<float> ones(tensors[l].ones->ne[0], (float) layout.n_head_kv()/hp.n_head(kv.layers[l].il)/readers[l].size());
            ggml_backend_tensor_set(tensors[l].ones, ones.data(), 0, ggml_nbytes(tensors[l].ones));
        }
    }
}

// Whoever reads a layer's cache has a say in what it keeps.
void taps::find_readers() {
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

int32_t taps::n_ring(int32_t ikv) const {
    return cfg->need.window*(int32_t) readers[ikv].size();
}

std::vector<ring_query> taps::of_all_readers(int32_t ikv, const std::vector<ring_query> & queries) const {
    const int32_t n = (int32_t) readers[ikv].size();
    std::vector<ring_query> res;
    for (int32_t i = 0; i < n; ++i) {
        for (const auto & q : queries) {
            res.push_back({ q.pos, i*cfg->need.window + q.row, q.weight/n });
        }
    }
    return res;
}

std::vector<float> taps::read_ring(uint32_t s, int32_t ikv) const {
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

std::vector<float> taps::read_sums(uint32_t s, int32_t ikv) const {
    const auto * t = tensors[ikv].sums;
    const size_t n_kv = layout.n_slots(s, ikv);
    std::vector<float> res(n_kv*layout.n_head_kv(), 0.0f);
    for (int32_t h = 0; h < layout.n_head_kv(); ++h) {
        const int32_t n = layout.n_slots(s, ikv, h);
        ggml_backend_tensor_get(t, res.data() + (h + 1)*n_kv - n, s*t->nb[2] + h*t->nb[1], n*sizeof(float));
    }
    return res;
}

std::vector<float> taps::read_inputs(uint32_t s, int32_t ikv) const {
    std::vector<float> res(cfg->need.window);
    const size_t n_bytes = res.size()*sizeof(float);
    ggml_backend_tensor_get(tensors[ikv].inputs, res.data(), s*n_bytes, n_bytes);
    return res;
}

void taps::clear() const {
    for (const auto & it : ctxs_bufs) {
        for (auto * t = ggml_get_first_tensor(it.first.get()); t; t = ggml_get_next_tensor(it.first.get(), t)) {
            if (t->name[0] != '1') { // the ones
                ggml_backend_tensor_memset(t, 0, 0, ggml_nbytes(t));
            }
        }
    }
}

// Free rows have a sum of 0: the graph only adds.
void taps::clear_free_sums(uint32_t s) const {
    for (int32_t l = 0; l < layout.n_layer(); ++l) {
        auto * t = tensors[l].sums;
        for (int32_t h = 0; t && h < layout.n_head_kv(); ++h) {
            const int32_t n = layout.n_slots(s, l, h);
            ggml_backend_tensor_memset(t, 0, s*t->nb[2] + h*t->nb[1] + n*sizeof(float), (t->ne[0] - n)*sizeof(float));
        }
    }
}

void taps::clear_sums(uint32_t s) const {
    for (const auto & t : tensors) {
        if (t.sums) {
            ggml_backend_tensor_memset(t.sums, 0, s*t.sums->nb[2], t.sums->nb[2]);
        }
    }
}

void taps::copy(uint32_t s0, uint32_t s1) const {
    for (const auto & t : tensors) {
        for (ggml_tensor * x : { t.win, t.sums }) {
            if (x) {
                std::vector<uint8_t> buf(ggml_nbytes(x)/kv.n_stream);
                ggml_backend_tensor_get(x, buf.data(), s0*buf.size(), buf.size());
                ggml_backend_tensor_set(x, buf.data(), s1*buf.size(), buf.size());
            }
        }
    }
}

size_t taps::n_bytes() const {
    size_t res = 0;
    for (const auto & it : ctxs_bufs) {
        res += ggml_backend_buffer_get_size(it.second.get());
    }
    return res;
}

} // namespace kvc
