#pragma once

// A prompt times a matrix of q4_1, q5_0, q5_1 or q8_0 on x86 CPUs with AVX-512 VNNI. Included once, by ggml-cpu/ggml-cpu.c
// (0005-cpu-matrix.patch): C, and compiled for the same CPU.
//
// ggml unpacks a row of such weights again for every token (q4_1, q5_1) or every second one (q5_0, q8_0), in vectors of 256
// bits. Here a tile is 4 rows by 8 tokens: a block of 4 rows is unpacked once for all tokens of a task, and two rows share
// a vector of 512 bits.
//
// Each result's own arithmetic is ggml's: 8 sums over the blocks in order, then those 8 in the same order. The integers in
// between are exact. So the result is the same bit for bit. Other types ggml tiles itself (K-quants) or repacks (q4_0).
// PYKVC_STOCK_MATRIX=1 in the environment leaves it to ggml.

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define KVC_MM_COLS 8 // tokens of a tile
#define KVC_MM_ROWS 4 // weight rows of a tile
#define KVC_MM_TASK_ROWS 64
#define KVC_MM_TASK_BYTES (512*1024) // of packed tokens, which a task reads once for every 4 rows: they should stay in L2

// Block number ib of 8 tokens.
typedef struct {
    uint8_t qs[KVC_MM_COLS][32]; // value + 128
    float   d [KVC_MM_COLS];
    float   s [KVC_MM_COLS];     // d * sum of the values (q8_1)
} kvc_mm_cols;

// Block number ib of 4 rows, two to a vector: rows 0 and 1, rows 2 and 3.
typedef struct {
    int8_t  qs [2][2][32];
    int32_t off[2][2][8]; // -128 * sums of 4 values: undoes the + 128
    float   d  [2][2][8]; // one number 8 times
    float   m  [KVC_MM_ROWS];
    float   pad[12];
} kvc_mm_rows;

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)

static bool kvc_mm_supports(const struct ggml_tensor * dst) {
    const struct ggml_tensor * w = dst->src[0], * x = dst->src[1];
    switch (w->type) {
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q8_0: break;
        default: return false;
    }
    return x->type == GGML_TYPE_F32 && w->ne[2] == 1 && w->ne[3] == 1 && ggml_nrows(x) >= KVC_MM_ROWS && ggml_is_contiguous(dst) &&
        !getenv("PYKVC_STOCK_MATRIX");
}

static size_t kvc_mm_cols_size(const struct ggml_tensor * dst) {
    return (ggml_nrows(dst->src[1]) + KVC_MM_COLS - 1)/KVC_MM_COLS*(dst->src[0]->ne[0]/32)*sizeof(kvc_mm_cols);
}

static size_t kvc_mm_rows_size(const struct ggml_tensor * dst) {
    return dst->src[0]->ne[0]/32*sizeof(kvc_mm_rows);
}

// Bytes behind ggml's own, 64-byte aligned.
static size_t kvc_mm_wdata_size(int n_tasks, const struct ggml_tensor * dst) {
    return kvc_mm_supports(dst) ? 64 + kvc_mm_cols_size(dst) + n_tasks*kvc_mm_rows_size(dst) : 0;
}

// Tokens [ic, ic + 8) of the quantized activations; those past the last are zeros.
static void kvc_mm_pack_cols(enum ggml_type type, const char * src, size_t row_size, int64_t ic, int64_t n_cols, int64_t nb, kvc_mm_cols * dst) {
    const __m256i sign = _mm256_set1_epi8((char) 0x80);
    for (int j = 0; j < KVC_MM_COLS; ++j) {
        const block_q8_1 * x1 = (const block_q8_1 *) (src + (ic + j)*row_size);
        const block_q8_0 * x0 = (const block_q8_0 *) x1;
        for (int64_t ib = 0; ib < nb; ++ib) {
            kvc_mm_cols * t = &dst[ib];
            if (ic + j >= n_cols) {
                _mm256_storeu_si256((__m256i *) t->qs[j], sign);
                t->d[j] = t->s[j] = 0.0f;
                continue;
            }
            const bool has_s = type == GGML_TYPE_Q8_1;
            const __m256i q = _mm256_loadu_si256((const __m256i *) (has_s ? x1[ib].qs : x0[ib].qs));
            _mm256_storeu_si256((__m256i *) t->qs[j], _mm256_xor_si256(q, sign));
            t->d[j] = GGML_CPU_FP16_TO_FP32(has_s ? x1[ib].d : x0[ib].d);
            t->s[j] = has_s ? GGML_CPU_FP16_TO_FP32(x1[ib].s) : 0.0f;
        }
    }
}

