/* Preloaded into a run: counts what it does to files below a folder, and at the k-th step kills it.
 *
 * CHAOS_FOLDER   the folder; files elsewhere do not count
 * CHAOS_STATE    a file of six 8-byte integers that all processes share, and that the test writes: counting (0: off),
 *                steps so far, the step at which something is done, what, the group to kill, and whether that step writes
 *
 * What is done: 1 the group is killed before the step; 2 half of a write is done first; 3 half of a write is done, the
 * process stops itself, and goes on with the rest once somebody continues it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

struct state { long counting, steps, at, action, group, writes; };
static struct state *state;
static const char *folder;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("CHAOS_STATE");
    folder = getenv("CHAOS_FOLDER");
    int descriptor = path && folder ? open(path, O_RDWR) : -1;
    if (descriptor < 0) return;
    void *found = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (found != MAP_FAILED) state = found;
    close(descriptor);
}

static int below(const char *path) {
    size_t n = strlen(folder);
    return strncmp(path, folder, n) == 0 && (path[n] == '/' || path[n] == 0);
}

static int of_descriptor(int descriptor) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

static int of_path(int directory, const char *path) {
    if (path[0] == '/') return below(path);
    if (directory != AT_FDCWD) return of_descriptor(directory);
    char here[4096];
    return getcwd(here, sizeof here) && below(here);
}

static void end_all(void) {
    kill(-(pid_t)state->group, SIGKILL);
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* The action, if this is the step for it; a kill that need not tear a write is done here. */
static long step(int counts, int tears) {
    if (!state || !state->counting || !counts) return 0;
    if (__atomic_add_fetch(&state->steps, 1, __ATOMIC_SEQ_CST) != state->at) return 0;
    state->writes = tears;
    if (state->action == 1 || (state->action == 2 && !tears)) end_all();
    return tears ? state->action : 0;
}

static void after_half(long action) {
    if (action == 2) end_all();
    raise(SIGSTOP);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int descriptor, const void *bytes, size_t n) {
    long action = state && state->counting ? step(of_descriptor(descriptor), 1) : 0;
    if (action) {
        ssize_t half = REAL(write)(descriptor, bytes, n / 2);
        after_half(action);
        ssize_t rest = REAL(write)(descriptor, (const char *)bytes + half, n - half);
        return rest < 0 ? rest : half + rest;
    }
    return REAL(write)(descriptor, bytes, n);
}

ssize_t pwrite64(int descriptor, const void *bytes, size_t n, off64_t at) {
    long action = state && state->counting ? step(of_descriptor(descriptor), 1) : 0;
    if (action) {
        ssize_t half = REAL(pwrite64)(descriptor, bytes, n / 2, at);
        after_half(action);
        ssize_t rest = REAL(pwrite64)(descriptor, (const char *)bytes + half, n - half, at + half);
        return rest < 0 ? rest : half + rest;
    }
    return REAL(pwrite64)(descriptor, bytes, n, at);
}
ssize_t pwrite(int descriptor, const void *bytes, size_t n, off_t at) { return pwrite64(descriptor, bytes, n, at); }

/* Half of the first buffer, which is all that daskinfer gives. */
ssize_t pwritev64(int descriptor, const struct iovec *parts, int n_parts, off64_t at) {
    long action = state && state->counting ? step(of_descriptor(descriptor), 1) : 0;
    if (action) {
        REAL(pwrite64)(descriptor, parts[0].iov_base, parts[0].iov_len / 2, at);
        after_half(action);
    }
    return REAL(pwritev64)(descriptor, parts, n_parts, at);
}
ssize_t pwritev(int descriptor, const struct iovec *parts, int n_parts, off_t at) {
    return pwritev64(descriptor, parts, n_parts, at);
}
ssize_t pwritev64v2(int descriptor, const struct iovec *parts, int n_parts, off64_t at, int flags) {
    long action = state && state->counting ? step(of_descriptor(descriptor), 1) : 0;
    if (action) {
        REAL(pwrite64)(descriptor, parts[0].iov_base, parts[0].iov_len / 2, at);
        after_half(action);
    }
    return REAL(pwritev64v2)(descriptor, parts, n_parts, at, flags);
}
ssize_t pwritev2(int descriptor, const struct iovec *parts, int n_parts, off_t at, int flags) {
    return pwritev64v2(descriptor, parts, n_parts, at, flags);
}
ssize_t writev(int descriptor, const struct iovec *parts, int n_parts) {
    if (state && state->counting) step(of_descriptor(descriptor), 0);
    return REAL(writev)(descriptor, parts, n_parts);
}

#define COUNTED(counts) if (state && state->counting) step(counts, 0)

int rename(const char *old, const char *new) { COUNTED(of_path(AT_FDCWD, new)); return REAL(rename)(old, new); }
int renameat(int from, const char *old, int to, const char *new) {
    COUNTED(of_path(to, new));
    return REAL(renameat)(from, old, to, new);
}
int renameat2(int from, const char *old, int to, const char *new, unsigned int flags) {
    COUNTED(of_path(to, new));
    return REAL(renameat2)(from, old, to, new, flags);
}
int fsync(int descriptor) { COUNTED(of_descriptor(descriptor)); return REAL(fsync)(descriptor); }
int fdatasync(int descriptor) { COUNTED(of_descriptor(descriptor)); return REAL(fdatasync)(descriptor); }
int unlink(const char *path) { COUNTED(of_path(AT_FDCWD, path)); return REAL(unlink)(path); }
int unlinkat(int at, const char *path, int flags) { COUNTED(of_path(at, path)); return REAL(unlinkat)(at, path, flags); }
int rmdir(const char *path) { COUNTED(of_path(AT_FDCWD, path)); return REAL(rmdir)(path); }
int mkdir(const char *path, mode_t mode) { COUNTED(of_path(AT_FDCWD, path)); return REAL(mkdir)(path, mode); }
int ftruncate64(int descriptor, off64_t n) { COUNTED(of_descriptor(descriptor)); return REAL(ftruncate64)(descriptor, n); }
int ftruncate(int descriptor, off_t n) { return ftruncate64(descriptor, n); }
int posix_fallocate64(int descriptor, off64_t at, off64_t n) {
    COUNTED(of_descriptor(descriptor));
    return REAL(posix_fallocate64)(descriptor, at, n);
}
int posix_fallocate(int descriptor, off_t at, off_t n) { return posix_fallocate64(descriptor, at, n); }
