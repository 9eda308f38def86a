// Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution, arXiv:2510.00636.
//
//   z_j = k_j . mu + k_j^T Sigma k_j / 2       log of the mean of exp(q . k_j), q ~ N(mu, Sigma), of a query head
//   score(j) = (mean over the group's query heads of softmax_j(z) + epsilon) * ||v_j||
//
// mu and Sigma are the queries' mean and covariance before their rotation, rotated by the mean of the rotations of the
// next `future` positions, with the softmax scale in them. The first tokens are left out of fit and softmax, and always
// kept. Variant: kvpress' ExpectedAttentionPress, which fits the queries of the whole prompt: here those of the last
// `window` tokens, the ones the engine holds. The last `recent` tokens are always kept, too. The model's soft cap on
// logits, if it has one, is left out: the mean of exp(cap * tanh(z / cap)) has no closed form. Cost: n_head *
// head_dim^2 / 2 products a slot; 270 ms in all at 1,536 slots of SmolLM2-135M (two cores, the fit's 70 ms included),
// below 2 % of their prefill.

#include "graph_ops.h"
#include "policies.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace kvc {

namespace {

// k . mean + k^T cov k / 2 of keys F32 [n_key, n_dim]: F32 [n_key].
void expected_logits(const float * keys, int32_t n_key, int32_t n_dim, const float * mean, const float * cov, float * out) {
    constexpr int32_t N = 16; // keys at a time, side by side: a row of cov is read once for all of them
    std::vector<float> k((size_t) n_dim * N); // F32 [n_dim, N]
    for (int32_t j0 = 0; j0 < n_key; j0 += N) {
        const int32_t n = std::min(N, n_key - j0);
        for (int32_t j = 0; j < n; ++j) {
            for (int32_t i = 0; i < n_dim; ++i) {
                k[(size_t) i * N + j] = keys[(size_t) (j0 + j) * n_dim + i];
            }
        }
        float sum[N] = { 0 };
        for (int32_t i = 0; i < n_dim; ++i) {
            const float * row = cov + (size_t) i * n_dim;
            const float * ki  = &k[(size_t) i * N];
            float inner[N];
            for (int32_t j = 0; j < N; ++j) {
                inner[j] = mean[i] + 0.5f * row[i] * ki[j];
            }
            for (int32_t l = 0; l < i; ++l) { // the other half is its mirror image
                const float * kl = &k[(size_t) l * N];
                for (int32_t j = 0; j < N; ++j) {
                    inner[j] += row[l] * kl[j];
                }
            }
            for (int32_t j = 0; j < N; ++j) {
                sum[j] += ki[j] * inner[j];
            }
        }
        std::copy(sum, sum + n, out + j0);
    }
}

struct expected_attention : policy {
    const int32_t window;
    const int32_t future;
    const int32_t sinks;
    const int32_t recent;
    const float   epsilon;

    explicit expected_attention(const params & p) :
        window(p.i("window")), future(p.i("future")), sinks(p.i("sinks")), recent(p.i("recent")), epsilon((float) p.f("epsilon")) {}

    needs need() const override {
        needs n;
        n.window = window;
        n.future = future;
        n.keys   = true;
        n.values = true;
        return n;
    }

    int32_t n_sink() const override {
        return sinks;
    }

    int32_t n_recent(int32_t budget) const override {
        return std::min(budget, recent);
    }

    int32_t min_budget() const override {
        return sinks + recent + 1;
    }

    // k . mean + k^T cov k / 2 for each query head
    ggml_tensor * reduce_keys(ggml_context * ctx, const head_keys & head) const override {
        auto * squares = graph_forms(ctx, head.cov, head.keys, head.on_cpu);
        return ggml_add(ctx, ggml_scale(ctx, squares, 0.5f), ggml_mul_mat(ctx, head.keys, head.mean)); // [n_kv, n_group]
    }

    void score(const layer_view & v, float * out) const override {
        const int32_t n_group = v.n_head / v.n_head_kv;
        const int32_t n_first = std::min(sinks, v.n_kv);
        const int32_t n       = v.n_kv - n_first; // slots that are scored

        std::vector<float> z(n);
        float best = 0;
        for (int32_t h = 0; h < v.n_head_kv; ++h) {
            const float * norm  = v.v_norm + (size_t) h * v.n_kv + n_first;
            float       * score = out      + (size_t) h * v.n_kv + n_first;
            std::fill(score, score + n, 0.0f);
            for (int32_t g = h * n_group; g < (h + 1) * n_group && n > 0; ++g) {
                if (v.reduced) {
                    std::copy_n(v.reduced + (size_t) g * v.n_kv + n_first, n, z.data());
                } else {
                    expected_logits(v.keys + ((size_t) h * v.n_kv + n_first) * v.head_dim, n, v.head_dim, v.q_mean + (size_t) g * v.head_dim,
                        v.q_cov + (size_t) g * v.head_dim * v.head_dim, z.data());
                }
                const float most = *std::max_element(z.begin(), z.end());
                double total = 0;
                for (float & x : z) {
                    x = std::exp(x - most);
                    total += x;
                }
                for (int32_t j = 0; j < n; ++j) {
                    score[j] += (float) (z[j] / total / n_group);
                }
            }
            for (int32_t j = 0; j < n; ++j) {
                score[j] = (score[j] + epsilon) * norm[j];
                best = std::max(best, score[j]);
            }
        }
        for (int32_t h = 0; h < v.n_head_kv; ++h) {
            std::fill_n(out + (size_t) h * v.n_kv, n_first, best);
        }
    }
};

const std::vector<param_info> & list_params() {
    static const std::vector<param_info> list = {
        { "window",  "128", "last queries the Gaussian is fitted to", 1, 4096 },
        { "future",  "512", "next positions whose rotations are averaged", 1, 65536 },
        { "sinks",   "4",   "first tokens always kept, and left out of the fit", 0, 4096 },
        { "recent",  "32",  "last tokens always kept", 0, 4096 },
        { "epsilon", "0",   "added to the expected attention before the value's norm weights it", 0, 1, {}, false },
    };
    return list;
}

std::unique_ptr<policy> make(const params & p) {
    return std::make_unique<expected_attention>(p);
}

} // namespace

const policy_info expected_attention_info = {
    "expected_attention", "Keeps, for each KV head, the tokens that queries like the last ones, at the next positions, are expected to attend "
    "to, weighted by the norms of their values; loses facts that are asked for later. Evicts the prompt only.", "2510.00636", decode_mode::none, false, list_params, make,
    "head",
};

} // namespace kvc
