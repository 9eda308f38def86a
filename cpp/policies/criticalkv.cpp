// CriticalKV on SnapKV: snapkv with values=wo as its default (critical.h says what that is), arXiv:2502.03805.

#include "policies.h"

namespace kvc {

const policy_info criticalkv_info = {
    "criticalkv", "Scores as snapkv; half of the budget goes to the best, the rest to the best by attention and by what a token's value adds "
    "behind the output projection; loses facts that are asked for later. Evicts the prompt only.", "2502.03805", decode_mode::none, false, snapkv_info.params, snapkv_info.make,
    "head", "wo",
};

} // namespace kvc
