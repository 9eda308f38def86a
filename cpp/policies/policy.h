#pragma once

// What an eviction method is asked, in words.
//
// The engine evicts one sequence at a time. It gathers the signals a policy declares in needs(), asks score() once
// per layer, budgets() once, and keep() once per layer and never moves a byte before the whole plan is known.
// A policy is a pure function over host arrays: no state, no clock, no model. It is asked about several layers at once.
// Errors are std::invalid_argument with a sentence that names what is valid.
//
// A *slot* is a cell of one layer and KV head, counted from the oldest token the head still holds. Before the first
// eviction slot j is position j; afterwards heads differ, and pos says which token a slot holds. Where heads_differ(),
// the first slots of a head that holds fewer than its layer are empty: position -1, no attention, keys of 0, never kept
// again.

#include "share.h"
#include "spec.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

struct ggml_context;
struct ggml_tensor;

namespace kvc {

// A probe is a text that is evaluated after the context to see what it attends to, and taken out again: what the cells
// of the context got from its queries and a KV head's query heads, on average or at most.
enum class probe { none, mean, max };

struct needs {
    int32_t window = 0;     // attention of the last `window` queries
    int32_t future = 0;     // > 0: not their attention, but a Gaussian fit of them, rotated as on average at the next `future` positions
    float   newest = 1.0f;  // their weights in the mean: 1 for the oldest, linear up to this for the newest
    bool attn_rows = false; // attention of each query of the window, not their mean
    bool    sums   = false; // attention summed over every query so far (runs with flash attention off)
    bool    keys   = false; // the keys themselves
    bool    values = false; // the norms of the values
    bool value_rows = false; // the values themselves
    bool outputs = false;   // the norms of what the values become behind the output projection
    kvc::probe probe = kvc::probe::none;
    bool chunk  = false;    // a probe's softmax: over the sinks, the part asked about and the probe itself, not over all cells
    bool plus   = false;    // a probe's attention counts |W_O v| of the cell over |h| of the query (KVzip+)
    bool    spans  = false; // units given by the caller; sentences when none are given
};

// One layer as score() sees it.
struct layer_view {
    int32_t il;        // 0 .. n_layer - 1, among the layers that evict
    int32_t n_layer;
    int32_t n_kv;      // slots
    int32_t n_head;    // query heads
    int32_t n_head_kv;
    int32_t head_dim;
    int32_t n_query;   // queries the window or the fit really had, <= needs().window
    int32_t value_dim; // of a value: head_dim in most models
    int32_t budget;    // slots a head is to keep on average; n_kv where nothing is to be evicted

    const int32_t * pos;  // I32 [n_head_kv, n_kv] original position of each slot, ascending
    const float   * attn; // F32 [n_head, n_kv] weighted mean over the window of softmax(scale * Q K^T + mask), or null
    const float   * sums; // F32 [n_head_kv, n_kv] attention summed over all queries, mean over the group's heads, or null
    const float   * keys; // F32 [n_head_kv, n_kv, head_dim], rotated as they lie in the cache, or null
    const float   * probed; // F32 [n_head_kv, n_kv] what a probe's queries gave each slot, inf where none has asked; null: no probe
    const float   * q_mean; // F32 [n_head, head_dim] mean of the fit, times the softmax scale: a logit is key . q_mean; or null
    const float   * q_cov;  // F32 [n_head, head_dim, head_dim] its covariance, times the scale squared, or null
    const float   * v_norm; // F32 [n_head_kv, n_kv] L2 norm of each slot's value, or null
    const float   * o_norm; // F32 [n_head, n_kv] L2 norm of W_O^h v, W_O^h the query head's slice of the output projection, or null
    const float   * attn_rows;  // F32 [n_head, n_query, n_kv] softmax(scale * Q K^T + mask), the oldest query first, or null
    const float   * value_rows; // F32 [n_head_kv, n_kv, value_dim], or null
    const float   * reduced;    // F32 [n_head_kv, n_out, n_kv] what reduce_keys() made of the keys, which are then null; or null
};

// One KV head, as a graph has it.
struct head_keys {
    ggml_tensor * keys;    // F32 [head_dim, n_kv]
    ggml_tensor * mean;    // F32 [head_dim, n_group] with future > 0: the fit of its query heads, else null
    ggml_tensor * cov;     // F32 [head_dim, head_dim, n_group], likewise
    bool          on_cpu;  // the graph runs there
};

struct span { int32_t begin, end; }; // original positions [begin, end)

// One layer as budgets() and keep() see it.
struct layer_plan {
    int32_t n_kv;            // slots now
    int32_t n_frozen;        // the first slots that stay whatever happens (a frozen prompt), 0 at prompt end
    const int32_t * pos;     // I32 [n_head_kv, n_kv], -1 where a slot is empty
    const float   * score;   // F32 [n_head_kv, n_kv], higher is kept longer
};

struct request {
    bool    prompt;          // tokens of the prompt are evicted; false: generated tokens are over their budget
    bool    room = false;    // because the cells are full, maybe in mid-prompt: what is always kept has to give way
    bool    at_least = false; // the budget is a ratio: never below what the policy always keeps
    int32_t n_head_kv;
    int32_t budget;          // slots to keep in a layer on average, the frozen ones included
    std::vector<layer_plan> layers;
    std::vector<span>       spans;   // ascending, disjoint; empty unless needs().spans
    std::vector<std::vector<int32_t>> heads; // [n_layer][n_head_kv] slots of each head: heads(), or empty
};

class policy {
public:
    virtual ~policy() = default;

