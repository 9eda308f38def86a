#pragma once

// The engine: one per llama_kv_cache that evicts. llama.cpp's side is hooks (third_party/patches/0001-kvc-hooks.patch);
// what they call is here.
//
// After an eviction layer l holds n_kept[l] rows, which stand for cells [n_base - n_kept[l], n_base): right-aligned, so
// that the next token takes the same cell in every layer and llama.cpp's one cell table still serves all. Sequences
// differ in what their layers hold: attention reads as many rows as the longest of a batch has, and each masks what it
// lacks. The rows themselves begin at 0 of the layer's tensors: row = cell - cell_begin(layer). Each KV head of a layer
// keeps rows of its own. Keys keep the RoPE position they were written with.
//
// Where the rows of a head lie together (layout.cpp), heads may keep different numbers: head h has its own
// beginning, row = cell - cell_begin(layer, h). Neighbouring heads of one length are a *lane*, which attention takes in
// one call. What is counted in slots is rectangular all the same, [n_head_kv, n_slots] of the longest head: the first
// slots of a shorter one are empty (position -1), and no row stands for them.
//
//   position  of a token in its sequence: 0, 1, 2 ...
//   cell      of llama.cpp's table, one for all layers; behind an eviction cells are renumbered
//   slot      what a policy ranks: a cell of one layer and KV head, counted from the oldest that the layer holds
//   row       where a slot's key and value lie, counted from the head's first
//   lane      neighbouring KV heads of a layer that have as many rows
//
// What is in parts, each with its header and what it needs of those before it:
//
//   sequence   what a sequence holds and was asked for
//   layout     where the rows of layers and heads lie: layout.cpp, pool.cpp, resident.cpp
//   taps       what attention leaves behind, query window and sums: taps.cpp, tap.cpp
//   scorer     what a policy looks at, and its scores: signal.cpp, attn*.cpp, reduce.cpp, fit.cpp, heard.cpp, output.cpp
//   evictor    limits.cpp, what a sequence may hold; evict.cpp, scores -> plan -> compaction; plan.cpp, its checks
//   engine     what llama.cpp and callers of ours ask:
//
//     config.cpp  which policy a context gets, and which models can evict; cells.cpp, with fewer cells than tokens
//     engine.cpp  what a new one holds, and from where a sequence can go on
//     cache.cpp   llama.cpp's cache, which asks the engine
//     hooks.cpp   what happened to the cache
//     due.cpp     budgets, and when an eviction is due
//     update.cpp  where evictions run
//     device.cpp  what the device that holds a layer can run
//     lanes.cpp   the model's graph: where new rows go, and attention over what each layer and head holds
//     probe.cpp   a text that is evaluated to see what it attends to, and taken out again
//     past.cpp    where a recurrent state can go back to
//     state.cpp   what a saved state needs beyond llama.cpp's cells

#include "config.h"
#include "evictor.h"
#include "graph.h"
#include "layout.h"
#include "policy.h"
#include "scorer.h"
#include "sequence.h"
#include "taps.h"

#include "llama.h"

#include <functional>
#include <memory>
#include <string>
#include <vector>

struct llama_cparams;
struct llama_memory_i;
struct llama_memory_params;
struct llama_model;
struct llama_ubatch;
class  llama_batch_allocr;
class  llama_io_read_i;
class  llama_io_write_i;
class  llama_kv_cache;
class  llm_graph_result;
struct llm_graph_context;

namespace kvc {

class engine {
public:
    // -- set-up

    // What model.create_memory() gives, with an engine where the context that is being created has a policy: of this
    // thread's next_context(), else of the environment. Turns flash attention off where the policy needs attention sums
    // and the user did not ask for it. Throws std::invalid_argument / std::runtime_error, which fail the creation.
    static llama_memory_i * create_memory(const llama_model & model, const llama_context_params & params, const llama_memory_params & mparams,
                                          llama_cparams & cparams);

    // -- what happened to the cache
    void      on_clear();
    static bool seq_rm(llama_memory_i * mem, llama_seq_id seq_id, llama_pos p0, llama_pos p1); // of all its parts, or of none
    bool      on_seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1); // false: refused, nothing may change
    bool      on_seq_cp(uint32_t s0, uint32_t s1); // false: llama.cpp copies keys and values at its next update
    void      on_ubatch(const llama_ubatch & ubatch);
    void      refuse_shift(const char * what) const;
    llama_pos pos_min(uint32_t s, llama_pos p0) const;

