// llama.cpp and the engine on it, as Model, Context and Sampler. Arguments are checked here: a GGML_ASSERT would take
// the interpreter with it. The GIL is released while llama.cpp computes, and signals are looked at between its calls.

#include "bind_policy.h"
#include "kvc.h"

#include "llama-cpp.h"
#include "llama.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <optional>
#include <stdexcept>
#include <thread>

namespace py = pybind11;
using namespace py::literals;

namespace {

//
// log
//

// errors of the call under way: llama.cpp returns null and says why here
thread_local std::string log_errors;

py::object & log_callback() {
    static auto * cb = new py::object(py::none()); // never destroyed: llama.cpp may log while the interpreter ends
    return *cb;
}

void on_log(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) {
        log_errors += text;
    }
    if (Py_IsInitialized() && log_callback().ptr() != Py_None) {
        py::gil_scoped_acquire gil;
        try {
            log_callback()((int) level, py::bytes(text).attr("decode")("utf-8", "replace"));
        } catch (py::error_already_set & e) {
            e.discard_as_unraisable("pykvc log callback");
        }
    }
}

// The engine's sentence, or the first line llama.cpp logged, without the function it names.
[[noreturn]] void fail(const std::string & what) {
    std::string why = kvc::last_error();
    if (why.empty()) {
        why = log_errors.substr(0, log_errors.find('\n'));
        const size_t colon = why.find(": ");
        if (colon != std::string::npos && why.find(' ') > colon) {
            why = why.substr(colon + 2);
        }
    }
    throw std::invalid_argument(why.empty() ? what : what + ": " + why);
}

void begin_call() {
    kvc::last_error().clear();
    log_errors.clear();
}

//
// Model
//

class Model {
public:
    llama_model_ptr ptr;
    const llama_vocab * vocab = nullptr;

    Model(const std::string & path, int n_gpu_layers, bool use_mmap, bool use_mlock, bool vocab_only) {
        begin_call();
        auto mp = llama_model_default_params();
        mp.n_gpu_layers = n_gpu_layers;
        mp.vocab_only   = vocab_only;
        mp.load_mode    = use_mlock ? LLAMA_LOAD_MODE_MLOCK : use_mmap ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_NONE;
        {
            py::gil_scoped_release nogil;
            ptr.reset(llama_model_load_from_file(path.c_str(), mp));
        }
        if (!ptr) {
            fail(path + " is not a GGUF model llama.cpp can load");
        }
        vocab = llama_model_get_vocab(ptr.get());
    }

    std::string str(int32_t (*fn)(const llama_model *, char *, size_t)) const {
        char buf[512];
        const int32_t n = fn(ptr.get(), buf, sizeof(buf));
        return std::string(buf, std::max(0, std::min<int32_t>(n, sizeof(buf) - 1)));
    }

    std::map<std::string, std::string> meta() const {
        std::map<std::string, std::string> res;
        std::vector<char> key(256), val(1 << 16);
        for (int32_t i = 0; i < llama_model_meta_count(ptr.get()); ++i) {
            llama_model_meta_key_by_index(ptr.get(), i, key.data(), key.size());
            llama_model_meta_val_str_by_index(ptr.get(), i, val.data(), val.size());
            res[key.data()] = val.data();
        }
        return res;
    }

    std::vector<llama_token> tokenize(const std::string & text, bool add_special, bool parse_special) const {
        std::vector<llama_token> res(text.size() + 8);
        const int32_t n = llama_tokenize(vocab, text.data(), (int32_t) text.size(), res.data(), (int32_t) res.size(), add_special, parse_special);
        if (n < 0) {
            res.resize(-n);
            llama_tokenize(vocab, text.data(), (int32_t) text.size(), res.data(), (int32_t) res.size(), add_special, parse_special);
            return res;
        }
        res.resize(n);
        return res;
    }

    void check(llama_token t) const {
        if (t < 0 || t >= llama_vocab_n_tokens(vocab)) {
            throw std::invalid_argument("token " + std::to_string(t) + " is outside the vocabulary [0, " + std::to_string(llama_vocab_n_tokens(vocab)) + ")");
        }
    }

