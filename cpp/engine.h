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
// On the host the rows of a head lie together (layout.cpp), so heads may keep different numbers: head h has its own
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
//   config.cpp  which policy a context gets, and which models can evict
//   engine.cpp  what a new one holds, and what its sequences hold
//   cache.cpp   llama.cpp's cache, which asks the engine
//   hooks.cpp   what happened to the cache
//   due.cpp     budgets, and when an eviction is due
//   cells.cpp   fewer cells than tokens: how many rows a layer gets, and room before each ubatch
//   layout.cpp  where the rows of layers and heads lie
//   pool.cpp    fewer cells than tokens, and layers or heads whose lengths are only known at an eviction
//   update.cpp  where evictions run
//   device.cpp  what the device that holds a layer can run
//   lanes.cpp   the model's graph: where new rows go, and attention over what each layer and head holds
//   tap.cpp     the model's graph: what attention leaves behind, query window and sums
//   attn.cpp    what some queries give to a layer's cells: attn_tiles.cpp on the CPU, attn_graph.cpp elsewhere
//   run.cpp     small graphs of ours, and work of ours on the threads that run them
//   signal.cpp  what a policy looks at, of one layer
//   fit.cpp     the queries that are to be expected
//   probe.cpp   what a probe attended to
//   past.cpp    where a recurrent state can go back to
//   output.cpp  what values become behind the output projection
//   evict.cpp   signals -> scores -> plan -> compaction of one sequence
//   state.cpp   what a saved state needs beyond llama.cpp's cells
//   resident.cpp  what of the cache is in memory

#include "config.h"
#include "graph.h"
#include "policy.h"
#include "signals.h"

#include "ggml-cpp.h"
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
class  llama_memory_recurrent;
class  llm_graph_result;
struct llm_graph_context;

namespace kvc {

struct cache_rows; // gather.h

// Why a sequence is evicted: its prompt ended; its generated tokens are over their budget; the next tokens have no
// room.
enum class cause { prompt, decode, room };

struct stats {
    int64_t n_evictions = 0;
    int64_t n_evicted   = 0;  // slots of the mean layer
    double  score_ms = 0, plan_ms = 0, compact_ms = 0;
};

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
    bool is_bounded() const;
    bool is_pooled() const { return cfg->pooled; }
    bool has_room(const llama_ubatch & ubatch) const;
    bool wants_update() const { return stale || !jobs.empty() || !due.empty(); }
    void update(llama_context * lctx);

    // -- the graph
    // Rows of llama.cpp's own view of layer ikv, for the first n_kv cells of the sequences s0 to s1.
    uint32_t n_rows(int32_t ikv, uint32_t n_kv, uint32_t s0, uint32_t s1) const;
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
    void set_window_rows(ggml_tensor * rows, const llama_ubatch * ubatch, int32_t i_reader, int32_t n_reader) const;
    void set_seen(ggml_tensor * mask, const llama_ubatch * ubatch, int32_t ikv, int32_t h, int64_t i_seq) const;
    void set_bias(ggml_tensor * bias, int32_t ikv) const;

    // -- saved states
    void     state_write_head(llama_io_write_i & io) const;
    void     state_read_head (llama_io_read_i  & io) const;
    void     state_write(llama_io_write_i & io, llama_seq_id seq_id) const;
    void     state_read (llama_io_read_i  & io, llama_seq_id seq_id);
    void     state_write_rows(llama_io_write_i & io, uint32_t s) const;
    bool     state_read_rows (llama_io_read_i  & io, uint32_t s);
    void     clear_rows(uint32_t s);

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
    llama_pos back(llama_seq_id seq_id, llama_pos pos) const; // up to pos, the last one to go on from; 0: the start alone
    llama_pos whole_from(llama_seq_id seq_id) const; // the same, whatever a recurrent state is of
    void      remember(llama_seq_id seq_id); // the recurrent state, to go back to it
    int32_t   n_layer() const;
    int32_t   n_head_kv() const { return n_hkv; }
    int32_t   n_slots(uint32_t s, int32_t ikv) const; // cells of layer ikv in use
    static size_t row_bytes(const llama_kv_cache & kv, int32_t ikv); // K and V of one cell; of a latent row, which is both
    size_t    held_bytes(uint32_t s, int32_t ikv) const; // of all rows of a layer
    size_t    signal_bytes() const;
    size_t    past_bytes() const;                     // of recurrent states that are kept
    void      count_evictions(uint32_t s, int64_t & n_evictions, int64_t & n_evicted) const;
    double    evict_ms(uint32_t s) const { return streams[s].evict_ms; }
    static size_t resident_bytes(const llama_kv_cache & kv); // of its tensors, in memory

