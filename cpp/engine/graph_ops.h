#pragma once

// Small pieces of graphs. ggml's CPU backend has one thread add up rows, and its products of short rows end with many
// sums across a vector: there, a product with ones and a step of our own (ggml/attn_scores.h) stand in.

#include "ggml.h"

#include <vector>

namespace kvc {

// A step of ggml/attn_scores.h, "kvc_attn_tiles" for example, for ggml_custom_4d() on the CPU.
ggml_custom_op_t cpu_step(const char * name);

// A node that is such a step: F32 [n0, n1].
inline ggml_tensor * graph_step(ggml_context * ctx, const char * name, int64_t n0, int64_t n1, std::vector<ggml_tensor *> args) {
    return ggml_custom_4d(ctx, GGML_TYPE_F32, n0, n1, 1, 1, args.data(), (int) args.size(), cpu_step(name), GGML_N_TASKS_MAX, nullptr);
}

// |x_j|^2: x F32 [n, m] -> F32 [m, 1].
inline ggml_tensor * graph_squares(ggml_context * ctx, ggml_tensor * x, bool on_cpu) {
    auto * squares = ggml_mul(ctx, x, x);
    if (!on_cpu) {
        return ggml_reshape_2d(ctx, ggml_sum_rows(ctx, squares), x->ne[1], 1);
    }
    return ggml_mul_mat(ctx, squares, ggml_fill(ctx, ggml_new_tensor_2d(ctx, GGML_TYPE_F32, x->ne[0], 1), 1.0f));
}

// x_j' C x_j, C symmetric: c F32 [n, n, n_form], x F32 [n, m] -> F32 [m, n_form].
inline ggml_tensor * graph_forms(ggml_context * ctx, ggml_tensor * c, ggml_tensor * x, bool on_cpu) {
    if (on_cpu) {
        return graph_step(ctx, "kvc_forms", x->ne[1], c->ne[2], { c, x });
    }
    ggml_tensor * all = nullptr;
    for (int64_t i = 0; i < c->ne[2]; ++i) {
        auto * cx = ggml_mul_mat(ctx, ggml_view_2d(ctx, c, c->ne[0], c->ne[1], c->nb[1], i*c->nb[2]), x);
        ggml_prec_set_acc(cx, GGML_PREC_F32);
        auto * form = ggml_reshape_2d(ctx, ggml_sum_rows(ctx, ggml_mul(ctx, cx, x)), x->ne[1], 1);
        all = all ? ggml_concat(ctx, all, form, 1) : form;
    }
    return all;
}

} // namespace kvc
