#pragma once

struct common_params;
struct server_http_context;
struct server_routes;

// What llama-server's routes say otherwise, before they are registered: llama.cpp's web page, which a build may lack,
// and what cannot be done where tokens are evicted.
void kvc_routes(const server_http_context & http, server_routes & routes, const common_params & params);
