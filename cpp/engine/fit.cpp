// The queries that are to be expected: a Gaussian fit of those in the ring, each turned from its own position to the
// mean of the positions to come.

#include "graph.h"
#include "scorer.h"

#include "llama-context.h"
#include "llama-graph.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <complex>
#include <cstring>
#include <stdexcept>

namespace kvc {

// Did a rope follow the last matrix product before t?
static bool has_rope(const ggml_tensor * t) {
    if (!t || t->op == GGML_OP_NONE || t->op == GGML_OP_MUL_MAT) {
        return false;
    }
    return t->op == GGML_OP_ROPE || std::any_of(t->src, t->src + GGML_MAX_SRC, has_rope);
}

// From what attention multiplies with keys back to the rope. In between, a query may be scaled as a whole: a rotation
// does not mind.
bool rotation::find(const ggml_tensor * q, rotation & res) {
    res = rotation();
    const ggml_tensor * mixed = q->op == GGML_OP_RESHAPE ? q->src[0] : nullptr;
    if (mixed && mixed->op == GGML_OP_MUL_MAT && strcmp(mixed->src[0]->name, "attn_inp_k_rot") == 0) {
        res.n_hadamard = (int32_t) mixed->src[0]->ne[0];
        q = mixed->src[1];
    }
    for (; has_rope(q); q = q->src[0]) {
        const bool reshaped = q->op == GGML_OP_RESHAPE || q->op == GGML_OP_CONT || (q->op == GGML_OP_VIEW && ggml_are_same_shape(q, q->src[0]));
        const bool scaled   = q->op == GGML_OP_SCALE || q->op == GGML_OP_RMS_NORM || (q->op == GGML_OP_MUL && q->src[1]->ne[0] == 1);
        if (q->op == GGML_OP_ROPE) {
            memcpy(res.params, q->op_params, sizeof(res.params));
            res.factors = q->src[2];
            res.rope    = true;
            const int32_t mode = res.params[2], offset = res.params[15];
            const bool known = mode == GGML_ROPE_TYPE_NORMAL || mode == GGML_ROPE_TYPE_NEOX || mode == GGML_ROPE_TYPE_MROPE || mode == GGML_ROPE_TYPE_IMROPE;
            return known && offset == 0;
        }
        if (!reshaped && !scaled) {
            return false;
        }
    }
    return true;
}

// What llama.cpp's rope makes of pairs (1, 0) at each position, scaling and all: (cos, sin) where the pair lies.
std::vector<float> scorer::read_turns(llama_context * lctx, int32_t ikv, const std::vector<llama_pos> & pos) const {
    const auto & turn = taps.attn[ikv].turn;
    const int64_t n_dim = model.hparams.n_embd_head_k(kv.layers[ikv].il), n_rot = turn.params[1];
    const bool neox = turn.pairs_apart();
    std::vector<llama_pos> parts = pos;
    if (turn.params[2] & GGML_ROPE_TYPE_MROPE) { // of a text: the same in all parts, and 0 in the last
        parts.insert(parts.end(), pos.begin(), pos.end());
        parts.insert(parts.end(), pos.begin(), pos.end());
        parts.resize(GGML_MROPE_SECTIONS*pos.size(), 0);
    }
    std::vector<float> unit(n_dim*pos.size(), 0.0f); // F32 [n_pos, head_dim]
    for (size_t i = 0; i < unit.size(); ++i) {
        unit[i] = neox ? (int64_t) i % n_dim < n_rot/2 : i % 2 == 0;
    }

    auto * res = begin_graph(lctx);
    auto * ctx = res->get_ctx();
    auto * x = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_dim, 1, pos.size());
    auto * p = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, parts.size());
    ggml_set_input(x);
    ggml_set_input(p);
    auto * out = ggml_rope_multi(ctx, x, p, nullptr, (int) n_rot, nullptr, turn.params[2], 0, 0, 1, 0, 1, 0, 0); // the rest of its numbers are:
    memcpy(out->op_params, turn.params, sizeof(turn.params));
    out->src[2] = turn.factors;
    run_graph(lctx, res, out, [&]() {
        ggml_backend_tensor_set(x, unit.data(), 0, ggml_nbytes(x));
        ggml_backend_tensor_set(p, parts.data(), 0, ggml_nbytes(p));
    });
    ggml_backend_tensor_get(out, unit.data(), 0, ggml_nbytes(out));
    return unit;
}