    // -- evictions happen in llama_context::memory_update(), which knows to drop the graphs of before
    static int  before_batch (llama_context * lctx, llama_batch_allocr & balloc); // 0, or what llama_decode() returns
    static bool before_ubatch(llama_context * lctx, const llama_ubatch & ubatch); // false: there is no room for it
    bool has_room(const llama_ubatch & ubatch) const;
    bool wants_update() const { return stale || !jobs.empty() || !due.empty(); }
    void update(llama_context * lctx);

    // -- the graph
    // Where the keys or values of new tokens go: idxs, llama.cpp's cells, where the layer's rows are those, else an
    // input of ours.
    ggml_tensor * build_rows(llm_graph_result * res, int il, ggml_tensor * idxs, bool values) const;
    // Writes new keys, or values that are not transposed, F32 [head_dim, n_head_kv, n_tokens].
    ggml_tensor * store(ggml_context * ctx, int32_t ikv, ggml_tensor * cur, ggml_tensor * rows, bool values) const;
    // What build_attn_mha() gives, of the sequences from s0 on. k, v: as llama.cpp reads them.
    ggml_tensor * build_attn(const llm_graph_context & graph, uint32_t s0, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b,
                             ggml_tensor * kq_mask, ggml_tensor * sinks, ggml_tensor * v_mla, float kq_scale, int il);
    static uint32_t n_more_nodes(llama_memory_i * mem); // of a graph, beyond those that llama.cpp counts on
    void set_cache_rows(ggml_tensor * rows, const llama_ubatch * ubatch, int32_t ikv, bool trans) const;
    void set_seen(ggml_tensor * mask, const llama_ubatch * ubatch, int32_t ikv, int32_t h, int64_t i_seq) const;
    void set_bias(ggml_tensor * bias, int32_t ikv) const;

    // -- saved states
    void     state_write_head(llama_io_write_i & io) const;
    void     state_read_head (llama_io_read_i  & io) const;
    void     state_write(llama_io_write_i & io, llama_seq_id seq_id) const;
    void     state_read (llama_io_read_i  & io, llama_seq_id seq_id);
    void     state_write_rows(llama_io_write_i & io, uint32_t s) const;
    bool     state_read_rows (llama_io_read_i  & io, uint32_t s);
    void     clear_rows(uint32_t s) { layout.clear_rows(s); } // of a state that could not be read

    // -- callers of ours (include/kvc.h, bindings). All throw.
    static engine * of(llama_context * lctx); // null: the context does not evict
    void check_budget(const budget & prompt, const budget & decode) const;
    void set_budget(llama_seq_id seq_id, const budget & prompt, const budget & decode); // until the sequence is emptied
    void set_spans(llama_seq_id seq_id, std::vector<span> spans);
    void set_guess(bool guess);
    void set_policy(llama_seq_id seq_id, const char * policy, const char * prompt, const char * decode); // until the sequence is emptied
    // What set_policy() would give a sequence: another policy on the signals and cells that the context has, budgets of
    // its own. Null: the context's own. Reads nothing that changes.
    std::shared_ptr<const config> variant(const char * policy, const char * prompt, const char * decode) const;
    void begin_prompt(llama_seq_id seq_id); // another prompt follows: what was generated belongs to it
    void end_prompt(llama_seq_id seq_id);
    bool evict(llama_context * lctx, llama_seq_id seq_id, bool mask_only = false); // false: nothing was over budget
    // A probe about positions [begin, end) is evaluated after the context, at most a window of it at a time: what the
    // last n_new of its n_probe tokens so far gave to the slots before it is added to `heard`, a layer F32 [n_head,
    // n_kv].
    void listen(llama_context * lctx, llama_seq_id seq_id, int32_t n_new, int32_t n_probe, llama_pos begin, llama_pos end,
                std::vector<std::vector<float>> & heard);
    // The probe is removed, and what was heard of positions [begin, end) is kept for the policy.
    void take_out(llama_context * lctx, llama_seq_id seq_id, int32_t n_probe, llama_pos begin, llama_pos end,
                  const std::vector<std::vector<float>> & heard);
    void make_room(llama_context * lctx, llama_seq_id seq_id, int32_t n_new);
    bool has_room(llama_seq_id seq_id, int32_t n_new) const;
    int32_t n_until_eviction(llama_seq_id seq_id) const; // as many tokens of an answer can be evaluated at once as if one by one
    std::vector<layer_signals>      signals(llama_context * lctx, llama_seq_id seq_id);
    std::vector<std::vector<float>> scores (llama_context * lctx, llama_seq_id seq_id);
    std::vector<int32_t>            kept(llama_seq_id seq_id, int32_t ikv) const; // I32 [n_head_kv, n] positions, -1: empty
    llama_pos floor(llama_seq_id seq_id) const; // first position to go on from, once what follows it was removed
    llama_pos heard_from(llama_seq_id seq_id, llama_pos pos, llama_pos end, const char * policy) const;
    llama_pos back(llama_seq_id seq_id, llama_pos pos) const; // up to pos, the last one to go on from; 0: the start alone
    llama_pos whole_from(llama_seq_id seq_id) const; // the same, whatever a recurrent state is of
    void      remember(llama_seq_id seq_id); // the recurrent state, to go back to it
    size_t    past_bytes() const;                     // of recurrent states that are kept
    void      count_evictions(uint32_t s, int64_t & n_evictions, int64_t & n_evicted) const;
    double    evict_ms(uint32_t s) const { return sequences[s].evict_ms; }

