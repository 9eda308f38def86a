#pragma once

// The reply of POST /slots/N?action=compress.

#include "server-task.h"

struct kvc_result : server_task_result {
    int  id_slot;
    json kv;

    json to_json() override { return { { "id_slot", id_slot }, { "kv", kv } }; }
};
