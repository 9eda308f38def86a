// Context: how it is created, and what is evaluated and removed.

#include "bind_context.h"

#include <atomic>
#include <chrono>
#include <limits>
#include <thread>

namespace kvc {

std::atomic<bool> calls_end = false;

static ggml_type cache_type(const std::string & name, const char * arg) {
    for (const auto t : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_1, GGML_TYPE_Q5_0, GGML_TYPE_Q4_1, GGML_TYPE_Q4_0 }) {
        if (name == ggml_type_name(t)) {
            return t;
        }
    }
    throw std::invalid_argument(std::string(arg) + " '" + name + "': valid are f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0");
}

Context::Context(std::shared_ptr<Model> m, uint32_t n_ctx, uint32_t n_batch, uint32_t n_ubatch, uint32_t n_seq_max, int n_threads_, int n_threads_batch,
        const std::string & type_k, const std::string & type_v, const std::string & fa, bool offload_kqv, const py::object & policy,
        const std::string & kv_budget, const std::string & kv_decode_budget, const std::string & kv_cells) : model(std::move(m)) {
    if (n_batch < 1 || n_ubatch < 1) {
        throw std::invalid_argument("n_batch and n_ubatch are tokens, at least 1");
    }
    if (n_seq_max < 1 || n_seq_max > llama_max_parallel_sequences()) {
        throw std::invalid_argument("n_seq_max must be 1 to " + std::to_string(llama_max_parallel_sequences()));
    }
    if (n_seq_max > n_batch) {
        throw std::invalid_argument("n_batch " + std::to_string(n_batch) + " is less than n_seq_max " + std::to_string(n_seq_max) +
                ": a batch holds a token of each sequence");
    }
    const int n_cores = std::max(1u, std::thread::hardware_concurrency());
    const int n_threads = n_threads_ > 0 ? n_threads_ : n_cores;
    if ((uint64_t) n_ctx*n_seq_max > std::numeric_limits<uint32_t>::max()) {
        throw std::invalid_argument("n_ctx " + std::to_string(n_ctx) + " times n_seq_max " + std::to_string(n_seq_max) + " is more than llama.cpp counts: 2^32 - 1");
    }
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
        forget_next_context(); // if llama.cpp refused before it was asked for
    }
    if (!ctx) {
        fail("the context cannot be created");
    }
    read_spec();
}

Context::Context(llama_context * borrowed) :
    model(std::make_shared<Model>(const_cast<llama_model *>(llama_get_model(borrowed)))), ctx(borrowed, [](llama_context *) {}) {
    read_spec();
}

void Context::read_spec() {
    if (auto * e = engine::of(ctx.get())) {
        spec = e->conf().spec;
    }
}

void Context::check_seq(int32_t seq) const {
    if (seq < 0 || (uint32_t) seq >= n_seq_max()) {
        throw std::invalid_argument("sequence " + std::to_string(seq) + ": this context has 0 to " + std::to_string(n_seq_max() - 1));
    }
}

llama_pos Context::pos_max(int32_t seq) const {
    check_seq(seq);
    return llama_memory_seq_pos_max(mem(), seq);
}

engine & Context::need_engine() const {
    auto * e = engine::of(ctx.get());
    if (!e) {
        throw std::invalid_argument("the policy is full: nothing is evicted; name a policy when the context is created");
    }
    return *e;
}

void Context::set_adapters(std::vector<std::shared_ptr<Adapter>> used, std::vector<float> scales) {
    if (used.size() != scales.size()) {
        throw std::invalid_argument("set_adapters: each adapter has a scale");
    }
    std::vector<llama_adapter_lora *> all;
    for (const auto & a : used) {
        if (a->model->ptr != model->ptr) {
            throw std::invalid_argument("set_adapters: an adapter of another model");
        }
        all.push_back(a->ptr.get());
    }
    const busy now(*this);
    begin_call();
    if (llama_set_adapters_lora(ctx.get(), all.data(), all.size(), scales.data()) != 0) {
        fail("the adapters cannot be used");
    }
    adapters = std::move(used);
}

void Context::run(llama_batch & batch) {
    if (calls_end) {
        PyErr_SetNone(PyExc_SystemExit); // which ends a thread without a word
        throw py::error_already_set();
    }
    const busy now(*this);
    begin_call();
    n_rows = 0;
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

void Context::decode(const i32_array & tokens, int32_t seq, const std::string & logits) {
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
        std::vector<int8_t> out(nb, logits == "all");
        out[nb - 1] |= logits == "last" && i0 + nb == n;
        decode_some(tokens.data() + i0, nb, seq, out.data());
    }
    n_rows = logits == "all" ? (int32_t) n : logits == "last" ? 1 : 0;
}

void Context::decode_some(const int32_t * tokens, int32_t n, int32_t seq, int8_t * out) {
    const llama_pos p0 = pos_max(seq) + 1;
    std::vector<llama_token>    tok(tokens, tokens + n);
    std::vector<llama_pos>      pos(n);
    std::vector<int32_t>        n_seq(n, 1);
    std::vector<llama_seq_id *> ids(n, &seq);
    for (int32_t i = 0; i < n; ++i) {
        pos[i] = p0 + i;
    }
    llama_batch batch = { n, tok.data(), nullptr, pos.data(), n_seq.data(), ids.data(), out };
    run(batch);
}

void Context::decode_batch(const i32_array & tokens, const i32_array & seqs) {
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

py::array_t<float> Context::logits() const {
    if (n_rows == 0) {
        throw std::invalid_argument("no logits: decode something with logits first");
    }
    const int32_t n_vocab = llama_vocab_n_tokens(model->vocab);
    py::array_t<float> res({ n_rows, n_vocab });
    const float * src = llama_get_logits(ctx.get());
    std::copy(src, src + (size_t) n_rows*n_vocab, res.mutable_data());
    return res;
}

bool Context::remove_tail(llama_pos pos, int32_t seq) {
    check_seq(seq);
    if (pos < 0) {
        throw std::invalid_argument("remove_tail: a position is >= 0");
    }
    const busy now(*this);
    return pos > pos_max(seq) || llama_memory_seq_rm(mem(), seq, pos, -1); // what removes nothing leaves settings, too
}

void Context::clear(int32_t seq) {
    const busy now(*this);
    if (seq < 0) {
        llama_memory_clear(mem(), false);
    } else {
        check_seq(seq);
        llama_memory_seq_rm(mem(), seq, -1, -1);
    }
    n_rows = 0;
}

void Context::copy(int32_t src, int32_t dst) {
    const busy now(*this);
    check_seq(src);
    check_seq(dst);
    if (src != dst) {
        llama_memory_seq_cp(mem(), src, dst, -1, -1);
        flush_copies(ctx.get());
    }
}

} // namespace kvc
