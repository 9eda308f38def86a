// What the device that holds a layer's cache can run. Asked once, when the context is created.
//
// Most of our graph is the scheduler's to place: a device that lacks an op has it run on the CPU, between copies. An op
// that writes into a tensor of ours has to run where that tensor is, and llama.cpp aborts where it cannot.

#include "engine.h"

#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <set>
#include <stdexcept>

namespace kvc {

static std::set<std::string> lacking;

void pretend_lacking(const std::vector<std::string> & ops) {
    lacking = { ops.begin(), ops.end() };
}

ggml_backend_dev_t device_of(const ggml_tensor * t) {
    auto * dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(t->buffer));
    return dev ? dev : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU); // plain host memory names none
}

bool on_cpu(const ggml_tensor * t) {
    return ggml_backend_dev_type(device_of(t)) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

bool can_run(ggml_backend_dev_t dev, const ggml_tensor * op) {
    return !lacking.count(ggml_op_name(op->op)) && ggml_backend_dev_supports_op(dev, op);
}

static bool is_view(const ggml_tensor * t) {
    return t->op == GGML_OP_NONE || t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE || t->op == GGML_OP_TRANSPOSE;
}

bool can_run_all(ggml_backend_dev_t dev, ggml_context * graph) {
    for (auto * op = ggml_get_first_tensor(graph); op; op = ggml_get_next_tensor(graph, op)) {
        if (!is_view(op) && !can_run(dev, op)) {
            return false;
        }
    }
    return true;
}

// The graphs of signal.cpp, in the largest shapes of a layer, and no memory behind them.
static ggml_context_ptr scratch() {
    return ggml_context_ptr(ggml_init({ 64*ggml_tensor_overhead(), nullptr, true }));
}

void engine::ask_device(int32_t ikv, int32_t n_ubatch) {
    const auto & hp = model.hparams;
    auto & t = taps.tensors[ikv];
    if (!t.win && !t.sums) {
        return;
    }
    const int64_t n_kv = kv.layers[ikv].k->ne[1], n_head = hp.n_head(kv.layers[ikv].il), n_window = taps.n_ring(ikv);
    auto * dev = device_of(kv.layers[ikv].k);

    ggml_context_ptr graph;
    for (const bool out_prod : { true, false }) {
        t.out_prod = out_prod;
        graph = scratch();
        auto * ctx = graph.get();
        if (t.win) {
            const int64_t n_row = std::min<int64_t>(n_window, n_ubatch);
            ggml_set_rows(ctx, t.win, ggml_new_tensor_2d(ctx, GGML_TYPE_F32, t.win->ne[0], n_row), ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_row));
            const auto p = scorer.largest_part(ikv);
            scorer.graph_reduced(ctx, ikv, scorer.graph_scores(ctx, 0, ikv, ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_kv, p.n_row), p),
                    ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 1, p.n_row, p.n_head*n_head/layout.n_head_kv()), cfg->need.probe == probe::max);
        }
        if (t.inputs) {
            ggml_set_rows(ctx, t.inputs, ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 1, 1), ggml_new_tensor_1d(ctx, GGML_TYPE_I64, 1));
        }
        if (t.sums) {
            taps.graph_sums(ctx, ikv, ggml_new_tensor_4d(ctx, GGML_TYPE_F32, n_kv, n_ubatch, n_head, 1), 0, 0);
        }
        bool missing = false;
        for (auto * op = ggml_get_first_tensor(ctx); op; op = ggml_get_next_tensor(ctx, op)) {
            missing |= op->op == GGML_OP_OUT_PROD && !can_run(dev, op);
        }
        if (!missing) {
            break;
        }
    }

    const std::string name = std::string(ggml_backend_dev_name(dev)) + " (" + ggml_backend_dev_description(dev) + ")";
    std::set<std::string> slow;
    if (!t.out_prod) {
        slow.insert("OUT_PROD: a transposed copy and MUL_MAT stand in for it");
    }
    for (auto * op = ggml_get_first_tensor(graph.get()); op; op = ggml_get_next_tensor(graph.get(), op)) {
        if (is_view(op) || can_run(dev, op)) {
            continue;
        }
        if (op->view_src && op->view_src->buffer) {
            throw std::invalid_argument(name + " cannot run " + ggml_op_name(op->op) + " into the attention signals of " + cfg->spec +
                    ": keep the cache on the CPU (n_gpu_layers 0, in llama.cpp's programs also --no-kv-offload)");
        }
        slow.insert(std::string(ggml_op_name(op->op)) + ": it runs on the CPU, between copies");
    }
    for (const auto & what : slow) {
        if (ikv == 0 || device_of(kv.layers[ikv - 1].k) != dev) { // once a device
            LLAMA_LOG_WARN("%s: %s has no %s\n", cfg->spec.c_str(), name.c_str(), what.c_str());
        }
    }
}

} // namespace kvc
