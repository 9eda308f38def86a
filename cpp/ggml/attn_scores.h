#pragma once

// What the queries of a window give to the cells, on the CPU. Included once, by ggml-cpu/ops.cpp (0004-cpu-attention.patch): it
// uses that file's simd_gemm and vector functions.
//
// ggml's product of F16 keys ends each of its sums of 64 values with a sum across a vector, and its softmax reads and writes
// all scores three times more. Here a lane is one query of one head, and a row is a cell: keys times a matrix of queries needs no
// sum across a vector, and exp() follows while a tile is in L1, taken from the tile's own maximum. A second step brings the tiles
// to one maximum and sums. Tiles are the same for any number of threads, so the result is.

#include "attn_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

namespace kvc {

static void exp_all(float * x, int64_t n) { // n: a multiple of KVC_ATTN_LANES
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    for (int64_t i = 0; i < n; i += 16) {
        _mm512_storeu_ps(x + i, ggml_v_expf(_mm512_loadu_ps(x + i)));
    }
#else
    ggml_vec_soft_max_f32((int) n, x, x, 0.0f);
#endif
}

// x [n][n_lane] = exp(x - max), where a maximum of -inf is that of a lane that sees nothing; sum [n_lane] of each lane.
static void attn_exp(float * GGML_RESTRICT x, const float * GGML_RESTRICT max, float * GGML_RESTRICT sum, int64_t n, int64_t n_lane) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    for (int64_t i = 0; i < n_lane; i += 16) {
        const __m512 m = _mm512_loadu_ps(max + i);
        const __m512 less = _mm512_mask_mov_ps(m, _mm512_cmp_ps_mask(m, _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ), _mm512_setzero_ps());
        __m512 acc = _mm512_setzero_ps();
        for (int64_t j = 0; j < n; ++j) {
            const __m512 y = ggml_v_expf(_mm512_sub_ps(_mm512_loadu_ps(x + j*n_lane + i), less));
            _mm512_storeu_ps(x + j*n_lane + i, y);
            acc = _mm512_add_ps(acc, y);
        }
        _mm512_storeu_ps(sum + i, acc);
    }
#else
    memset(sum, 0, n_lane*sizeof(float));
    for (int64_t j = 0; j < n; ++j) {
        for (int64_t i = 0; i < n_lane; ++i) {
            x[j*n_lane + i] -= max[i] == -INFINITY ? 0.0f : max[i];
        }
        exp_all(x + j*n_lane, n_lane);
        for (int64_t i = 0; i < n_lane; ++i) {
            sum[i] += x[j*n_lane + i];
        }
    }
#endif
}

#if defined(__AVX512F__)
// RM cells times RN vectors of lanes.
template<int RM, int RN>
static void attn_block(const float * a, const float * b, float * c, int64_t n_dim, int64_t n_lane) {
    __m512 acc[RM][RN] = {};
    for (int64_t d = 0; d < n_dim; ++d) {
        __m512 bv[RN];
        for (int r = 0; r < RN; ++r) {
            bv[r] = _mm512_loadu_ps(b + d*n_lane + r*16);
        }
        for (int i = 0; i < RM; ++i) {
            const __m512 av = _mm512_set1_ps(a[i*n_dim + d]);
            for (int r = 0; r < RN; ++r) {
                acc[i][r] = _mm512_fmadd_ps(av, bv[r], acc[i][r]);
            }
        }
    }
    for (int i = 0; i < RM; ++i) {
        for (int r = 0; r < RN; ++r) {
            _mm512_storeu_ps(c + i*n_lane + r*16, acc[i][r]);
        }
    }
}

template<int RN>
static void attn_columns(const float * a, const float * b, float * c, int64_t n, int64_t n_dim, int64_t n_lane) {
    int64_t j = 0;
    for (; j + 8 <= n; j += 8) {
        attn_block<8, RN>(a + j*n_dim, b, c + j*n_lane, n_dim, n_lane);
    }
    for (; j < n; ++j) {
        attn_block<1, RN>(a + j*n_dim, b, c + j*n_lane, n_dim, n_lane);
    }
}
#endif

// c [n][n_lane] = a [n][n_dim] * b [n_dim][n_lane]. simd_gemm's blocks of one vector, which most of the lanes of few heads are, wait
// for their sums: here 8 cells times 3 vectors keep the multipliers busy.
static void attn_product(const float * a, const float * b, float * c, int64_t n, int64_t n_dim, int64_t n_lane) {
#if defined(__AVX512F__)
    int64_t i = 0;
    for (; i + 48 <= n_lane; i += 48) {
        attn_columns<3>(a, b + i, c + i, n, n_dim, n_lane);
    }
    for (; i < n_lane; i += 16) {
        attn_columns<1>(a, b + i, c + i, n, n_dim, n_lane);
    }
#else
    memset(c, 0, n*n_lane*sizeof(float));
    simd_gemm(c, a, b, (int) n, (int) n_dim, (int) n_lane);
#endif
}

