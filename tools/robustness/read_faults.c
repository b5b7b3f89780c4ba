/* Errors of reading, for programs that run under LD_PRELOAD: a disk that fails, a server that is away, too many open files.

   cc -shared -fPIC -O1 -o read_faults.so tools/robustness/read_faults.c -ldl
   LD_PRELOAD=$PWD/read_faults.so READ_FAULTS_PATH=patient00005 READ_FAULTS_ERRNO=5 mura-dist ...

   READ_FAULTS_PATH    calls fail whose path, or whose descriptor's path, contains this text; unset: none does
   READ_FAULTS_ERRNO   the error's number; 5 (EIO) by default
   READ_FAULTS_CALL    read (read, pread; the default), open (open, openat) or list (opendir)
   READ_FAULTS_SKIP    so many of these calls succeed first; 0 by default
   READ_FAULTS_TIMES   so many fail then, and later ones succeed; all by default
   READ_FAULTS_COUNTER a file of 8 bytes that counts these calls over all processes; without it each process counts its own
*/
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

static unsigned long own_calls, *calls;
static const char *part, *kind;
static unsigned long skip, times;
static int number;

#define NEXT(name) __typeof__(&name) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static unsigned long setting(const char *name, unsigned long usual) {
    const char *text = getenv(name);
    return text && *text ? strtoul(text, NULL, 10) : usual;
}

__attribute__((constructor)) static void begin(void) {
    const char *counter = getenv("READ_FAULTS_COUNTER");
    kind = getenv("READ_FAULTS_CALL") ? getenv("READ_FAULTS_CALL") : "read";
    number = (int)setting("READ_FAULTS_ERRNO", EIO);
    skip = setting("READ_FAULTS_SKIP", 0);
    times = setting("READ_FAULTS_TIMES", ULONG_MAX - skip);
    calls = &own_calls;
    if (counter) {
        NEXT(open64);
        int file = next(counter, O_RDWR);
        void *shared = file < 0 ? MAP_FAILED : mmap(NULL, sizeof *calls, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (shared == MAP_FAILED) {
            perror("READ_FAULTS_COUNTER");
            _exit(1);
        }
        close(file);
        calls = shared;
    }
    part = getenv("READ_FAULTS_PATH");
}

/* Whether this call is to fail; errno says why then. */
static int fails(const char *call, const char *path) {
    if (!part || !path || strcmp(call, kind) || !strstr(path, part)) return 0;
    unsigned long before = __atomic_fetch_add(calls, 1, __ATOMIC_SEQ_CST);
    if (before < skip || before - skip >= times) return 0;
    errno = number;
    return 1;
}

static int read_fails(int file) {
    char link[64], path[PATH_MAX];
    if (!part || strcmp(kind, "read")) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails("read", path);
}

ssize_t read(int file, void *data, size_t size) {
    NEXT(read);
    return read_fails(file) ? -1 : next(file, data, size);
}

ssize_t pread(int file, void *data, size_t size, off_t start) {
    NEXT(pread);
    return read_fails(file) ? -1 : next(file, data, size, start);
}

ssize_t pread64(int file, void *data, size_t size, off64_t start) {
    NEXT(pread64);
    return read_fails(file) ? -1 : next(file, data, size, start);
}

/* The mode is there only with O_CREAT or O_TMPFILE, but taking it is harmless. */
#define MODE(last) va_list more; va_start(more, last); mode_t mode = va_arg(more, mode_t); va_end(more)

int open(const char *path, int flags, ...) {
    NEXT(open);
    MODE(flags);
    return fails("open", path) ? -1 : next(path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    NEXT(open64);
    MODE(flags);
    return fails("open", path) ? -1 : next(path, flags, mode);
}

int openat(int folder, const char *path, int flags, ...) {
    NEXT(openat);
    MODE(flags);
    return fails("open", path) ? -1 : next(folder, path, flags, mode);
}

int openat64(int folder, const char *path, int flags, ...) {
    NEXT(openat64);
    MODE(flags);
    return fails("open", path) ? -1 : next(folder, path, flags, mode);
}

DIR *opendir(const char *path) {
    NEXT(opendir);
    return fails("list", path) ? NULL : next(path);
}
