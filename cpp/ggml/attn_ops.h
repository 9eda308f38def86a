#pragma once

// C and C++: the two steps of attn_scores.h, as functions of ggml_custom_4d(). They are compiled for the CPU that runs them,
// so the engine asks the CPU backend for them by name (ggml_backend_reg_get_proc_address, 0004-cpu-attention.patch).

#define KVC_ATTN_LANES 16 // the lanes of a query head are a multiple of it
#define KVC_ATTN_TILE  64 // keys of a tile

struct ggml_tensor;

#ifdef __cplusplus
extern "C" {
#endif

void kvc_attn_tiles(struct ggml_tensor * dst, int ith, int nth, void * userdata);
void kvc_attn_sum  (struct ggml_tensor * dst, int ith, int nth, void * userdata);
void kvc_attn_max  (struct ggml_tensor * dst, int ith, int nth, void * userdata);

#ifdef __cplusplus
}
#endif
