#pragma once

// What the server knows of its context's eviction, and what it tells of it.

#include "kvc.h"
#include "kvc_options.h"

#include "server-common.h"

// Fixed once the model is loaded.
struct kvc_server {
    bool        on         = false; // the context evicts
    llama_context * ctx    = nullptr;
    bool        bounded    = false; // in fewer cells than it has tokens
    bool        has_budget = false; // of its own
    int32_t     n_cells    = 0;     // of a slot, in the mean layer
    kvc_options options;
    std::string weights; // tell one model's file from another's

    void attach(llama_context * ctx, const std::string & model_path); // takes over from the engine when a prompt ends

    json props() const; // of /props
};
