#pragma once

#include "llama.h"

#include <string>

// Lines of /metrics: all slots together.
std::string kvc_metrics(llama_context * ctx, int32_t n_slots);
