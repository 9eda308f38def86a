#pragma once

// Context: llama.cpp's, with the engine on its cache. Signals are looked at between calls of llama_decode.

#include "bind_model.h"
#include "kvc.h"

#include <chrono>
#include <thread>

namespace kvc {

inline ggml_type cache_type(const std::string & name, const char * arg) {
    for (const auto t : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_1, GGML_TYPE_Q5_0, GGML_TYPE_Q4_1, GGML_TYPE_Q4_0 }) {
        if (name == ggml_type_name(t)) {
            return t;
        }
    }
    throw std::invalid_argument(std::string(arg) + " '" + name + "': valid are f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0");
}

class Context {
public:
    std::shared_ptr<Model> model;
    std::shared_ptr<llama_context> ctx;
    std::string spec = "full";
    int32_t n_rows = 0; // rows of logits of the last decode
    double prefill_ms = 0, decode_ms = 0;

    Context(std::shared_ptr<Model> m, uint32_t n_ctx, uint32_t n_batch, uint32_t n_ubatch, uint32_t n_seq_max, int n_threads_, int n_threads_batch,
            const std::string & type_k, const std::string & type_v, const std::string & fa, bool offload_kqv, const py::object & policy,
            const std::string & kv_budget, const std::string & kv_decode_budget, const std::string & kv_cells) : model(std::move(m)) {
        if (n_batch < 1 || n_ubatch < 1) {
            throw std::invalid_argument("n_batch and n_ubatch are tokens, at least 1");
        }
        if (n_seq_max < 1 || n_seq_max > llama_max_parallel_sequences()) {
            throw std::invalid_argument("n_seq_max must be 1 to " + std::to_string(llama_max_parallel_sequences()));
        }
        const int n_cores = std::max(1u, std::thread::hardware_concurrency());
        const int n_threads = n_threads_ > 0 ? n_threads_ : n_cores;
        auto cp = llama_context_default_params();
        cp.n_ctx           = n_ctx*n_seq_max; // llama.cpp divides it among the sequences
        cp.n_batch         = n_batch;
        cp.n_ubatch        = n_ubatch;
        cp.n_seq_max       = n_seq_max;
        cp.n_threads       = n_threads;
        cp.n_threads_batch = n_threads_batch > 0 ? n_threads_batch : n_threads;
        cp.type_k          = cache_type(type_k, "type_k");
        cp.type_v          = cache_type(type_v, "type_v");
        cp.offload_kqv     = offload_kqv;
        cp.kv_unified      = false;
        cp.no_perf         = true;
        if      (fa == "auto") { cp.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_AUTO; }
        else if (fa == "on")   { cp.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED; }
        else if (fa == "off")  { cp.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED; }
        else { throw std::invalid_argument("flash_attn '" + fa + "': valid are on, off, auto"); }

        begin_call();
        const bool env = policy.is_none(); // as any llama.cpp program on this library
        const auto cfg = env ? nullptr : config_from_python(policy, kv_budget, kv_decode_budget, kv_cells);
        if (cfg && cfg->need.sums && ggml_is_quantized(cp.type_v)) {
            throw std::invalid_argument(cfg->spec + " runs with flash attention off, which a quantized V cache needs: use type_v f16, bf16 or f32");
        }
        {
            py::gil_scoped_release nogil;
            if (!env) {
                next_context(cfg);
            }
            ctx.reset(llama_init_from_model(model->ptr.get(), cp), llama_free);
        }
        if (!ctx) {
            fail("the context cannot be created");
        }
        read_spec();
    }

    // Another program's, which frees it: valid until then.
    explicit Context(llama_context * borrowed) :
        model(std::make_shared<Model>(const_cast<llama_model *>(llama_get_model(borrowed)))), ctx(borrowed, [](llama_context *) {}) {
        read_spec();
    }

    void read_spec() {
        if (auto * e = engine::of(ctx.get())) {
            spec = e->conf().spec;
        }
    }

