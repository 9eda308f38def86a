#pragma once

// C and C++: what ggml-cpu.c has to set aside for flash_attn.h.

#define KVC_FA_TILE  64 // queries, and keys, of a tile: as ggml's GGML_FA_TILE_Q and _KV, or sums would come in another order
#define KVC_FA_TILES 8  // tiles of queries that share a packed tile of keys

// Floats of one thread.
#define KVC_FA_SCRATCH(DK, DV) (KVC_FA_TILE*((1 + KVC_FA_TILES)*((DK) + (DV)) + 2*KVC_FA_TILE))
