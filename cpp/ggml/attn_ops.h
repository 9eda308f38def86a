#pragma once

// C and C++: the steps of attn_scores.h, as functions of ggml_custom_4d(). They are compiled for the CPU that runs
// them, so the engine asks the CPU backend for them by name (ggml_backend_reg_get_proc_address, 0004-cpu-attention.patch).

#define KVC_ATTN_LANES 16 // the lanes of a query head are a multiple of it
#define KVC_ATTN_TILE  64 // keys of a tile

#ifdef __cplusplus
extern "C" {
#endif

// A ggml_custom_op_t by its name, "kvc_attn_tiles" for example; null: there is none.
void * kvc_cpu_step(const char * name);

#ifdef __cplusplus
}
#endif
