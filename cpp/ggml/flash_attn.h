#pragma once

// Flash attention of a prompt on the CPU. Included once, by ggml-cpu/ops.cpp (0004-cpu-attention.patch): it uses that
// file's simd_gemm and vector functions, and is compiled for the same CPU.
//
// ggml converts and transposes each tile of 64 keys again for every tile of 64 queries of every query head, one value at
// a time, and the mask with it; a cache that is neither F32 nor F16 goes row by row. Here
//
//   - up to 8 tiles of queries that read the same KV head (one head's, or several of its group's) share a packed tile;
//   - a mask tile that is all 0 or all -inf, as most of a causal mask are, is recognised from its bits;
//   - keys and values of any type are packed as F32: a quantized cache is as fast as F16.
//
// Each tile's own arithmetic, and its order over the keys, are ggml's: with an F32 or F16 cache the result is the same
// bit for bit. With a quantized cache ggml quantizes the queries, and this does not.
// PYKVC_STOCK_ATTENTION=1 in the environment leaves it to ggml.

#include "flash_attn_size.h"

#include <cstdlib>
#include <cstring>

namespace kvc {

struct fa_tile {
    int64_t iq1, iq2, iq3; // its first query
    int     n;             // valid queries
    float   sum[KVC_FA_TILE];
    float   max[KVC_FA_TILE];
};

enum class fa_mask { zero, inf, mixed };

static bool fa_supports(const ggml_tensor * q, const ggml_tensor * k, const ggml_tensor * v) {
    const auto to_f32 = [](ggml_type type) { return type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float; };
    return !getenv("PYKVC_STOCK_ATTENTION") && q->type == GGML_TYPE_F32 && q->ne[1] >= KVC_FA_TILE && k->ne[0] <= KVC_FA_TILE*KVC_FA_TILE &&
        to_f32(k->type) && to_f32(v->type);
}

static void fa_to_f32(ggml_type type, const char * src, float * dst, int64_t n) {
    if (type == GGML_TYPE_F32) {
        memcpy(dst, src, n*sizeof(float));
    } else if (type == GGML_TYPE_F16) {
        ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) src, dst, n);
    } else {
        ggml_get_type_traits(type)->to_float(src, dst, n);
    }
}

static const ggml_fp16_t * fa_mask_row(const ggml_tensor * mask, const fa_tile & t, int i, int64_t ic) {
    return (const ggml_fp16_t *) ((const char *) mask->data + (t.iq1 + i)*mask->nb[1] + (t.iq2 % mask->ne[2])*mask->nb[2] +
        (t.iq3 % mask->ne[3])*mask->nb[3]) + ic;
}

static fa_mask fa_mask_kind(const ggml_tensor * mask, const fa_tile & t, int64_t ic, int n_kv) {
    uint16_t not_zero = 0, not_inf = 0;
    for (int i = 0; i < t.n; ++i) {
        const ggml_fp16_t * row = fa_mask_row(mask, t, i, ic);
        for (int j = 0; j < n_kv; ++j) {
            not_zero |= row[j];
            not_inf  |= row[j] ^ 0xFC00; // -inf
        }
    }
    return !not_zero ? fa_mask::zero : !not_inf ? fa_mask::inf : fa_mask::mixed;
}