static inline __m256i kvc_mm_nibbles(const uint8_t * qs) {
    const __m128i q = _mm_loadu_si128((const __m128i *) qs);
    return _mm256_and_si256(_mm256_inserti128_si256(_mm256_castsi128_si256(q), _mm_srli_epi16(q, 4), 1), _mm256_set1_epi8(15));
}

static inline __mmask32 kvc_mm_bits(const uint8_t * qh) {
    uint32_t bits;
    memcpy(&bits, qh, sizeof(bits));
    return _cvtu32_mask32(bits);
}

static inline void kvc_mm_unpack(enum ggml_type type, const char * row, int64_t ib, __m256i * q, float * d, float * m) {
    *m = 0.0f;
    switch (type) {
        case GGML_TYPE_Q4_1: {
            const block_q4_1 * w = (const block_q4_1 *) row + ib;
            *q = kvc_mm_nibbles(w->qs);
            *d = GGML_CPU_FP16_TO_FP32(w->d);
            *m = GGML_CPU_FP16_TO_FP32(w->m);
        } break;
        case GGML_TYPE_Q5_0: {
            const block_q5_0 * w = (const block_q5_0 *) row + ib;
            const __m256i low = kvc_mm_nibbles(w->qs);
            *q = _mm256_mask_sub_epi8(low, _knot_mask32(kvc_mm_bits(w->qh)), low, _mm256_set1_epi8(16));
            *d = GGML_CPU_FP16_TO_FP32(w->d);
        } break;
        case GGML_TYPE_Q5_1: {
            const block_q5_1 * w = (const block_q5_1 *) row + ib;
            const __m256i low = kvc_mm_nibbles(w->qs);
            *q = _mm256_mask_add_epi8(low, kvc_mm_bits(w->qh), low, _mm256_set1_epi8(16));
            *d = GGML_CPU_FP16_TO_FP32(w->d);
            *m = GGML_CPU_FP16_TO_FP32(w->m);
        } break;
        default: {
            const block_q8_0 * w = (const block_q8_0 *) row + ib;
            *q = _mm256_loadu_si256((const __m256i *) w->qs);
            *d = GGML_CPU_FP16_TO_FP32(w->d);
        } break;
    }
}

// Rows [ir, ir + 4); the last one again for those past it.
static void kvc_mm_pack_rows(const struct ggml_tensor * w, int64_t ir, int64_t nb, kvc_mm_rows * dst) {
    const __m256i ones = _mm256_set1_epi8((char) 0x80); // 128, unsigned
    for (int i = 0; i < KVC_MM_ROWS; ++i) {
        const char * row = (const char *) w->data + MIN(ir + i, w->ne[1] - 1)*w->nb[1];
        for (int64_t ib = 0; ib < nb; ++ib) {
            kvc_mm_rows * t = &dst[ib];
            __m256i q;
            float d;
            kvc_mm_unpack(w->type, row, ib, &q, &d, &t->m[i]);
            const __m256i sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), ones, q);
            _mm256_storeu_si256((__m256i *) t->qs [i/2][i%2], q);
            _mm256_storeu_si256((__m256i *) t->off[i/2][i%2], _mm256_sub_epi32(_mm256_setzero_si256(), sums));
            _mm256_storeu_ps(t->d[i/2][i%2], _mm256_set1_ps(d));
        }
    }
}

