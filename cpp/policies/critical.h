#pragma once

// values=wo: what a token's value adds to the residual stream counts beside the attention it gets. A choice of its own for every
// policy whose score is attention: "snapkv:values=wo" is CriticalKV on SnapKV.

#include "spec.h"

#include <memory>
#include <string>

namespace kvc {

class policy;

// The parameter of a policy that takes it, with its own default.
param_info values_param(const std::string & value);

// CriticalKV around a score.
std::unique_ptr<policy> weigh_values(std::unique_ptr<policy> base);

} // namespace kvc
