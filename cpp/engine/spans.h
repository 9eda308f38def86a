#pragma once

// Where the units of a prompt begin and end: what finds sentences for the engine, for kvc_segment() (llama-server) and for
// pykvc/spans.py. Spans are ascending and disjoint; those of white space alone are left out.

#include "policy.h"

#include "llama.h"

#include <string>
#include <vector>

namespace kvc {

// Spans of bytes of a UTF-8 text. A sentence ends
//   - with . ! ? and what closes it (" ' ) ] ” ’) before white space or the end; after 。！？ none is needed
//   - with an empty line
// and has the white space after it. An abbreviation ends one, a line break alone does not.
std::vector<span> sentence_spans(const std::string & text);

// Spans of bytes: each piece with the separator that ends it. Throws if the separator is empty.
std::vector<span> separator_spans(const std::string & text, const std::string & separator);

// Spans of tokens: sentences (separator null), or what ends with a separator. A token belongs to the span in which its first byte
// lies; one of no text (an image, a BOS that the tokenizer put in front) to none. Throws if the model has no tokenizer.
std::vector<span> segment(const llama_vocab * vocab, const std::vector<llama_token> & tokens, const char * separator);

// Throws where one is empty, out of order or overlaps another.
void check_spans(const std::vector<span> & spans);

} // namespace kvc
