#pragma once

// What a slot does around its prompt: policy and budgets before it, the eviction after its first token.

#include "kvc.h"
#include "kvc_checkpoints.h"
#include "kvc_request.h"

#include "server-common.h"

struct kvc_server;
struct server_task;

struct kvc_slot {
    kvc_slot(llama_context * ctx, int32_t id); // ctx null: nothing evicts, and nothing here does anything

    void reset(); // what the cache holds is no request's: nothing, or a restored file's

    // Of n_past tokens that the slot's cache has in common with a prompt, those that a request may use: all, where it
    // was evicted under the same rule, the prompt goes on from what was evaluated by then, and nothing is missing that
    // lies before next, the position of the first token to evaluate; but for the last queries, which are evaluated again
    // where those of an answer have taken their place. Where recurrent layers cannot go back to that,
    // those before the last one they can: the state is then that of a checkpoint, if one was nearer. Else none.
    int n_reusable(int n_past, llama_pos next, const server_task & task, const kvc_checkpoints & checkpoints) const;

    // Before the prompt's first tokens, after what is not reused was removed; once a request. Throws
    // std::runtime_error.
    void begin_prompt(const server_task & task, kvc_checkpoints & checkpoints);
    // After its first token was sampled, so that this one's latency is untouched. "" or why the client's budget does
    // not do for this prompt. Begins it where the cache is a copy of another slot's, which has several answers to give.
    std::string end_prompt(const server_task & task, kvc_checkpoints & checkpoints);
    bool is_prompt(const server_task & task) const; // of a request that has a slot: true until end_prompt()

    // Of a slot that no request uses, now: everything it holds is evicted to the budget. "kv" of the reply. Throws
    // std::invalid_argument.
    json compress(const kvc_server & server, const kvc_request & req, kvc_checkpoints & checkpoints);

    // After a decode: what the cache holds, for the reports; and whether it was evicted.
    void look(const server_task & task, kvc_checkpoints & checkpoints);

    json report(const server_task & task); // "kv" of a reply; null: nothing evicts
    json state();                          // "kv" of /slots

private:
    llama_context * ctx;
    int32_t id;
    int32_t begun = -1, ended = -1; // the task whose prompt last did
    kvc_options used; // by the request
    kvc_seq_usage before = {}, now = {};

    json report()  const;
    json figures() const; // what it holds, and how it was asked for
    void drop_useless(kvc_checkpoints & checkpoints) const; // whose attention was evicted
    void look(const kvc_request & req, kvc_checkpoints & checkpoints);
    void take(const kvc_request & req); // its policy, budgets and spans, and what the cache holds before them
};
