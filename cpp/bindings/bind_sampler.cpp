// llama.cpp's samplers as Sampler, grammars and JSON schemas.

#include "bind_context.h"

#ifdef PYKVC_JSON_SCHEMA
#include "json-schema-to-grammar.h"
#endif

#include <cmath>

namespace kvc {

// What the chain is made of; 0 or 1 leaves a sampler out, as in llama.cpp.
struct sampling {
    float    temperature, top_p, min_p, typical_p, repeat_penalty, presence_penalty, frequency_penalty;
    int32_t  top_k;
    uint32_t seed;

    void check() const {
        const bool valid = temperature >= 0 && top_k >= 0 && top_p > 0 && top_p <= 1 && min_p >= 0 && min_p <= 1 && typical_p > 0 && typical_p <= 1 &&
            repeat_penalty > 0 && std::isfinite(presence_penalty) && std::isfinite(frequency_penalty);
        if (!valid) {
            throw std::invalid_argument("sampling: temperature >= 0, top_k >= 0, top_p and typical_p in (0, 1], min_p in [0, 1], repeat_penalty > 0, "
                "presence_penalty and frequency_penalty finite");
        }
    }
};

class Sampler {
public:
    Sampler(std::shared_ptr<Model> m, const sampling & how, const std::map<llama_token, float> & bias, const std::string & gbnf) : model(std::move(m)) {
        how.check();
        const int32_t n_vocab = llama_vocab_n_tokens(model->vocab);
        chain.reset(llama_sampler_chain_init(llama_sampler_chain_default_params()));
        add_bias(bias, n_vocab);
        if (how.repeat_penalty != 1.0f || how.frequency_penalty != 0.0f || how.presence_penalty != 0.0f) {
            add(llama_sampler_init_penalties(n_vocab, 64, how.repeat_penalty, how.frequency_penalty, how.presence_penalty));
        }
        if (how.temperature == 0) {
            add(llama_sampler_init_greedy());
        } else {
            add_random(how);
        }
        if (!gbnf.empty()) {
            set_grammar(gbnf);
        }
    }

    llama_token sample_row(const f32_array & logits) {
        if (logits.ndim() != 1 || logits.size() == 0) {
            throw std::invalid_argument("logits must be F32 [n_vocab]");
        }
        return pick(logits.data(), (int32_t) logits.size());
    }

    llama_token sample(Context & ctx, int32_t row) {
        if (ctx.n_rows == 0 || row >= ctx.n_rows || row < -ctx.n_rows) {
            throw std::invalid_argument("sample: the last decode left " + std::to_string(ctx.n_rows) + " rows of logits");
        }
        const int32_t n_vocab = llama_vocab_n_tokens(ctx.model->vocab);
        return pick(llama_get_logits(ctx.ctx.get()) + (size_t) (row < 0 ? ctx.n_rows + row : row)*n_vocab, n_vocab);
    }

private:
    std::shared_ptr<Model> model; // the samplers read its vocabulary
    llama_sampler_ptr chain, grammar;

    void add(llama_sampler * s) {
        llama_sampler_chain_add(chain.get(), s);
    }

    void add_bias(const std::map<llama_token, float> & bias, int32_t n_vocab) {
        std::vector<llama_logit_bias> all;
        for (const auto & b : bias) {
            model->check(b.first);
            all.push_back({ b.first, b.second });
        }
        if (!all.empty()) {
            add(llama_sampler_init_logit_bias(n_vocab, (int32_t) all.size(), all.data()));
        }
    }

    void add_random(const sampling & how) {
        if (how.top_k > 0) {
            add(llama_sampler_init_top_k(how.top_k));
        }
        if (how.typical_p < 1.0f) {
            add(llama_sampler_init_typical(how.typical_p, 1));
        }
        add(llama_sampler_init_top_p(how.top_p, 1));
        add(llama_sampler_init_min_p(how.min_p, 1));
        add(llama_sampler_init_temp(how.temperature));
        add(llama_sampler_init_dist(how.seed));
    }