    const config & conf() const { return *cfg; }
    stats st;

private:
    engine(std::shared_ptr<const config> cfg, const llama_model & model, const llama_cparams & cparams, llama_kv_cache & kv);

    // One sequence: n_stream == n_seq_max, so a stream is a sequence.
    struct stream {
        int32_t   n_base = 0;                   // cells of the compacted part
        std::vector<int32_t> n_kept;            // [n_layer] rows of it a layer holds
        std::vector<std::vector<int32_t>> kept; // a layer I32 [n_head_kv, n_kept] original positions, after -1s in a shorter head
        std::vector<int32_t> lacks;             // [n_layer, n_head_kv] how many -1s
        llama_pos floor = 0;                    // every head of every layer holds [floor, end)
        llama_pos seen  = 0;                    // tokens that the last eviction saw
        llama_pos gen   = -1;                   // first generated position; -1: still the prompt
        llama_pos past_end = -1;                // the recurrent state of all before it is kept; -1: none is
        std::vector<uint8_t> past;              // in here, once another token has come
        int32_t   n_prompt = 0;                 // slots of the mean layer when generation began
        std::vector<std::vector<float>> probed; // a layer F32 [n_probed, n_head_kv]: of its first slots
        std::vector<llama_token> tokens;        // [end] by position
        std::vector<span>        spans;
        std::shared_ptr<const config> cfg;      // the context's, or set_policy()'s
        budget    prompt_budget;                // of the configuration, or set_budget()'s
        budget    decode_budget;
        int64_t   n_evictions = 0;
        int64_t   n_evicted   = 0;              // slots of the mean layer
        double    evict_ms    = 0;
        std::vector<llama_pos>   win_pos;       // [window] position of the query in each ring row, -1: none
    };

    struct job { uint32_t s; cause why; int32_t n_new; };

    // Where the rows of a KV head lie, or those of all heads side by side. Bytes, but for n_rows.
    struct place {
        ggml_tensor * t;   // what views are made of
        size_t  offset;    // of its first row
        size_t  row;       // from a row to the next
        size_t  channel;   // from a channel to the next, of transposed values; else 0
        int64_t n_rows;    // that it has room for
    };
    struct region { int64_t at; int32_t n_rows; }; // of the pool: its first row
    struct lane { int32_t head, n_head; };

    // config.cpp
    static std::shared_ptr<const config> configure(const llama_model & model, const llama_context_params & params, llama_cparams & cparams);
    static void attach(std::shared_ptr<const config> cfg, const llama_model & model, const llama_cparams & cparams, llama_memory_i * mem);

    // cells.cpp
    static llama_cparams memory_cparams(const std::shared_ptr<const config> & cfg, const llama_cparams & cparams); // what the cache is built from
    static std::shared_ptr<const config> bound(std::shared_ptr<const config> cfg, const llama_model & model,
                                               const llama_context_params & params, const llama_cparams & cparams);
    static void check_memory(const std::shared_ptr<const config> & cfg, const llama_model & model,
                             const llama_context_params & params, const llama_cparams & cparams);
    int64_t n_room(uint32_t s) const;
    bool    has_room(uint32_t s, int32_t n_new) const;
    int32_t n_to_free(uint32_t s, int32_t n_new) const;

    // layout.cpp
    bool     by_head() const { return heads_apart; }              // the rows of a head lie together
    int32_t  n_parts() const { return by_head() ? n_hkv : 1; }    // of a layer, with rows of their own
    int32_t  n_slots(uint32_t s, int32_t ikv, int32_t h) const;   // of a head; those that are not empty
    uint32_t cell_begin(uint32_t s, int32_t ikv, int32_t h = 0) const; // first cell that a head holds of a sequence, its row 0
    void     count_lacks(stream & q) const;
    place    place_of(uint32_t s, int32_t ikv, int32_t h, bool values) const;
    std::vector<lane> lanes(int32_t ikv, uint32_t s0, uint32_t s1) const; // of all these sequences
    std::vector<int32_t> rows_held(uint32_t s) const; // [n_layer, n_parts]
    std::vector<bool> sides() const; // of a cache, as `values`: keys, and values unless they are a part of the keys (MLA)
    struct run_of_rows { ggml_tensor * t; size_t offset, size; };
    std::vector<run_of_rows> runs_of(uint32_t s, int32_t ikv, int32_t h, int64_t n, bool values) const; // of n rows, that lie together
    // n rows of a lane of some sequences: [head_dim, n_head, n, n_seq], or of transposed values [n, n_head, head_dim,
    // n_seq]
    ggml_tensor * view_of(ggml_context * ctx, uint32_t s0, int64_t n_seq, int32_t ikv, const lane & x, int64_t n, bool values) const;

