#pragma once

// What of its past a prompt's cache can go back to. It goes where the prompt goes: into the host's prompt cache or a
// slot file, and back.

#include "common.h"

#include <cstdint>
#include <list>
#include <string>

// How the cache was last evicted.
struct kvc_mark {
    std::string rule;         // of the request, "": nothing was evicted
    int32_t     n_tokens = 0; // evaluated by then

    void clear() { *this = kvc_mark(); }
};

// Recurrent states, in the order of their tokens.
struct kvc_checkpoints : std::list<common_prompt_checkpoint> {
    kvc_mark mark;

    void clear() { list::clear(); mark.clear(); }
};
