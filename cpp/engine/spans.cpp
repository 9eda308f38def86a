#include "spans.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace kvc {

//
// bytes of UTF-8
//

// Bytes of the character at `at`; 1 where they are no UTF-8.
static size_t length(const std::string & s, size_t at) {
    const unsigned char c = s[at];
    const size_t n = c < 0xc0 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
    for (size_t i = 1; i < n; ++i) {
        if (at + i >= s.size() || ((unsigned char) s[at + i] & 0xc0) != 0x80) {
            return 1;
        }
    }
    return n;
}

static bool one_of(const std::string & s, size_t at, size_t n, const std::vector<const char *> & words) {
    for (const char * w : words) {
        if (strlen(w) == n && s.compare(at, n, w) == 0) {
            return true;
        }
    }
    return false;
}

// Bytes of the white space at `at`, 0: none. As Python's str.isspace().
static size_t space(const std::string & s, size_t at) {
    static const std::vector<const char *> wide = {
        "\u0085", "\u00a0", "\u1680", "\u2000", "\u2001", "\u2002", "\u2003", "\u2004", "\u2005", "\u2006", "\u2007", "\u2008", "\u2009",
        "\u200a", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000" };
    if (at >= s.size()) {
        return 0;
    }
    const unsigned char c = s[at];
    if (c < 0x80) {
        return c == ' ' || (c >= 0x09 && c <= 0x0d) || (c >= 0x1c && c <= 0x1f);
    }
    const size_t n = length(s, at);
    return one_of(s, at, n, wide) ? n : 0;
}

static size_t skip_spaces(const std::string & s, size_t at) {
    while (const size_t n = space(s, at)) {
        at += n;
    }
    return at;
}

//
// spans of bytes
//

// The text between ascending cuts.
static std::vector<span> between(const std::string & text, std::vector<size_t> cuts) {
    if (cuts.empty() || cuts.back() < text.size()) {
        cuts.push_back(text.size());
    }
    std::vector<span> res;
    size_t begin = 0;
    for (const size_t end : cuts) {
        if (skip_spaces(text, begin) < end) {
            res.push_back({ (int32_t) begin, (int32_t) end });
        }
        begin = end;
    }
    return res;
}

std::vector<span> separator_spans(const std::string & text, const std::string & separator) {
    if (separator.empty()) {
        throw std::invalid_argument("a separator has at least one character");
    }
    std::vector<size_t> cuts;
    for (size_t at = text.find(separator); at != std::string::npos; at = text.find(separator, at + separator.size())) {
        cuts.push_back(at + separator.size());
    }
    return between(text, cuts);
}

std::vector<span> sentence_spans(const std::string & text) {
    static const std::vector<const char *> closing = { "\"", "'", ")", "]", "\u201d", "\u2019" };
    static const std::vector<const char *> full    = { "\u3002", "\uff01", "\uff1f" };
    std::vector<size_t> cuts;
    for (size_t at = 0; at < text.size(); ) {
        const size_t n = length(text, at);
        const bool wide = one_of(text, at, n, full);
        if (wide || text[at] == '.' || text[at] == '!' || text[at] == '?') {
            size_t end = at + n;
            while (end < text.size() && one_of(text, end, length(text, end), closing)) {
                end += length(text, end);
            }
            size_t after = skip_spaces(text, end);
            if (after > end || end == text.size() || wide) {
                after = after > end || end == text.size() ? after : at + n;
                cuts.push_back(after);
                at = after;
                continue;
            }
        } else if (text[at] == '\n') { // an empty line: two line breaks with nothing but white space between them
            const size_t after = skip_spaces(text, at);
            if (text.find('\n', at + 1) < after) {
                cuts.push_back(after);
                at = after;
                continue;
            }
        }
        at += n;
    }
    return between(text, cuts);
}

//
// spans of tokens
//

static std::string piece(const llama_vocab * vocab, llama_token token) {
    if (token == LLAMA_TOKEN_NULL) { // of an image
        return "";
    }
    std::string res(32, 0);
    int32_t n = llama_token_to_piece(vocab, token, &res[0], (int32_t) res.size(), 0, true);
    if (n < 0) {
        res.resize(-n);
        n = llama_token_to_piece(vocab, token, &res[0], (int32_t) res.size(), 0, true);
    }
    res.resize(std::max(n, 0));
    return res;
}

std::vector<span> segment(const llama_vocab * vocab, const std::vector<llama_token> & tokens, const char * separator) {
    if (llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_NONE) {
        throw std::invalid_argument("this model has no tokenizer, so its tokens have no text to segment");
    }
    const int32_t n_tokens = (int32_t) tokens.size();
    std::string text;
    std::vector<int32_t> at; // [n_tokens + 1] first byte of each token, and where the last one ends
    for (int32_t i = 0; i < n_tokens; ++i) {
        const bool bos = i == 0 && tokens[i] == llama_vocab_bos(vocab) && llama_vocab_get_add_bos(vocab); // the tokenizer's, not the caller's
        at.push_back((int32_t) text.size());
        text += bos ? "" : piece(vocab, tokens[i]);
    }
    at.push_back((int32_t) text.size());

    std::vector<span> res;
    int32_t token = 0;
    for (const span & s : separator ? separator_spans(text, separator) : sentence_spans(text)) {
        while (token < n_tokens && (at[token] < s.begin || at[token] == at[token + 1])) {
            token++;
        }
        const int32_t begin = token;
        while (token < n_tokens && at[token] < s.end) {
            token++;
        }
        if (begin < token) {
            res.push_back({ begin, token });
        }
    }
    return res;
}

void check_spans(const std::vector<span> & spans) {
    int32_t end = 0;
    for (const auto & sp : spans) {
        if (sp.begin < end || sp.end <= sp.begin) {
            throw std::invalid_argument("span [" + std::to_string(sp.begin) + ", " + std::to_string(sp.end) +
                    ") overlaps another, is empty or out of order: spans are ascending and disjoint, [begin, end)");
        }
        end = sp.end;
    }
}

} // namespace kvc
