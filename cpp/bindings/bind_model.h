#pragma once

// Model, and how a failed call of llama.cpp becomes a ValueError. Arguments are checked here: a GGML_ASSERT would take
// the interpreter with it. The GIL is released while llama.cpp computes.

#include "bind_policy.h"

#include "llama-cpp.h"
#include "llama.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>

namespace kvc {

namespace py = pybind11;

// Forgets the errors of earlier calls; throws those of this one.
void begin_call();
std::string why_failed(const std::string & what);
[[noreturn]] void fail(const std::string & what);

// Of llama.cpp's RPC servers, host:port each, and the GPUs of this machine; nullptr at the end.
std::vector<ggml_backend_dev_t> devices_of(const std::vector<std::string> & rpc_servers);

class Model {
public:
    std::shared_ptr<llama_model> ptr;
    const llama_vocab * vocab = nullptr;

    Model(const std::string & path, int n_gpu_layers, bool use_mmap, bool use_mlock, bool vocab_only, int main_gpu, std::vector<float> tensor_split,
            const std::vector<std::string> & rpc_servers) {
        begin_call();
        auto mp = llama_model_default_params();
        if (tensor_split.size() > llama_max_devices()) {
            throw std::invalid_argument("tensor_split has " + std::to_string(tensor_split.size()) + " devices: llama.cpp knows at most " + std::to_string(llama_max_devices()));
        }
        const size_t n_asked = std::max<size_t>(tensor_split.size(), std::max(main_gpu, -1) + 1);
        tensor_split.resize(llama_max_devices(), 0.0f);
        mp.tensor_split = tensor_split.data();
        if (main_gpu >= 0) {
            mp.split_mode = LLAMA_SPLIT_MODE_NONE;
            mp.main_gpu   = main_gpu;
        }
        mp.n_gpu_layers = n_gpu_layers;
        mp.vocab_only   = vocab_only;
        mp.load_mode    = use_mlock ? LLAMA_LOAD_MODE_MLOCK : use_mmap ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_NONE;
        {
            py::gil_scoped_release nogil;
            auto devices = rpc_servers.empty() ? std::vector<ggml_backend_dev_t>() : devices_of(rpc_servers);
            if (!devices.empty() && n_asked >= devices.size()) {
                throw std::invalid_argument("tensor_split or main_gpu wants " + std::to_string(n_asked) + " devices: RPC servers and GPUs are " +
                        std::to_string(devices.size() - 1) + " here");
            }
            mp.devices = devices.empty() ? nullptr : devices.data(); // nullptr: llama.cpp chooses
            ptr.reset(llama_model_load_from_file(path.c_str(), mp), llama_model_free);
        }
        if (!ptr) {
            fail(path + " is not a GGUF model llama.cpp can load");
        }
        vocab = llama_model_get_vocab(ptr.get());
    }

    // Another program's, which frees it.
    explicit Model(llama_model * borrowed) : ptr(borrowed, [](llama_model *) {}), vocab(llama_model_get_vocab(borrowed)) {}

    std::string str(int32_t (*fn)(const llama_model *, char *, size_t)) const {
        char buf[512];
        const int32_t n = fn(ptr.get(), buf, sizeof(buf));
        return std::string(buf, std::max(0, std::min<int32_t>(n, sizeof(buf) - 1)));
    }

    std::map<std::string, std::string> meta() const {
        std::map<std::string, std::string> res;
        std::vector<char> key(256), val(1 << 16);
        for (int32_t i = 0; i < llama_model_meta_count(ptr.get()); ++i) {
            llama_model_meta_key_by_index(ptr.get(), i, key.data(), key.size());
            llama_model_meta_val_str_by_index(ptr.get(), i, val.data(), val.size());
            res[key.data()] = val.data();
        }
        return res;
    }

    bool has_text() const {
        return llama_vocab_type(vocab) != LLAMA_VOCAB_TYPE_NONE;
    }

    void need_text(const char * instead) const { // llama.cpp would abort
        if (!has_text()) {
            throw std::invalid_argument(std::string("this model has no tokenizer: ") + instead);
        }
    }