    // pool.cpp
    void     find_pool(); // throws where layers cannot draw from one
    int32_t  n_to_share(const std::vector<int32_t> & n_held) const;
    void     lay_out(uint32_t s, const std::vector<int32_t> & n_held); // [n_layer, n_head_kv]
    void     even_out(uint32_t s);
    void     copy_rows(uint32_t s0, uint32_t s1);
    void     clear_pool(uint32_t s);

    // lanes.cpp
    ggml_tensor * mask_of_lane(llm_graph_result * res, ggml_tensor * kq_mask, uint32_t s0, int64_t i_seq, int64_t n_seq, int32_t ikv, int32_t h, int64_t n) const;
    int64_t  rows_of_lane(uint32_t s0, int64_t n_seq, int32_t ikv, int32_t h, int64_t n_kv) const; // that attention reads

    // resident.cpp
    void     give_back_rows(uint32_t s, bool all) const; // to the system; all, or those that are free

    // hooks.cpp
    void     synchronize() const;
    bool     can_seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // past.cpp
    llama_pos n_recurrent(uint32_t s) const;
    void     take_past(uint32_t s); // before another token comes
    void     check_past(uint32_t s); // throws
    bool     go_back(llama_seq_id seq_id, llama_pos p0, llama_pos p1); // of a recurrent state, which is then that of p0: false if there is none
    size_t   past_max() const;
    bool     is_back(uint32_t s) const;
    std::vector<llama_pos> ways_back(uint32_t s) const;

    // engine.cpp
    void     refuse_latent(const config & c) const; // throws
    void     reset(stream & q) const;
    uint32_t stream_of(llama_seq_id seq_id) const; // throws
    llama_pos held_from(uint32_t s) const;
    int32_t  n_cells(uint32_t s) const;
    int64_t  row_of_origin(uint32_t s, int32_t ikv, int32_t h) const;
    int64_t  n_held(uint32_t s, int32_t ikv) const;
    std::vector<int32_t> slot_pos(uint32_t s, int32_t ikv) const;

    // due.cpp
    std::vector<int32_t> frozen(uint32_t s, cause why) const;
    int32_t  target(uint32_t s, cause why, int32_t n_new, const std::vector<int32_t> & n_frozen) const;
    int64_t  n_decode(uint32_t s) const; // tokens of the answer that may stay
    llama_pos first_query(uint32_t s) const;
    bool     has_queries(uint32_t s) const;
    bool     is_over(uint32_t s, cause why, int32_t n_new, int32_t n_target) const;
    bool     has_limit(uint32_t s) const;
    int64_t  n_over(uint32_t s) const;
    bool     over_budget(uint32_t s, int32_t n_new) const;
    int32_t  n_of_each(const llama_ubatch & ubatch) const;
    void     add_room(const llama_ubatch & ubatch);
    void     check_budgets(const config & c, const budget & prompt, const budget & decode) const;
    bool     is_due(const std::vector<llama_ubatch> & ubatches); // of a batch
    bool     lacks_room(const llama_ubatch & ubatch);            // between two ubatches

    // update.cpp
    std::string why_not(const llama_batch_allocr & balloc) const; // a batch that cannot be evaluated, or ""
    void     in_update(llama_context * lctx, std::function<void()> fn);

    // evict.cpp
    int32_t  n_block() const; // rows by which layers differ: what kernels want of views off the host
    bool     run(llama_context * lctx, const job & j);
    void     score_layers(llama_context * lctx, uint32_t s, int32_t budget, std::vector<std::vector<int32_t>> & pos,
                          std::vector<std::vector<float>> & score) const;
    void     compact(llama_context * lctx, uint32_t s, const std::vector<std::vector<int32_t>> & slots, const std::vector<int32_t> & n_keep);
    std::vector<cache_rows> rows_of_part(uint32_t s, int32_t ikv, int32_t h) const;
    void     clear_free_sums(uint32_t s) const;
    void     clear_sums(uint32_t s);
    std::vector<span> sentences(const stream & q) const;

