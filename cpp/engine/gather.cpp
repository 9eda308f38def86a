// Rows move where they lie: the kept rows of a layer go to its first rows. In the host's memory one after the other, in
// place. On a device by two ops that every backend has: GET_ROWS over an I32 alias of the bytes, which copies them as
// they are whatever their type is, and CPY; nothing crosses but the numbers of the slots. Where a device lacks them,
// through the host.
//
//   K of a stream [n_embd_k, n_rows]  as  I32 [head bytes/4, n_rows, n_head_kv]
//   GET_ROWS by slots I32 [n, n_head_kv]  ->  I32 [head bytes/4, n, n_head_kv]  -> CPY to rows [begin, begin + n)
//
// A slot is never below the row it goes to, so rows are moved in pieces, the first ones first, and a piece is all the
// memory it takes.

#include "gather.h"
#include "engine.h"

#include "llama-context.h"
#include "llama-graph.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>

namespace kvc {

static const size_t N_BYTES = 8u << 20; // of a piece
static const size_t N_PIECES = 64;      // of one graph

// A view of other bytes of t, as another type. llama.cpp's own views keep the type.
static ggml_tensor * alias(ggml_context * ctx, ggml_tensor * t, ggml_type type, size_t offset, const int64_t (&ne)[4], const size_t (&nb)[4]) {
    auto * v = ggml_view_1d(ctx, t, ggml_blck_size(t->type), offset);
    v->type = type;
    std::copy(ne, ne + 4, v->ne);
    std::copy(nb, nb + 4, v->nb);
    return v;
}

static ggml_tensor * view_of(ggml_context * ctx, const cache_rows & r, int64_t begin, int64_t n) {
    return alias(ctx, r.t, r.type, r.offset + begin*r.nb1, { r.n_elem, n, r.ne2, r.ne3 }, { ggml_type_size(r.type), r.nb1, r.nb2, r.nb3 });
}

// Bytes of a row, as it is moved.
static int64_t n_bytes(const cache_rows & r) {
    return r.n_elem*r.ne2*r.ne3*4;
}

static ggml_backend_buffer_t buffer_of(const ggml_tensor * t) {
    return t->view_src ? t->view_src->buffer : t->buffer;
}

cache_rows rows_of_cache(ggml_tensor * t, size_t offset, size_t row, size_t channel, int64_t n_rows, int64_t head_dim, int32_t n_heads) {
    const size_t es = ggml_type_size(t->type), n_head = ggml_row_size(t->type, head_dim);
    if (channel == 0) {
        return { t, offset, GGML_TYPE_I32, n_rows, n_head % 4 ? 0 : (int64_t) n_head/4, n_heads, 1, row, n_head, n_head*n_heads, n_heads, false };
    }
    // F16 and BF16 go through F32, which holds them as they are
    return { t, offset, es == 4 ? GGML_TYPE_I32 : t->type, n_rows, 1, head_dim, n_heads, es, channel, channel*head_dim, n_heads, true };
}

cache_rows rows_of_sums(ggml_tensor * t, size_t offset, int32_t n_heads) {
    return { t, offset, GGML_TYPE_I32, t->ne[0], 1, 1, n_heads, sizeof(float), t->nb[1], t->nb[1], n_heads, true };
}

// Where a row of some head moves first.
static int32_t first_moved(const int32_t * slots, int32_t n_dst, int32_t n_hkv) {
    int32_t first = n_dst;
    for (int32_t h = 0; h < n_hkv; ++h) {
        const int32_t * row = slots + (size_t) h*n_dst;
        int32_t i = 0;
        while (i < first && row[i] == i) {
            ++i;
        }
        first = i;
    }
    return first;
}

// The slots that GET_ROWS takes: I32 [n, ne2, ne3], of each channel its head's again.
static void add_slots(const piece & p, std::vector<int32_t> & out) {
    for (int32_t h = 0; h < p.rows.n_head_kv; ++h) {
        for (int64_t c = 0; c < (p.rows.channels ? p.rows.ne2 : 1); ++c) {
            out.insert(out.end(), p.slots + (size_t) h*p.stride, p.slots + (size_t) h*p.stride + p.n);
        }
    }
}

// The two ops of a piece; its slots begin at `at` of all.
static std::pair<ggml_tensor *, ggml_tensor *> ops_of(ggml_context * ctx, const piece & p, ggml_tensor * all, int64_t at) {
    const size_t nb1 = p.n*sizeof(int32_t), nb2 = nb1*p.rows.ne2;
    auto * slots = ggml_view_3d(ctx, all, p.n, p.rows.ne2, p.rows.ne3, nb1, nb2, at*sizeof(int32_t));
    auto * got   = ggml_get_rows(ctx, view_of(ctx, p.rows, 0, p.rows.n_rows), slots);
    return { got, ggml_cpy(ctx, got, view_of(ctx, p.rows, p.begin, p.n)) };
}

static bool can_gather(const cache_rows & rows) {
    if (rows.n_elem == 0 || n_bytes(rows) == 0) {
        return false;
    }
    ggml_context_ptr ctx(ggml_init({ 16*ggml_tensor_overhead(), nullptr, true }));
    const int32_t slot = 0;
    ops_of(ctx.get(), { rows, 0, 1, &slot, 1 }, ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, rows.ne2*rows.ne3), 0);
    return can_run_all(device_of(rows.t), ctx.get());
}

