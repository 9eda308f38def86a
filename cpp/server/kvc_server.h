#pragma once

// What the server knows of its context's eviction, and what it tells of it.

#include "kvc.h"
#include "kvc_options.h"
#include "kvc_slot.h"

#include "server-common.h"

#include <memory>
#include <string>
#include <vector>

struct common_params;
struct server_prompt;
struct server_task;
struct server_task_result;

// Fixed once the model is loaded, but for the slots.
struct kvc_server {
    bool        on         = false; // the context evicts
    llama_context * ctx    = nullptr;
    bool        bounded    = false; // in fewer cells than it has tokens
    bool        has_budget = false; // of its own
    int32_t     n_cells    = 0;     // of a slot, in the mean layer
    kvc_options options;
    std::string weights; // tell one model's file from another's
    std::vector<kvc_slot> slots;

    // Takes over from the engine when a prompt ends. Switches context checkpoints off where they are of no use.
    void attach(llama_context * ctx, common_params & params);

    // Of a slot that no request uses. The reply, or why not.
    std::unique_ptr<server_task_result> compress(server_task & task, server_prompt & prompt);

    json        props() const;   // of /props; null: nothing evicts
    std::string metrics() const; // lines of /metrics, as of now
};
