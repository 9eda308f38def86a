#include "kvc_server.h"

#include "kvc_file.h"

void kvc_server::attach(llama_context * ctx, const std::string & model_path) {
    *this = kvc_server();
    this->ctx = ctx;
    options = kvc_options::of_environment();
    weights = kvc_fingerprint(model_path.c_str());
    on = kvc_guess_prompt_end(ctx, false) == 0; // a prompt's end is announced, see kvc_slot
    if (!on) {
        return;
    }
    kvc_usage usage;
    kvc_get_usage(ctx, &usage);
    n_cells    = usage.n_cells;
    bounded    = n_cells < (int32_t) llama_n_ctx_seq(ctx);
    has_budget = bounded || !options.budget.empty() || !options.decode_budget.empty();
}

json kvc_server::props() const {
    return {
        { "policy",        options.policy },
        { "budget",        options.budget.empty()        ? json(nullptr) : json(options.budget) },
        { "decode_budget", options.decode_budget.empty() ? json(nullptr) : json(options.decode_budget) },
        { "cells",         n_cells },
    };
}
