#include "policies.h"

namespace kvc {

const char * const recommended = "keydiff";

// Named here one by one: a linker drops self-registering objects of a static library.
const std::vector<policy_info> & policy_table() {
    static const std::vector<policy_info> table = {
        full_info,
        random_info,
        random_head_info,
        streaming_llm_info,
        h2o_info,
        tova_info,
        knorm_info,
        keydiff_info,
        snapkv_info,
        pyramidkv_info,
        criticalkv_info,
        defensive_info,
        dropkv_info,
        adakv_info,
        pyramidinfer_info,
        chunkkv_info,
        finch_info,
        kvzip_info,
        expected_attention_info,
        shotkv_info,
        random_shot_info,
        vase_info,
        rkv_info,
    };
    return table;
}

} // namespace kvc