void add_pieces(const cache_rows & rows, int32_t n, const int32_t * slots, std::vector<piece> & out) {
    const int32_t n_most = ggml_backend_buffer_is_host(buffer_of(rows.t)) ? n : (int32_t) std::max<int64_t>(1, N_BYTES/std::max<int64_t>(1, n_bytes(rows)));
    for (int32_t i = first_moved(slots, n, rows.n_head_kv); i < n; i += n_most) {
        out.push_back({ rows, i, std::min(n_most, n - i), slots + i, n });
    }
}

// One head's parts of rows, in place: row i becomes row slots[i] - begin, which is never below it.
static void move_head(char * rows, size_t n_row, size_t n_part, const int32_t * slots, int32_t n, int32_t begin) {
    for (int32_t i = 0; i < n; ++i) {
        if (slots[i] - begin != i) {
            memcpy(rows + i*n_row, rows + (slots[i] - begin)*n_row, n_part);
        }
    }
}

static void move_by_host(const piece & p) {
    const cache_rows & r = p.rows;
    const bool here = ggml_backend_buffer_is_host(buffer_of(r.t));
    int32_t n_src = p.begin + p.n;
    for (int32_t h = 0; h < r.n_head_kv; ++h) {
        n_src = std::max(n_src, 1 + p.slots[(size_t) h*p.stride + p.n - 1]);
    }
    for (int64_t c = 0; c < (r.channels ? r.ne2*r.ne3 : 1); ++c) { // a channel's rows lie together; else a row's heads do
        const size_t n_row = r.nb1, offset = r.offset + (r.channels ? c*r.nb2 : 0), from = offset + p.begin*n_row, size = (n_src - p.begin)*n_row;
        std::unique_ptr<char[]> staged(here ? nullptr : new char[size]);
        char * rows = here ? (char *) r.t->data + from : staged.get(); // of row p.begin
        if (!here) {
            ggml_backend_tensor_get(r.t, rows, from, size);
        }
        for (int32_t h = 0; h < (r.channels ? 1 : r.n_head_kv); ++h) {
            const int32_t * slots = p.slots + (r.channels ? c/r.ne2 : h)*p.stride;
            move_head(rows + h*r.nb2, n_row, r.channels ? n_row : r.nb2, slots, p.n, p.begin);
        }
        if (!here) {
            ggml_backend_tensor_set(r.t, rows, from, p.n*n_row);
        }
    }
}

static ggml_backend_t backend_of(ggml_backend_sched_t sched, const ggml_tensor * t) {
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        auto * backend = ggml_backend_sched_get_backend(sched, i);
        if (ggml_backend_get_device(backend) == device_of(t)) {
            return backend;
        }
    }
    return nullptr;
}

