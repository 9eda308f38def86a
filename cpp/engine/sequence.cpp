#include "sequence.h"

#include <algorithm>

namespace kvc {

// A budget may be as large as an int32 is.
int64_t sequence::n_decode() const {
    return decode_budget.of(std::max(1, end() - gen));
}

bool sequence::has_limit() const {
    return decode_budget.kind != budget::none && gen >= 0;
}

// Heads disagree on what lies below the floor. Queries from the floor on see all of that; earlier ones are left out.
// The ring may be longer than the window of the sequence's policy.
llama_pos sequence::first_query() const {
    return std::max({ floor - 1, end() - cfg->need.window, 0 });
}

// A removed tail took its own along.
bool sequence::has_queries() const {
    return cfg->need.window == 0 || *std::max_element(win_pos.begin(), win_pos.end()) >= first_query();
}

} // namespace kvc
