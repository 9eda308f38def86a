#pragma once

// The fields of a request's JSON that kvc_request holds.

#include <memory>
#include <vector>

namespace server_schema { struct field; }
struct kvc_request;

void kvc_add_fields(std::vector<std::unique_ptr<server_schema::field>> & fields, kvc_request & kv);