    // device.cpp
    void ask_device(int32_t ikv, int32_t n_ubatch); // throws what is missing, or finds a way around

    // tap.cpp
    void tap_queries(llm_graph_result * res, int il, ggml_tensor * q, int64_t n_seqs, ggml_tensor * sinks, float kq_scale);
    ggml_tensor * graph_sums(ggml_context * ctx, int32_t ikv, ggml_tensor * kq, int64_t s0, int32_t h0) const;
    ggml_tensor * graph_dot(ggml_context * ctx, int32_t ikv, ggml_tensor * x, ggml_tensor * w) const;

    // attn.cpp, attn_graph.cpp, attn_tiles.cpp
    ggml_tensor * graph_scores(ggml_context * ctx, uint32_t s, int32_t ikv, ggml_tensor * mask, const ring_part & p) const;
    ggml_tensor * graph_reduced(ggml_context * ctx, int32_t ikv, ggml_tensor * each, ggml_tensor * weight, bool largest) const;
    ring_part largest_part(int32_t ikv) const; // that one graph ever takes
    // Heads that have as many slots, and which of those are seen: their own slots, ascending; empty: all.
    struct watched { lane x; int32_t n_kv; const int32_t * pos; std::vector<int32_t> slots; };
    std::vector<watched> watch(uint32_t s, const layer_signals & sig, const std::vector<int32_t> & slots) const;
    // F32 [n_head, n_kv]: the weighted sum, or the largest, of what the queries give to each slot. slots: those that
    // they see, ascending, of all heads; empty: all of them.
    std::vector<float> attention_of(llama_context * lctx, uint32_t s, const layer_signals & sig, const std::vector<ring_query> & queries,
                                    bool largest, const std::vector<int32_t> & slots = {}) const;
    std::vector<float> attention_tiles(llama_context * lctx, uint32_t s, const layer_signals & sig, const watched & w,
                                       const std::vector<ring_query> & queries, bool largest) const;
    std::vector<float> attention_graph(llama_context * lctx, uint32_t s, const layer_signals & sig, const watched & w,
                                       const std::vector<ring_query> & queries, bool largest) const;
    bool has_tiles(int32_t ikv) const;
    std::vector<float> run_tiles(llama_context * lctx, uint32_t s, const layer_signals & sig, const watched & w, const lane & x,
                                 const std::vector<ring_query> & queries, const char * step) const;
    using add_row = std::function<void(int32_t h, size_t i, const float * row)>; // what query i gives in query head h: F32 [n_kv]
    void tiles_rows(llama_context * lctx, uint32_t s, const layer_signals & sig, const watched & w, const std::vector<ring_query> & queries,
                    const add_row & add) const;
    void graph_rows(llama_context * lctx, uint32_t s, const layer_signals & sig, const watched & w, const std::vector<ring_query> & queries,
                    const add_row & add) const;
    // F32 [n_head, n_query, n_kv]: of each query, in their order.
    std::vector<float> attention_rows(llama_context * lctx, uint32_t s, const layer_signals & sig, const std::vector<ring_query> & queries) const;

    // signal.cpp
    void alloc_signals(const llama_cparams & cparams);
    void find_readers(); // throws where they differ in what they read
    int32_t n_ring(int32_t ikv) const; // queries in the ring of a sequence: a window of each reader
    std::vector<ring_query> of_all_readers(int32_t ikv, const std::vector<ring_query> & queries) const; // of the first one: their mean
    std::vector<float> read_ring(uint32_t s, int32_t ikv) const; // F32 [n_ring, head_dim*n_head]
    layer_signals no_signals(uint32_t s, int32_t ikv) const;
    // whole: the keys themselves, although the policy has a graph for what it needs of them.
    layer_signals read_signals(llama_context * lctx, uint32_t s, int32_t ikv, bool whole = false) const;
    std::vector<float> score(uint32_t s, const layer_signals & sig, int32_t budget) const; // F32 [n_head_kv, n_kv], -inf where a slot is empty
    void read_attn(llama_context * lctx, uint32_t s, layer_signals & sig) const;
    std::vector<float> read_rows(uint32_t s, int32_t ikv, bool values) const; // F32 [n_head_kv, n_kv, head_dim] as they lie in the cache
    void read_values(uint32_t s, layer_signals & sig) const;
    void read_sums(uint32_t s, layer_signals & sig) const;
    void read_probed(uint32_t s, layer_signals & sig) const;

