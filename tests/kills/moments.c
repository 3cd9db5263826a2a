/* Ends a process before its k-th change of files below a folder, fills its disk before its k-th write,
or refuses it files from its k-th opening on.

Preloaded (LD_PRELOAD), it stands between a process with all of its libraries and the C library. It
does nothing until `moments_arm` is called, which a fork of the process does for itself. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { KILL = 1, FULL, CLOSED }; /* faults */
enum { CHANGE, GROWTH, WRITE, OPENING }; /* kinds of calls */
struct seen { long count; char names[1 << 20]; size_t used; };

static struct seen *seen;          /* shared with the parent of the fork */
static char root[PATH_MAX];
static long at;
static int fault;

void moments_arm(const char *folder, const char *shared, long number, int kind) {
  int file = open(shared, O_RDWR);
  seen = mmap(NULL, sizeof *seen, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  snprintf(root, sizeof root, "%s", folder);
  at = number, fault = kind;
}
long moments_size(void) { return sizeof(struct seen); }

static int below(const char *path) {
  size_t length = strlen(root);
  return !strncmp(path, root, length) && (path[length] == '/' || !path[length]);
}
static void of_fd(int fd, char *into) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t got = readlink(link, into, PATH_MAX - 1);
  into[got < 0 ? 0 : got] = 0;
}
static void whole(int folder, const char *path, char *into) {
  char base[PATH_MAX] = "";
  if (path[0] == '/') { snprintf(into, PATH_MAX, "%s", path); return; }
  if (folder == AT_FDCWD) { if (!getcwd(base, sizeof base)) base[0] = 0; }
  else of_fd(folder, base);
  snprintf(into, PATH_MAX, "%.2000s/%.2000s", base, path);
}
/* 1 if this call fails. */
static int moment(const char *name, const char *path, int kind) {
  int counts = fault == KILL ? kind <= GROWTH : fault == FULL ? kind == GROWTH || kind == WRITE
               : kind == OPENING;
  if (!seen || !counts || !below(path)) return 0;
  int error = errno;
  long number = __sync_add_and_fetch(&seen->count, 1);
  if (number <= at || !at) {
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%s %s\n", name, path + strlen(root));
    size_t start = __sync_fetch_and_add(&seen->used, length);
    if (start + length < sizeof seen->names) memcpy(seen->names + start, line, length);
  }
  errno = error;
  if (fault == KILL && number == at) { kill(getpid(), SIGKILL); for (;;) pause(); }
  if (fault != KILL && at && number >= at) {
    errno = fault == FULL ? ENOSPC : EMFILE;
    return 1;
  }
  return 0;
}
static int of_path(const char *name, int folder, const char *path, int kind) {
  if (!seen) return 0;
  char full[PATH_MAX];
  whole(folder, path, full);
  return moment(name, full, kind);
}
static int of_file(const char *name, int fd, int kind) {
  if (!seen) return 0;
  char full[PATH_MAX];
  of_fd(fd, full);
  return moment(name, full, kind);
}
#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

int rename(const char *a, const char *b) {
  REAL(rename); if (of_path("rename", AT_FDCWD, b, CHANGE)) return -1; return real(a, b); }
int renameat(int x, const char *a, int y, const char *b) {
  REAL(renameat); if (of_path("rename", y, b, CHANGE)) return -1; return real(x, a, y, b); }
int renameat2(int x, const char *a, int y, const char *b, unsigned f) {
  REAL(renameat2); if (of_path("rename", y, b, CHANGE)) return -1; return real(x, a, y, b, f); }
int link(const char *a, const char *b) {
  REAL(link); if (of_path("link", AT_FDCWD, b, GROWTH)) return -1; return real(a, b); }
int unlink(const char *a) {
  REAL(unlink); if (of_path("unlink", AT_FDCWD, a, CHANGE)) return -1; return real(a); }
int unlinkat(int x, const char *a, int f) {
  REAL(unlinkat); if (of_path("unlink", x, a, CHANGE)) return -1; return real(x, a, f); }
int rmdir(const char *a) {
  REAL(rmdir); if (of_path("rmdir", AT_FDCWD, a, CHANGE)) return -1; return real(a); }
int mkdir(const char *a, mode_t m) {
  REAL(mkdir); if (of_path("mkdir", AT_FDCWD, a, GROWTH)) return -1; return real(a, m); }
int mkdirat(int x, const char *a, mode_t m) {
  REAL(mkdirat); if (of_path("mkdir", x, a, GROWTH)) return -1; return real(x, a, m); }
int fsync(int fd) {
  REAL(fsync); if (of_file("fsync", fd, GROWTH)) return -1; return real(fd); }
int fdatasync(int fd) {
  REAL(fdatasync); if (of_file("fsync", fd, GROWTH)) return -1; return real(fd); }
ssize_t write(int fd, const void *data, size_t size) {
  REAL(write); if (fd > 2 && of_file("write", fd, WRITE)) return -1; return real(fd, data, size); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t o) {
  REAL(pwrite); if (of_file("write", fd, WRITE)) return -1; return real(fd, data, size, o); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t o) {
  REAL(pwrite64); if (of_file("write", fd, WRITE)) return -1; return real(fd, data, size, o); }
ssize_t writev(int fd, const struct iovec *data, int count) {
  REAL(writev); if (of_file("write", fd, WRITE)) return -1; return real(fd, data, count); }
ssize_t pwritev(int fd, const struct iovec *data, int count, off_t o) {
  REAL(pwritev); if (of_file("write", fd, WRITE)) return -1; return real(fd, data, count, o); }
int ftruncate(int fd, off_t size) {
  REAL(ftruncate); if (of_file("truncate", fd, WRITE)) return -1; return real(fd, size); }
int fallocate(int fd, int m, off_t o, off_t size) {
  REAL(fallocate); if (of_file("allocate", fd, WRITE)) return -1; return real(fd, m, o, size); }

#define MODE mode_t m = 0; if (f & (O_CREAT | O_TMPFILE)) { va_list l; va_start(l, f); \
  m = va_arg(l, mode_t); va_end(l); }
int open(const char *a, int f, ...) {
  REAL(open); MODE if (of_path("open", AT_FDCWD, a, OPENING)) return -1; return real(a, f, m); }
int open64(const char *a, int f, ...) {
  REAL(open64); MODE if (of_path("open", AT_FDCWD, a, OPENING)) return -1; return real(a, f, m); }
int openat(int x, const char *a, int f, ...) {
  REAL(openat); MODE if (of_path("open", x, a, OPENING)) return -1; return real(x, a, f, m); }
int openat64(int x, const char *a, int f, ...) {
  REAL(openat64); MODE if (of_path("open", x, a, OPENING)) return -1; return real(x, a, f, m); }
FILE *fopen(const char *a, const char *f) {
  REAL(fopen); if (of_path("open", AT_FDCWD, a, OPENING)) return NULL; return real(a, f); }
FILE *fopen64(const char *a, const char *f) {
  REAL(fopen64); if (of_path("open", AT_FDCWD, a, OPENING)) return NULL; return real(a, f); }
DIR *opendir(const char *a) {
  REAL(opendir); if (of_path("open", AT_FDCWD, a, OPENING)) return NULL; return real(a); }
