// Reductions over heads and values, and draws by hash.

#include "select.h"

#include <algorithm>

namespace kvc {

void mean_over_group(const layer_view & v, const float * given, float * out) {
    const int32_t n_group = v.n_head / v.n_head_kv;

    for (int32_t h = 0; h < v.n_head_kv; ++h) {
        float * dst = out + (size_t) h * v.n_kv;
        std::fill(dst, dst + v.n_kv, 0.0f);
        for (int32_t g = 0; g < n_group; ++g) {
            const float * src = given + (size_t) (h * n_group + g) * v.n_kv;
            for (int32_t j = 0; j < v.n_kv; ++j) {
                dst[j] += src[j];
            }
        }
        for (int32_t j = 0; j < v.n_kv; ++j) {
            dst[j] /= n_group;
        }
    }
}

void mean_over_heads(const layer_view & v, float * out) {
    std::fill(out, out + v.n_kv, 0.0f);
    for (int32_t h = 0; h < v.n_head; ++h) {
        const float * src = v.attn + (size_t) h * v.n_kv;
        for (int32_t j = 0; j < v.n_kv; ++j) {
            out[j] += src[j];
        }
    }
    for (int32_t j = 0; j < v.n_kv; ++j) {
        out[j] /= v.n_head;
    }
    for (int32_t h = 1; h < v.n_head_kv; ++h) {
        std::copy(out, out + v.n_kv, out + (size_t) h * v.n_kv);
    }
}

std::vector<float> sum_over_heads(const request & r, int32_t il) {
    const layer_plan & lp = r.layers[il];

    std::vector<float> sum(lp.n_kv, 0.0f);
    for (int32_t h = 0; h < r.n_head_kv; ++h) {
        const float * src = lp.score + (size_t) h * lp.n_kv;
        for (int32_t j = 0; j < lp.n_kv; ++j) {
            sum[j] += src[j];
        }
    }
    return sum;
}

// Sums f(i) over [0, n) in eight partial sums: one running sum would wait for each addition, and the compiler may not
// reorder floats.
template <typename F>
static float sum_of(int32_t n, F f) {
    float s[8] = { 0 };
    int32_t i = 0;
    for (; i + 8 <= n; i += 8) {
        for (int32_t k = 0; k < 8; ++k) {
            s[k] += f(i + k);
        }
    }
    for (; i < n; ++i) {
        s[0] += f(i);
    }
    return ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
}

float sum(const float * a, int32_t n) {
    return sum_of(n, [=](int32_t i) { return a[i]; });
}

float dot(const float * a, const float * b, int32_t n) {
    return sum_of(n, [=](int32_t i) { return a[i] * b[i]; });
}

float distance_squared(const float * a, const float * b, int32_t n) {
    return sum_of(n, [=](int32_t i) { return (a[i] - b[i]) * (a[i] - b[i]); });
}

static uint64_t splitmix64(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

float hash_unit(uint64_t seed, uint64_t x) {
    return (float) (splitmix64(splitmix64(seed) ^ x) >> 40) / 16777216.0f;
}

float hash_slot(uint64_t seed, int32_t il, int32_t h, int32_t pos) {
    return hash_unit(seed, ((uint64_t) il << 48) ^ ((uint64_t) h << 36) ^ (uint32_t) pos);
}

} // namespace kvc