// The maximum of each lane, the sum of each lane, the cells: what kvc_attn_tiles() writes for a KV head.
struct attn_slab {
    int64_t n_lane, n_kv, n_tile;
    float * max; // [n_tile][n_lane]
    float * sum; // [n_tile][n_lane]
    float * exp; // [n_kv][n_lane]

    attn_slab(const ggml_tensor * t, int64_t n_kv, int64_t h) : n_lane(t->ne[0]), n_kv(n_kv), n_tile((n_kv + KVC_ATTN_TILE - 1)/KVC_ATTN_TILE) {
        max = (float *) ((char *) t->data + h*t->nb[2]);
        sum = max + n_tile*n_lane;
        exp = sum + n_tile*n_lane;
    }
};

// A tile of cells: their scores, masked, less their maximum, exponentiated.
static void attn_tile(const attn_slab & s, int64_t it, const float * keys, int64_t n_dim, const float * queries, const int32_t * begin) {
    const int64_t n_lane = s.n_lane, first = it*KVC_ATTN_TILE, n = std::min<int64_t>(KVC_ATTN_TILE, s.n_kv - first);
    const int32_t * end = begin + n_lane;
    float * GGML_RESTRICT x   = s.exp + first*n_lane;
    float * GGML_RESTRICT max = s.max + it*n_lane;
    float * GGML_RESTRICT sum = s.sum + it*n_lane;

    attn_product(keys, queries, x, n, n_dim, n_lane);

    const bool whole = *std::max_element(begin, end) <= first && *std::min_element(end, end + n_lane) >= first + n;
    for (int64_t j = 0; !whole && j < n; ++j) {
        for (int64_t i = 0; i < n_lane; ++i) {
            x[j*n_lane + i] = first + j >= begin[i] && first + j < end[i] ? x[j*n_lane + i] : -INFINITY;
        }
    }
    std::fill_n(max, n_lane, -INFINITY);
    for (int64_t j = 0; j < n; ++j) {
        for (int64_t i = 0; i < n_lane; ++i) {
            max[i] = x[j*n_lane + i] > max[i] ? x[j*n_lane + i] : max[i];
        }
    }
    attn_exp(x, max, sum, n, n_lane);
}

// What each lane's numbers of a tile are to be multiplied with: weight*exp(tile's maximum - maximum)/sum.
struct attn_factors {
    const attn_slab & s;
    std::vector<float> max, scale, factor; // [n_lane]

    attn_factors(const attn_slab & s, const float * weight) : s(s), max(s.n_lane, -INFINITY), scale(s.n_lane, 0.0f), factor(s.n_lane) {
        for (int64_t it = 0; it < s.n_tile; ++it) {
            for (int64_t i = 0; i < s.n_lane; ++i) {
                max[i] = std::max(max[i], s.max[it*s.n_lane + i]);
            }
        }
        for (auto & x : max) {
            x = x == -INFINITY ? 0.0f : x; // a lane that sees nothing
        }
        for (int64_t it = 0; it < s.n_tile; ++it) {
            fade(it);
            for (int64_t i = 0; i < s.n_lane; ++i) {
                scale[i] += s.sum[it*s.n_lane + i]*factor[i];
            }
        }
        for (int64_t i = 0; i < s.n_lane; ++i) {
            scale[i] = scale[i] == 0.0f ? 0.0f : weight[i]/scale[i];
        }
    }

    void fade(int64_t it) {
        for (int64_t i = 0; i < s.n_lane; ++i) {
            factor[i] = s.max[it*s.n_lane + i] - max[i];
        }
        exp_all(factor.data(), s.n_lane);
    }

    const float * of(int64_t it) {
        fade(it);
        for (int64_t i = 0; i < s.n_lane; ++i) {
            factor[i] *= scale[i];
        }
        return factor.data();
    }
};

// Over the lanes of a head: the sum, or the largest, of halves, quarters, and so on.
template<bool largest>
static float attn_lanes(const float * x, const float * factor, int64_t n) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    __m512 acc = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) {
        const __m512 y = _mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_loadu_ps(factor + i));
        acc = largest ? _mm512_max_ps(acc, y) : _mm512_add_ps(acc, y);
    }
    return largest ? _mm512_reduce_max_ps(acc) : _mm512_reduce_add_ps(acc);
