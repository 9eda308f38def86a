#pragma once

// POST /slots/N?action=compress: a slot that no request uses is evicted now.

struct server_http_req;
struct server_http_res;
struct server_response_reader;

// Answers it, and an action that there is not where something evicts; false: the request is another's.
bool kvc_compress(const server_http_req & req, server_response_reader & rd, server_http_res & res, bool evicts);
