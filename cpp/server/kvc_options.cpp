#include "kvc_options.h"

#include "kvc.h"

#include "common.h"
#include "log.h"

#include <cstdlib>

static std::string env(const char * name) {
    const char * value = getenv(name);
    return value ? value : "";
}

kvc_options kvc_options::of_environment() {
    return { env("LLAMA_ARG_KV_POLICY"), env("LLAMA_ARG_KV_BUDGET"), env("LLAMA_ARG_KV_DECODE_BUDGET"), env("LLAMA_ARG_KV_CELLS") };
}

std::string kvc_prepare(common_params & params) {
    auto opt = kvc_options::of_environment();
    if (opt.policy.empty() && !(opt.budget.empty() && opt.decode_budget.empty() && opt.cells.empty())) {
        opt.policy = kvc_recommended_policy();
        setenv("LLAMA_ARG_KV_POLICY", opt.policy.c_str(), 1);
        LOG_INF("kvc: --kv-policy %s, the recommended one for a budget without a policy\n", opt.policy.c_str());
    }
    const std::string policy = opt.policy.empty() ? "full" : opt.policy;
    if (kvc_check_config(policy.c_str(), opt.budget.c_str(), opt.decode_budget.c_str(), opt.cells.c_str()) < 0) {
        return kvc_last_error();
    }
    if (!opt.evicts()) {
        return "";
    }
    const std::string name = policy.substr(0, policy.find(':'));
    if (name == "finch" || name == "kvzip") {
        return "--kv-policy " + name + ": it asks questions of its own between the parts of a prompt, which a server does not: use keydiff or snapkv";
    }
    if (params.embedding) {
        return "--kv-policy: an embedding or a rerank score is made of all tokens of a text at once, so nothing can be evicted: "
               "leave out --embeddings and --reranking, or --kv-policy";
    }
    // Eviction needs a stream for each slot, and streams do not share cells as llama.cpp's automatic slots do.
    if (params.n_parallel < 0) {
        LOG_INF("kvc: one slot with the whole context; -np N for more, each with an N-th of -c\n");
        params.n_parallel = 1;
    }
    if (params.kv_unified && params.n_parallel > 1) {
        return "--kv-unified: slots that share cells cannot evict: leave it out";
    }
    LOG_INF("kvc: no context shift or cache reuse, and context checkpoints of recurrent states alone: positions stay, and what was evicted is gone\n");
    if (params.speculative.types != common_params_speculative().types || params.speculative.has_dft()) {
        LOG_INF("kvc: speculative decoding is off: drafts would change when evictions happen\n");
        params.speculative = common_params_speculative();
    }
    return "";
}
