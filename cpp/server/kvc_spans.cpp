#include "kvc_spans.h"

#include <algorithm>
#include <cstring>

// -- bytes of UTF-8 ----------------------------------------------------------------------------------------------------

static size_t length(const std::string & s, size_t at) {
    const unsigned char c = s[at];
    const size_t n = c < 0x80 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
    return std::min(n, s.size() - at);
}

static bool one_of(const std::string & s, size_t at, size_t n, const std::vector<const char *> & words) {
    for (const char * w : words) {
        if (strlen(w) == n && s.compare(at, n, w) == 0) {
            return true;
        }
    }
    return false;
}

// Bytes of the white space at `at`, 0: none. As Python's \s.
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

// -- spans ---------------------------------------------------------------------------------------------------------------

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

kvc_text::kvc_text(const llama_vocab * vocab, const std::vector<llama_token> & tokens) {
    for (size_t i = 0; i < tokens.size(); ++i) {
        const bool bos = i == 0 && tokens[i] == llama_vocab_bos(vocab) && llama_vocab_get_add_bos(vocab); // the tokenizer's, not the client's
        const std::string p = bos ? "" : piece(vocab, tokens[i]);
        begin.push_back(text.size());
        empty.push_back(p.empty());
        text += p;
    }
    begin.push_back(text.size());
}

// Token spans of the text between ascending cuts.
static std::vector<kvc_span> between(const kvc_text & prompt, std::vector<size_t> cuts) {
    const std::string & s = prompt.text;
    const size_t n_tokens = prompt.empty.size();
    if (cuts.empty() || cuts.back() < s.size()) {
        cuts.push_back(s.size());
    }
    std::vector<kvc_span> res;
    size_t first = 0, token = 0;
    for (const size_t end : cuts) {
        while (token < n_tokens && (prompt.begin[token] < first || prompt.empty[token])) {
            token++;
        }
        const size_t begin = token;
        while (token < n_tokens && prompt.begin[token] < end) {
            token++;
        }
        if (begin < token && skip_spaces(s, first) < end) {
            res.push_back({ (int32_t) begin, (int32_t) token });
        }
        first = end;
    }
    return res;
}

std::vector<kvc_span> kvc_separated(const kvc_text & prompt, const std::string & separator) {
    std::vector<size_t> cuts;
    for (size_t at = prompt.text.find(separator); at != std::string::npos; at = prompt.text.find(separator, at + separator.size())) {
        cuts.push_back(at + separator.size());
    }
    return between(prompt, cuts);
}

std::vector<kvc_span> kvc_sentences(const kvc_text & prompt) {
    static const std::vector<const char *> closing = { "\"", "'", ")", "]", "\u201d", "\u2019" };
    static const std::vector<const char *> full    = { "\u3002", "\uff01", "\uff1f" };
    const std::string & s = prompt.text;
    std::vector<size_t> cuts;
    for (size_t at = 0; at < s.size(); ) {
        const size_t n = length(s, at);
        const bool wide = one_of(s, at, n, full);
        if (wide || s[at] == '.' || s[at] == '!' || s[at] == '?') {
            size_t end = at + n;
            while (end < s.size() && one_of(s, end, length(s, end), closing)) {
                end += length(s, end);
            }
            size_t after = skip_spaces(s, end);
            if (after > end || end == s.size() || wide) {
                after = after > end || end == s.size() ? after : at + n;
                cuts.push_back(after);
                at = after;
                continue;
            }
        } else if (s[at] == '\n') { // an empty line: two line breaks with nothing but white space between them
            const size_t after = skip_spaces(s, at);
            if (s.find('\n', at + 1) < after) {
                cuts.push_back(after);
                at = after;
                continue;
            }
        }
        at += n;
    }
    return between(prompt, cuts);
}
