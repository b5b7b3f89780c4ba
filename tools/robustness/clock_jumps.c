/* A wall clock that jumps, for programs that run under LD_PRELOAD: a set clock, a virtual machine that was moved, a wrong battery.

   cc -shared -fPIC -O1 -o clock_jumps.so tools/robustness/clock_jumps.c -ldl
   LD_PRELOAD=$PWD/clock_jumps.so CLOCK_JUMPS_SEED=1 mura-dist ...

   CLOCK_JUMPS_SEED      draws the order of the jumps; 0 by default
   CLOCK_JUMPS_PERIOD_MS time between two jumps; 200 by default

   time, gettimeofday and clock_gettime(CLOCK_REALTIME) jump by hours and years, forwards and backwards. All processes of one
   machine see the same clock. CLOCK_MONOTONIC, the times of files and the kernel's own deadlines stay right.
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

#define HOUR 3600L
#define YEAR (365 * 24 * HOUR)

static const long offsets_s[] = {0, HOUR, -HOUR, 7 * HOUR, -26 * HOUR, YEAR, -YEAR, 10 * YEAR, -20 * YEAR};
static unsigned long seed, period_ms;

#define NEXT(name) __typeof__(&name) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static unsigned long setting(const char *name, unsigned long usual) {
    const char *text = getenv(name);
    return text && *text ? strtoul(text, NULL, 10) : usual;
}

__attribute__((constructor)) static void begin(void) {
    seed = setting("CLOCK_JUMPS_SEED", 0);
    period_ms = setting("CLOCK_JUMPS_PERIOD_MS", 200);
    if (!period_ms) period_ms = 1;
}

/* The seconds by which the wall clock is wrong now: a hash of the seed and of the number of the period. */
static long offset_s(void) {
    NEXT(clock_gettime);
    struct timespec now;
    if (!period_ms || next(CLOCK_MONOTONIC, &now)) return 0; /* before begin() */
    unsigned long hash = seed * 0x9E3779B97F4A7C15UL + (now.tv_sec * 1000UL + now.tv_nsec / 1000000) / period_ms;
    hash = (hash ^ (hash >> 30)) * 0xBF58476D1CE4E5B9UL;
    hash = (hash ^ (hash >> 27)) * 0x94D049BB133111EBUL;
    return offsets_s[(hash ^ (hash >> 31)) % (sizeof offsets_s / sizeof *offsets_s)];
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    NEXT(clock_gettime);
    int status = next(clock, now);
    if (!status && clock == CLOCK_REALTIME) now->tv_sec += offset_s();
    return status;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    NEXT(gettimeofday);
    int status = next(now, zone);
    if (!status && now) now->tv_sec += offset_s();
    return status;
}

time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result) *result = now.tv_sec;
    return now.tv_sec;
}
