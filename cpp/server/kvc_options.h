#pragma once

// --kv-policy and the other flags. They are kept in the environment, as LLAMA_ARG_KV_*, where the engine reads them whenever
// llama.cpp creates a context: to measure what fits, to serve, and again after the server has slept.

#include <string>

struct common_params;

struct kvc_options {
    std::string policy, budget, decode_budget, cells; // as they were given, "" if not

    static kvc_options of_environment();

    bool evicts() const { return !policy.empty() && policy != "full"; }
};

// Checks the options, fits the server's other parameters to them, and switches off, with a line in the log, what evicted tokens break.
// "" or the sentence that says what is valid.
std::string kvc_prepare(common_params & params);
