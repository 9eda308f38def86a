#pragma once

// The fields of a request's JSON that kvc_request holds.

#include <memory>
#include <string>
#include <vector>

namespace server_schema { struct field; }
struct kvc_request;

// Of a request that has no other fields: a JSON object, or nothing. Throws std::invalid_argument.
kvc_request kvc_read_fields(const std::string & body);

void kvc_add_fields(std::vector<std::unique_ptr<server_schema::field>> & fields, kvc_request & kv);
