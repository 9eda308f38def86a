// llama.cpp and the engine on it, as Model and Context.

#include "bind_context.h"

namespace kvc {

//
// log
//

// errors of the call under way: llama.cpp returns null and says why here
static thread_local std::string log_errors;

static py::object & log_callback() {
    static auto * cb = new py::object(py::none()); // never destroyed: llama.cpp may log while the interpreter ends
    return *cb;
}

static void on_log(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) {
        log_errors += text;
    }
    if (Py_IsInitialized() && log_callback().ptr() != Py_None) {
        py::gil_scoped_acquire gil;
        try {
            log_callback()((int) level, py::bytes(text).attr("decode")("utf-8", "replace"));
        } catch (py::error_already_set & e) {
            e.discard_as_unraisable("pykvc log callback");
        }
    }
}

// The engine's sentence, or the first line llama.cpp logged, without the function it names.
std::string why_failed(const std::string & what) {
    std::string why = last_error();
    if (why.empty()) {
        why = log_errors.substr(0, log_errors.find('\n'));
        const size_t colon = why.find(": ");
        if (colon != std::string::npos && why.find(' ') > colon) {
            why = why.substr(colon + 2);
        }
    }
    return why.empty() ? what : what + ": " + why;
}

void fail(const std::string & what) {
    throw std::invalid_argument(why_failed(what));
}

void begin_call() {
    last_error().clear();
    log_errors.clear();
}

} // namespace kvc

namespace py = pybind11;

