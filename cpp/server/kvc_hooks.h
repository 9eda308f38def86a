#pragma once

// All that the patch of llama-server calls: it includes this once.

#include "kvc_checkpoints.h"
#include "kvc_compress.h"
#include "kvc_fields.h"
#include "kvc_file.h"
#include "kvc_options.h"
#include "kvc_request.h"
#include "kvc_result.h"
#include "kvc_routes.h"
#include "kvc_server.h"
#include "kvc_slot.h"