    sharing share; // of a policy that declares share_params(): what the spec said

    virtual needs need() const = 0;

    // Slots always kept, counted in the budget: the first ones, and the last ones of a layer that keeps `budget`.
    virtual int32_t n_sink() const { return 0; }
    virtual int32_t n_recent(int32_t budget) const { (void) budget; return 0; }

    // The least kv_budget, in tokens, that means anything: sinks + window + 1 for most.
    virtual int32_t min_budget() const { return 1; }

    // True: KV heads of a layer may keep different numbers, r.budget on average; a head takes the rows it keeps. budgets()
    // says how many the longest head of each layer keeps. Only where generated tokens stay.
    virtual bool heads_differ() const { return share.heads_differ(); }

    // True: a layer's heads keep the same tokens, and have to hold the same ones.
    virtual bool heads_alike() const { return false; }

    // Slots of each head, [n_layer][n_head_kv], where they differ and are known before keep(); else empty. The default
    // does what `share` says. Off the CPU they are rounded to whole blocks: a policy whose heads differ and that does
    // not know them runs on the CPU alone.
    virtual std::vector<std::vector<int32_t>> heads(const request & r) const { return head_lengths(*this, r); }

    // Slots each layer keeps. The mean over layers is r.budget exactly; no layer asks for more than it has. The default
    // does what `share` says; a policy with another rule declares no share.
    virtual std::vector<int32_t> budgets(const request & r) const;

    // False: score() and keep() are asked one layer after the other.
    virtual bool on_any_thread() const { return true; }

    // F32 [n_head_kv, n_kv], higher is kept longer.
    virtual void score(const layer_view & v, float * out) const = 0;

    // What score() needs of the keys as a graph, which runs where they lie: F32 [n_kv, n_out]. Null: score() takes the
    // keys themselves.
    virtual ggml_tensor * reduce_keys(ggml_context * ctx, const head_keys & head) const {
        (void) ctx, (void) head;
        return nullptr;
    }

    // Slots to keep of layer il: I32 [n_head_kv, n_keep], ascending in each head. The default keeps n_frozen, n_sink()
    // and n_recent(n_keep), then the best scores; equal scores go to the older slot, and a head keeps r.heads if there
    // are any. Where heads_differ(), n_keep is the most a head may keep, with kv_cells maybe less than budgets() asked
    // for; a head that keeps fewer begins with -1s.
    virtual void keep(const request & r, int32_t il, int32_t n_keep, int32_t * out) const;
};

// Why a context that was made for one policy cannot take another; empty: it can.
std::string lacks(const policy & has, const policy & wants);

// When a method evicts generated tokens, if it does.
enum class decode_mode { none, whole, generated }; // never | all cells compete | the prompt is frozen

// One line of the table (policies/policies.cpp). CLI, server, evals and docs read it.
struct policy_info {
    const char * name;
    const char * title;       // one sentence: signal, budget, unit, variant
    const char * paper;       // arXiv number, or ""
    decode_mode  decode;
    bool         layers_differ; // budgets() gives layers different numbers, as it does where heads_differ()
    const std::vector<param_info> & (*params)();
    std::unique_ptr<policy> (*make)(const kvc::params & p);
    const char * share = nullptr; // its default (share.h); null: it cannot share, since it does not rank single tokens of a head
    const char * values = nullptr; // its default (critical.h); null: its score is no attention, which a value could weigh

    std::vector<param_info> all_params() const; // and those of sharing and of values, if it can
    bool is_own(const param_info & p, const kvc::params & given) const; // a share or values as the line has them
    std::unique_ptr<policy> make_policy(const kvc::params & p) const;
};

const std::vector<policy_info> & policy_table();

// Of the table: what a budget without a policy gets. It works on every device and knows no question; docs/results.md
// says what it is worth.
extern const char * const recommended;
const policy_info & find_policy(const std::string & name); // throws, listing the names

} // namespace kvc