void bind_llama(py::module_ & m) {
    using namespace kvc;
    using namespace py::literals;
    llama_log_set(on_log, nullptr);
    llama_backend_init();

    m.def("system_info", []() { return std::string(llama_print_system_info()); }, "CPU and backend features llama.cpp was built with.");
    m.def("set_log", [](py::object cb) {
        log_callback() = std::move(cb);
        llama_log_set(on_log, nullptr); // somebody else may have set theirs
    }, "callback"_a, "level (1 debug .. 4 error) and text of each llama.cpp message; None: silent.");
    m.def("next_context", [](const py::object & policy, const std::string & budget, const std::string & decode_budget, const std::string & cells) {
        if (policy.is_none()) {
            forget_next_context();
        } else {
            next_context(config_from_python(policy, budget, decode_budget, cells));
        }
    }, "policy"_a, "budget"_a = "", "decode_budget"_a = "", "cells"_a = "", "The policy of the next context this thread creates; None: what the environment says.");
    m.def("end_calls", []() { calls_end = true; },
            "Before the interpreter ends: a call in another thread is a SystemExit after its llama_decode.");
    m.def("begin_call", &begin_call, "Forgets what failed before.");
    m.def("why_failed", &why_failed, "what"_a, "what, and why, as llama.cpp or the engine said since begin_call().");

    m.def("pretend_lacking", kvc::pretend_lacking, "ops"_a, "Tests: no device runs these ops of ggml, if it is asked.");

    py::class_<Model, std::shared_ptr<Model>>(m, "Model", "A loaded GGUF. ValueError: not a GGUF, truncated, unknown architecture.")
        .def(py::init<const std::string &, int, bool, bool, bool, int, const std::vector<float> &, const std::vector<std::string> &>(), "path"_a, py::kw_only(), "n_gpu_layers"_a = 0,
                "use_mmap"_a = true, "use_mlock"_a = false, "vocab_only"_a = false, "main_gpu"_a = -1, "tensor_split"_a = std::vector<float>(),
                "rpc_servers"_a = std::vector<std::string>(),
                "main_gpu: the one device that is used; -1: layers are split over all, in the proportions of tensor_split, as much to each if that is empty.")
        .def_property_readonly("desc", [](const Model & m) { return m.str(llama_model_desc); })
        .def_property_readonly("arch", [](const Model & m) { return m.meta()["general.architecture"]; })
        .def_property_readonly("meta", &Model::meta)
        .def_property_readonly("size", [](const Model & m) { return llama_model_size(m.ptr.get()); })
        .def_property_readonly("n_params", [](const Model & m) { return llama_model_n_params(m.ptr.get()); })
        .def_property_readonly("n_ctx_train", [](const Model & m) { // a u32 of the GGUF
            return (uint32_t) llama_model_n_ctx_train(m.ptr.get());
        })
        .def_property_readonly("n_layer", [](const Model & m) { return llama_model_n_layer(m.ptr.get()); })
        .def_property_readonly("n_head", [](const Model & m) { return llama_model_n_head(m.ptr.get()); })
        .def_property_readonly("n_head_kv", [](const Model & m) { return llama_model_n_head_kv(m.ptr.get()); })
        .def_property_readonly("n_embd", [](const Model & m) { return llama_model_n_embd(m.ptr.get()); })
        .def_property_readonly("n_vocab", [](const Model & m) { return llama_vocab_n_tokens(m.vocab); })
        .def_property_readonly("bos", [](const Model & m) { return llama_vocab_bos(m.vocab); })
        .def_property_readonly("eos", [](const Model & m) { return llama_vocab_eos(m.vocab); })
        .def_property_readonly("add_bos", [](const Model & m) { return llama_vocab_get_add_bos(m.vocab); })
        .def_property_readonly("chat_template", [](const Model & m) -> py::object {
            const char * t = llama_model_chat_template(m.ptr.get(), nullptr);
            return t ? py::object(py::str(t)) : py::object(py::none());
        })
        .def("tokenize", &Model::tokenize, "text"_a, "add_special"_a = true, "parse_special"_a = false)
        .def("detokenize", &Model::detokenize, "tokens"_a, "remove_special"_a = false, "unparse_special"_a = true)
        .def("piece", &Model::piece, "token"_a, "special"_a = false)
        .def("is_eog", [](const Model & m, llama_token t) { m.check(t); return llama_vocab_is_eog(m.vocab, t); }, "token"_a)
        .def("apply_chat_template", &Model::chat, "messages"_a, "add_assistant"_a = true, "template"_a = py::none());

    py::class_<Adapter, std::shared_ptr<Adapter>>(m, "Adapter", "A LoRA of a model, in a GGUF of its own. ValueError: it is none, or another model's.")
        .def(py::init<std::shared_ptr<Model>, const std::string &>(), "model"_a, "path"_a)
        .def_property_readonly("is_activated", &Adapter::is_activated, "By words of the prompt (aLoRA).");

    py::class_<Context>(m, "Context", "A llama_context with its cache.")
        .def(py::init<std::shared_ptr<Model>, uint32_t, uint32_t, uint32_t, uint32_t, int, int, const std::string &, const std::string &, const std::string &,
                bool, const py::object &, const std::string &, const std::string &, const std::string &>(), "model"_a, py::kw_only(), "n_ctx"_a = 0, "n_batch"_a = 2048,
                "n_ubatch"_a = 512, "n_seq_max"_a = 1, "n_threads"_a = 0, "n_threads_batch"_a = 0, "type_k"_a = "f16", "type_v"_a = "f16",
                "flash_attn"_a = "auto", "offload_kqv"_a = true, "policy"_a = "full", "budget"_a = "", "decode_budget"_a = "", "cells"_a = "")
        .def_static("borrow", [](uintptr_t address) { return std::make_unique<Context>(reinterpret_cast<llama_context *>(address)); }, "address"_a,
                "One that another program of this process made and frees, with its model.")
        .def_property_readonly("model", [](const Context & c) { return c.model; })
        .def_property_readonly("n_ctx", &Context::n_ctx)
        .def_property_readonly("n_batch", [](const Context & c) { return llama_n_batch(c.ctx.get()); })
        .def_property_readonly("n_ubatch", [](const Context & c) { return llama_n_ubatch(c.ctx.get()); })
        .def_property_readonly("n_seq_max", &Context::n_seq_max)
        .def_property_readonly("flash_attn", [](const Context & c) { return kvc::uses_flash_attn(c.ctx.get()); })
        .def_property_readonly("policy", [](const Context & c) { return c.spec; })
        .def_property_readonly("n_layer_kv", [](const Context & c) { return c.usage().n_layer; })
        .def("set_adapters", &Context::set_adapters, "adapters"_a, "scales"_a, "LoRAs of what is evaluated from now on, each times its scale.")
        .def("decode", &Context::decode, "tokens"_a, "seq"_a = 0, "logits"_a = "last", "Appends tokens to a sequence, in calls of n_batch.")
        .def("decode_batch", &Context::decode_batch, "tokens"_a, "seqs"_a, "One token for each of several sequences, in one call.")
        .def("logits", &Context::logits, "F32 [n_rows, n_vocab] of the last decode.")
        .def("pos_max", &Context::pos_max, "seq"_a = 0)
        .def("pos_floor", [](const Context & c, int32_t seq) { c.check_seq(seq); return kvc_floor(c.ctx.get(), seq); }, "seq"_a = 0)
        .def("heard_from", [](const Context & c, int32_t pos, int32_t end, int32_t seq) { c.check_seq(seq); return c.need_engine().heard_from(seq, pos, end, nullptr); },
            "pos"_a, "end"_a, "seq"_a = 0, "Where to evaluate a prompt up to end from, held up to pos, so that all queries it is scored by are there.")
        .def("remove_tail", &Context::remove_tail, "pos"_a, "seq"_a = 0, "Removes [pos, end); False and unchanged below the floor.")
        .def("clear", &Context::clear, "seq"_a = -1)
        .def("copy", &Context::copy, "src"_a, "dst"_a)
        .def("check_budget", [](const Context & c, const std::string & b, const std::string & d) {
            c.need_engine().check_budget(kvc::parse_budget(b, "kv_budget"), kvc::parse_budget(d, "kv_decode_budget"));
        }, "budget"_a, "decode_budget"_a)
        .def("check_policy", [](const Context & c, const std::string & policy, const std::string & budget, const std::string & decode) {
            c.need_engine().variant(policy.c_str(), budget.c_str(), decode.c_str());
        }, "policy"_a, "budget"_a, "decode_budget"_a = "")
        .def("set_policy", [](Context & c, const std::string & policy, const std::string & budget, const std::string & decode, int32_t seq) {
            const Context::busy now(c);
            c.check_seq(seq);
            c.need_engine().set_policy(seq, policy.empty() ? nullptr : policy.c_str(), budget.c_str(), decode.c_str());
        }, "policy"_a, "budget"_a, "decode_budget"_a = "", "seq"_a = 0)
        .def("set_budget", [](Context & c, const std::string & b, const std::string & d, int32_t seq) {
            const Context::busy now(c);
            c.need_engine().set_budget(seq, kvc::parse_budget(b, "kv_budget"), kvc::parse_budget(d, "kv_decode_budget"));
        }, "budget"_a, "decode_budget"_a, "seq"_a = 0)
        .def("set_spans", [](Context & c, const std::vector<std::pair<int32_t, int32_t>> & spans, int32_t seq) {
            const Context::busy now(c);
            std::vector<kvc::span> v;
            for (const auto & s : spans) {
                v.push_back({ s.first, s.second });
            }
            c.need_engine().set_spans(seq, std::move(v));
        }, "spans"_a, "seq"_a = 0)
        .def("begin_prompt", [](Context & c, int32_t seq) { const Context::busy now(c); c.need_engine().begin_prompt(seq); }, "seq"_a = 0)
        .def("end_prompt", [](Context & c, int32_t seq) { const Context::busy now(c); c.need_engine().end_prompt(seq); }, "seq"_a = 0)
        .def("evict", &Context::evict, "seq"_a = 0, "mask_only"_a = false, "Prompt eviction now; mask_only (tests): the keep sets as a mask, nothing is freed.")
        .def("ask", &Context::ask, "tokens"_a, "seq"_a = 0, "begin"_a = 0, "end"_a = -1, "n_repeated"_a = 0)
        .def("has_room", [](const Context & c, int32_t n, int32_t seq) { c.check_seq(seq); return c.need_engine().has_room(seq, n); }, "n"_a, "seq"_a = 0)
        .def("n_until_eviction", [](const Context & c, int32_t seq) { c.check_seq(seq); return c.need_engine().n_until_eviction(seq); }, "seq"_a = 0)
        .def("make_room", &Context::make_room, "n"_a, "seq"_a = 0)
        .def("kept", &Context::kept, "seq"_a = 0)
        .def("scores", &Context::scores, "seq"_a = 0)
        .def("signals", &Context::signals, "seq"_a = 0)
        .def("stats", &Context::stats)
        .def("bytes_resident", [](const Context & c) { return (int64_t) (c.usage().bytes_signals + c.usage().bytes_past) + kvc_resident_bytes(c.ctx.get()); })
        .def("n_evictions", &Context::n_evictions, "seq"_a = 0)
        .def("seq_stats", &Context::seq_stats, "seq"_a = 0)
        .def("save", [](Context & c) { return c.save(-1); })
        .def("load", [](Context & c, const std::string & d) { c.load(d, -1); }, "data"_a)
        .def("save_seq", &Context::save, "seq"_a = 0)
        .def("load_seq", [](Context & c, const std::string & d, int32_t seq) { c.check_seq(seq); c.load(d, seq); }, "data"_a, "seq"_a = 0);
}