// y = H x for each block of a row; H is its own inverse.
static void mix(const std::vector<float> & hadamard, int32_t n, float * row, int32_t n_dim) {
    std::vector<float> x(row, row + n_dim);
    std::fill(row, row + n_dim, 0.0f);
    for (int32_t i = 0; i < n_dim; ++i) {
        for (int32_t k = 0; k < n; ++k) {
            row[i/n*n + k] += x[i]*hadamard[(size_t) (i % n)*n + k];
        }
    }
}

void scorer::read_fit(llama_context * lctx, uint32_t s, layer_signals & sig) const {
    const auto & q    = sequences[s];
    const auto & turn = taps.attn[sig.il].turn;
    const int32_t n_dim = sig.head_dim, n_window = cfg->need.window;

    std::vector<int32_t>   rows; // of the ring; the first tokens' queries are like no others
    std::vector<llama_pos> pos;
    for (int32_t r = 0; r < n_window; ++r) {
        if (q.win_pos[r] >= std::max(q.cfg->pol->n_sink(), (int32_t) q.tokens.size() - q.cfg->need.window)) {
            rows.push_back(r);
            pos.push_back(q.win_pos[r]);
        }
    }
    const size_t n = rows.size();
    sig.n_query = (int32_t) n;
    if (n == 0) {
        throw std::invalid_argument("there is no query to fit: at least one token after the sinks has to be evaluated, and not be removed");
    }

    // one number for each query and pair: from its position to the mean of those to come
    using complex = std::complex<double>;
    const int32_t n_pair = turn.rope ? turn.params[1]/2 : 0;
    const int32_t stride = turn.pairs_apart() ? 1 : 2, apart = stride == 1 ? n_pair : 1; // of a pair's two dimensions
    std::vector<complex> turns(n*n_pair);
    if (turn.rope) {
        for (int32_t i = 0; i < q.cfg->need.future; ++i) {
            pos.push_back((llama_pos) q.tokens.size() + i);
        }
        const auto table = read_turns(lctx, sig.il, pos);
        for (int32_t i = 0; i < n_pair; ++i) {
            const auto at = [&](size_t p) { return complex(table[p*n_dim + i*stride], table[p*n_dim + i*stride + apart]); };
            complex mean = 0;
            for (size_t p = n; p < pos.size(); ++p) {
                mean += at(p)/(double) q.cfg->need.future;
            }
            for (size_t p = 0; p < n; ++p) {
                turns[p*n_pair + i] = mean/at(p);
            }
        }
    }

    const size_t n_row = (size_t) sig.n_head*n_dim;
    auto ring = taps.read_ring(s, sig.il);

    sig.q_mean.assign(n_row, 0.0f);
    sig.q_cov.assign(n_row*n_dim, 0.0f);
    on_threads(lctx, sig.n_head, [&](int32_t h) {
        std::vector<double> mean(n_dim, 0.0);
        for (size_t r = 0; r < n; ++r) {
            float * x = &ring[rows[r]*n_row + (size_t) h*n_dim];
            if (turn.n_hadamard > 0) {
                mix(kv.attn_rot_hadamard.at(turn.n_hadamard), turn.n_hadamard, x, n_dim);
            }
            for (int32_t i = 0; i < n_pair; ++i) {
                float & a = x[i*stride], & b = x[i*stride + apart];
                const complex z = complex(a, b)*turns[r*n_pair + i];
                a = (float) z.real();
                b = (float) z.imag();
            }
            if (turn.n_hadamard > 0) { // the keys of the cache are mixed
                mix(kv.attn_rot_hadamard.at(turn.n_hadamard), turn.n_hadamard, x, n_dim);
            }
            for (int32_t i = 0; i < n_dim; ++i) {
                x[i]    *= taps.attn[sig.il].scale;
                mean[i] += x[i]/(double) n;
            }
        }
        float * cov = &sig.q_cov[(size_t) h*n_dim*n_dim];
        for (size_t r = 0; r < n; ++r) {
            float * x = &ring[rows[r]*n_row + (size_t) h*n_dim];
            for (int32_t i = 0; i < n_dim; ++i) {
                x[i] -= (float) mean[i];
            }
            for (int32_t i = 0; i < n_dim; ++i) {
                const float scaled = x[i]/n;
                for (int32_t k = 0; k < n_dim; ++k) {
                    cov[i*n_dim + k] += scaled*x[k];
                }
            }
        }
        std::copy(mean.begin(), mean.end(), sig.q_mean.begin() + (size_t) h*n_dim);
    });
}

} // namespace kvc
