#include "kvc_result.h"

#include "server-task.h"

#include <utility>

namespace {

struct final_result : server_task_result_cmpl_final {
    json kv;

    json to_json() override {
        if (kv.is_null() || res_type == TASK_RESPONSE_TYPE_OAI_ASR) {
            return server_task_result_cmpl_final::to_json();
        }
        const auto fields = std::exchange(response_fields, {}); // "kv" may be one of those that are asked for
        json res = server_task_result_cmpl_final::to_json();
        json & first = res.is_array() ? res.front() : res;
        if (first.contains("__verbose")) {
            kvc_add(first["__verbose"], kv);
        }
        if (!res.is_array()) {
            kvc_add(res, kv);
            return res_type == TASK_RESPONSE_TYPE_NONE && !fields.empty() ? json_get_nested_values(fields, res) : res;
        }
        json * event = &res.back();
        if (event->value("event", "") == "message_stop") { // says nothing else
            event = &res[res.size() - 2];
        }
        kvc_add(event->contains("data") ? event->at("data") : *event, kv);
        return res;
    }
};

struct compressed : server_task_result {
    json kv;

    json to_json() override { return { { "id_slot", id_slot }, { "kv", kv } }; }
};

} // namespace

void kvc_add(json & to, const json & kv) {
    if (!kv.is_null()) {
        to["kv"] = kv;
    }
}

std::unique_ptr<server_task_result_cmpl_final> kvc_final(json kv) {
    auto res = std::make_unique<final_result>();
    res->kv = std::move(kv);
    return res;
}

std::unique_ptr<server_task_result> kvc_compressed(int id_task, int id_slot, json kv) {
    auto res = std::make_unique<compressed>();
    res->id      = id_task;
    res->id_slot = id_slot;
    res->kv      = std::move(kv);
    return res;
}
