// Where a recurrent state can go back to: it is of its end alone, so a copy is kept of where a prompt ended, or a probe
// began.

#include "engine.h"

#include "llama-io.h"
#include "llama-kv-cache.h"
#include "llama-memory-recurrent.h"

#include "ggml-backend.h"

#include <cstring>
#include <stdexcept>

namespace kvc {

namespace {

class writer : public llama_io_write_i {
public:
    explicit writer(std::vector<uint8_t> & data) : data(data) { data.clear(); }
    void write(const void * src, size_t size) override {
        const auto * bytes = (const uint8_t *) src;
        data.insert(data.end(), bytes, bytes + size);
    }
    void write_tensor(ggml_tensor * t, size_t offset, size_t size) override {
        data.resize(data.size() + size);
        ggml_backend_tensor_get(t, data.data() + data.size() - size, offset, size);
    }
    size_t n_bytes() override { return data.size(); }
private:
    std::vector<uint8_t> & data;
};

class reader : public llama_io_read_i {
public:
    explicit reader(const std::vector<uint8_t> & data) : data(data) {}
    void read(void * dst, size_t size) override { memcpy(dst, take(size), size); }
    void read_tensor(ggml_tensor * t, size_t offset, size_t size) override { ggml_backend_tensor_set(t, take(size), offset, size); }
    size_t n_bytes() override { return at; }
private:
    const uint8_t * take(size_t size) {
        if (size > data.size() - at) {
            throw std::runtime_error("a recurrent state ends early");
        }
        at += size;
        return data.data() + at - size;
    }
    const std::vector<uint8_t> & data;
    size_t at = 0;
};

} // namespace

void engine::remember(llama_seq_id seq_id) {
    auto & q = streams[stream_of(seq_id)];
    const llama_pos end = (llama_pos) q.tokens.size();
    if (!mem.recurrent || end == 0 || mem.recurrent->seq_pos_max(seq_id) != end - 1) {
        return;
    }
    synchronize();
    writer io(q.past);
    mem.recurrent->state_write(io, seq_id, 0);
    q.past_end = end;
}

bool engine::go_back(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (seq_id < 0 || (uint32_t) seq_id >= kv.n_seq_max || p0 <= 0) {
        return false;
    }
    const auto & q = streams[stream_of(seq_id)];
    if (p0 != q.past_end || (p1 >= 0 && p1 < (llama_pos) q.tokens.size())) {
        return false;
    }
    synchronize();
    reader io(q.past);
    mem.recurrent->state_read(io, seq_id, 0);
    return true;
}

llama_pos engine::back(llama_seq_id seq_id, llama_pos pos) const {
    const llama_pos end = (llama_pos) streams[stream_of(seq_id)].tokens.size(), first = floor(seq_id);
    return pos >= end ? end : pos < first ? 0 : mem.recurrent ? first : pos;
}

} // namespace kvc