    const config & conf() const { return *cfg; }
    const kvc::layout & rows() const { return layout; }
    size_t signal_bytes() const { return taps.n_bytes(); }
    const stats & st() const { return evictor.st; }

private:
    engine(std::shared_ptr<const config> cfg, const llama_model & model, const llama_cparams & cparams, llama_kv_cache & kv);

    // config.cpp
    static std::shared_ptr<const config> configure(const llama_model & model, const llama_context_params & params, llama_cparams & cparams);
    static void attach(std::shared_ptr<const config> cfg, const llama_model & model, const llama_cparams & cparams, llama_memory_i * mem);

    // engine.cpp
    static void refuse_latent(const config & c, const llama_model & model, const llama_kv_cache & kv); // throws
    void     reset(sequence & q) const;
    uint32_t stream_of(llama_seq_id seq_id) const; // throws
    llama_pos held_from(uint32_t s) const;

    // hooks.cpp
    void     synchronize() const;
    void     empty(uint32_t s); // as it was before its first token
    bool     can_seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // past.cpp
    llama_pos n_recurrent(uint32_t s) const;
    void     take_past(uint32_t s); // before another token comes
    void     check_past(uint32_t s); // throws
    bool     go_back(llama_seq_id seq_id, llama_pos p0, llama_pos p1); // of a recurrent state, which is then that of p0: false if there is none
    size_t   past_max() const;
    bool     is_back(uint32_t s) const;
    std::vector<llama_pos> ways_back(uint32_t s) const;

    // due.cpp
    int32_t  n_of_each(const llama_ubatch & ubatch) const;
    void     add_room(const llama_ubatch & ubatch);
    void     check_budgets(const config & c, const budget & prompt, const budget & decode) const;
    bool     is_due(const std::vector<llama_ubatch> & ubatches); // of a batch
    bool     lacks_room(const llama_ubatch & ubatch);            // between two ubatches

    // update.cpp
    std::string why_not(const llama_batch_allocr & balloc) const; // a batch that cannot be evaluated, or ""
    void     in_update(llama_context * lctx, std::function<void()> fn);

    // device.cpp
    void     ask_device(int32_t ikv, int32_t n_ubatch); // throws what is missing, or finds a way around

    // lanes.cpp
    ggml_tensor * mask_of_lane(llm_graph_result * res, ggml_tensor * kq_mask, uint32_t s0, int64_t i_seq, int64_t n_seq, int32_t ikv, int32_t h, int64_t n) const;

    std::shared_ptr<const config> cfg;
    bool guess; // cfg's, or set_guess()'s
    const llama_model & model;
    llama_kv_cache    & kv;
    parts mem; // what the cache is part of

    std::vector<sequence> sequences;
    kvc::layout  layout;
    kvc::taps    taps;
    kvc::scorer  scorer;
    kvc::evictor evictor;

    llama_context * computes = nullptr; // the cache's own, known from its first ubatch on
    std::vector<job>    due;
    std::vector<std::function<void()>> jobs;
    bool stale; // where layers or heads differ, cells a layer reads changed outside an update: graphs must go
};

// The last sentence an engine of this thread had to say where no exception could pass (llama_decode, state loading).
std::string & last_error();

llama_kv_cache * cache_of(llama_context * lctx);

int32_t n_head_kv_of(llama_context * lctx, int32_t ikv); // KV heads of a layer of its cache

// Runs the copies between sequences that llama.cpp has put off to the next decode: a state saved or loaded before that
// decode would be of the time before them.
void flush_copies(llama_context * lctx);

bool uses_flash_attn(llama_context * lctx);

} // namespace kvc
