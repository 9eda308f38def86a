#pragma once

// What one request says of its cache: kv_policy, kv_budget, kv_decode_budget, kv_spans.

#include "kvc.h"
#include "kvc_options.h"

#include <optional>
#include <string>
#include <vector>

struct common_chat_msg_spans;
struct kvc_server;
struct server_tokens;

struct kvc_request {
    enum units_t { unsaid, messages, sentences, separator, ranges };

    std::optional<std::string> policy, budget, decode_budget; // as the engine reads them; nothing: the server's own
    units_t                    units = unsaid;
    std::string                text;  // the separator
    std::vector<kvc_span>      spans; // token ranges: the client's, or what resolve() made of the rest

    bool compress = false; // a slot, now: there is no prompt

    // What an eviction depends on beside the tokens: a cache that was evicted under one rule is of no use under another.
    std::string rule;

    // Checks all that against the context and the prompt, and finds the spans. Throws std::invalid_argument with the sentence.
    // n_predict: -1 no limit. Runs on the thread of the connection, while the context works.
    void resolve(const kvc_server & server, const server_tokens & prompt, int32_t n_predict,
                 const common_chat_msg_spans & chat);

    // What is in force for it: its own, or else the server's.
    kvc_options over(const kvc_options & own) const;

    const char * policy_arg()        const { return policy        ? policy->c_str()        : nullptr; }
    const char * budget_arg()        const { return budget        ? budget->c_str()        : nullptr; }
    const char * decode_budget_arg() const { return decode_budget ? decode_budget->c_str() : nullptr; }
};
