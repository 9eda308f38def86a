#include "kvc_file.h"

#include "server-common.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <vector>

#include <unistd.h>

namespace {

// The file's last bytes; before them `n_about` bytes of JSON.
struct trailer {
    char     magic[7];
    char     version;
    uint64_t n_about;
    uint64_t sum; // FNV-1a of all before the trailer
};

const char MAGIC[7] = { 'K', 'V', 'C', 'S', 'L', 'O', 'T' };
const char VERSION  = '2';

const uint64_t FNV_START = 14695981039346656037ull;

using file_ptr = std::unique_ptr<FILE, int (*)(FILE *)>;

file_ptr open(const char * path, const char * mode) {
    return { fopen(path, mode), fclose };
}

// Goes on with a sum over the next n bytes; false: they could not be read.
bool add(FILE * f, size_t n, uint64_t & sum) {
    std::vector<unsigned char> buf(std::min<size_t>(n, 1 << 20));
    while (n > 0) {
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

// Of the first n bytes.
bool checksum(FILE * f, size_t n, uint64_t & sum) {
    sum = FNV_START;
    rewind(f);
    return add(f, n, sum);
}

bool append(const char * path, const std::string & about) {
    trailer t = { {}, VERSION, about.size(), 0 };
    memcpy(t.magic, MAGIC, sizeof(MAGIC));
    auto f = open(path, "r+b");
    return f && fseek(f.get(), 0, SEEK_END) == 0 && fwrite(about.data(), 1, about.size(), f.get()) == about.size() && fflush(f.get()) == 0 &&
        checksum(f.get(), ftell(f.get()), t.sum) && fseek(f.get(), 0, SEEK_END) == 0 && fwrite(&t, sizeof(t), 1, f.get()) == 1 &&
        fflush(f.get()) == 0 && fsync(fileno(f.get())) == 0;
}

std::string read_about(FILE * f, const trailer & t, size_t n_before) {
    std::string about(t.n_about, '\0');
    if (fseek(f, (long) (n_before - t.n_about), SEEK_SET) != 0 || fread(&about[0], 1, about.size(), f) != about.size()) {
        throw std::runtime_error("the file cannot be read");
    }
    return about;
}

} // namespace

std::string kvc_fingerprint(const char * path) {
    auto f = open(path, "rb");
    if (!f || fseek(f.get(), 0, SEEK_END) != 0) {
        return "";
    }
    const size_t n = ftell(f.get()), n_piece = std::min<size_t>(n, 4096);
    uint64_t sum = FNV_START;
    for (size_t i = 0; i < 64; ++i) {
        if (fseek(f.get(), (long) (i*(n - n_piece)/63), SEEK_SET) != 0 || !add(f.get(), n_piece, sum)) {
            return "";
        }
    }
    return std::to_string(n) + "-" + std::to_string(sum);
}

size_t kvc_save_slot(llama_context * ctx, const char * path, llama_seq_id seq_id, const llama_token * tokens, size_t n_tokens,
        const std::string & weights, const kvc_mark & mark) {
    const std::string about = json({ { "weights", weights }, { "rule", mark.rule }, { "n_tokens", mark.n_tokens } }).dump();
    const std::string part = std::string(path) + "." + std::to_string(getpid()) + ".part";
    const size_t n = llama_state_seq_save_file(ctx, part.c_str(), seq_id, tokens, n_tokens);
    if (n == 0 || !append(part.c_str(), about) || rename(part.c_str(), path) != 0) {
        remove(part.c_str());
        return 0;
    }
    return n + about.size() + sizeof(trailer);
}

size_t kvc_check_slot(const char * path, const std::string & weights, bool must, kvc_mark & mark) {
    mark.clear();
    std::error_code ec;
    const auto status = std::filesystem::status(path, ec);
    if (!std::filesystem::is_regular_file(status)) { // to open a pipe would wait for its other end
        throw std::runtime_error(std::filesystem::exists(status) ? "this is no file that was saved, but a folder or a device" : "there is no such file: save one first");
    }
    auto f = open(path, "rb");
    trailer t;
    if (!f || fseek(f.get(), -(long) sizeof(t), SEEK_END) != 0 || fread(&t, sizeof(t), 1, f.get()) != 1) {
        throw std::runtime_error("the file cannot be read or is too short");
    }
    const size_t n_before = ftell(f.get()) - sizeof(t);
    if (memcmp(t.magic, MAGIC, sizeof(MAGIC)) != 0) {
        if (must) {
            throw std::runtime_error("the file is cut short, or was not saved by this version of this server");
        }
        return 0;
    }
    uint64_t sum;
    if (t.version != VERSION) {
        throw std::runtime_error("the file is of another version of this server");
    }
    if (t.n_about > n_before || !checksum(f.get(), n_before, sum) || sum != t.sum) {
        throw std::runtime_error("the file is damaged");
    }
    const json about = json::parse(read_about(f.get(), t, n_before));
    if (about.at("weights") != weights) {
        throw std::runtime_error("the file was saved with other weights than this model's");
    }
    mark = { about.at("rule").get<std::string>(), about.at("n_tokens").get<int32_t>() };
    return t.n_about + sizeof(t);
}
