/* Fail, or kill at, the Nth call of one kind on what lies in one folder. For LD_PRELOAD.

   strace's own injection counts per thread and matches whole paths only; the files of a run have
   random names and many threads. What is asked comes from the environment:

   INJECT_FOLDER  only calls on paths below it count
   INJECT_CALL    open, write, fsync, rename, unlink, mkdir, truncate, close, read, map; any: all
   INJECT_NTH     which of them, from 1, over all threads of a process; 0: none
   INJECT_ERROR   the errno it fails with; 0: SIGKILL to the process group instead
   INJECT_LASTING if set, all later ones fail too, as on a full disk
   INJECT_LOG     gets a line per matching call, "hit" before those that were meant
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static atomic_long calls;

static void note(const char *log, int hit, const char *call, const char *path) {
  char line[PATH_MAX + 64];
  int length = snprintf(line, sizeof line, "%s%s %s\n", hit ? "hit " : "", call, path);
  long fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
  if (fd >= 0) {
    syscall(SYS_write, fd, line, length);
    syscall(SYS_close, fd);
  }
}

/* Whether this call is to fail; sets errno. */
static int fails(const char *call, const char *path) {
  const char *folder = getenv("INJECT_FOLDER"), *asked = getenv("INJECT_CALL");
  if (!folder || !asked || strncmp(path, folder, strlen(folder))) return 0;
  if (strcmp(asked, call) && strcmp(asked, "any")) return 0;
  long nth = atol(getenv("INJECT_NTH")), number = atomic_fetch_add(&calls, 1) + 1;
  int hit = nth && (number == nth || (number > nth && getenv("INJECT_LASTING")));
  note(getenv("INJECT_LOG"), hit, call, path);
  if (!hit) return 0;
  int error = atoi(getenv("INJECT_ERROR"));
  if (!error) {
    kill(0, SIGKILL);
    for (;;) pause();
  }
  errno = error;
  return 1;
}

static int fails_fd(const char *call, int fd) {
  char link[64], path[PATH_MAX];
  int before = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
  errno = before;
  if (length < 0) return 0;
  path[length] = 0;
  return fails(call, path);
}

static int fails_at(const char *call, int folder, const char *name) {
  char link[64], path[2 * PATH_MAX];
  if (name[0] == '/') return fails(call, name);
  snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
  int before = errno;
  ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
  errno = before;
  if (length < 0) return 0;
  snprintf(path + length, sizeof path - length, "/%s", name);
  return fails(call, path);
}

#define WRAP(result, bad, name, parameters, arguments, failing)          \
  result name parameters {                                               \
    static result(*real) parameters;                                     \
    if (!real) real = (result(*) parameters)dlsym(RTLD_NEXT, #name);     \
    return (failing) ? (bad) : real arguments;                           \
  }

/* The mode is passed on whether the caller gave one or not; the kernel looks at it if it must. */
#define OPEN(name)                                                       \
  int name(const char *path, int flags, ...) {                           \
    static int (*real)(const char *, int, ...);                          \
    va_list rest;                                                        \
    va_start(rest, flags);                                               \
    int mode = va_arg(rest, int);                                        \
    va_end(rest);                                                        \
    if (!real) real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name); \
    return fails_at("open", AT_FDCWD, path) ? -1 : real(path, flags, mode); \
  }
#define OPENAT(name)                                                     \
  int name(int folder, const char *path, int flags, ...) {               \
    static int (*real)(int, const char *, int, ...);                     \
    va_list rest;                                                        \
    va_start(rest, flags);                                               \
    int mode = va_arg(rest, int);                                        \
    va_end(rest);                                                        \
    if (!real) real = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, #name); \
    return fails_at("open", folder, path) ? -1 : real(folder, path, flags, mode); \
  }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
WRAP(FILE *, NULL, fopen, (const char *p, const char *m), (p, m), fails_at("open", AT_FDCWD, p))
WRAP(FILE *, NULL, fopen64, (const char *p, const char *m), (p, m), fails_at("open", AT_FDCWD, p))

WRAP(ssize_t, -1, write, (int f, const void *b, size_t n), (f, b, n), fails_fd("write", f))
WRAP(ssize_t, -1, pwrite, (int f, const void *b, size_t n, off_t o), (f, b, n, o), fails_fd("write", f))
WRAP(ssize_t, -1, pwrite64, (int f, const void *b, size_t n, off64_t o), (f, b, n, o), fails_fd("write", f))
WRAP(size_t, 0, fwrite, (const void *b, size_t s, size_t n, FILE *f), (b, s, n, f), fails_fd("write", fileno(f)))
WRAP(int, EOF, fflush, (FILE *f), (f), f && fails_fd("write", fileno(f)))

WRAP(ssize_t, -1, read, (int f, void *b, size_t n), (f, b, n), fails_fd("read", f))
WRAP(ssize_t, -1, pread, (int f, void *b, size_t n, off_t o), (f, b, n, o), fails_fd("read", f))
WRAP(ssize_t, -1, pread64, (int f, void *b, size_t n, off64_t o), (f, b, n, o), fails_fd("read", f))
WRAP(void *, MAP_FAILED, mmap, (void *a, size_t n, int p, int s, int f, off_t o), (a, n, p, s, f, o), f >= 0 && fails_fd("map", f))
WRAP(void *, MAP_FAILED, mmap64, (void *a, size_t n, int p, int s, int f, off64_t o), (a, n, p, s, f, o), f >= 0 && fails_fd("map", f))

WRAP(int, -1, fsync, (int f), (f), fails_fd("fsync", f))
WRAP(int, -1, fdatasync, (int f), (f), fails_fd("fsync", f))
WRAP(int, -1, ftruncate, (int f, off_t n), (f, n), fails_fd("truncate", f))
WRAP(int, -1, ftruncate64, (int f, off64_t n), (f, n), fails_fd("truncate", f))

WRAP(int, -1, rename, (const char *a, const char *b), (a, b), fails_at("rename", AT_FDCWD, a))
WRAP(int, -1, renameat, (int d, const char *a, int e, const char *b), (d, a, e, b), fails_at("rename", d, a))
WRAP(int, -1, unlink, (const char *p), (p), fails_at("unlink", AT_FDCWD, p))
WRAP(int, -1, unlinkat, (int d, const char *p, int f), (d, p, f), fails_at("unlink", d, p))
WRAP(int, -1, rmdir, (const char *p), (p), fails_at("unlink", AT_FDCWD, p))
WRAP(int, -1, mkdir, (const char *p, mode_t m), (p, m), fails_at("mkdir", AT_FDCWD, p))
WRAP(int, -1, mkdirat, (int d, const char *p, mode_t m), (d, p, m), fails_at("mkdir", d, p))

/* As the kernel does: the descriptor is gone even when closing it reports an error. */
WRAP(int, (syscall(SYS_close, f), -1), close, (int f), (f), fails_fd("close", f))
WRAP(int, (real(f), errno = atoi(getenv("INJECT_ERROR")), EOF), fclose, (FILE *f), (f), fails_fd("close", fileno(f)))
