#include "kvc_server.h"

#include "kvc_file.h"
#include "kvc_metrics.h"
#include "kvc_result.h"

#include "server-task.h"

#include <stdexcept>

void kvc_server::attach(llama_context * ctx, common_params & params) {
    *this = kvc_server();
    this->ctx = ctx;
    options = kvc_options::of_environment();
    weights = kvc_fingerprint(params.model.path.c_str());
    on = kvc_guess_prompt_end(ctx, false) == 0; // a prompt's end is announced, see kvc_slot
    for (int32_t i = 0; i < params.n_parallel; ++i) {
        slots.emplace_back(on ? ctx : nullptr, i);
    }
    if (!on) {
        return;
    }
    // Checkpoints of sliding windows: the layers that evict are not in them, and have no way back.
    if (!llama_model_is_hybrid(llama_get_model(ctx))) {
        params.n_ctx_checkpoints = 0;
    }
    kvc_usage usage;
    kvc_get_usage(ctx, &usage);
    n_cells    = usage.n_cells;
    bounded    = n_cells < (int32_t) llama_n_ctx_seq(ctx);
    has_budget = bounded || !options.budget.empty() || !options.decode_budget.empty();
}

std::unique_ptr<server_task_result> kvc_server::compress(server_task & task, server_prompt & prompt) {
    const int id = task.slot_action.id_slot;
    try {
        if (id < 0 || (size_t) id >= slots.size()) {
            throw std::invalid_argument("Invalid slot ID: slots are 0 to " + std::to_string(slots.size() - 1) + ", not " + std::to_string(id));
        }
        task.params.kv.resolve(*this, prompt.tokens, 0, {});
        return kvc_compressed(task.id, id, slots[id].compress(*this, task.params.kv, prompt.checkpoints));
    } catch (const std::exception & err) {
        auto res = std::make_unique<server_task_result_error>();
        res->id       = task.id;
        res->err_type = ERROR_TYPE_INVALID_REQUEST;
        res->err_msg  = err.what();
        return res;
    }
}

std::string kvc_server::metrics() const {
    return on ? kvc_metrics(ctx, (int32_t) slots.size()) : "";
}

json kvc_server::props() const {
    if (!on) {
        return nullptr;
    }
    return {
        { "policy",        options.policy },
        { "budget",        options.budget.empty()        ? json(nullptr) : json(options.budget) },
        { "decode_budget", options.decode_budget.empty() ? json(nullptr) : json(options.decode_budget) },
        { "cells",         n_cells },
    };
}
