#pragma once

// Slot files: llama.cpp's format, then how the cache was evicted, of which weights it is, and a checksum. Written whole or not at all,
// and read only if whole.

#include "kvc_checkpoints.h"

#include "llama.h"

#include <string>

// Of a model's file: its size and 64 pieces from its metadata to its end; "" if it cannot be read.
std::string kvc_fingerprint(const char * path);

// As llama_state_seq_save_file(): bytes written, 0 if the file could not be. What was there under that name stays until then.
size_t kvc_save_slot(llama_context * ctx, const char * path, llama_seq_id seq_id, const llama_token * tokens, size_t n_tokens,
                     const std::string & weights, const kvc_mark & mark);

// Bytes behind llama.cpp's, and the mark. Throws std::runtime_error with the reason if the file is missing, cut short, damaged, of another
// version or of other weights. must: a file of llama.cpp, which adds nothing, is refused, too.
size_t kvc_check_slot(const char * path, const std::string & weights, bool must, kvc_mark & mark);
