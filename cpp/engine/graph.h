#pragma once

// Graphs of ours, and what the device that holds a layer can run of them: device.cpp, run.cpp, lanes.cpp.

#include "ggml-backend.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

struct llama_context;
struct llama_ubatch;
class  llm_graph_input_i;
class  llm_graph_result;

namespace kvc {

ggml_backend_dev_t device_of(const ggml_tensor * t);
bool on_cpu(const ggml_tensor * t);
bool can_run(ggml_backend_dev_t dev, const ggml_tensor * op); // but for what pretend_lacking() named
bool can_run_all(ggml_backend_dev_t dev, ggml_context * graph); // every op of it but views

// Layers that agree on these numbers share an input of a graph: a name for it.
std::string name_of(const char * what, const std::vector<int64_t> & numbers);

// An input that `fill` writes before each run of its graph, which ubatches of n_tokens may use again; 0: of any number.
std::unique_ptr<llm_graph_input_i> filled(int64_t n_tokens, std::function<void(const llama_ubatch *)> fill);

// A small graph of ours, between those of the model: build it, then run it for one result.
llm_graph_result * begin_graph(llama_context * lctx);
void run_graph(llama_context * lctx, llm_graph_result * res, ggml_tensor * out, const std::function<void()> & set_inputs);

// f(0) .. f(n - 1), in any order, on the threads that run graphs on the CPU. f runs no graph. Throws what one of them
// throws.
void on_threads(llama_context * lctx, int32_t n, const std::function<void(int32_t)> & f);

// Test only: from now on no device runs these ops, by their names in ggml. The ops themselves go on to work.
void pretend_lacking(const std::vector<std::string> & ops);

} // namespace kvc
