// Memory that is really taken. A host's buffer is pages that the system gives when they are first written, so rows that
// nobody holds need none. Here they are given back: after an eviction, and when a sequence is emptied. What was given
// back reads as zeros, which is what attention needs of free rows. On Linux; elsewhere, and on devices, all pages stay
// (use kv_cells).

#include "layout.h"

#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace kvc {

// Not pinned memory of a GPU's host buffers: their pages have to stay.
static bool has_pages(const ggml_tensor * t) {
    return t->buffer && ggml_backend_buffer_get_type(t->buffer) == ggml_backend_cpu_buffer_type() && ggml_backend_buffer_get_size(t->buffer) > 0;
}

#ifdef __linux__

static const size_t N_WORTH = 8*1024; // bytes: fewer are not worth a call

// Whole pages of [begin, end).
static void give_back(char * begin, char * end) {
    const uintptr_t page = (uintptr_t) sysconf(_SC_PAGESIZE);
    const uintptr_t b = ((uintptr_t) begin + page - 1)/page*page, e = (uintptr_t) end/page*page;
    if (e > b && e - b >= N_WORTH) {
        madvise((void *) b, e - b, MADV_DONTNEED); // private pages of no file: zeros when they are read again
    }
}

static size_t n_resident(const char * begin, size_t size) {
    const uintptr_t page = (uintptr_t) sysconf(_SC_PAGESIZE), b = (uintptr_t) begin/page*page;
    std::vector<unsigned char> in((((uintptr_t) begin + size) - b + page - 1)/page);
    if (mincore((void *) b, (uintptr_t) begin + size - b, in.data()) != 0) {
        return size;
    }
    size_t n = 0;
    for (const unsigned char x : in) {
        n += x & 1;
    }
    return std::min(n*page, size);
}

#else

static void give_back(char *, char *) {}

static size_t n_resident(const char *, size_t size) {
    return size;
}

#endif

// Not those of a bounded cache, which the next tokens write again at once, nor while a copy of the sequence waits for
// the next update.
void layout::give_back_rows(uint32_t s, bool all) const {
    for (int32_t l = 0; !cfg->is_bounded() && kv.sc_info.empty() && l < n_layer(); ++l) {
        if (!has_pages(kv.layers[l].k)) {
            continue;
        }
        for (const auto * t : { kv.layers[l].k_stream[s], kv.layers[l].v_stream[s] }) {
            if (all && t) {
                give_back((char *) t->data, (char *) t->data + ggml_nbytes(t));
            }
        }
        for (int32_t h = 0; !all && h < n_parts(); ++h) {
            for (const bool values : sides()) {
                const place p = place_of(s, l, h, values);
                for (const auto & run : runs_of(s, l, h, p.n_rows, values)) {
                    char * begin = (char *) run.t->data + run.offset;
                    give_back(begin + n_slots(s, l, h)*p.row, begin + run.size);
                }
            }
        }
    }
}

size_t layout::resident_bytes(const llama_kv_cache & kv) {
    size_t n = 0;
    for (const auto & layer : kv.layers) {
        for (const auto * t : { layer.k, layer.v }) {
            n += !t ? 0 : has_pages(t) ? n_resident((const char *) t->data, ggml_nbytes(t)) : ggml_nbytes(t);
        }
    }
    return n;
}

} // namespace kvc
