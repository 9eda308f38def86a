#include "kvc_file.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include <unistd.h>

namespace {

struct trailer {
    char     magic[8];
    uint64_t sum; // FNV-1a of all before the trailer
};

const char MAGIC[8] = { 'K', 'V', 'C', 'S', 'L', 'O', 'T', '1' };

using file_ptr = std::unique_ptr<FILE, int (*)(FILE *)>;

file_ptr open(const char * path, const char * mode) {
    return { fopen(path, mode), fclose };
}

// Of the first n bytes; false: they could not be read.
bool checksum(FILE * f, size_t n, uint64_t & sum) {
    std::vector<unsigned char> buf(1 << 20);
    sum = 14695981039346656037ull;
    for (rewind(f); n > 0; ) {
        const size_t got = fread(buf.data(), 1, std::min(n, buf.size()), f);
        if (got == 0) {
            return false;
        }
        for (size_t i = 0; i < got; ++i) {
            sum = (sum ^ buf[i])*1099511628211ull;
        }
        n -= got;
    }
    return true;
}

bool append_checksum(const char * path, size_t n) {
    trailer t;
    memcpy(t.magic, MAGIC, sizeof(MAGIC));
    auto f = open(path, "r+b");
    return f && checksum(f.get(), n, t.sum) && fseek(f.get(), 0, SEEK_END) == 0 && fwrite(&t, sizeof(t), 1, f.get()) == 1 &&
        fflush(f.get()) == 0 && fsync(fileno(f.get())) == 0;
}

} // namespace

size_t kvc_save_slot(llama_context * ctx, const char * path, llama_seq_id seq_id, const llama_token * tokens, size_t n_tokens) {
    const std::string part = std::string(path) + "." + std::to_string(getpid()) + ".part";
    const size_t n = llama_state_seq_save_file(ctx, part.c_str(), seq_id, tokens, n_tokens);
    if (n == 0 || !append_checksum(part.c_str(), n) || rename(part.c_str(), path) != 0) {
        remove(part.c_str());
        return 0;
    }
    return n + sizeof(trailer);
}

size_t kvc_check_slot(const char * path, bool must) {
    auto f = open(path, "rb");
    trailer t;
    if (!f || fseek(f.get(), -(long) sizeof(t), SEEK_END) != 0 || fread(&t, sizeof(t), 1, f.get()) != 1) {
        throw std::runtime_error("the file cannot be read or is too short");
    }
    const bool ours = memcmp(t.magic, MAGIC, sizeof(MAGIC)) == 0;
    if (!ours && must) {
        throw std::runtime_error("the file is cut short, or was not saved by this server");
    }
    uint64_t sum;
    if (ours && (!checksum(f.get(), ftell(f.get()) - sizeof(t), sum) || sum != t.sum)) {
        throw std::runtime_error("the file is damaged");
    }
    return ours ? sizeof(t) : 0;
}
