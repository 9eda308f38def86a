// How small graphs of ours run, and work of ours on the threads that run graphs: threads of our own beside llama.cpp's
// would wait for the same cores.

#include "graph.h"
#include "graph_ops.h"

#include "llama-context.h"
#include "llama-graph.h"

#include "ggml-cpu.h"

#include <atomic>
#include <exception>
#include <mutex>
#include <stdexcept>

namespace kvc {

llm_graph_result * begin_graph(llama_context * lctx) {
    ggml_backend_sched_reset(lctx->get_sched());
    auto * res = lctx->get_gf_res_reserve();
    res->reset();
    return res;
}

void run_graph(llama_context * lctx, llm_graph_result * res, ggml_tensor * out, const std::function<void()> & set_inputs) {
    ggml_set_output(out);
    ggml_build_forward_expand(res->get_gf(), out);
    if (!ggml_backend_sched_alloc_graph(lctx->get_sched(), res->get_gf())) {
        throw std::runtime_error("no memory for the graph of a signal");
    }
    set_inputs();
    if (lctx->graph_compute(res->get_gf(), true) != GGML_STATUS_SUCCESS) {
        throw std::runtime_error("the graph of a signal failed");
    }
    llama_synchronize(lctx);
}

ggml_custom_op_t cpu_step(const char * name) {
    auto * dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    return (ggml_custom_op_t) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(dev), name);
}

struct shared_work {
    int32_t n;
    const std::function<void(int32_t)> & f;
    std::atomic<int32_t> next{0};
    std::mutex mutex;
    std::exception_ptr failed;
};

static void take_work(ggml_tensor *, int, int, void * data) {
    auto & work = *(shared_work *) data;
    for (int32_t i; (i = work.next++) < work.n;) {
        try {
            work.f(i);
        } catch (...) { // not through a graph
            const std::lock_guard<std::mutex> lock(work.mutex);
            work.failed = work.failed ? work.failed : std::current_exception();
        }
    }
}

void on_threads(llama_context * lctx, int32_t n, const std::function<void(int32_t)> & f) {
    if (n < 2) {
        for (int32_t i = 0; i < n; ++i) {
            f(i);
        }
        return;
    }
    shared_work work{ n, f, {}, {}, {} };
    auto * graph = begin_graph(lctx);
    auto * ctx   = graph->get_ctx();
    auto * begun = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 1); // an input: the scheduler has the CPU run what follows
    ggml_set_input(begun);
    auto * all   = ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, &begun, 1, take_work, GGML_N_TASKS_MAX, &work);
    try {
        run_graph(lctx, graph, all, []() {});
    } catch (const std::exception &) {
        // No memory, or an abort callback: half of the rows moved would be worse than one thread.
    }
    take_work(nullptr, 0, 1, &work); // what no thread has taken
    if (work.failed) {
        std::rethrow_exception(work.failed);
    }
}

} // namespace kvc
