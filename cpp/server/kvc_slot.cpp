#include "kvc_slot.h"

#include "kvc_server.h"

#include "server-task.h"

#include "log.h"

#include <algorithm>
#include <stdexcept>

static void check(int32_t res) {
    if (res < 0) {
        throw std::runtime_error(kvc_last_error());
    }
}

kvc_slot::kvc_slot(llama_context * ctx, int32_t id) : ctx(ctx), id(id) {
    reset();
}

void kvc_slot::reset() {
    if (!ctx) {
        return;
    }
    used = kvc_options::of_environment();
    check(kvc_get_seq_usage(ctx, id, &before));
    now = before;
}

int kvc_slot::n_reusable(int n_past, llama_pos next, const server_task & task, const kvc_checkpoints & checkpoints) const {
    if (!ctx || n_past == 0) {
        return n_past;
    }
    const auto & mark = checkpoints.mark;
    if (!mark.rule.empty() && mark.rule != task.params.kv.rule) {
        LOG_INF("kvc: slot %d was evicted under another policy, budget or spans: its prompt is evaluated from the start\n", id);
        return 0;
    }
    if (n_past < mark.n_tokens) {
        LOG_INF("kvc: slot %d was evicted for another prompt, which has %d tokens in common: this one is evaluated from the start\n", id, n_past);
        return 0;
    }
    const llama_pos asked = next;
    const int n_new = task.n_tokens() - std::min(n_past, task.n_tokens() - 1);
    if (mark.rule.empty() || n_past < task.n_tokens()) { // else it was evicted for this prompt
        next = kvc_heard_from(ctx, id, asked, asked + n_new, task.params.kv.policy_arg());
    }
    const llama_pos back = kvc_back(ctx, id, next), first = std::max(back + 1, kvc_whole_from(ctx, id));
    const auto it = back == next ? checkpoints.rend() : std::find_if(checkpoints.rbegin(), checkpoints.rend(),
        [&](const auto & c) { return c.pos_max + 1 >= first && c.pos_max < next; });
    if (it != checkpoints.rend()) {
        it->load_tgt(ctx, id, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY);
        LOG_INF("kvc: slot %d goes on from a checkpoint, after token %d of %d\n", id, (int) it->n_tokens, n_past);
        return (int) it->n_tokens;
    }
    if (back < asked) {
        LOG_INF("kvc: slot %d lacks what was evicted or left a sliding window, the last queries, or a recurrent state of the past, and this prompt "
            "goes on from token %d: it is evaluated from token %d\n", id, asked, back);
        return std::max(back, 0);
    }
    return n_past;
}

void kvc_slot::take(const kvc_request & req) {
    used = req.over(kvc_options::of_environment());
    check(kvc_set_policy(ctx, id, req.policy_arg(), req.budget_arg(), req.decode_budget_arg()));
    check(kvc_set_spans(ctx, id, req.spans.data(), req.spans.size()));
    check(kvc_get_seq_usage(ctx, id, &before));
    now = before;
}

void kvc_slot::begin_prompt(const server_task & task, kvc_checkpoints & checkpoints) {
    if (!ctx || begun == task.id) {
        return;
    }
    begun = task.id;
    check(kvc_begin_prompt(ctx, id));
    take(task.params.kv);
    if (before.n_tokens == 0) {
        checkpoints.mark.clear();
    }
}

bool kvc_slot::is_prompt(const server_task & task) const {
    return ctx && ended != task.id;
}

void kvc_slot::drop_useless(kvc_checkpoints & checkpoints) const {
    const llama_pos first = kvc_whole_from(ctx, id);
    checkpoints.remove_if([&](const auto & c) { return c.pos_max + 1 < first; });
}

std::string kvc_slot::end_prompt(const server_task & task, kvc_checkpoints & checkpoints) {
    begin_prompt(task, checkpoints);
    ended = task.id;
    if (kvc_evict(ctx, id) < 0) {
        return kvc_last_error();
    }
    check(kvc_end_prompt(ctx, id));
    look(task, checkpoints);
    drop_useless(checkpoints);
    return "";
}

json kvc_slot::compress(const kvc_server & server, const kvc_request & req, kvc_checkpoints & checkpoints) {
    const auto asked = req.over(server.options);
    if (!ctx) {
        throw std::invalid_argument("compress: this server was started without --kv-policy, so its cache keeps every token");
    }
    if (asked.policy == "full") {
        throw std::invalid_argument("compress: kv_policy full keeps every token: name one that evicts, such as \"keydiff\"");
    }
    if (asked.budget.empty() && !server.bounded) {
        throw std::invalid_argument("compress: there is nothing to compress to: give kv_budget (tokens, or a retained ratio in (0, 1])");
    }
    reset();
    if (now.n_tokens == 0) {
        throw std::invalid_argument("compress: slot " + std::to_string(id) + " is empty: evaluate a prompt in it, as with id_slot " +
            std::to_string(id) + " and n_predict 0, or restore a file");
    }
    take(req);
    if (kvc_evict(ctx, id) < 0) {
        throw std::invalid_argument(kvc_last_error());
    }
    look(req, checkpoints);
    drop_useless(checkpoints);
    return report();
}

void kvc_slot::look(const server_task & task, kvc_checkpoints & checkpoints) {
    if (ctx && begun == task.id) {
        look(task.params.kv, checkpoints);
    }
}

void kvc_slot::look(const kvc_request & req, kvc_checkpoints & checkpoints) {
    const int64_t n_evictions = now.n_evictions;
    check(kvc_get_seq_usage(ctx, id, &now));
    if (now.n_evictions > n_evictions) {
        checkpoints.mark = { req.rule, now.n_tokens };
    }
}

json kvc_slot::report(const server_task & task) {
    if (ctx && begun != task.id) { // nothing of it was evaluated
        reset();
        used = task.params.kv.over(used);
    }
    return report();
}

json kvc_slot::report() const {
    if (!ctx) {
        return nullptr;
    }
    json res = figures();
    res["n_evicted"]   = now.n_evicted   - before.n_evicted;
    res["n_evictions"] = now.n_evictions - before.n_evictions;
    res["evict_ms"]    = now.evict_ms    - before.evict_ms;
    return res;
}

json kvc_slot::state() {
    if (!ctx) {
        return nullptr;
    }
    kvc_seq_usage there;
    check(kvc_get_seq_usage(ctx, id, &there));
    if (there.n_tokens == 0) { // llama-server has cleared it
        reset();
    }
    return figures();
}

json kvc_slot::figures() const {
    return {
        { "policy",        used.policy },
        { "budget",        used.budget.empty()        ? json(nullptr) : json(used.budget) },
        { "decode_budget", used.decode_budget.empty() ? json(nullptr) : json(used.decode_budget) },
        { "n_tokens",      now.n_tokens },
        { "n_kept",        now.n_cells },
        { "bytes",         now.bytes_used },
        { "bytes_full",    now.bytes_full },
    };
}