    py::bytes detokenize(const std::vector<llama_token> & tokens, bool remove_special, bool unparse_special) const {
        for (const auto t : tokens) {
            check(t);
        }
        std::string res(tokens.size()*8 + 16, '\0');
        int32_t n = llama_detokenize(vocab, tokens.data(), (int32_t) tokens.size(), &res[0], (int32_t) res.size(), remove_special, unparse_special);
        if (n < 0) {
            res.resize(-n);
            n = llama_detokenize(vocab, tokens.data(), (int32_t) tokens.size(), &res[0], (int32_t) res.size(), remove_special, unparse_special);
        }
        return py::bytes(res.data(), std::max(0, n));
    }

    py::bytes piece(llama_token t, bool special) const {
        check(t);
        char buf[512];
        const int32_t n = llama_token_to_piece(vocab, t, buf, sizeof(buf), 0, special);
        return py::bytes(buf, std::max(0, n));
    }

    std::string chat(const std::vector<std::pair<std::string, std::string>> & messages, bool add_assistant, const std::optional<std::string> & tmpl) const {
        const char * t = tmpl ? tmpl->c_str() : llama_model_chat_template(ptr.get(), nullptr);
        if (!t) {
            throw std::invalid_argument("this model has no chat template: give one of llama.cpp's names, \"chatml\" for instance");
        }
        std::vector<llama_chat_message> msgs;
        size_t n_text = 256;
        for (const auto & m : messages) {
            msgs.push_back({ m.first.c_str(), m.second.c_str() });
            n_text += 2*(m.first.size() + m.second.size()) + 64;
        }
        std::string res(n_text, '\0');
        int32_t n = llama_chat_apply_template(t, msgs.data(), msgs.size(), add_assistant, &res[0], (int32_t) res.size());
        if (n > (int32_t) res.size()) {
            res.resize(n);
            n = llama_chat_apply_template(t, msgs.data(), msgs.size(), add_assistant, &res[0], (int32_t) res.size());
        }
        if (n < 0) {
            throw std::invalid_argument("llama.cpp does not know this chat template: give one of its names, \"chatml\" for instance");
        }
        res.resize(n);
        return res;
    }
};

//
// Context
//