// 8 sums of [row a | row b] x 8 tokens each -> the totals [row a: 8 tokens | row b: 8 tokens]; a row's 8 sums s are added as
// ggml's hsum_float_8 does: ((s4 + s0) + (s6 + s2)) + ((s5 + s1) + (s7 + s3)).
static inline __m512 kvc_mm_hsum(const __m512 * acc) {
    __m512 half[4]; // 128-bit lanes: row a token i, row b token i, row a token i + 4, row b token i + 4
    for (int i = 0; i < 4; ++i) {
        const __m512 lo = _mm512_shuffle_f32x4(acc[i], acc[i + 4], _MM_SHUFFLE(2, 0, 2, 0));
        const __m512 hi = _mm512_shuffle_f32x4(acc[i], acc[i + 4], _MM_SHUFFLE(3, 1, 3, 1));
        half[i] = _mm512_add_ps(hi, lo);
    }
    __m512 quarter[2]; // lanes: even sum of two tokens, odd sum of both
    for (int i = 0; i < 2; ++i) {
        const __m512 lo = _mm512_unpacklo_ps(half[2*i], half[2*i + 1]);
        const __m512 hi = _mm512_unpackhi_ps(half[2*i], half[2*i + 1]);
        quarter[i] = _mm512_add_ps(lo, hi);
    }
    const __m512 even = _mm512_shuffle_ps(quarter[0], quarter[1], _MM_SHUFFLE(1, 0, 1, 0));
    const __m512 odd  = _mm512_shuffle_ps(quarter[0], quarter[1], _MM_SHUFFLE(3, 2, 3, 2));
    const __m512 sum  = _mm512_add_ps(even, odd); // lanes: row a tokens 0-3, row b tokens 0-3, row a tokens 4-7, row b tokens 4-7
    return _mm512_shuffle_f32x4(sum, sum, _MM_SHUFFLE(3, 1, 2, 0));
}

// out: F32 [4 rows, 8 tokens], a row's tokens together.
static inline __attribute__((always_inline)) void kvc_mm_tile(bool has_min, int64_t nb, const kvc_mm_rows * rows, const kvc_mm_cols * cols, float * out) {
    __m512 acc[2][KVC_MM_COLS];
    __m256 min[KVC_MM_ROWS];
    for (int j = 0; j < KVC_MM_COLS; ++j) {
        acc[0][j] = acc[1][j] = _mm512_setzero_ps();
    }
    for (int i = 0; i < KVC_MM_ROWS; ++i) {
        min[i] = _mm256_setzero_ps();
    }
    for (int64_t ib = 0; ib < nb; ++ib) {
        const kvc_mm_rows * r = &rows[ib];
        const kvc_mm_cols * c = &cols[ib];
        const __m512i q0 = _mm512_loadu_si512(r->qs[0]), off0 = _mm512_loadu_si512(r->off[0]);
        const __m512i q1 = _mm512_loadu_si512(r->qs[1]), off1 = _mm512_loadu_si512(r->off[1]);
        const __m512  d0 = _mm512_loadu_ps(r->d[0]), d1 = _mm512_loadu_ps(r->d[1]);
        for (int j = 0; j < KVC_MM_COLS; ++j) {
            const __m512i x  = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) c->qs[j]));
            const __m512  dx = _mm512_set1_ps(c->d[j]);
            const __m512 xy0 = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(off0, x, q0));
            const __m512 xy1 = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(off1, x, q1));
            acc[0][j] = _mm512_fmadd_ps(_mm512_mul_ps(d0, dx), xy0, acc[0][j]);
            acc[1][j] = _mm512_fmadd_ps(_mm512_mul_ps(d1, dx), xy1, acc[1][j]);
        }
        if (has_min) {
            const __m256 s = _mm256_loadu_ps(c->s);
            for (int i = 0; i < KVC_MM_ROWS; ++i) {
                min[i] = _mm256_fmadd_ps(_mm256_set1_ps(r->m[i]), s, min[i]);
            }
        }
    }
    for (int i = 0; i < 2; ++i) {
        const __m512 sum = kvc_mm_hsum(acc[i]);
        _mm256_storeu_ps(out + (2*i    )*KVC_MM_COLS, _mm256_add_ps(_mm512_castps512_ps256(sum),      min[2*i    ]));
        _mm256_storeu_ps(out + (2*i + 1)*KVC_MM_COLS, _mm256_add_ps(_mm512_extractf32x8_ps(sum, 1), min[2*i + 1]));
    }
}

