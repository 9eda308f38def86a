#pragma once

// Where the rows of layers and heads lie, and how many each holds: layout.cpp, pool.cpp, resident.cpp.

#include "gather.h"
#include "sequence.h"

#include "ggml-cpp.h"

#include <cstdint>
#include <memory>
#include <vector>

struct llama_model;
class  llama_kv_cache;

namespace kvc {

class layout {
public:
    // Throws std::invalid_argument where layers or heads cannot lie as the configuration wants it.
    layout(std::shared_ptr<const config> cfg, const llama_model & model, llama_kv_cache & kv, const std::vector<sequence> & sequences);

    // Where the rows of a KV head lie, or those of all heads side by side. Bytes, but for n_rows.
    struct place {
        ggml_tensor * t;   // what views are made of
        size_t  offset;    // of its first row
        size_t  row;       // from a row to the next
        size_t  channel;   // from a channel to the next, of transposed values; else 0
        int64_t n_rows;    // that it has room for
    };
    struct lane { int32_t head, n_head; };
    struct run_of_rows { ggml_tensor * t; size_t offset, size; };

    int32_t n_layer() const;
    int32_t n_head_kv() const { return n_hkv; }
    int32_t n_block() const { return all_on_host ? 1 : 256; }   // rows by which layers and heads differ
    bool    by_head() const { return heads_apart; }             // the rows of a head lie together
    int32_t n_parts() const { return heads_apart ? n_hkv : 1; } // of a layer, with rows of their own
    std::vector<bool> sides() const; // of a cache, as `values`: keys, and values unless they are a part of the keys (MLA)

    // -- what a sequence holds
    int32_t  n_cells(uint32_t s) const;
    int64_t  n_slots(uint32_t s) const;                                // cells of all layers in use
    int32_t  n_slots(uint32_t s, int32_t ikv) const;                   // of one
    int32_t  n_slots(uint32_t s, int32_t ikv, int32_t h) const;        // of a head; those that are not empty
    int64_t  n_held(uint32_t s, int32_t ikv) const;                    // of all heads
    std::vector<int32_t> rows_held(uint32_t s) const;                  // [n_layer, n_parts]
    std::vector<int32_t> slot_pos(uint32_t s, int32_t ikv) const;      // I32 [n_head_kv, n_slots], -1: empty
    uint32_t cell_begin(uint32_t s, int32_t ikv, int32_t h = 0) const; // first cell that a head holds, its row 0
    int64_t  row_of_origin(uint32_t s, int32_t ikv, int32_t h) const;  // where position 0 would be
    void     count_lacks(sequence & q) const;

    // -- where it lies
    place    place_of(uint32_t s, int32_t ikv, int32_t h, bool values) const;
    int64_t  n_room(uint32_t s) const; // rows that are free in every layer and head
    std::vector<lane> lanes(int32_t ikv, uint32_t s0, uint32_t s1) const; // of all these sequences
    std::vector<run_of_rows> runs_of(uint32_t s, int32_t ikv, int32_t h, int64_t n, bool values) const; // of n rows, that lie together
    // n rows of a lane of some sequences: [head_dim, n_head, n, n_seq], or of transposed values [n, n_head, head_dim,
    // n_seq]
    ggml_tensor * view_of(ggml_context * ctx, uint32_t s0, int64_t n_seq, int32_t ikv, const lane & x, int64_t n, bool values) const;

    // -- what attention reads, of the first n_kv cells
    uint32_t n_rows(int32_t ikv, uint32_t n_kv, uint32_t s0, uint32_t s1) const; // of llama.cpp's own view of a layer
    int64_t  rows_of_lane(uint32_t s0, int64_t n_seq, int32_t ikv, int32_t h, int64_t n_kv) const;

    // -- the pool, where heads draw their rows from one
    bool     has_pool() const { return pool.k; }
    int64_t  pool_begin(uint32_t s, int32_t ikv, int32_t h) const { return pool.regions[s][ikv*n_hkv + h].at; }
    ggml_tensor * pool_of(bool values) const { return values ? pool.v : pool.k; }
    int32_t  n_to_share(const std::vector<int32_t> & n_held) const;
    // Every head gets room for the rows it holds, I32 [n_layer, n_head_kv], and all get as many free ones. What has to
    // move of the pool, in an order in which no move writes over rows that a later one takes; the caller makes the moves.
    std::vector<row_move> lay_out(uint32_t s, const std::vector<int32_t> & n_held);
    void     clear_free(uint32_t s, const std::vector<int32_t> & n_held) const;
    bool     even_out(uint32_t s); // false: there is no pool
    void     copy_rows(uint32_t s0, uint32_t s1);
    void     clear_rows(uint32_t s);

    // -- bytes
    static size_t row_bytes(const llama_kv_cache & kv, int32_t ikv); // K and V of one cell; of a latent row, which is both
    size_t   held_bytes(uint32_t s, int32_t ikv) const;              // of all rows of a layer
    void     give_back_rows(uint32_t s, bool all) const;             // to the system; all, or those that are free
    static size_t resident_bytes(const llama_kv_cache & kv);         // of its tensors, in memory

private:
    struct region { int64_t at; int32_t n_rows; }; // of the pool: its first row
    struct pool_rows {
        ggml_context_ptr ctx;
        ggml_tensor * k = nullptr, * v = nullptr; // [n_elem of a row, n_stream*n_rows], all of the buffer
        int64_t n_rows = 0;                       // of a sequence
        std::vector<std::vector<region>> regions; // a sequence [n_layer, n_head_kv]
    };
    void find_pool(); // throws where layers cannot draw from one

    std::shared_ptr<const config> cfg;
    const llama_model & model;
    llama_kv_cache    & kv;
    const std::vector<sequence> & sequences;
    int32_t   n_hkv = 0;
    bool      all_on_host = false, heads_apart = false;
    pool_rows pool;
};

} // namespace kvc