    // reduce.cpp
    ggml_tensor * graph_head(ggml_context * ctx, uint32_t s, int32_t ikv, int32_t h, bool values) const;
    std::vector<float> run_heads(llama_context * lctx, uint32_t s, int32_t ikv, llm_graph_result * graph, const std::vector<ggml_tensor *> & heads,
                                 const std::function<void()> & set_inputs) const;
    bool reduce_keys(llama_context * lctx, uint32_t s, layer_signals & sig) const; // false: the policy or the device has no graph for it
    bool reduce_values(llama_context * lctx, uint32_t s, layer_signals & sig) const;

    // probe.cpp
    std::vector<float> read_probe(llama_context * lctx, uint32_t s, int32_t ikv, int32_t n_new, int32_t n_probe, llama_pos begin,
                                  llama_pos end) const;
    std::vector<int32_t> slots_of_chunk(uint32_t s, const layer_signals & sig, llama_pos begin, llama_pos end, llama_pos n_context) const;

    // output.cpp
    void find_outputs(); // throws where the model has no plain output projection
    const std::vector<float> & gram_of(llama_context * lctx, int32_t ikv) const; // F32 [n_head, head_dim, head_dim] W_O^h' W_O^h
    std::vector<float> output_norms(llama_context * lctx, uint32_t s, int32_t ikv) const; // F32 [n_head, n_kv]
    std::vector<float> plain_values(uint32_t s, int32_t ikv) const; // read_rows(), not mixed as a quantized cache has them

    // fit.cpp
    void read_fit(llama_context * lctx, uint32_t s, layer_signals & sig) const;
    std::vector<float> read_turns(llama_context * lctx, int32_t ikv, const std::vector<llama_pos> & pos) const;

    std::shared_ptr<const config> cfg;
    const llama_model & model;
    llama_kv_cache    & kv;
    parts mem; // what the cache is part of
    int32_t n_hkv = 0;
    bool    heads_apart = false;

    std::vector<stream> streams;
    llama_context * computes = nullptr; // the cache's own, known from its first ubatch on
    std::vector<job>    due;
    std::vector<std::function<void()>> jobs;

    struct pool_rows {
        ggml_context_ptr ctx;
        ggml_tensor * k = nullptr, * v = nullptr; // [n_elem of a row, n_stream*n_rows], all of the buffer
        int64_t n_rows = 0;                       // of a sequence
        std::vector<std::vector<region>> regions; // a sequence [n_layer, n_head_kv]
    };
    pool_rows pool; // where heads draw their rows from one
    bool stale = false;           // where layers or heads differ, cells a layer reads changed outside an update: graphs must go

    std::vector<std::vector<int32_t>> readers; // [n_layer] layers of the model that read the cache of one, ascending: it, and who shares it

    // what attention was given, for the graphs of ours
    struct layer_attn { ggml_tensor * sinks = nullptr; float scale = 0; rotation turn; };
    std::vector<layer_attn> attn; // [n_layer]

    struct layer_tensors {
        ggml_tensor * win  = nullptr; // F16 or F32 [head_dim*n_head, n_ring*n_stream] ring of the last queries
        ggml_tensor * sums = nullptr; // F32 [kv_size, n_head_kv, n_stream]
        ggml_tensor * ones = nullptr; // F32 [n_ubatch*n_head] all 1/g, 1/(g*n_reader) where several layers read
        ggml_tensor * inputs = nullptr; // F32 [1, window*n_stream] ring of the squared norms of what the last queries were made from
        bool out_prod = true;         // the layer's device has it
    };
    std::vector<layer_tensors> tensors;
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;
    std::shared_ptr<std::vector<std::vector<float>>> grams; // [n_layer] gram_of(), shared by the contexts of a model

    // test only: kept slots of a layer as a per-head mask over an uncompacted cache
    bool mask_only = false;
    std::vector<std::vector<int32_t>> mask_slots; // a layer [n_head_kv, n_keep]
    int32_t mask_n = 0;
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
