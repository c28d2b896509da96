/* Lets the k-th change of a file below a folder fail: the process is killed there, or the call returns an error.
   Loaded by LD_PRELOAD; `fault_arm` sets what happens, `fault_count` says how many changes there were. An error `for_good`
   lasts, as that of a full disk does, on which files can still be removed. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

enum { KILL, KILL_HALFWAY, ERROR };  /* halfway: after half of the bytes of a write, or after the call */

static char root[PATH_MAX];
static long fault_at = -1, count;
static int mode, error, lasting, hit_removal;

void fault_arm(const char *folder, long k, int how, int number, int for_good) {
  snprintf(root, sizeof root, "%s", folder);
  fault_at = k; mode = how; error = number; lasting = for_good; count = 0;
}

long fault_count(void) { return count; }
int fault_hit_removal(void) { return hit_removal; }

static int is_below(const char *path) {
  size_t n = strlen(root);
  return n && !strncmp(path, root, n) && (path[n] == '/' || !path[n]);
}

static int is_watched(int folder, const char *path) {
  char full[2 * PATH_MAX], link[64];
  if (!*root || !path) return 0;
  if (*path == '/') return is_below(path);
  ssize_t n = 0;
  if (folder == AT_FDCWD) { if (!getcwd(full, PATH_MAX)) return 0; n = strlen(full); }
  else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    if ((n = readlink(link, full, PATH_MAX)) < 0) return 0;
  }
  snprintf(full + n, sizeof full - n, "/%s", path);
  return is_below(full);
}

static int is_watched_fd(int fd) {
  char link[64], full[PATH_MAX];
  if (!*root) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, full, sizeof full - 1);
  if (n < 0) return 0;
  full[n] = 0;
  return is_below(full);
}

static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

/* Whether the call that follows is the one to fail; with ERROR, errno is set and the call returns -1. */
static int strikes(int removes) {
  long i = count++;
  if (fault_at < 0 || i < fault_at || (i > fault_at && (!lasting || removes))) return 0;
  if (mode == KILL) die();
  hit_removal |= removes;
  if (mode == ERROR) errno = error;
  return 1;
}

static int is_last(void) { return mode == KILL_HALFWAY && fault_at == count - 1; }

#define REAL(name, ret, ...) static ret (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, name)
#define CHANGE(watched, call) CHANGE_OF(0, watched, call)
#define CHANGE_OF(removes, watched, call) \
  if (!(watched) || !strikes(removes)) return call; \
  if (mode == ERROR) return -1; \
  (void)!call; die(); return -1;

ssize_t write(int fd, const void *data, size_t n) {
  REAL("write", ssize_t, int, const void *, size_t);
  CHANGE(is_watched_fd(fd), real(fd, data, is_last() ? n / 2 : n))
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) {
  REAL("pwrite", ssize_t, int, const void *, size_t, off_t);
  CHANGE(is_watched_fd(fd), real(fd, data, is_last() ? n / 2 : n, at))
}
ssize_t pwrite64(int fd, const void *data, size_t n, off_t at) { return pwrite(fd, data, n, at); }
ssize_t sendfile(int out, int in, off_t *at, size_t n) {
  REAL("sendfile", ssize_t, int, int, off_t *, size_t);
  CHANGE(is_watched_fd(out), real(out, in, at, n))
}
ssize_t sendfile64(int out, int in, off_t *at, size_t n) { return sendfile(out, in, at, n); }

/* Nothing is waited for, which saves the tests' time: a killed process loses no data that it has written. */
int fsync(int fd) {
  REAL("fsync", int, int);
  CHANGE(is_watched_fd(fd), (*root ? 0 : real(fd)))
}
int fdatasync(int fd) { return fsync(fd); }
int ftruncate(int fd, off_t n) {
  REAL("ftruncate", int, int, off_t);
  CHANGE(is_watched_fd(fd), real(fd, n))
}
int ftruncate64(int fd, off_t n) { return ftruncate(fd, n); }

static int open_in(int folder, const char *path, int flags, mode_t m) {
  REAL("openat", int, int, const char *, int, ...);
  CHANGE((flags & (O_CREAT | O_TRUNC)) && is_watched(folder, path), real(folder, path, flags, m))
}
#define MODE mode_t m = 0; if (flags & (O_CREAT | __O_TMPFILE)) { va_list a; va_start(a, flags); m = va_arg(a, mode_t); va_end(a); }
int open(const char *path, int flags, ...) { MODE return open_in(AT_FDCWD, path, flags, m); }
int open64(const char *path, int flags, ...) { MODE return open_in(AT_FDCWD, path, flags | O_LARGEFILE, m); }
int openat(int folder, const char *path, int flags, ...) { MODE return open_in(folder, path, flags, m); }
int openat64(int folder, const char *path, int flags, ...) { MODE return open_in(folder, path, flags | O_LARGEFILE, m); }

int renameat(int f, const char *a, int g, const char *b) {
  REAL("renameat", int, int, const char *, int, const char *);
  CHANGE(is_watched(f, a) || is_watched(g, b), real(f, a, g, b))
}
int rename(const char *a, const char *b) { return renameat(AT_FDCWD, a, AT_FDCWD, b); }
int renameat2(int f, const char *a, int g, const char *b, unsigned flags) {
  REAL("renameat2", int, int, const char *, int, const char *, unsigned);
  CHANGE(is_watched(f, a) || is_watched(g, b), real(f, a, g, b, flags))
}
int unlinkat(int f, const char *path, int flags) {
  REAL("unlinkat", int, int, const char *, int);
  CHANGE_OF(1, is_watched(f, path), real(f, path, flags))
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int mkdirat(int f, const char *path, mode_t m) {
  REAL("mkdirat", int, int, const char *, mode_t);
  CHANGE(is_watched(f, path), real(f, path, m))
}
int mkdir(const char *path, mode_t m) { return mkdirat(AT_FDCWD, path, m); }
int linkat(int f, const char *a, int g, const char *b, int flags) {
  REAL("linkat", int, int, const char *, int, const char *, int);
  CHANGE(is_watched(g, b), real(f, a, g, b, flags))
}
int link(const char *a, const char *b) { return linkat(AT_FDCWD, a, AT_FDCWD, b, 0); }
