#pragma once

// Context: llama.cpp's, with the engine on its cache. Signals are looked at between calls of llama_decode.

#include "bind_model.h"
#include "kvc.h"

#include <atomic>

namespace kvc {

extern std::atomic<bool> calls_end; // the interpreter ends: nothing more is evaluated

class Context {
public:
    std::shared_ptr<Model> model;
    std::vector<std::shared_ptr<Adapter>> adapters; // in use by ctx
    std::shared_ptr<llama_context> ctx;
    std::string spec = "full";
    int32_t n_rows = 0; // rows of logits of the last decode
    double prefill_ms = 0, decode_ms = 0;

    // A call that changes what there is, until it ends. Throws within another one: amid it a policy written in Python is
    // asked, or another thread runs.
    class busy {
    public:
        explicit busy(Context & c) : c(c) {
            if (c.in_call) {
                throw std::runtime_error("a context is in one call at a time: neither a policy that it asks nor another thread can "
                    "evaluate, evict, remove or set anything meanwhile");
            }
            c.in_call = true;
        }
        ~busy() { c.in_call = false; }

    private:
        Context & c;
    };
    bool in_call = false;

    // -- bind_context.cpp
    Context(std::shared_ptr<Model> m, uint32_t n_ctx, uint32_t n_batch, uint32_t n_ubatch, uint32_t n_seq_max, int n_threads_, int n_threads_batch,
            const std::string & type_k, const std::string & type_v, const std::string & fa, bool offload_kqv, const py::object & policy,
            const std::string & kv_budget, const std::string & kv_decode_budget, const std::string & kv_cells);
    // Another program's, which frees it: valid until then.
    explicit Context(llama_context * borrowed);
    void read_spec();

    llama_memory_t mem() const { return llama_get_memory(ctx.get()); }
    uint32_t n_seq_max() const { return llama_n_seq_max(ctx.get()); }
    int32_t  n_ctx()     const { return (int32_t) llama_n_ctx_seq(ctx.get()); }

    void check_seq(int32_t seq) const;
    llama_pos pos_max(int32_t seq) const;
    engine & need_engine() const;

    void set_adapters(std::vector<std::shared_ptr<Adapter>> used, std::vector<float> scales);
    void run(llama_batch & batch);
    void decode(const i32_array & tokens, int32_t seq, const std::string & logits);
    void decode_some(const int32_t * tokens, int32_t n, int32_t seq, int8_t * out); // at most n_batch; out: which have logits
    void decode_batch(const i32_array & tokens, const i32_array & seqs);
    py::array_t<float> logits() const;
    bool remove_tail(llama_pos pos, int32_t seq);
    void clear(int32_t seq);
    void copy(int32_t src, int32_t dst);

    // -- bind_cache.cpp
    bool evict(int32_t seq, bool mask_only);
    // Evaluates a probe after what the sequence holds, lets the policy see what it attends to of positions [begin,
    // end), and takes it out again, a window of it at a time. However it ends, the probe is gone. Of the last
    // n_repeated tokens, those that the model was to repeat: (sum of their log-probabilities in nats, how many were
    // looked at).
    std::pair<double, int32_t> ask(const i32_array & tokens, int32_t seq, int32_t begin, int32_t end, int32_t n_repeated);
    void make_room(int32_t n, int32_t seq);

    py::list kept(int32_t seq) const;
    py::list scores(int32_t seq);
    py::list signals(int32_t seq);

    kvc_usage usage() const;
    py::dict stats() const;
    kvc_seq_usage seq_usage(int32_t seq) const;
    int64_t n_evictions(int32_t seq) const;
    py::dict seq_stats(int32_t seq) const;

    py::bytes save(int32_t seq);
    void load(const std::string & data, int32_t seq);
};

} // namespace kvc
