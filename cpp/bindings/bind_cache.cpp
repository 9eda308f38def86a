// Context: evictions, what its cache holds, and saved states.

#include "bind_context.h"

#include <cmath>

namespace kvc {

static const int32_t N_LISTEN = 64; // repeated tokens whose likelihood is looked at

bool Context::evict(int32_t seq, bool mask_only) {
    check_seq(seq);
    const busy now(*this);
    begin_call();
    py::gil_scoped_release nogil;
    return need_engine().evict(ctx.get(), seq, mask_only);
}

// Of logits F32 [n_vocab].
static double log_prob(const float * logits, int32_t n_vocab, int32_t token) {
    const float top = *std::max_element(logits, logits + n_vocab);
    double sum = 0;
    for (int32_t i = 0; i < n_vocab; ++i) {
        sum += std::exp((double) logits[i] - top);
    }
    return logits[token] - top - std::log(sum);
}

std::pair<double, int32_t> Context::ask(const i32_array & tokens, int32_t seq, int32_t begin, int32_t end, int32_t n_repeated) {
    const llama_pos p0 = pos_max(seq) + 1;
    const int32_t n = (int32_t) tokens.size(), n_vocab = llama_vocab_n_tokens(model->vocab);
    const int32_t n_piece = std::min<int32_t>({ need_engine().conf().need.window, (int32_t) llama_n_ubatch(ctx.get()), (int32_t) llama_n_batch(ctx.get()) });
    if (n < 1 || n_piece < 1 || (need_engine().conf().need.probe != probe::max && n > n_piece)) {
        throw std::invalid_argument("a probe of " + std::to_string(n) + " tokens: it is not empty, and what is asked (finch) has at most as many as "
                "the policy's window and n_ubatch, " + std::to_string(n_piece));
    }
    if (p0 + n > n_ctx() || !need_engine().has_room(seq, n)) {
        throw std::invalid_argument("there is no room for a probe of " + std::to_string(n) + " tokens");
    }
    for (int32_t i = 0; i < n; ++i) {
        model->check(tokens.data()[i]);
    }
    const int32_t first = std::max(1, n - n_repeated), step = std::max(1, (n - first)/N_LISTEN); // a logit costs as much as a few layers
    std::pair<double, int32_t> likelihood = { 0, 0 };
    std::vector<std::vector<float>> heard;
    need_engine().remember(seq);
    try {
        for (int32_t i0 = 0; i0 < n; i0 += n_piece) {
            const int32_t nb = std::min(n_piece, n - i0);
            const auto is_next = [&](int32_t i) { return i + 1 >= first && i + 1 < n && (i + 1 - first) % step == 0; }; // of a token looked at
            std::vector<int8_t> out(nb, 0);
            for (int32_t i = 0; i < nb; ++i) {
                out[i] = is_next(i0 + i);
            }
            decode_some(tokens.data() + i0, nb, seq, out.data());
            for (int32_t i = 0; i < nb; ++i) {
                if (out[i]) {
                    likelihood.first += log_prob(llama_get_logits_ith(ctx.get(), i), n_vocab, tokens.data()[i0 + i + 1]);
                    likelihood.second++;
                }
            }
            const busy now(*this);
            py::gil_scoped_release nogil;
            need_engine().listen(ctx.get(), seq, nb, i0 + nb, begin, end < 0 ? p0 : end, heard);
        }
        const busy now(*this);
        py::gil_scoped_release nogil;
        need_engine().take_out(ctx.get(), seq, n, begin, end < 0 ? p0 : end, heard);
    } catch (...) {
        if (pos_max(seq) >= p0) {
            remove_tail(p0, seq);
        }
        throw;
    }
    n_rows = 0;
    return likelihood;
}

void Context::make_room(int32_t n, int32_t seq) {
    check_seq(seq);
    const busy now(*this);
    begin_call();
    py::gil_scoped_release nogil;
    need_engine().make_room(ctx.get(), seq, n);
}

py::list Context::kept(int32_t seq) const {
    check_seq(seq);
    kvc_usage u = usage();
    py::list res;
    for (int32_t l = 0; l < u.n_layer; ++l) {
        const int32_t n = kvc_kept(ctx.get(), seq, l, nullptr);
        py::array_t<int32_t> a({ n_head_kv_of(ctx.get(), l), n }); // of this layer: without a policy they may differ
        kvc_kept(ctx.get(), seq, l, a.mutable_data());
        res.append(a);
    }
    return res;
}

py::list Context::scores(int32_t seq) {
    check_seq(seq);
    const busy now(*this);
    begin_call();
    std::vector<std::vector<float>> v;
    {
        py::gil_scoped_release nogil;
        v = need_engine().scores(ctx.get(), seq);
    }
    py::list res;
    for (const auto & s : v) {
        const int32_t n_hkv = need_engine().rows().n_head_kv();
        res.append(to_numpy(s, { n_hkv, (py::ssize_t) s.size()/n_hkv }));
    }
    return res;
}

py::list Context::signals(int32_t seq) {
    check_seq(seq);
    const busy now(*this);
    begin_call();
    std::vector<layer_signals> v;
    {
        py::gil_scoped_release nogil;
        v = need_engine().signals(ctx.get(), seq);
    }
    py::list res;
    for (const auto & s : v) {
        py::dict d = arrays_of(s.view(0, 0));
        d["probed"] = s.probed.empty() ? py::object(py::none()) : py::object(to_numpy(s.probed, { s.n_head_kv, s.n_kv }));
        res.append(d);
    }
    return res;
}

kvc_usage Context::usage() const {
    begin_call();
    kvc_usage u;
    if (kvc_get_usage(ctx.get(), &u) < 0) {
        fail("no usage");
    }
    return u;
}

py::dict Context::stats() const {
    const kvc_usage u = usage();
    py::list cells, kept;
    for (uint32_t s = 0; s < n_seq_max(); ++s) {
        int32_t n_max = 0;
        for (int32_t l = 0; l < u.n_layer; ++l) {
            const int32_t n = kvc_kept(ctx.get(), (int32_t) s, l, nullptr);
            n_max = std::max(n_max, n);
            if (s == 0) {
                kept.append(n);
            }
        }
        cells.append(n_max);
    }
    py::dict d;
    d["cells_used"] = cells; d["cells_allocated"] = u.n_cells; d["kept"] = kept;
    d["bytes_allocated"] = u.bytes_allocated; d["bytes_signals"] = u.bytes_signals; d["bytes_past"] = u.bytes_past; d["bytes_used"] = u.bytes_used; d["bytes_full"] = u.bytes_full;
    d["n_evictions"] = u.n_evictions; d["n_evicted"] = u.n_evicted;
    d["score_ms"] = u.score_ms; d["plan_ms"] = u.plan_ms; d["compact_ms"] = u.compact_ms;
    d["prefill_ms"] = prefill_ms; d["decode_ms"] = decode_ms;
    return d;
}

kvc_seq_usage Context::seq_usage(int32_t seq) const {
    check_seq(seq);
    begin_call();
    kvc_seq_usage u;
    if (kvc_get_seq_usage(ctx.get(), seq, &u) < 0) {
        fail("no usage");
    }
    return u;
}

int64_t Context::n_evictions(int32_t seq) const {
    return seq_usage(seq).n_evictions;
}

py::dict Context::seq_stats(int32_t seq) const {
    const kvc_seq_usage u = seq_usage(seq);
    py::list kept;
    for (int32_t l = 0; l < usage().n_layer; ++l) {
        kept.append(kvc_kept(ctx.get(), seq, l, nullptr));
    }
    py::dict d;
    d["n_tokens"] = u.n_tokens; d["cells"] = u.n_cells; d["kept"] = kept;
    d["bytes_used"] = u.bytes_used; d["bytes_full"] = u.bytes_full;
    d["n_evictions"] = u.n_evictions; d["n_evicted"] = u.n_evicted;
    return d;
}

py::bytes Context::save(int32_t seq) {
    const busy now(*this);
    if (seq >= 0) {
        check_seq(seq);
    }
    std::string buf(seq < 0 ? llama_state_get_size(ctx.get()) : llama_state_seq_get_size(ctx.get(), seq), '\0');
    const size_t n = seq < 0 ? llama_state_get_data(ctx.get(), (uint8_t *) &buf[0], buf.size())
                             : llama_state_seq_get_data(ctx.get(), (uint8_t *) &buf[0], buf.size(), seq);
    if (n == 0) {
        fail("the state cannot be saved");
    }
    return py::bytes(buf.data(), n);
}

void Context::load(const std::string & data, int32_t seq) {
    if (seq >= 0) {
        check_seq(seq);
    }
    begin_call();
    std::optional<busy> now(*this);
    const size_t n = seq < 0 ? llama_state_set_data(ctx.get(), (const uint8_t *) data.data(), data.size())
                             : llama_state_seq_set_data(ctx.get(), (const uint8_t *) data.data(), data.size(), seq);
    n_rows = 0;
    if (n != data.size()) {
        const std::string why = why_failed("this state is not of this model, policy and version, or damaged");
        now.reset();
        clear(seq);
        throw std::invalid_argument(why);
    }
}

} // namespace kvc
