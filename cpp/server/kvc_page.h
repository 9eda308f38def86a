#pragma once

// llama.cpp's web page: who opens a server that was built without it in a browser is told how to get it.

#include "server-common.h"
#include "server-http.h"

#include "ui.h"

#if defined(LLAMA_UI_HAS_ASSETS)
constexpr bool kvc_has_page = true;
#else
constexpr bool kvc_has_page = false;
#endif

inline server_http_context::handler_t kvc_says(int status, const std::string & type, const std::string & text) {
    return [=](const server_http_req &) {
        auto res = std::make_unique<server_http_res>();
        res->status       = status;
        res->content_type = type;
        res->data         = text;
        return res;
    };
}

inline void kvc_page(const server_http_context & http, const common_params & params) {
    if (params.ui && params.public_path.empty() && !kvc_has_page) {
        const char * how = "This build is without llama.cpp's web page: `make webui` in a checkout of pykvc adds it (with "
                           "npm), and --path FOLDER serves one that was built elsewhere.";
        SRV_INF("%s\n", how);
        http.get("/", kvc_says(501, "text/plain; charset=utf-8", std::string(how) + "\n")); // of a 404 it writes the body
    }
}

// The page asks for the server's tools. It is told that there are none; a 403 would be an error in the browser's console.
inline server_http_context::handler_t kvc_no_tools(const server_http_context::handler_t & forbidden,
                                                   const common_params & params, const char * none) {
    const bool page = params.ui && (kvc_has_page || !params.public_path.empty());
    return page ? kvc_says(200, "application/json; charset=utf-8", none) : forbidden;
}