    std::vector<llama_token> tokenize(const std::string & text, bool add_special, bool parse_special) const {
        need_text("give tokens, not text");
        std::vector<llama_token> res(text.size() + 8);
        const int32_t n = llama_tokenize(vocab, text.data(), (int32_t) text.size(), res.data(), (int32_t) res.size(), add_special, parse_special);
        if (n < 0) {
            res.resize(-n);
            llama_tokenize(vocab, text.data(), (int32_t) text.size(), res.data(), (int32_t) res.size(), add_special, parse_special);
            return res;
        }
        res.resize(n);
        return res;
    }

    void check(llama_token t) const {
        if (t < 0 || t >= llama_vocab_n_tokens(vocab)) {
            throw std::invalid_argument("token " + std::to_string(t) + " is outside the vocabulary [0, " + std::to_string(llama_vocab_n_tokens(vocab)) + ")");
        }
    }

    py::bytes detokenize(const std::vector<llama_token> & tokens, bool remove_special, bool unparse_special) const {
        need_text("its tokens have no text");
        for (const auto t : tokens) {
            check(t);
        }
        std::string res(tokens.size()*8 + 16, '\0');
        int32_t n = llama_detokenize(vocab, tokens.data(), (int32_t) tokens.size(), &res[0], (int32_t) res.size(), remove_special, unparse_special);
        if (n < 0) {
            res.resize(-n);
            n = llama_detokenize(vocab, tokens.data(), (int32_t) tokens.size(), &res[0], (int32_t) res.size(), remove_special, unparse_special);
        }
        return py::bytes(res.data(), std::max(0, n));
    }

    // Empty where the model has no tokenizer.
    py::bytes piece(llama_token t, bool special) const {
        check(t);
        if (!has_text()) {
            return py::bytes();
        }
        char buf[512];
        const int32_t n = llama_token_to_piece(vocab, t, buf, sizeof(buf), 0, special);
        return py::bytes(buf, std::max(0, n));
    }

    std::string chat(const std::vector<std::pair<std::string, std::string>> & messages, bool add_assistant, const std::optional<std::string> & tmpl) const {
        const char * t = tmpl ? tmpl->c_str() : llama_model_chat_template(ptr.get(), nullptr);
        if (!t) {
            throw std::invalid_argument("this model has no chat template: give one of llama.cpp's names, \"chatml\" for instance");
        }
        std::vector<llama_chat_message> msgs;
        size_t n_text = 256;
        for (const auto & m : messages) {
            msgs.push_back({ m.first.c_str(), m.second.c_str() });
            n_text += 2*(m.first.size() + m.second.size()) + 64;
        }
        std::string res(n_text, '\0');
        int32_t n = llama_chat_apply_template(t, msgs.data(), msgs.size(), add_assistant, &res[0], (int32_t) res.size());
        if (n > (int32_t) res.size()) {
            res.resize(n);
            n = llama_chat_apply_template(t, msgs.data(), msgs.size(), add_assistant, &res[0], (int32_t) res.size());
        }
        if (n < 0) {
            throw std::invalid_argument("llama.cpp does not know this chat template: give one of its names, \"chatml\" for instance");
        }
        res.resize(n);
        return res;
    }
};

// Contexts of one model may be made by several threads, and llama.cpp lists its adapters without a lock: the GIL is
// held.
class Adapter {
public:
    std::shared_ptr<Model> model; // outlives ptr
    std::unique_ptr<llama_adapter_lora, void (*)(llama_adapter_lora *)> ptr{ nullptr, llama_adapter_lora_free };

    Adapter(std::shared_ptr<Model> m, const std::string & path) : model(std::move(m)) {
        begin_call();
        ptr.reset(llama_adapter_lora_init(model->ptr.get(), path.c_str()));
        if (!ptr) {
            fail(path + " is not a LoRA of this model");
        }
    }

    bool is_activated() const { return llama_adapter_get_alora_n_invocation_tokens(ptr.get()) > 0; }
};

} // namespace kvc