    llama_memory_t mem() const { return llama_get_memory(ctx.get()); }
    uint32_t n_seq_max() const { return llama_n_seq_max(ctx.get()); }
    int32_t  n_ctx()     const { return (int32_t) llama_n_ctx_seq(ctx.get()); }

    void check_seq(int32_t seq) const {
        if (seq < 0 || (uint32_t) seq >= n_seq_max()) {
            throw std::invalid_argument("sequence " + std::to_string(seq) + ": this context has 0 to " + std::to_string(n_seq_max() - 1));
        }
    }

    llama_pos pos_max(int32_t seq) const {
        check_seq(seq);
        return llama_memory_seq_pos_max(mem(), seq);
    }

    engine & evictor() const {
        auto * e = engine::of(ctx.get());
        if (!e) {
            throw std::invalid_argument("the policy is full: nothing is evicted; name a policy when the context is created");
        }
        return *e;
    }

    void run(llama_batch & batch) {
        begin_call();
        int32_t rc;
        const auto t0 = std::chrono::steady_clock::now();
        {
            py::gil_scoped_release nogil;
            rc = llama_decode(ctx.get(), batch);
            llama_synchronize(ctx.get());
        }
        (batch.n_tokens > 1 ? prefill_ms : decode_ms) += std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - t0).count();
        if (rc != 0) {
            fail(rc == 1 ? "the cache has no room for these tokens" : "llama_decode failed with code " + std::to_string(rc));
        }
        if (PyErr_CheckSignals() != 0) {
            throw py::error_already_set();
        }
    }

    void decode(const i32_array & tokens, int32_t seq, const std::string & logits) {
        check_seq(seq);
        const int64_t n = tokens.size();
        if (tokens.ndim() != 1 || n == 0) {
            throw std::invalid_argument("tokens must be a 1-d array of at least one token");
        }
        if (logits != "none" && logits != "last" && logits != "all") {
            throw std::invalid_argument("logits '" + logits + "': valid are none, last, all");
        }
        const llama_pos p0 = pos_max(seq) + 1;
        if (p0 + n > n_ctx()) {
            throw std::invalid_argument(std::to_string(n) + " tokens after " + std::to_string(p0) + " exceed the context of " + std::to_string(n_ctx()) + " (n_ctx)");
        }
        if (logits == "all" && n > llama_n_batch(ctx.get())) {
            throw std::invalid_argument("logits of all tokens need one call: at most n_batch = " + std::to_string(llama_n_batch(ctx.get())) + " tokens");
        }
        for (int64_t i = 0; i < n; ++i) {
            model->check(tokens.data()[i]);
        }
        const int64_t n_batch = llama_n_batch(ctx.get());
        for (int64_t i0 = 0; i0 < n; i0 += n_batch) {
            const int32_t nb = (int32_t) std::min(n_batch, n - i0);
            std::vector<llama_token>    tok(tokens.data() + i0, tokens.data() + i0 + nb);
            std::vector<llama_pos>      pos(nb);
            std::vector<int32_t>        n_seq(nb, 1);
            std::vector<llama_seq_id *> ids(nb, &seq);
            std::vector<int8_t>         out(nb, logits == "all");
            for (int32_t i = 0; i < nb; ++i) {
                pos[i] = p0 + (llama_pos) i0 + i;
            }
            out[nb - 1] |= logits == "last" && i0 + nb == n;
            llama_batch batch = { nb, tok.data(), nullptr, pos.data(), n_seq.data(), ids.data(), out.data() };
            run(batch);
        }
        n_rows = logits == "all" ? (int32_t) n : logits == "last" ? 1 : 0;
    }

    void decode_batch(const i32_array & tokens, const i32_array & seqs) {
        const int32_t n = (int32_t) tokens.size();
        if (n == 0 || seqs.size() != n || n > (int32_t) llama_n_batch(ctx.get())) {
            throw std::invalid_argument("tokens and seqs must have the same length, 1 to n_batch");
        }
        std::vector<llama_token>    tok(tokens.data(), tokens.data() + n);
        std::vector<llama_seq_id>   sid(seqs.data(), seqs.data() + n);
        std::vector<llama_pos>      pos(n);
        std::vector<int32_t>        n_seq(n, 1);
        std::vector<llama_seq_id *> ids(n);
        std::vector<int8_t>         out(n, 1);
        std::vector<bool>           seen(n_seq_max(), false);
        for (int32_t i = 0; i < n; ++i) {
            model->check(tok[i]);
            pos[i] = pos_max(sid[i]) + 1;
            ids[i] = &sid[i];
            if (seen[sid[i]]) {
                throw std::invalid_argument("decode_batch takes one token of each sequence");
            }
            if (pos[i] >= n_ctx()) {
                throw std::invalid_argument("sequence " + std::to_string(sid[i]) + " fills its context of " + std::to_string(n_ctx()) + " tokens (n_ctx)");
            }
            seen[sid[i]] = true;
        }
        llama_batch batch = { n, tok.data(), nullptr, pos.data(), n_seq.data(), ids.data(), out.data() };
        run(batch);
        n_rows = n;
    }

    py::array_t<float> logits() const {
        if (n_rows == 0) {
            throw std::invalid_argument("no logits: decode something with logits first");
        }
        const int32_t n_vocab = llama_vocab_n_tokens(model->vocab);
        py::array_t<float> res({ n_rows, n_vocab });
        const float * src = llama_get_logits(ctx.get());
        std::copy(src, src + (size_t) n_rows*n_vocab, res.mutable_data());
        return res;
    }

    bool remove_tail(llama_pos pos, int32_t seq) {
        check_seq(seq);
        if (pos < 0) {
            throw std::invalid_argument("remove_tail: a position is >= 0");
        }
        return llama_memory_seq_rm(mem(), seq, pos, -1);
    }

    void clear(int32_t seq) {
        if (seq < 0) {
            llama_memory_clear(mem(), false);
        } else {
            check_seq(seq);
            llama_memory_seq_rm(mem(), seq, -1, -1);
        }
        n_rows = 0;
    }

    void copy(int32_t src, int32_t dst) {
        check_seq(src);
        check_seq(dst);
        if (src != dst) {
            llama_memory_seq_cp(mem(), src, dst, -1, -1);
            flush_copies(ctx.get());
        }
    }

    bool evict(int32_t seq, bool mask_only) {
        check_seq(seq);
        begin_call();
        py::gil_scoped_release nogil;
        return evictor().evict(ctx.get(), seq, mask_only);
    }

    // Evaluates a probe after what the sequence holds, lets the policy see what it attends to of positions [begin, end), and
    // takes it out again. However it ends, the probe is gone.
    void ask(const i32_array & tokens, int32_t seq, int32_t begin, int32_t end) {
        const llama_pos p0 = pos_max(seq) + 1;
        const int32_t n = (int32_t) tokens.size();
        if (n > std::min<int64_t>(evictor().conf().need.window, llama_n_ubatch(ctx.get()))) {
            throw std::invalid_argument("a probe of " + std::to_string(n) + " tokens: at most the policy's window, " +
                    std::to_string(evictor().conf().need.window) + ", and n_ubatch, " + std::to_string(llama_n_ubatch(ctx.get())));
        }
        if (!evictor().has_room(seq, n)) {
            throw std::invalid_argument("there is no room for a probe of " + std::to_string(n) + " tokens");
        }
        try {
            decode(tokens, seq, "none");
            py::gil_scoped_release nogil;
            evictor().ask(ctx.get(), seq, n, begin, end < 0 ? p0 : end);
        } catch (...) {
            if (pos_max(seq) >= p0) {
                remove_tail(p0, seq);
            }
            throw;
        }
        n_rows = 0;
    }

    void make_room(int32_t n, int32_t seq) {
        check_seq(seq);
        begin_call();
        py::gil_scoped_release nogil;
        evictor().make_room(ctx.get(), seq, n);
    }

    py::list kept(int32_t seq) const {
        check_seq(seq);
        kvc_usage u = usage();
        py::list res;
        for (int32_t l = 0; l < u.n_layer; ++l) {
            const int32_t n = kvc_kept(ctx.get(), seq, l, nullptr);
            py::array_t<int32_t> a({ u.n_head_kv, n });
            kvc_kept(ctx.get(), seq, l, a.mutable_data());
            res.append(a);
        }
        return res;
    }

    py::list scores(int32_t seq) const {
        check_seq(seq);
        begin_call();
        std::vector<std::vector<float>> v;
        {
            py::gil_scoped_release nogil;
            v = evictor().scores(ctx.get(), seq);
        }
        py::list res;
        for (const auto & s : v) {
            const int32_t n_hkv = evictor().n_head_kv();
            res.append(to_numpy(s, { n_hkv, (py::ssize_t) s.size()/n_hkv }));
        }
        return res;
    }

    py::list signals(int32_t seq) const {
        check_seq(seq);
        begin_call();
        std::vector<layer_signals> v;
        {
            py::gil_scoped_release nogil;
            v = evictor().signals(ctx.get(), seq);
        }
        py::list res;
        for (const auto & s : v) {
            py::dict d;
            const auto f32 = [](const std::vector<float> & x, std::vector<py::ssize_t> shape) -> py::object {
                return x.empty() ? py::object(py::none()) : py::object(to_numpy(x, shape));
            };
            d["il"] = s.il; d["n_query"] = s.n_query;
            d["pos"]  = to_numpy(s.pos, { s.n_head_kv, s.n_kv });
            d["attn"] = f32(s.attn, { s.n_head, s.n_kv });
            d["sums"] = f32(s.sums, { s.n_head_kv, s.n_kv });
            d["keys"] = f32(s.keys, { s.n_head_kv, s.n_kv, s.head_dim });
            d["probed"] = f32(s.probed, { s.n_head_kv, s.n_kv });
            d["q_mean"] = f32(s.q_mean, { s.n_head, s.head_dim });
            d["q_cov"]  = f32(s.q_cov,  { s.n_head, s.head_dim, s.head_dim });
            d["v_norm"] = f32(s.v_norm, { s.n_head_kv, s.n_kv });
            res.append(d);
        }
        return res;
    }

    kvc_usage usage() const {
        begin_call();
        kvc_usage u;
        if (kvc_get_usage(ctx.get(), &u) < 0) {
            fail("no usage");
        }
        return u;
    }

    py::dict stats() const {
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
        d["bytes_allocated"] = u.bytes_allocated; d["bytes_signals"] = u.bytes_signals; d["bytes_used"] = u.bytes_used; d["bytes_full"] = u.bytes_full;
        d["n_evictions"] = u.n_evictions; d["n_evicted"] = u.n_evicted;
        d["score_ms"] = u.score_ms; d["plan_ms"] = u.plan_ms; d["compact_ms"] = u.compact_ms;
        d["prefill_ms"] = prefill_ms; d["decode_ms"] = decode_ms;
        return d;
    }

    kvc_seq_usage seq_usage(int32_t seq) const {
        check_seq(seq);
        begin_call();
        kvc_seq_usage u;
        if (kvc_get_seq_usage(ctx.get(), seq, &u) < 0) {
            fail("no usage");
        }
        return u;
    }

    int64_t n_evictions(int32_t seq) const {
        return seq_usage(seq).n_evictions;
    }

    py::dict seq_stats(int32_t seq) const {
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

    py::bytes save(int32_t seq) {
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

    void load(const std::string & data, int32_t seq) {
        if (seq >= 0) {
            check_seq(seq);
        }
        begin_call();
        const size_t n = seq < 0 ? llama_state_set_data(ctx.get(), (const uint8_t *) data.data(), data.size())
                                 : llama_state_seq_set_data(ctx.get(), (const uint8_t *) data.data(), data.size(), seq);
        n_rows = 0;
        if (n != data.size()) {
            const std::string why = why_failed("this state is not of this model, policy and version, or damaged");
            clear(seq);
            throw std::invalid_argument(why);
        }
    }
};

} // namespace kvc
