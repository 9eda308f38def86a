#pragma once

#include "kvc.h"

#include <string>
#include <vector>

// Of /metrics: all slots together.
struct kvc_totals {
    bool      on = false;
    int64_t   n_cells_used = 0;
    int64_t   n_cells      = 0;
    kvc_usage usage        = {};

    void look(llama_context * ctx, int32_t n_slots);

    // "name", "description", value of each
    struct item { std::string name, description; double value; };
    std::vector<item> counters() const;
    std::vector<item> gauges() const;
};
