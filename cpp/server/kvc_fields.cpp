#include "kvc_fields.h"

#include "kvc_request.h"

#include "server-schema.h"

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <stdexcept>

using server_schema::field_eval_context;
using server_schema::field_json;

// Without white space around it; "" of what is none, or holds a NUL: the engine takes C strings.
static std::string read_text(const json & v) {
    const std::string text = v.is_string() ? v.get<std::string>() : "";
    const size_t begin = text.find_first_not_of(" \t\r\n");
    return begin == std::string::npos || text.find('\0') != std::string::npos ? "" : text.substr(begin, text.find_last_not_of(" \t\r\n") - begin + 1);
}

// 512 tokens, 0.25 or "25%" retained ratio: as pykvc.LLM takes them.
static std::string read_budget(const json & v) {
    if (const std::string text = read_text(v); !text.empty()) {
        return text;
    }
    if (v.is_number_integer()) {
        return v.dump();
    }
    if (v.is_number_float()) {
        const double x = v.get<double>();
        if (x > 0 && x <= 1) {
            char text[32];
            snprintf(text, sizeof(text), "%.12g%%", 100*x);
            return text;
        }
    }
    throw std::invalid_argument("a number of tokens, a retained ratio in (0, 1] or a string such as \"25%\", not " + v.dump());
}

static void read_spans(const json & v, kvc_request & kv) {
    static const char * valid = "a list of [begin, end] token ranges, \"message\" (of a chat), \"sentence\", or a separator (\"sep:...\" for one that is a word)";
    kv.spans.clear();
    if (v.is_array()) {
        kv.units = kvc_request::ranges;
        for (const auto & item : v) {
            if (!item.is_array() || item.size() != 2 || !item[0].is_number_integer() || !item[1].is_number_integer()) {
                throw std::invalid_argument(std::string(valid) + ": " + item.dump() + " is no range");
            }
            const int64_t begin = item[0].get<int64_t>(), end = item[1].get<int64_t>();
            if (begin < 0 || end > INT32_MAX || begin > end) {
                throw std::invalid_argument(item.dump() + " is no range of tokens");
            }
            kv.spans.push_back({ (int32_t) begin, (int32_t) end });
        }
        return;
    }
    std::string text = v.is_string() ? v.get<std::string>() : "";
    if (text.find('\0') != std::string::npos) { // the engine takes C strings
        text.clear();
    }
    bool word = !text.empty();
    for (const char c : text) {
        word = word && (isalnum((unsigned char) c) || c == '_');
    }
    if (text == "message" || text == "sentence") {
        kv.units = text == "message" ? kvc_request::messages : kvc_request::sentences;
    } else if (text.rfind("sep:", 0) == 0 && text.size() > 4) {
        kv.units = kvc_request::separator;
        kv.text  = text.substr(4);
    } else if (!text.empty() && !word && text.rfind("re:", 0) != 0 && text != "sep:") {
        kv.units = kvc_request::separator;
        kv.text  = text;
    } else {
        throw std::invalid_argument(std::string(valid) + ", not " + v.dump());
    }
}

void kvc_add_fields(std::vector<std::unique_ptr<server_schema::field>> & fields, kvc_request & kv) {
    const auto add = [&](const char * name, const char * desc, std::function<void(const json &)> read) {
        fields.emplace_back((new field_json(name))->set_desc(desc)->set_handler([name, read](field_eval_context &, const json & data) {
            read(data.at(name));
        }));
    };
    add("kv_policy", "Which tokens of the cache stay: NAME[:key=value,...], within what --kv-policy computes; full: all of them", [&kv](const json & v) {
        kv.policy = read_text(v);
        if (kv.policy->empty()) {
            throw std::invalid_argument("the name of a policy, such as \"snapkv:window=32\", not " + v.dump());
        }
    });
    add("kv_budget", "Cells a layer keeps of the prompt: a number of tokens, a retained ratio such as 0.25 or \"25%\"", [&kv](const json & v) {
        kv.budget = read_budget(v);
    });
    add("kv_decode_budget", "The same of the generated tokens", [&kv](const json & v) {
        kv.decode_budget = read_budget(v);
    });
    add("kv_spans", "Units for policies that work on spans: [[begin, end], ...] in tokens, \"message\", \"sentence\" or a separator", [&kv](const json & v) {
        read_spans(v, kv);
    });
}

kvc_request kvc_read_fields(const std::string & body) {
    const json data = body.empty() ? json::object() : json::parse_no_throw(body);
    if (!data.is_object()) {
        throw std::invalid_argument("a JSON object of kv_policy, kv_budget, kv_decode_budget and kv_spans, which may all be left out");
    }
    task_params params;
    field_eval_context ctx(params);
    std::vector<std::unique_ptr<server_schema::field>> fields;
    kvc_add_fields(fields, params.kv);
    for (const auto & item : data.items()) {
        if (std::none_of(fields.begin(), fields.end(), [&](const auto & f) { return item.key() == f->name.at(0); })) {
            throw std::invalid_argument("kv_policy, kv_budget, kv_decode_budget and kv_spans are the fields there are, not " + item.key());
        }
    }
    for (const auto & f : fields) {
        f->eval(ctx, data);
    }
    return params.kv;
}