#else
    float acc[KVC_ATTN_LANES] = {};
    for (int64_t i = 0; i < n; i += KVC_ATTN_LANES) {
        for (int64_t l = 0; l < KVC_ATTN_LANES; ++l) {
            const float y = x[i + l]*factor[i + l];
            acc[l] = largest ? (y > acc[l] ? y : acc[l]) : acc[l] + y;
        }
    }
    for (int64_t m = KVC_ATTN_LANES/2; m > 0; m /= 2) {
        for (int64_t l = 0; l < m; ++l) {
            acc[l] = largest ? std::max(acc[l], acc[l + m]) : acc[l] + acc[l + m];
        }
    }
    return acc[0];
#endif
}

template<bool largest>
static void attn_reduce(ggml_tensor * dst, int ith, int nth) {
    const ggml_tensor * tiles  = dst->src[0]; // of kvc_attn_tiles()
    const ggml_tensor * weight = dst->src[1]; // F32 [n_lane, n_head_kv]
    const int64_t n_kv = dst->ne[0], n_hkv = tiles->ne[2], n_group = dst->ne[1]/n_hkv, n_lane = tiles->ne[0]/n_group; // of a head
    const int64_t n_tile = (n_kv + KVC_ATTN_TILE - 1)/KVC_ATTN_TILE, n_item = n_hkv*n_tile;

    for (int64_t item = n_item*ith/nth, last = n_item*(ith + 1)/nth; item < last; ) {
        const int64_t h = item/n_tile;
        const attn_slab s(tiles, n_kv, h);
        attn_factors factors(s, (const float *) weight->data + h*s.n_lane);
        for (; item < last && item/n_tile == h; ++item) {
            const float * factor = factors.of(item % n_tile);
            const int64_t j0 = item % n_tile*KVC_ATTN_TILE, j1 = std::min(j0 + KVC_ATTN_TILE, n_kv);
            for (int64_t g = 0; g < n_group; ++g) {
                float * out = (float *) dst->data + (h*n_group + g)*n_kv;
                for (int64_t j = j0; j < j1; ++j) {
                    out[j] = attn_lanes<largest>(s.exp + j*s.n_lane + g*n_lane, factor + g*n_lane, n_lane);
                }
            }
        }
    }
}

// Each lane by itself: dst F32 [n_kv, n_lane].
static void attn_rows(ggml_tensor * dst, int ith, int nth) {
    const ggml_tensor * tiles  = dst->src[0]; // of kvc_attn_tiles(), one KV head
    const ggml_tensor * weight = dst->src[1]; // F32 [n_lane]
    const int64_t n_kv = dst->ne[0], n_lane = dst->ne[1], n_tile = (n_kv + KVC_ATTN_TILE - 1)/KVC_ATTN_TILE;
    const attn_slab s(tiles, n_kv, 0);
    attn_factors factors(s, (const float *) weight->data);
    for (int64_t it = n_tile*ith/nth; it < n_tile*(ith + 1)/nth; ++it) {
        const float * factor = factors.of(it);
        const int64_t j0 = it*KVC_ATTN_TILE, j1 = std::min(j0 + KVC_ATTN_TILE, n_kv);
        for (int64_t i = 0; i < n_lane; ++i) {
            float * out = (float *) dst->data + i*n_kv;
            for (int64_t j = j0; j < j1; ++j) {
                out[j] = s.exp[j*n_lane + i]*factor[i];
            }
        }
    }
}

} // namespace kvc

// dst: F32 [n_lane, n_kv + 2*n_tile, n_head_kv], see attn_slab.
static void kvc_attn_tiles(ggml_tensor * dst, int ith, int nth, void *) {
    const ggml_tensor * k     = dst->src[0]; // any type [head_dim, n_head_kv, n_kv]
    const ggml_tensor * q     = dst->src[1]; // F32 [n_lane, head_dim, n_head_kv], scaled
    const ggml_tensor * range = dst->src[2]; // I32 [n_lane, 2, n_head_kv]: the cells that a lane sees, from and up to
    const ggml_tensor * rows  = dst->src[3]; // I32 [n_kv]: the cells that there are, of more; null: all
    const int64_t n_dim = k->ne[0], n_hkv = k->ne[1], n_kv = rows ? rows->ne[0] : k->ne[2];
    const int64_t n_tile = (n_kv + KVC_ATTN_TILE - 1)/KVC_ATTN_TILE, n_item = n_hkv*n_tile;

    std::vector<float> keys(KVC_ATTN_TILE*n_dim); // [tile][head_dim]
    for (int64_t item = n_item*ith/nth; item < n_item*(ith + 1)/nth; ++item) {
        const int64_t h = item/n_tile, it = item % n_tile;
        const int64_t j0 = it*KVC_ATTN_TILE, n_row = std::min<int64_t>(KVC_ATTN_TILE, n_kv - j0);
        const int64_t n_at_once = rows || k->nb[2] != ggml_row_size(k->type, n_dim) ? 1 : n_row; // rows that lie together
        for (int64_t j = 0; j < n_row; j += n_at_once) {
            const int64_t row = rows ? ((const int32_t *) rows->data)[j0 + j] : j0 + j;
            kvc::fa_to_f32(k->type, (const char *) k->data + h*k->nb[1] + row*k->nb[2], &keys[j*n_dim], n_at_once*n_dim);
        }
        kvc::attn_tile(kvc::attn_slab(dst, n_kv, h), it, keys.data(), n_dim, (const float *) ((const char *) q->data + h*q->nb[2]),
                (const int32_t *) ((const char *) range->data + h*range->nb[2]));
    }
}

