#pragma once

// Moving the rows that an eviction keeps: gather.cpp.

#include "ggml.h"

#include <cstdint>
#include <vector>

struct llama_context;

namespace kvc {

// A tensor as GGML_OP_GET_ROWS takes it: [n_elem, n_rows, ne2, ne3], from a byte offset on.
struct cache_rows {
    ggml_tensor * t;
    size_t    offset;
    ggml_type type;
    int64_t   n_rows, n_elem, ne2, ne3; // n_elem 0: a head's bytes are no whole number of I32, so no graph can move them
    size_t    nb1, nb2, nb3;
    int32_t   n_head_kv;
    bool      channels; // ne2 counts the channels of a head, whose rows lie together: transposed values, sums
};

// K or V of some heads that lie side by side, from a byte offset on; row and channel in bytes, channel 0: not transposed.
cache_rows rows_of_cache(ggml_tensor * t, size_t offset, size_t row, size_t channel, int64_t n_rows, int64_t head_dim, int32_t n_heads);
cache_rows rows_of_sums(ggml_tensor * t, size_t offset, int32_t n_heads); // F32 [n_rows, n_head_kv, n_stream]

// Rows [begin, begin + n) become those of the slots; a head's begin at slots + h*stride.
struct piece {
    cache_rows rows;
    int32_t begin, n;
    const int32_t * slots;
    int32_t stride;
};

// What has to move for rows [0, n) to become those of the slots I32 [n_head_kv, n], ascending in each head. They stay the
// caller's.
void add_pieces(const cache_rows & rows, int32_t n, const int32_t * slots, std::vector<piece> & out);

void move_rows(llama_context * lctx, const std::vector<piece> & pieces);

// Rows [from, from + n) of a tensor become its rows [to, to + n).
struct row_move { int64_t from, to, n; };

// One move after the other, so that none may write over rows that a later one takes.
void shift_rows(llama_context * lctx, ggml_tensor * t, const std::vector<row_move> & moves);

} // namespace kvc
