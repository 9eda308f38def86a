#pragma once

// Where the units of a prompt begin and end, in tokens: the rules of pykvc/spans.py. A token belongs to the span in which its
// first byte lies; pieces of white space alone are no span.

#include "kvc.h"

#include <string>
#include <vector>

// The prompt's text as its tokens spell it. Tokens of no text (BOS, images) belong to no span.
struct kvc_text {
    std::string         text;
    std::vector<size_t> begin; // [n_tokens] first byte of each token; text.size() for the end of the last one
    std::vector<bool>   empty; // [n_tokens]

    kvc_text(const llama_vocab * vocab, const std::vector<llama_token> & tokens);
};

// A sentence ends with . ! ? (and what closes it) before white space, or with an empty line.
std::vector<kvc_span> kvc_sentences(const kvc_text & prompt);

// Each piece with the separator that ends it.
std::vector<kvc_span> kvc_separated(const kvc_text & prompt, const std::string & separator);
