#pragma once

// What a slot does around its prompt: policy and budgets before it, the eviction after its first token.

#include "kvc.h"
#include "kvc_request.h"

#include "server-common.h"

struct kvc_server;

struct kvc_slot {
    void init(llama_context * ctx, int32_t id); // ctx null: nothing evicts, and nothing here does anything

    void start(); // another request
    void reset(); // what the cache holds is no request's: nothing, or a restored file's

    // Of n_past tokens that the slot's cache has in common with a prompt, those that a request may use: all, where it was evicted
    // under the same rule, the prompt goes on from what was evaluated by then, and nothing is missing that lies before next, the
    // position of the first token to evaluate; else none.
    int n_reusable(int n_past, llama_pos next, const kvc_mark & mark, const kvc_request & req) const;

    // Before the prompt's first tokens, after what is not reused was removed; once a request. Throws std::runtime_error.
    void begin_prompt(const kvc_request & req);
    // After its first token was sampled, so that this one's latency is untouched; once a request. "" or why the client's budget
    // does not do for this prompt.
    std::string end_prompt(const kvc_request & req, kvc_mark & mark);
    bool is_prompt() const { return ctx && begun && !ended; } // between the two

    // Of a slot that no request uses, now: everything it holds is evicted to the budget. "kv" of the reply. Throws std::invalid_argument.
    json compress(const kvc_server & server, const kvc_request & req, kvc_mark & mark);

    // After a decode: what the cache holds, for the reports; and whether it was evicted.
    void look(const kvc_request & req, kvc_mark & mark);

    json report() const; // "kv" of a reply; null: nothing evicts
    json state() const;  // "kv" of /slots

private:
    llama_context * ctx = nullptr;
    int32_t id = 0;
    bool begun = false, ended = false;
    kvc_options used; // by the request
    kvc_seq_usage before = {}, now = {};

    void take(const kvc_request & req); // its policy, budgets and spans, and what the cache holds before them
};
