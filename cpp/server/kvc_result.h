#pragma once

// What replies say of the cache: "kv".

#include "server-common.h"

#include <memory>

struct server_task_result;
struct server_task_result_cmpl_final;

// kv null: nothing evicts, and nothing is added.
void kvc_add(json & to, const json & kv);

// An answer's last part, with "kv" beside its timings: in every format, and in the last event of a stream that has a
// content.
std::unique_ptr<server_task_result_cmpl_final> kvc_final(json kv);

// Of POST /slots/N?action=compress.
std::unique_ptr<server_task_result> kvc_compressed(int id_task, int id_slot, json kv);
