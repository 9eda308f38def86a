#pragma once

// Slot files, in llama.cpp's format with a checksum after it: written whole or not at all, and read only if whole.

#include "llama.h"

#include <string>

// As llama_state_seq_save_file(): bytes written, 0 if the file could not be. What was there under that name stays until then.
size_t kvc_save_slot(llama_context * ctx, const char * path, llama_seq_id seq_id, const llama_token * tokens, size_t n_tokens);

// Bytes of the checksum. Throws std::runtime_error with the reason if the file is cut short or damaged. must: a file without a checksum
// (of llama.cpp, which knows none) is refused, too.
size_t kvc_check_slot(const char * path, bool must);