    void set_grammar(const std::string & gbnf) {
        model->need_text("a grammar is of text");
        begin_call();
        grammar.reset(llama_sampler_init_grammar(model->vocab, gbnf.c_str(), "root"));
        if (!grammar) {
            fail("the grammar cannot be read: it is GBNF with a rule named root");
        }
    }

    // Of the logits, the chain's token. A grammar looks at the whole vocabulary only where it refuses what the chain
    // chose.
    llama_token pick(const float * logits, int32_t n_vocab) {
        llama_token res = choose(logits, n_vocab, false);
        if (grammar) {
            llama_token_data one = { res, 1.0f, 0.0f };
            llama_token_data_array only = { &one, 1, -1, false };
            llama_sampler_apply(grammar.get(), &only);
            if (one.logit == -INFINITY) {
                res = choose(logits, n_vocab, true);
            }
            llama_sampler_accept(grammar.get(), res);
        }
        llama_sampler_accept(chain.get(), res);
        return res;
    }

    llama_token choose(const float * logits, int32_t n_vocab, bool ruled) {
        std::vector<llama_token_data> data(n_vocab);
        for (llama_token t = 0; t < n_vocab; ++t) {
            data[t] = { t, logits[t], 0.0f };
        }
        llama_token_data_array cur = { data.data(), data.size(), -1, false };
        std::vector<bool> allowed(ruled ? n_vocab : 0);
        if (ruled) {
            llama_sampler_apply(grammar.get(), &cur);
            for (const auto & d : data) {
                allowed[d.id] = d.logit != -INFINITY;
            }
        }
        llama_sampler_apply(chain.get(), &cur);
        const llama_token res = cur.data[cur.selected].id;
        if (ruled && !allowed[res]) { // of none the chain takes any
            throw std::invalid_argument("the grammar allows no token of this model's vocabulary here, or logit_bias takes all that it allows");
        }
        return res;
    }
};

// GBNF of what the schema allows, as llama-server makes it.
static std::string schema_to_grammar(const std::string & schema) {
#ifdef PYKVC_JSON_SCHEMA
    try {
        return json_schema_to_grammar(common_json::parse(schema));
    } catch (const std::exception & e) {
        throw std::invalid_argument(std::string("json_schema: ") + e.what());
    }
#else
    (void) schema;
    throw std::invalid_argument("json_schema: this build is without llama-server (PYKVC_SERVER=OFF), whose converter it takes: give a grammar");
#endif
}

} // namespace kvc

namespace py = pybind11;

void bind_sampler(py::module_ & m) {
    using namespace kvc;
    using namespace py::literals;

    m.def("json_schema_to_grammar", &schema_to_grammar, "schema"_a, "GBNF of the JSON texts that a schema, itself JSON text, allows.");

    py::class_<Sampler>(m, "Sampler", "llama.cpp's chain: logit_bias, penalties, top_k, typical_p, top_p, min_p, temp, dist; temperature 0 is greedy. grammar: GBNF.")
        .def(py::init([](std::shared_ptr<Model> model, float temperature, int32_t top_k, float top_p, float min_p, float typical_p, float repeat_penalty,
                    float presence_penalty, float frequency_penalty, uint32_t seed, const std::map<llama_token, float> & logit_bias, const std::string & grammar) {
                const sampling how = { temperature, top_p, min_p, typical_p, repeat_penalty, presence_penalty, frequency_penalty, top_k, seed };
                return std::make_unique<Sampler>(std::move(model), how, logit_bias, grammar);
            }), "model"_a, py::kw_only(), "temperature"_a = 0.0f, "top_k"_a = 40, "top_p"_a = 0.95f, "min_p"_a = 0.05f, "typical_p"_a = 1.0f, "repeat_penalty"_a = 1.0f,
                "presence_penalty"_a = 0.0f, "frequency_penalty"_a = 0.0f, "seed"_a = 0, "logit_bias"_a = std::map<llama_token, float>(), "grammar"_a = "")
        .def("sample", &Sampler::sample, "ctx"_a, "row"_a = -1, "The token, accepted.")
        .def("sample_row", &Sampler::sample_row, "logits"_a, "The same from logits F32 [n_vocab] that were kept.");
}