// dst: F32 [n_kv, n_head]: the weighted sum, or the largest, of what a head's lanes give to each cell.
static void kvc_attn_sum(ggml_tensor * dst, int ith, int nth, void *) { kvc::attn_reduce<false>(dst, ith, nth); }
static void kvc_attn_max(ggml_tensor * dst, int ith, int nth, void *) { kvc::attn_reduce<true> (dst, ith, nth); }

// dst: F32 [n_kv, n_lane]: what each lane of a KV head gives to each cell.
static void kvc_attn_rows(ggml_tensor * dst, int ith, int nth, void *) { kvc::attn_rows(dst, ith, nth); }

// dst: F32 [n_dim, n] of any type [n_dim, 1, n], whose rows may lie apart: ggml's own copy takes their F16 one by one.
static void kvc_to_f32(ggml_tensor * dst, int ith, int nth, void *) {
    const ggml_tensor * src = dst->src[0];
    for (int64_t j = dst->ne[1]*ith/nth; j < dst->ne[1]*(ith + 1)/nth; ++j) {
        kvc::fa_to_f32(src->type, (const char *) src->data + j*src->nb[2], (float *) ((char *) dst->data + j*dst->nb[1]), dst->ne[0]);
    }
}

// dst: F32 [n, n_form]: x' C x of each row x of F32 [n_dim, n] and each symmetric C of F32 [n_dim, n_dim, n_form].
static void kvc_forms(ggml_tensor * dst, int ith, int nth, void *) {
    const ggml_tensor * c = dst->src[0];
    const ggml_tensor * x = dst->src[1];
    const int64_t n_dim = x->ne[0], n_lane = GGML_PAD(n_dim, KVC_ATTN_LANES), n = dst->ne[0], n_tile = (n + KVC_ATTN_TILE - 1)/KVC_ATTN_TILE;
    std::vector<float> wide(n_lane == n_dim ? 0 : c->ne[2]*n_dim*n_lane, 0.0f); // rows of whole vectors
    for (int64_t i = 0; i < (int64_t) wide.size()/n_lane; ++i) {
        memcpy(&wide[i*n_lane], (const char *) c->data + i/n_dim*c->nb[2] + i % n_dim*c->nb[1], n_dim*sizeof(float));
    }
    std::vector<float> cx(KVC_ATTN_TILE*n_lane); // [tile][n_lane]
    for (int64_t it = n_tile*ith/nth; it < n_tile*(ith + 1)/nth; ++it) {
        const int64_t j0 = it*KVC_ATTN_TILE, n_row = std::min<int64_t>(KVC_ATTN_TILE, n - j0);
        const float * rows = (const float *) ((const char *) x->data + j0*x->nb[1]);
        for (int64_t g = 0; g < dst->ne[1]; ++g) {
            const float * form = wide.empty() ? (const float *) ((const char *) c->data + g*c->nb[2]) : &wide[g*n_dim*n_lane];
            kvc::attn_product(rows, form, cx.data(), n_row, n_dim, n_lane);
            float * out = (float *) dst->data + g*n + j0;
            for (int64_t j = 0; j < n_row; ++j) {
                ggml_vec_dot_f32((int) n_dim, out + j, 0, &cx[j*n_lane], 0, rows + j*n_dim, 0, 1);
            }
        }
    }
}

void * kvc_cpu_step(const char * name) {
    const std::pair<const char *, ggml_custom_op_t> steps[] = {
        { "kvc_attn_tiles", kvc_attn_tiles }, { "kvc_attn_sum", kvc_attn_sum }, { "kvc_attn_max", kvc_attn_max }, { "kvc_attn_rows", kvc_attn_rows },
        { "kvc_to_f32", kvc_to_f32 }, { "kvc_forms", kvc_forms },
    };
    for (const auto & step : steps) {
        if (strcmp(name, step.first) == 0) {
            return (void *) step.second;
        }
    }
    return nullptr;
}
