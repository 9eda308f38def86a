#include "kvc_request.h"

#include "kvc_server.h"

#include "server-common.h"

#include <algorithm>
#include <stdexcept>

// Messages by the tokens that end them, without the first, which may be the system's, and the last, which is the question.
static std::vector<kvc_span> ended_spans(const llama_vocab * vocab, const server_tokens & prompt) {
    std::vector<kvc_span> res;
    int32_t begin = 0;
    for (int32_t i = 0, n = (int32_t) prompt.size(); i < n; ++i) {
        if (prompt[i] == LLAMA_TOKEN_NULL || !llama_vocab_is_eog(vocab, prompt[i])) {
            continue;
        }
        const bool blank = i + 1 < n && prompt[i + 1] != LLAMA_TOKEN_NULL && common_token_to_piece(vocab, prompt[i + 1], true) == "\n";
        res.push_back({ begin, i + 1 + blank });
        begin = i + 1 + blank;
    }
    return res.size() < 3 ? std::vector<kvc_span>() : std::vector<kvc_span>(res.begin() + 1, res.end() - 1);
}

// The messages before the last one of the user, which is the question; the system's are always kept. Of a template that
// writes a system message of its own llama.cpp takes that one's beginning for the user's.
static std::vector<kvc_span> message_spans(const llama_vocab * vocab, const server_tokens & prompt, const common_chat_msg_spans & chat) {
    std::vector<kvc_span> res;
    const int32_t last = chat.last_user_message_pos();
    for (int32_t i = std::max(last, 0); i < std::min(last + 4, (int32_t) prompt.size()); ++i) {
        if (prompt[i] != LLAMA_TOKEN_NULL && common_token_to_piece(vocab, prompt[i], true) == "system") {
            return ended_spans(vocab, prompt);
        }
    }
    for (const auto & m : chat.spans) {
        const int32_t begin = (int32_t) m.pos, end = (int32_t) (m.pos + m.len);
        if (begin < last && begin < end && m.role != COMMON_CHAT_ROLE_SYSTEM) {
            res.push_back({ begin, end });
        }
    }
    return res;
}

static void check_ranges(const std::vector<kvc_span> & spans, int32_t n_tokens) {
    int32_t end = 0;
    for (const auto & s : spans) {
        if (s.begin < end || s.end <= s.begin || s.end > n_tokens) {
            throw std::invalid_argument("kv_spans: [" + std::to_string(s.begin) + ", " + std::to_string(s.end) + "] is empty, out of order, "
                "overlaps the one before it or leaves the prompt, which has " + std::to_string(n_tokens) + " tokens");
        }
        end = s.end;
    }
}

kvc_options kvc_request::over(const kvc_options & own) const {
    const std::string name = policy.value_or(own.policy);
    const bool keeps = name == "full";
    return { name, budget.value_or(keeps ? "" : own.budget), decode_budget.value_or(keeps ? "" : own.decode_budget), own.cells };
}

void kvc_request::resolve(const kvc_server & server, const server_tokens & prompt, int32_t n_predict,
        const common_chat_msg_spans & chat) {
    if (!server.on) {
        if (policy || budget || decode_budget || units != unsaid) {
            throw std::invalid_argument("kv_policy, kv_budget, kv_decode_budget and kv_spans: this server was started without --kv-policy, "
                "so its cache keeps every token");
        }
        return;
    }
    const int uses_spans = kvc_check_policy(server.ctx, policy_arg(), budget_arg(), decode_budget_arg());
    if (uses_spans < 0) {
        throw std::invalid_argument(kvc_last_error());
    }
    const int32_t n_tokens = (int32_t) prompt.size();
    const auto rope = llama_model_rope_type(llama_get_model(server.ctx));
    bool image = false;
    for (int32_t i = 0; i < n_tokens; ++i) {
        image |= prompt[i] == LLAMA_TOKEN_NULL;
    }
    if (image && (rope == LLAMA_ROPE_TYPE_MROPE || rope == LLAMA_ROPE_TYPE_IMROPE)) {
        throw std::invalid_argument("images: in this model their positions are no count of tokens, which an eviction goes by: leave them out, or "
            "ask a server that was started without --kv-policy");
    }
    if (policy && *policy == "full") {
        if (server.bounded && (n_predict < 0 || (int64_t) n_tokens + n_predict > server.n_cells)) {
            throw std::invalid_argument("kv_policy full: a slot has " + std::to_string(server.n_cells) + " cells (--kv-cells), and the prompt of " +
                std::to_string(n_tokens) + " tokens and n_predict have to fit into them");
        }
    } else if (policy && !budget && !decode_budget && !server.has_budget) {
        throw std::invalid_argument("kv_policy " + *policy + " evicts nothing without a budget: give kv_budget (tokens, or a retained ratio in (0, 1]) "
            "or kv_decode_budget");
    }
    const auto used = over(server.options);
    rule = used.policy + "|" + used.budget + "|" + used.decode_budget;

    if (units == ranges) {
        check_ranges(spans, n_tokens);
    }
    if (units == messages && chat.spans.empty()) {
        throw std::invalid_argument("kv_spans \"message\": this is no chat, or its template marks no messages: use \"sentence\", a separator or token ranges");
    }
    if (uses_spans == 0) {
        spans.clear(); // what a policy does not look at
        return;
    }
    if (units == unsaid) {
        units = chat.spans.empty() ? sentences : messages;
    }
    rule += "|" + std::to_string(units) + text;
    if (units == messages) {
        spans = message_spans(llama_model_get_vocab(llama_get_model(server.ctx)), prompt, chat);
    } else if (units != ranges) {
        std::vector<llama_token> tokens;
        for (int32_t i = 0; i < n_tokens; ++i) {
            tokens.push_back(prompt[i]);
        }
        spans.resize(n_tokens);
        const int32_t n = kvc_segment(llama_model_get_vocab(llama_get_model(server.ctx)), tokens.data(), n_tokens,
            units == separator ? text.c_str() : nullptr, spans.data());
        if (n < 0) {
            throw std::invalid_argument(kvc_last_error());
        }
        spans.resize(n);
    }
}
