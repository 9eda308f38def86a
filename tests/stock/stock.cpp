// Stock llama.cpp's answer to a list of tokens, for tests to compare with.
//
//   stock MODEL TOKENS.bin OUT.bin [--ctx N] [--batch N] [--ubatch N] [--ctk TYPE] [--ctv TYPE] [--fa 0|1] [--threads N] [--split N1,N2,...]
//
// TOKENS.bin is I32. They are decoded by one llama_decode for each number of the split, and what is left one token a call.
// OUT.bin: for each call F32 [n_vocab] logits of its last token, then a U64 size and that many bytes of llama_state_get_data.

#include "ggml.h"
#include "llama.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <sstream>
#include <string>
#include <vector>

static void fail(const std::string & why) {
    fprintf(stderr, "stock: %s\n", why.c_str());
    exit(1);
}

static ggml_type type_of(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const char * known = ggml_type_name((ggml_type) i);
        if (known && name == known) {
            return (ggml_type) i;
        }
    }
    fail("unknown cache type " + name);
    return GGML_TYPE_COUNT;
}

int main(int argc, char ** argv) {
    if (argc < 4 || argc % 2 != 0) {
        fail("usage: stock MODEL TOKENS.bin OUT.bin [--option value ...]");
    }
    std::map<std::string, std::string> opt = {
        {"--ctx", "4096"}, {"--batch", "2048"}, {"--ubatch", "512"}, {"--ctk", "f16"}, {"--ctv", "f16"},
        {"--fa", "1"}, {"--threads", "2"}, {"--split", ""},
    };
    for (int i = 4; i < argc; i += 2) {
        if (!opt.count(argv[i])) {
            fail(std::string("unknown option ") + argv[i]);
        }
        opt[argv[i]] = argv[i + 1];
    }

    std::ifstream in(argv[2], std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(in)), {});
    const int32_t * begin = (const int32_t *) bytes.data();
    std::vector<llama_token> tokens(begin, begin + bytes.size() / sizeof(int32_t));
    if (tokens.empty()) {
        fail(std::string("no tokens in ") + argv[2]);
    }

    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level >= GGML_LOG_LEVEL_ERROR && level != GGML_LOG_LEVEL_CONT) {
            fputs(text, stderr);
        }
    }, nullptr);
    llama_backend_init();

    llama_model_params mparams = llama_model_default_params();
    const char * ngl = getenv("PYKVC_TEST_NGL");
    mparams.n_gpu_layers = ngl ? atoi(ngl) : 0;
    llama_model * model = llama_model_load_from_file(argv[1], mparams);
    if (!model) {
        fail(std::string("cannot load ") + argv[1]);
    }

    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx           = std::stoi(opt["--ctx"]);
    cparams.n_batch         = std::stoi(opt["--batch"]);
    cparams.n_ubatch        = std::stoi(opt["--ubatch"]);
    cparams.n_threads       = std::stoi(opt["--threads"]);
    cparams.n_threads_batch = cparams.n_threads;
    cparams.type_k          = type_of(opt["--ctk"]);
    cparams.type_v          = type_of(opt["--ctv"]);
    cparams.flash_attn_type = opt["--fa"] == "0" ? LLAMA_FLASH_ATTN_TYPE_DISABLED : LLAMA_FLASH_ATTN_TYPE_ENABLED;
    llama_context * ctx = llama_init_from_model(model, cparams);
    if (!ctx) {
        fail("cannot make a context");
    }

    std::ofstream out(argv[3], std::ios::binary);
    const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    const size_t  n       = tokens.size();
    std::stringstream split(opt["--split"]);
    std::string word;
    for (size_t done = 0; done < n; ) {
        size_t take = std::getline(split, word, ',') ? std::stoul(word) : 1;
        take = std::min(take, n - done);
        if (take == 0 || take > llama_n_batch(ctx)) {
            fail("--split wants numbers from 1 to the batch size, " + std::to_string(llama_n_batch(ctx)));
        }
        if (llama_decode(ctx, llama_batch_get_one(tokens.data() + done, (int32_t) take)) != 0) {
            fail("llama_decode failed at token " + std::to_string(done));
        }
        out.write((const char *) llama_get_logits_ith(ctx, -1), n_vocab * sizeof(float));
        done += take;
    }

    std::vector<uint8_t> state(llama_state_get_size(ctx));
    state.resize(llama_state_get_data(ctx, state.data(), state.size()));
    const uint64_t size = state.size();
    out.write((const char *) &size, sizeof(size));
    out.write((const char *) state.data(), size);
    out.close();

    llama_free(ctx);
    llama_model_free(model);
    llama_backend_free();
    return out ? 0 : 1;
}
