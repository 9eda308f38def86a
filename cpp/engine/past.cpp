// Where a recurrent state can go back to: it is of its end alone, so a copy is kept of where a prompt ended, or a probe
// began. The copy is taken when the next token comes: until then the state is that one, and needs none. Beside it a caller
// may have copies of its own (llama-server's context checkpoints): one that it has loaded is where the state is, before
// the end.

#include "engine.h"

#include "llama-io.h"
#include "llama-kv-cache.h"
#include "llama-memory-recurrent.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstring>
#include <map>
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

// Where a state is: tokens it has seen.
llama_pos engine::n_recurrent(uint32_t s) const {
    return mem.recurrent->seq_pos_max((llama_seq_id) s) + 1;
}

// A caller has loaded a recurrent state of before the end.
bool engine::is_back(uint32_t s) const {
    return mem.recurrent && n_recurrent(s) < (llama_pos) sequences[s].tokens.size();
}

void engine::remember(llama_seq_id seq_id) {
    const uint32_t s = stream_of(seq_id);
    auto & q = sequences[s];
    const llama_pos end = (llama_pos) q.tokens.size();
    if (mem.recurrent && end > 0 && n_recurrent(s) == end) {
        q.past_end = end;
        q.past     = {};
    }
}

void engine::take_past(uint32_t s) {
    auto & q = sequences[s];
    if (!mem.recurrent || !q.past.empty() || q.past_end < 0 || q.past_end != (llama_pos) q.tokens.size()) {
        return;
    }
    try {
        synchronize();
        writer io(q.past);
        mem.recurrent->state_write(io, (llama_seq_id) s, 0);
    } catch (const std::exception &) { // no memory: there is no way back then
        q.past     = {};
        q.past_end = -1;
    }
}

// Bytes that a copy has at most.
size_t engine::past_max() const {
    size_t res = mem.recurrent ? 1 << 16 : 0; // what says of which layer and type rows are
    for (const auto & it : mem.recurrent ? mem.recurrent->memory_breakdown() : std::map<ggml_backend_buffer_type_t, size_t>()) {
        res += it.second;
    }
    return res;
}

// Of a state that was saved: it is what llama.cpp reads, and of its place. Leaves the recurrent state to be read again.
void engine::check_past(uint32_t s) {
    const auto & q = sequences[s];
    reader io(q.past);
    mem.recurrent->state_read(io, (llama_seq_id) s, 0);
    if (io.n_bytes() != q.past.size() || n_recurrent(s) != q.past_end) {
        mem.recurrent->seq_rm((llama_seq_id) s, -1, -1);
        throw std::runtime_error("the state is damaged: its recurrent state of the past is another one's");
    }
}

bool engine::go_back(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (seq_id < 0 || (uint32_t) seq_id >= kv.n_seq_max || p0 <= 0) {
        return false;
    }
    const uint32_t s = stream_of(seq_id);
    const auto & q = sequences[s];
    if (!mem.recurrent || n_recurrent(s) <= p0 || p0 != q.past_end || q.past.empty() || (p1 >= 0 && p1 < (llama_pos) q.tokens.size())) {
        return false;
    }
    synchronize();
    reader io(q.past);
    mem.recurrent->state_read(io, seq_id, 0);
    return true;
}

// Where a prompt up to end, which goes on from pos, has to be evaluated from to be scored by all of its last queries: pos,
// or earlier, where what came after pos has taken their rows of the ring. policy: that of the prompt, null: the context's.
llama_pos engine::heard_from(llama_seq_id seq_id, llama_pos pos, llama_pos end, const char * policy) const {
    const auto & q = sequences[stream_of(seq_id)];
    const bool  keeps = policy && parse_spec(policy).info->name == std::string("full");
    const llama_pos n_window = keeps ? 0 : variant(policy, nullptr, nullptr)->need.window, n_ring = (llama_pos) q.win_pos.size();
    for (llama_pos p = std::max(end - n_window, 0); p < pos; ++p) {
        if (q.win_pos[p % n_ring] != p) {
            return p;
        }
    }
    return pos;
}

llama_pos engine::back(llama_seq_id seq_id, llama_pos pos) const {
    const uint32_t s = stream_of(seq_id);
    const llama_pos first = whole_from(seq_id);
    llama_pos res = 0;
    for (const llama_pos at : ways_back(s)) {
        res = at <= pos && at >= first ? std::max(res, at) : res;
    }
    return mem.recurrent || pos < first ? res : std::min(pos, (llama_pos) sequences[s].tokens.size());
}

// Where the sequence can go on from, as far as a recurrent state has a say in it.
std::vector<llama_pos> engine::ways_back(uint32_t s) const {
    const auto & q = sequences[s];
    const llama_pos end = (llama_pos) q.tokens.size();
    if (!mem.recurrent) {
        return { end };
    }
    return { is_back(s) ? n_recurrent(s) : end, q.past_end };
}

} // namespace kvc