static void gather(llama_context * lctx, const std::vector<piece> & pieces) {
    std::vector<int32_t> slots;
    std::vector<int64_t> at;
    for (const piece & p : pieces) {
        at.push_back((int64_t) slots.size());
        add_slots(p, slots);
    }
    auto * res = begin_graph(lctx);
    auto * all = ggml_new_tensor_1d(res->get_ctx(), GGML_TYPE_I32, (int64_t) slots.size());
    ggml_set_input(all);
    ggml_tensor * last = nullptr;
    for (size_t i = 0; i < pieces.size(); ++i) {
        const auto ops = ops_of(res->get_ctx(), pieces[i], all, at[i]);
        for (auto * op : { ops.first, ops.second }) {
            ggml_backend_sched_set_tensor_backend(lctx->get_sched(), op, backend_of(lctx->get_sched(), pieces[i].rows.t));
        }
        ggml_build_forward_expand(res->get_gf(), last = ops.second);
    }
    run_graph(lctx, res, last, [&]() { ggml_backend_tensor_set(all, slots.data(), 0, ggml_nbytes(all)); });
}

// Pieces one after the other, on a device that can; else each by other means.
static void gather_all(llama_context * lctx, const std::vector<piece> & pieces, const std::function<void(const piece &)> & otherwise) {
    for (size_t i = 0; i < pieces.size(); i += N_PIECES) {
        const std::vector<piece> some(pieces.begin() + i, pieces.begin() + std::min(i + N_PIECES, pieces.size()));
        try {
            gather(lctx, some);
        } catch (const std::exception &) { // no memory for the graph: rows that moved have to be followed by the others
            std::for_each(some.begin(), some.end(), otherwise);
        }
    }
}

void move_rows(llama_context * lctx, const std::vector<piece> & pieces) {
    std::vector<piece> here, there; // in the host's memory, each of rows of its own; on a device that can
    for (const piece & p : pieces) {
        if (ggml_backend_buffer_is_host(buffer_of(p.rows.t))) {
            here.push_back(p);
        } else if (can_gather(p.rows)) {
            there.push_back(p);
        } else {
            move_by_host(p);
        }
    }
    on_threads(lctx, (int32_t) here.size(), [&](int32_t i) { move_by_host(here[i]); });
    gather_all(lctx, there, move_by_host);
}

void shift_rows(llama_context * lctx, ggml_tensor * t, const std::vector<row_move> & moves) {
    const size_t n_row = t->nb[1];
    if (ggml_backend_buffer_is_host(t->buffer)) {
        for (const row_move & m : moves) {
            memmove((char *) t->data + m.to*n_row, (char *) t->data + m.from*n_row, m.n*n_row);
        }
        return;
    }
    const auto rows = rows_of_cache(t, 0, n_row, 0, t->ne[1], t->ne[0], 1);
    const int64_t n_most = std::max<int64_t>(1, N_BYTES/n_row);
    std::vector<int32_t> all(t->ne[1]); // a piece's slots are neighbours
    std::iota(all.begin(), all.end(), 0);
    std::vector<piece> pieces;
    for (const row_move & m : moves) {
        const int64_t n_piece = (m.n + n_most - 1)/n_most;
        for (int64_t k = 0; k < n_piece; ++k) { // up: the last piece first
            const int64_t i = (m.to < m.from ? k : n_piece - 1 - k)*n_most, n = std::min(n_most, m.n - i);
            pieces.push_back({ rows, (int32_t) (m.to + i), (int32_t) n, all.data() + m.from + i, (int32_t) n });
        }
    }
    const auto through_host = [&](const piece & p) {
        std::vector<char> staged(p.n*n_row);
        ggml_backend_tensor_get(t, staged.data(), p.slots[0]*n_row, staged.size());
        ggml_backend_tensor_set(t, staged.data(), p.begin*n_row, staged.size());
    };
    if (can_gather(rows)) {
        gather_all(lctx, pieces, through_host);
    } else {
        std::for_each(pieces.begin(), pieces.end(), through_host);
    }
}

} // namespace kvc