ggml_type cache_type(const std::string & name, const char * arg) {
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
    llama_context_ptr ctx;
    std::string spec = "full";
    int32_t n_rows = 0; // rows of logits of the last decode
    double prefill_ms = 0, decode_ms = 0;

    Context(std::shared_ptr<Model> m, uint32_t n_ctx, uint32_t n_batch, uint32_t n_ubatch, uint32_t n_seq_max, int n_threads_, int n_threads_batch,
            const std::string & type_k, const std::string & type_v, const std::string & fa, bool offload_kqv, const py::object & policy,
            const std::string & kv_budget, const std::string & kv_decode_budget) : model(std::move(m)) {
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
        const auto cfg = env ? nullptr : kvc::config_from_python(policy, kv_budget, kv_decode_budget);
        if (cfg && cfg->need.sums && ggml_is_quantized(cp.type_v)) {
            throw std::invalid_argument(cfg->spec + " runs with flash attention off, which a quantized V cache needs: use type_v f16, bf16 or f32");
        }
        {
            py::gil_scoped_release nogil;
            if (!env) {
                kvc::next_context(cfg);
            }
            ctx.reset(llama_init_from_model(model->ptr.get(), cp));
        }
        if (!ctx) {
            fail("the context cannot be created");
        }
        if (auto * e = kvc::engine::of(ctx.get())) {
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

    kvc::engine & engine() const {
        auto * e = kvc::engine::of(ctx.get());
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

    void decode(const kvc::i32_array & tokens, int32_t seq, const std::string & logits) {
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

    void decode_batch(const kvc::i32_array & tokens, const kvc::i32_array & seqs) {
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
            kvc::flush_copies(ctx.get());
        }
    }

    bool evict(int32_t seq, bool mask_only) {
        check_seq(seq);
        begin_call();
        py::gil_scoped_release nogil;
        return engine().evict(ctx.get(), seq, mask_only);
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
            v = engine().scores(ctx.get(), seq);
        }
        py::list res;
        for (const auto & s : v) {
            const int32_t n_hkv = engine().n_head_kv();
            res.append(kvc::to_numpy(s, { n_hkv, (py::ssize_t) s.size()/n_hkv }));
        }
        return res;
    }

    py::list signals(int32_t seq) const {
        check_seq(seq);
        begin_call();
        std::vector<kvc::layer_signals> v;
        {
            py::gil_scoped_release nogil;
            v = engine().signals(ctx.get(), seq);
        }
        py::list res;
        for (const auto & s : v) {
            py::dict d;
            const auto f32 = [](const std::vector<float> & x, std::vector<py::ssize_t> shape) -> py::object {
                return x.empty() ? py::object(py::none()) : py::object(kvc::to_numpy(x, shape));
            };
            d["il"] = s.il; d["n_query"] = s.n_query;
            d["pos"]  = kvc::to_numpy(s.pos, { s.n_head_kv, s.n_kv });
            d["attn"] = f32(s.attn, { s.n_head, s.n_kv });
            d["sums"] = f32(s.sums, { s.n_head_kv, s.n_kv });
            d["keys"] = f32(s.keys, { s.n_head_kv, s.n_kv, s.head_dim });
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
        d["bytes_allocated"] = u.bytes_allocated; d["bytes_used"] = u.bytes_used; d["bytes_full"] = u.bytes_full;
        d["n_evictions"] = u.n_evictions; d["n_evicted"] = u.n_evicted;
        d["score_ms"] = u.score_ms; d["plan_ms"] = u.plan_ms; d["compact_ms"] = u.compact_ms;
        d["prefill_ms"] = prefill_ms; d["decode_ms"] = decode_ms;
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
            const std::string why = log_errors;
            clear(seq);
            log_errors = why;
            fail("this state is not of this model, policy and version, or damaged");
        }
    }
};

//
// Sampler
//

class Sampler {
public:
    llama_sampler_ptr chain;

    Sampler(const Model & m, float temperature, int top_k, float top_p, float min_p, float repeat_penalty, uint32_t seed) {
        if (!(temperature >= 0) || top_k < 0 || !(top_p > 0 && top_p <= 1) || !(min_p >= 0 && min_p <= 1) || !(repeat_penalty > 0)) {
            throw std::invalid_argument("sampling: temperature >= 0, top_k >= 0, top_p in (0, 1], min_p in [0, 1], repeat_penalty > 0");
        }
        chain.reset(llama_sampler_chain_init(llama_sampler_chain_default_params()));
        if (repeat_penalty != 1.0f) {
            llama_sampler_chain_add(chain.get(), llama_sampler_init_penalties(llama_vocab_n_tokens(m.vocab), 64, repeat_penalty, 0.0f, 0.0f));
        }
        if (temperature == 0) {
            llama_sampler_chain_add(chain.get(), llama_sampler_init_greedy());
            return;
        }
        if (top_k > 0) {
            llama_sampler_chain_add(chain.get(), llama_sampler_init_top_k(top_k));
        }
        llama_sampler_chain_add(chain.get(), llama_sampler_init_top_p(top_p, 1));
        llama_sampler_chain_add(chain.get(), llama_sampler_init_min_p(min_p, 1));
        llama_sampler_chain_add(chain.get(), llama_sampler_init_temp(temperature));
        llama_sampler_chain_add(chain.get(), llama_sampler_init_dist(seed));
    }

    llama_token sample_row(const kvc::f32_array & logits) {
        if (logits.ndim() != 1 || logits.size() == 0) {
            throw std::invalid_argument("logits must be F32 [n_vocab]");
        }
        return pick(logits.data(), (int32_t) logits.size());
    }

    llama_token sample(Context & ctx, int32_t row) {
        if (ctx.n_rows == 0 || row >= ctx.n_rows || row < -ctx.n_rows) {
            throw std::invalid_argument("sample: the last decode left " + std::to_string(ctx.n_rows) + " rows of logits");
        }
        const int32_t n_vocab = llama_vocab_n_tokens(ctx.model->vocab);
        return pick(llama_get_logits(ctx.ctx.get()) + (size_t) (row < 0 ? ctx.n_rows + row : row)*n_vocab, n_vocab);
    }

private:
    llama_token pick(const float * logits, int32_t n_vocab) {
        std::vector<llama_token_data> data(n_vocab);
        for (llama_token t = 0; t < n_vocab; ++t) {
            data[t] = { t, logits[t], 0.0f };
        }
        llama_token_data_array cur = { data.data(), data.size(), -1, false };
        llama_sampler_apply(chain.get(), &cur);
        const llama_token res = cur.data[cur.selected].id;
        llama_sampler_accept(chain.get(), res);
        return res;
    }
};

} // namespace

void bind_llama(py::module_ & m) {
    llama_log_set(on_log, nullptr);
    llama_backend_init();

    m.def("system_info", []() { return std::string(llama_print_system_info()); }, "CPU and backend features llama.cpp was built with.");
    m.def("set_log", [](py::object cb) { log_callback() = std::move(cb); }, "callback"_a, "level (1 debug .. 4 error) and text of each llama.cpp message; None: silent.");

    py::class_<Model, std::shared_ptr<Model>>(m, "Model", "A loaded GGUF. ValueError: not a GGUF, truncated, unknown architecture.")
        .def(py::init<const std::string &, int, bool, bool, bool>(), "path"_a, py::kw_only(), "n_gpu_layers"_a = 0, "use_mmap"_a = true, "use_mlock"_a = false, "vocab_only"_a = false)
        .def_property_readonly("desc", [](const Model & m) { return m.str(llama_model_desc); })
        .def_property_readonly("arch", [](const Model & m) { return m.meta()["general.architecture"]; })
        .def_property_readonly("meta", &Model::meta)
        .def_property_readonly("size", [](const Model & m) { return llama_model_size(m.ptr.get()); })
        .def_property_readonly("n_params", [](const Model & m) { return llama_model_n_params(m.ptr.get()); })
        .def_property_readonly("n_ctx_train", [](const Model & m) { return llama_model_n_ctx_train(m.ptr.get()); })
        .def_property_readonly("n_layer", [](const Model & m) { return llama_model_n_layer(m.ptr.get()); })
        .def_property_readonly("n_head", [](const Model & m) { return llama_model_n_head(m.ptr.get()); })
        .def_property_readonly("n_head_kv", [](const Model & m) { return llama_model_n_head_kv(m.ptr.get()); })
        .def_property_readonly("n_embd", [](const Model & m) { return llama_model_n_embd(m.ptr.get()); })
        .def_property_readonly("n_vocab", [](const Model & m) { return llama_vocab_n_tokens(m.vocab); })
        .def_property_readonly("bos", [](const Model & m) { return llama_vocab_bos(m.vocab); })
        .def_property_readonly("eos", [](const Model & m) { return llama_vocab_eos(m.vocab); })
        .def_property_readonly("chat_template", [](const Model & m) -> py::object {
            const char * t = llama_model_chat_template(m.ptr.get(), nullptr);
            return t ? py::object(py::str(t)) : py::object(py::none());
        })
        .def("tokenize", &Model::tokenize, "text"_a, "add_special"_a = true, "parse_special"_a = false)
        .def("detokenize", &Model::detokenize, "tokens"_a, "remove_special"_a = false, "unparse_special"_a = true)
        .def("piece", &Model::piece, "token"_a, "special"_a = false)
        .def("is_eog", [](const Model & m, llama_token t) { m.check(t); return llama_vocab_is_eog(m.vocab, t); }, "token"_a)
        .def("apply_chat_template", &Model::chat, "messages"_a, "add_assistant"_a = true, "template"_a = py::none());

    py::class_<Context>(m, "Context", "A llama_context with its cache.")
        .def(py::init<std::shared_ptr<Model>, uint32_t, uint32_t, uint32_t, uint32_t, int, int, const std::string &, const std::string &, const std::string &,
                bool, const py::object &, const std::string &, const std::string &>(), "model"_a, py::kw_only(), "n_ctx"_a = 0, "n_batch"_a = 2048,
                "n_ubatch"_a = 512, "n_seq_max"_a = 1, "n_threads"_a = 0, "n_threads_batch"_a = 0, "type_k"_a = "f16", "type_v"_a = "f16",
                "flash_attn"_a = "auto", "offload_kqv"_a = true, "policy"_a = "full", "budget"_a = "", "decode_budget"_a = "")
        .def_property_readonly("n_ctx", &Context::n_ctx)
        .def_property_readonly("n_batch", [](const Context & c) { return llama_n_batch(c.ctx.get()); })
        .def_property_readonly("n_ubatch", [](const Context & c) { return llama_n_ubatch(c.ctx.get()); })
        .def_property_readonly("n_seq_max", &Context::n_seq_max)
        .def_property_readonly("flash_attn", [](const Context & c) { return kvc::uses_flash_attn(c.ctx.get()); })
        .def_property_readonly("policy", [](const Context & c) { return c.spec; })
        .def_property_readonly("n_layer_kv", [](const Context & c) { return c.usage().n_layer; })
        .def("decode", &Context::decode, "tokens"_a, "seq"_a = 0, "logits"_a = "last", "Appends tokens to a sequence, in calls of n_batch.")
        .def("decode_batch", &Context::decode_batch, "tokens"_a, "seqs"_a, "One token for each of several sequences, in one call.")
        .def("logits", &Context::logits, "F32 [n_rows, n_vocab] of the last decode.")
        .def("pos_max", &Context::pos_max, "seq"_a = 0)
        .def("pos_floor", [](const Context & c, int32_t seq) { c.check_seq(seq); return kvc_floor(c.ctx.get(), seq); }, "seq"_a = 0)
        .def("remove_tail", &Context::remove_tail, "pos"_a, "seq"_a = 0, "Removes [pos, end); False and unchanged below the floor.")
        .def("clear", &Context::clear, "seq"_a = -1)
        .def("copy", &Context::copy, "src"_a, "dst"_a)
        .def("set_budget", [](Context & c, const std::string & b, const std::string & d) {
            c.engine().set_budget(kvc::parse_budget(b, "kv_budget"), kvc::parse_budget(d, "kv_decode_budget"));
        }, "budget"_a, "decode_budget"_a)
        .def("set_spans", [](Context & c, const std::vector<std::pair<int32_t, int32_t>> & spans, int32_t seq) {
            std::vector<kvc::span> v;
            for (const auto & s : spans) {
                v.push_back({ s.first, s.second });
            }
            c.engine().set_spans(seq, std::move(v));
        }, "spans"_a, "seq"_a = 0)
        .def("begin_prompt", [](Context & c, int32_t seq) { c.engine().begin_prompt(seq); }, "seq"_a = 0)
        .def("end_prompt", [](Context & c, int32_t seq) { c.engine().end_prompt(seq); }, "seq"_a = 0)
        .def("evict", &Context::evict, "seq"_a = 0, "mask_only"_a = false, "Prompt eviction now; mask_only (tests): the keep sets as a mask, nothing is freed.")
        .def("kept", &Context::kept, "seq"_a = 0)
        .def("scores", &Context::scores, "seq"_a = 0)
        .def("signals", &Context::signals, "seq"_a = 0)
        .def("stats", &Context::stats)
        .def("save", [](Context & c) { return c.save(-1); })
        .def("load", [](Context & c, const std::string & d) { c.load(d, -1); }, "data"_a)
        .def("save_seq", &Context::save, "seq"_a = 0)
        .def("load_seq", [](Context & c, const std::string & d, int32_t seq) { c.check_seq(seq); c.load(d, seq); }, "data"_a, "seq"_a = 0);

    py::class_<Sampler>(m, "Sampler", "llama.cpp's chain: penalties, top_k, top_p, min_p, temp, dist; temperature 0 is greedy.")
        .def(py::init<const Model &, float, int, float, float, float, uint32_t>(), "model"_a, py::kw_only(), "temperature"_a = 0.0f, "top_k"_a = 40, "top_p"_a = 0.95f,
                "min_p"_a = 0.05f, "repeat_penalty"_a = 1.0f, "seed"_a = 0)
        .def("sample", &Sampler::sample, "ctx"_a, "row"_a = -1, "The token, accepted.")
        .def("sample_row", &Sampler::sample_row, "logits"_a, "The same from logits F32 [n_vocab] that were kept.")
        .def("reset", [](Sampler & s) { llama_sampler_reset(s.chain.get()); });
}
