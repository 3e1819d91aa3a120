/* Loaded into tritonserver before its own libraries (serving/native/__init__.py).

   Triton's HTTP server says of a request that it cannot parse that the server has failed: TRITONSERVER_ERROR_INTERNAL, which
   is 500 (triton-inference-server/server, issue 8762, open in 2026). Here such an error becomes TRITONSERVER_ERROR_INVALID_ARG,
   which is 400, as gRPC answers the same request. It is told by the words with which HTTP's front end begins it
   (src/http_server.cc, and tritonjson.h of triton-inference-server/common); all other errors pass as they are. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

enum { INTERNAL = 1, INVALID_ARG = 3 }; /* TRITONSERVER_Error_Code of tritonserver.h; its ABI keeps them */

static const char *const OF_THE_REQUEST[] = {
    "failed to parse the request JSON buffer: ",
    "Unable to parse ",
    "failed to get request params.: ",
};

typedef void *New(int code, const char *message);

static New *next_new;

__attribute__((constructor)) static void find(void) { next_new = (New *)dlsym(RTLD_NEXT, "TRITONSERVER_ErrorNew"); }

__attribute__((visibility("default"))) void *TRITONSERVER_ErrorNew(int code, const char *message)
{
    if (!next_new) /* a library that was opened later has it */
        find();
    if (!next_new)
        abort();
    if (code == INTERNAL && message)
        for (size_t at = 0; at < sizeof OF_THE_REQUEST / sizeof *OF_THE_REQUEST; at++)
            if (!strncmp(message, OF_THE_REQUEST[at], strlen(OF_THE_REQUEST[at])))
                return next_new(INVALID_ARG, message);
    return next_new(code, message);
}
