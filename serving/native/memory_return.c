/* Loaded into tritonserver before its own libraries (serving/native/__init__.py).

   A large request reaches tritonserver in thousands of small pieces. glibc gives memory back by itself only from a heap's end
   (M_TRIM_THRESHOLD), so one piece that is still in use behind them keeps the megabytes of a request that was answered long ago.
   malloc_trim(3) gives back every page that is free, wherever it lies; nobody in tritonserver calls it.

   And pages are small in tritonserver. The launcher asks for huge ones, for the weights that stubs read; in tritonserver's heap one
   small piece would hold two megabytes of what a large request left. */

#define _GNU_SOURCE
#include <errno.h>
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

enum { EVERY_S = 1 };

static void *give_back(void *unused)
{
    (void)unused;
    for (;;) {
        sleep(EVERY_S);
        malloc_trim(0);
    }
    return NULL;
}

static void huge_pages_again(void) /* in what tritonserver starts, which would inherit small ones */
{
    prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0);
}

static void small_pages(void)
{
    if (!prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) && !pthread_atfork(NULL, NULL, huge_pages_again))
        prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
}

__attribute__((constructor)) static void start(void)
{
    pthread_t thread;
    sigset_t all, before;
    if (strcmp(program_invocation_short_name, "tritonserver")) /* stubs inherit the environment, not the need */
        return;
    small_pages();
    sigfillset(&all); /* signals are for tritonserver's own threads */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (!pthread_create(&thread, NULL, give_back, NULL)) {
        pthread_setname_np(thread, "memory-return");
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}