// Queries [ir0, ir1) of all heads, as ggml_compute_forward_flash_attn_ext_tiled().
static void flash_attn(const ggml_compute_params * params, ggml_tensor * dst, int64_t ir0, int64_t ir1) {
    const ggml_tensor * q     = dst->src[0]; // F32 [DK, n_tokens, n_head, n_seq]
    const ggml_tensor * k     = dst->src[1]; // [DK, n_kv, n_head_kv, n_seq]
    const ggml_tensor * v     = dst->src[2]; // [DV, n_kv, n_head_kv, n_seq]
    const ggml_tensor * mask  = dst->src[3]; // F16 [n_kv, n_tokens, 1 or n_head, 1 or n_seq], or null
    const ggml_tensor * sinks = dst->src[4]; // F32 [n_head], or null

    const int64_t DK = k->ne[0], DV = v->ne[0], n_kv = k->ne[1], n_tokens = q->ne[1], n_head = q->ne[2];
    const int64_t rk2 = n_head/k->ne[2], rk3 = q->ne[3]/k->ne[3]; // query heads of a KV head, and so on
    const int64_t rv2 = n_head/v->ne[2], rv3 = q->ne[3]/v->ne[3];
    constexpr int T = KVC_FA_TILE;

    float scale, max_bias, softcap;
    memcpy(&scale,    (const float *) dst->op_params + 0, sizeof(float));
    memcpy(&max_bias, (const float *) dst->op_params + 1, sizeof(float));
    memcpy(&softcap,  (const float *) dst->op_params + 2, sizeof(float));
    scale = softcap != 0.0f ? scale/softcap : scale;

    const uint32_t n_head_log2 = 1u << (uint32_t) floor(log2(n_head));
    const float m0 = powf(2.0f, -(max_bias       )/n_head_log2);
    const float m1 = powf(2.0f, -(max_bias / 2.0f)/n_head_log2);
    const auto slope = [&](uint32_t h) { // ALiBi's, of a head
        return max_bias <= 0.0f ? 1.0f : h < n_head_log2 ? powf(m0, h + 1) : powf(m1, 2*(h - n_head_log2) + 1);
    };

    float * kf  = (float *) params->wdata + params->ith*(KVC_FA_SCRATCH(DK, DV) + CACHE_LINE_SIZE_F32); // [DK][T] keys, transposed
    float * vf  = kf + T*DK;  // [T][DV] values
    float * kq  = vf + T*DV;  // [T][T] scores
    float * mf  = kq + T*T;   // [T][T] mask
    float * qf  = mf + T*T;   // a tile [T][DK] queries
    float * out = qf + KVC_FA_TILES*T*DK; // a tile [T][DV] sums of values
    fa_tile tiles[KVC_FA_TILES];

    for (int64_t ir = ir0; ir < ir1; ) {
        const int64_t ik2 = ir/n_tokens % n_head / rk2, ik3 = ir/n_tokens/n_head / rk3;
        const int64_t iv2 = ir/n_tokens % n_head / rv2, iv3 = ir/n_tokens/n_head / rv3;

        int n_tiles = 0;
        for (; n_tiles < KVC_FA_TILES && ir < ir1; ++n_tiles) {
            fa_tile & t = tiles[n_tiles];
            t.iq1 = ir % n_tokens;
            t.iq2 = ir/n_tokens % n_head;
            t.iq3 = ir/n_tokens/n_head;
            if (t.iq2/rk2 != ik2 || t.iq3/rk3 != ik3 || t.iq2/rv2 != iv2 || t.iq3/rv3 != iv3) {
                break;
            }
            t.n = (int) std::min({ (int64_t) T, ir1 - ir, n_tokens - t.iq1 }); // a tile is of one head
            std::fill_n(t.sum, T, 0.0f);
            std::fill_n(t.max, T, -INFINITY);
            float * rows = qf + n_tiles*T*DK;
            for (int i = 0; i < t.n; ++i) {
                memcpy(rows + i*DK, (const char *) q->data + (t.iq1 + i)*q->nb[1] + t.iq2*q->nb[2] + t.iq3*q->nb[3], DK*sizeof(float));
            }
            memset(rows + t.n*DK, 0, (T - t.n)*DK*sizeof(float));
            ir += t.n;
        }
        memset(out, 0, n_tiles*T*DV*sizeof(float));
        memset(kf,  0, T*DK*sizeof(float));
        memset(vf,  0, T*DV*sizeof(float));

        for (int64_t ic = 0; ic < n_kv; ic += T) {
            const int n = (int) std::min((int64_t) T, n_kv - ic);
            bool packed = false;

            for (int it = 0; it < n_tiles; ++it) {
                fa_tile & t = tiles[it];
                const fa_mask kind = mask ? fa_mask_kind(mask, t, ic, n) : fa_mask::zero;
                if (kind == fa_mask::inf) {
                    continue;
                }
                if (!packed) {
                    for (int j = 0; j < n; ++j) {
                        float * row = kq; // free until the product below
                        fa_to_f32(k->type, (const char *) k->data + (ic + j)*k->nb[1] + ik2*k->nb[2] + ik3*k->nb[3], row, DK);
                        for (int64_t d = 0; d < DK; ++d) {
                            kf[d*T + j] = row[d];
                        }
                        fa_to_f32(v->type, (const char *) v->data + (ic + j)*v->nb[1] + iv2*v->nb[2] + iv3*v->nb[3], vf + j*DV, DV);
                    }
                    packed = true;
                }
                memset(kq, 0, T*T*sizeof(float));
                simd_gemm(kq, qf + it*T*DK, kf, T, DK, T);
                ggml_vec_scale_f32(T*T, kq, scale);
                if (softcap != 0.0f) {
                    ggml_vec_tanh_f32(T*T, kq, kq);
                    ggml_vec_scale_f32(T*T, kq, softcap);
                }
                for (int i = 0; n < T && i < T; ++i) {
                    std::fill(kq + i*T + n, kq + (i + 1)*T, -INFINITY);
                }
                if (kind == fa_mask::mixed) {
                    for (int i = 0; i < t.n; ++i) {
                        ggml_cpu_fp16_to_fp32(fa_mask_row(mask, t, i, ic), mf + i*T, n);
                        std::fill(mf + i*T + n, mf + (i + 1)*T, -INFINITY);
                    }
                    if (max_bias > 0.0f) {
                        ggml_vec_scale_f32(t.n*T, mf, slope(t.iq2));
                    }
                    ggml_vec_add_f32(t.n*T, kq, kq, mf);
                }
                for (int i = 0; i < T; ++i) {
                    float * row = kq + i*T;
                    float best;
                    ggml_vec_max_f32(T, &best, row);
                    if (best == -INFINITY) {
                        memset(row, 0, T*sizeof(float));
                        continue;
                    }
                    if (best > t.max[i]) {
                        const float fade = expf(t.max[i] - best);
                        ggml_vec_scale_f32(DV, out + (it*T + i)*DV, fade);
                        t.sum[i] *= fade;
                        t.max[i]  = best;
                    }
                    t.sum[i] += ggml_vec_soft_max_f32(T, row, row, t.max[i]);
                }
                simd_gemm(out + it*T*DV, kq, vf, T, T, DV);
            }
        }

        for (int it = 0; it < n_tiles; ++it) {
            fa_tile & t = tiles[it];
            for (int i = 0; i < t.n; ++i) {
                float * row = out + (it*T + i)*DV;
                if (sinks) {
                    const float s = ((const float *) sinks->data)[t.iq2];
                    if (s > t.max[i]) {
                        const float fade = expf(t.max[i] - s);
                        ggml_vec_scale_f32(DV, row, fade);
                        t.sum[i] = t.sum[i]*fade + 1.0f;
                    } else {
                        t.sum[i] += expf(s - t.max[i]);
                    }
                }
                ggml_vec_scale_f32(DV, row, t.sum[i] == 0.0f ? 0.0f : 1.0f/t.sum[i]);
                memcpy((char *) dst->data + t.iq3*dst->nb[3] + (t.iq1 + i)*dst->nb[2] + t.iq2*dst->nb[1], row, DV*sizeof(float));
            }
        }
    }
}

} // namespace kvc