static void kvc_mm_store(const float * out, float * dst, int64_t stride, int n_rows, int n_cols) {
    if (n_rows == KVC_MM_ROWS) {
        for (int j = 0; j < KVC_MM_COLS; j += 4) {
            __m128 r[KVC_MM_ROWS];
            for (int i = 0; i < KVC_MM_ROWS; ++i) {
                r[i] = _mm_loadu_ps(out + i*KVC_MM_COLS + j);
            }
            _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
            for (int k = 0; k < 4 && j + k < n_cols; ++k) {
                _mm_storeu_ps(dst + (j + k)*stride, r[k]);
            }
        }
        return;
    }
    for (int j = 0; j < n_cols; ++j) {
        for (int i = 0; i < n_rows; ++i) {
            dst[j*stride + i] = out[i*KVC_MM_COLS + j];
        }
    }
}

// After ggml has quantized the activations into wdata, and its barrier; current_chunk is n_threads.
static void kvc_mul_mat(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * w = dst->src[0], * x = dst->src[1];
    const enum ggml_type type = type_traits_cpu[w->type].vec_dot_type;
    const bool    has_min = type == GGML_TYPE_Q8_1;
    const int64_t nb = w->ne[0]/32, n_rows = w->ne[1], n_cols = ggml_nrows(x), n_tiles = (n_cols + KVC_MM_COLS - 1)/KVC_MM_COLS;
    const size_t  row_size = ggml_row_size(type, w->ne[0]);

    char * base = (char *) params->wdata + row_size*n_cols;
    base += (64 - (uintptr_t) base%64)%64;
    kvc_mm_cols * cols = (kvc_mm_cols *) base; // [n_tiles, nb]
    kvc_mm_rows * rows = (kvc_mm_rows *) (base + kvc_mm_cols_size(dst) + params->ith*kvc_mm_rows_size(dst)); // [nb], this thread's

    for (int64_t it = params->ith; it < n_tiles; it += params->nth) {
        kvc_mm_pack_cols(type, params->wdata, row_size, it*KVC_MM_COLS, n_cols, nb, cols + it*nb);
    }
    ggml_barrier(params->threadpool);

    const int64_t n_task_tiles = MAX(8, KVC_MM_TASK_BYTES/(int64_t) (nb*sizeof(kvc_mm_cols)));
    const int64_t n_task_rows  = n_rows >= KVC_MM_TASK_ROWS*4*params->nth ? KVC_MM_TASK_ROWS : KVC_MM_TASK_ROWS/4;
    const int64_t n_row_tasks  = (n_rows + n_task_rows - 1)/n_task_rows;
    const int64_t n_tasks      = n_row_tasks*((n_tiles + n_task_tiles - 1)/n_task_tiles);

    float out[KVC_MM_ROWS*KVC_MM_COLS];
    for (int64_t task = params->ith; task < n_tasks; task = atomic_fetch_add_explicit(&params->threadpool->current_chunk, 1, memory_order_relaxed)) {
        const int64_t ir_end = MIN(n_rows,  (task%n_row_tasks + 1)*n_task_rows);
        const int64_t it_end = MIN(n_tiles, (task/n_row_tasks + 1)*n_task_tiles);
        for (int64_t ir = task%n_row_tasks*n_task_rows; ir < ir_end; ir += KVC_MM_ROWS) {
            kvc_mm_pack_rows(w, ir, nb, rows);
            for (int64_t it = task/n_row_tasks*n_task_tiles; it < it_end; ++it) {
                if (has_min) {
                    kvc_mm_tile(true, nb, rows, cols + it*nb, out);
                } else {
                    kvc_mm_tile(false, nb, rows, cols + it*nb, out);
                }
                const int64_t ic = it*KVC_MM_COLS;
                kvc_mm_store(out, (float *) dst->data + ic*n_rows + ir, n_rows, MIN(KVC_MM_ROWS, ir_end - ir), MIN(KVC_MM_COLS, n_cols - ic));
            }
        }
    }
}

#else

static bool kvc_mm_supports(const struct ggml_tensor * dst) {
    GGML_UNUSED(dst);
    return false;
}

static size_t kvc_mm_wdata_size(int n_tasks, const struct ggml_tensor * dst) {
    GGML_UNUSED(n_tasks);
    GGML_UNUSED(dst);
    return 0;
}

static void kvc_mul_mat(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    GGML_UNUSED(params);
    GGML_UNUSED(dst);
}

#endif
