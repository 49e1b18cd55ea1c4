/* Counts every operation that changes files below one folder, and at the k-th kills the process,
 * tears a write, or fails. Preloaded, so that writes from Rust and C++ are seen too; each operation
 * is appended to a log from which the disk can be made again (tests/faults/power.py).
 *
 * Some libraries (Rust's rustix, under safetensors' rename) make system calls without the C
 * library. A seccomp filter turns those into a signal, whose handler makes them through here.
 *
 * fault_begin() switches it on in a process, after everything is imported.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/sendfile.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

enum { WATCH, KILL, TEAR, ONCE, FROM };  /* what is done at operation `at` */
enum { CREATE = 1, WRITE, SYNC, TRUNCATE, RENAME, EXCHANGE, MKDIR, UNLINK, RMDIR, LINK };

static char root[PATH_MAX];
static size_t root_length;
static int active, mode, error_number, journal = -1;
static long at, seen, unseen, failed;

static __attribute__((constructor)) void ready(void) { root[0] = 0; }

/* ---- control, called through ctypes ---- */

static int follow_raw_calls(void);

int fault_begin(const char *folder, int what, long k, int number, const char *log) {
    strncpy(root, folder, sizeof root - 1);
    root_length = strlen(root);
    mode = what, at = k, error_number = number, seen = unseen = failed = 0;
    journal = log ? (int)syscall(SYS_openat, AT_FDCWD, log, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0644) : -1;
    active = 1;
    return follow_raw_calls();
}

void fault_end(void) { active = 0; }
long fault_seen(void) { return seen; }
long fault_unseen(void) { return unseen; }  /* ways to write that are not followed */
long fault_failed(void) { return failed; }

/* ---- which paths and descriptors are below the folder ---- */

static int below(const char *path) {
    return active && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static int descriptor_path(int descriptor, char *found) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, found, PATH_MAX - 1);
    if (length <= 0) return 0;
    found[length] = 0;
    return found[0] == '/';
}

static int absolute(int folder, const char *path, char *found) {
    char base[PATH_MAX];
    if (!path) return 0;
    if (path[0] == '/') { snprintf(found, PATH_MAX, "%s", path); return 1; }
    if (folder == AT_FDCWD) { if (syscall(SYS_getcwd, base, sizeof base) <= 0) return 0; }
    else if (!descriptor_path(folder, base)) return 0;
    if (snprintf(found, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) return 0;
    return 1;
}

static int watched(int folder, const char *path, char *found) {
    return active && absolute(folder, path, found) && below(found);
}

static int watched_descriptor(int descriptor, char *found) {
    return active && descriptor_path(descriptor, found) && below(found);
}

/* ---- the log: kind, offset, three lengths, two paths, data ---- */

static void put(const void *data, size_t length) {
    while (length) {
        ssize_t done = syscall(SYS_write, journal, data, length);
        if (done <= 0) _exit(97);
        data = (const char *)data + done, length -= (size_t)done;
    }
}

static void record(int kind, const char *path, const char *other, int64_t offset, const void *data, size_t length) {
    if (journal < 0) return;
    uint32_t sizes[3] = {(uint32_t)strlen(path), other ? (uint32_t)strlen(other) : 0, (uint32_t)length};
    uint32_t what = (uint32_t)kind;
    put(&what, sizeof what), put(&offset, sizeof offset), put(sizes, sizeof sizes);
    put(path, sizes[0]);
    if (other) put(other, sizes[1]);
    if (length) put(data, length);
}

/* ---- one operation: 0 to go on, 1 to fail with errno, 2 to tear ---- */

static void die(void) {
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) pause();
}

static int event(int takes_space) {
    long now = ++seen;
    if (mode == KILL && now == at) die();
    if (mode == TEAR && now == at) return 2;
    int hit = mode == ONCE ? now == at : mode == FROM && now >= at;
    /* a full disk lets files go; every other error does not */
    if (hit && (takes_space || error_number != ENOSPC)) { failed++; errno = error_number; return 1; }
    return 0;
}

#define REAL(name) ({ static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name); real; })
#define DIES(result) do { int what_ = event(1); if (what_ == 1) return result; if (what_ == 2) die(); } while (0)
#define FREES(result) do { int what_ = event(0); if (what_ == 1) return result; if (what_ == 2) die(); } while (0)

/* ---- opening ---- */

static int opening(int folder, const char *path, int flags, mode_t rights) {
    char full[PATH_MAX];
    int changes = flags & (O_CREAT | O_TRUNC);
    if (changes && (flags & O_TMPFILE) != O_TMPFILE && watched(folder, path, full)) {
        struct stat before;
        int was_there = !syscall(SYS_newfstatat, folder, path, &before, flags & O_NOFOLLOW ? AT_SYMLINK_NOFOLLOW : 0);
        int empties = was_there && (flags & O_TRUNC) && before.st_size;
        if (!was_there || empties) {
            DIES(-1);
            int made = (int)syscall(SYS_openat, folder, path, flags, rights);
            if (made >= 0) record(was_there ? TRUNCATE : CREATE, full, 0, 0, 0, 0);
            return made;
        }
    } else if ((flags & O_TMPFILE) == O_TMPFILE && watched(folder, path, full)) unseen++;
    return (int)syscall(SYS_openat, folder, path, flags, rights);
}

#define RIGHTS mode_t rights = 0; if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) { \
    va_list rest; va_start(rest, flags); rights = va_arg(rest, mode_t); va_end(rest); }

int open(const char *path, int flags, ...) { RIGHTS return opening(AT_FDCWD, path, flags, rights); }
int open64(const char *path, int flags, ...) { RIGHTS return opening(AT_FDCWD, path, flags | O_LARGEFILE, rights); }
int openat(int folder, const char *path, int flags, ...) { RIGHTS return opening(folder, path, flags, rights); }
int openat64(int folder, const char *path, int flags, ...) { RIGHTS return opening(folder, path, flags | O_LARGEFILE, rights); }
int creat(const char *path, mode_t rights) { return opening(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, rights); }
int creat64(const char *path, mode_t rights) { return creat(path, rights); }

/* C++ streams open so and write as everybody does; what C's own stdio writes never comes by here,
 * so that each stream is told */
static int stream(const char *path, const char *how) {
    char full[PATH_MAX];
    struct stat before;
    if (!strpbrk(how, "wa+") || !watched(AT_FDCWD, path, full)) return 0;
    unseen++;
    int was_there = !syscall(SYS_newfstatat, AT_FDCWD, path, &before, 0);
    if (was_there && (how[0] != 'w' || !before.st_size)) return 0;
    DIES(1);
    record(was_there ? TRUNCATE : CREATE, full, 0, 0, 0, 0);
    return 0;
}
FILE *fopen(const char *path, const char *how) { return stream(path, how) ? 0 : REAL(fopen)(path, how); }
FILE *fopen64(const char *path, const char *how) { return stream(path, how) ? 0 : REAL(fopen64)(path, how); }

/* ---- writing ---- */

static int64_t place(int descriptor) {
    struct stat now;
    if (fcntl(descriptor, F_GETFL) & O_APPEND) return fstat(descriptor, &now) ? 0 : now.st_size;
    return lseek(descriptor, 0, SEEK_CUR);
}

static ssize_t writing(int descriptor, const void *data, size_t length, int64_t offset, int positioned) {
    char full[PATH_MAX];
    int follows = watched_descriptor(descriptor, full);
    if (follows) {
        if (!positioned) offset = place(descriptor);
        int what = event(1);
        if (what == 1) return -1;
        if (what == 2) {
            if (positioned) syscall(SYS_pwrite64, descriptor, data, length / 2, offset);
            else syscall(SYS_write, descriptor, data, length / 2);
            die();
        }
    }
    ssize_t done = positioned ? syscall(SYS_pwrite64, descriptor, data, length, offset)
                              : syscall(SYS_write, descriptor, data, length);
    if (follows && done > 0) record(WRITE, full, 0, offset, data, (size_t)done);
    return done;
}

ssize_t write(int descriptor, const void *data, size_t length) { return writing(descriptor, data, length, 0, 0); }
ssize_t pwrite(int descriptor, const void *data, size_t length, off_t offset) { return writing(descriptor, data, length, offset, 1); }
ssize_t pwrite64(int descriptor, const void *data, size_t length, off64_t offset) { return writing(descriptor, data, length, offset, 1); }

/* gathered writes are one write of what they gather */
static ssize_t gathered(int descriptor, const struct iovec *parts, int count, int64_t offset, int positioned) {
    size_t total = 0;
    for (int i = 0; i < count; i++) total += parts[i].iov_len;
    char *whole = malloc(total ? total : 1), *end = whole;
    for (int i = 0; i < count; i++) end = (char *)memcpy(end, parts[i].iov_base, parts[i].iov_len) + parts[i].iov_len;
    ssize_t done = writing(descriptor, whole, total, offset, positioned);
    free(whole);
    return done;
}
ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    char full[PATH_MAX];
    if (!watched_descriptor(descriptor, full)) return syscall(SYS_writev, descriptor, parts, count);
    return gathered(descriptor, parts, count, 0, 0);
}
ssize_t pwritev(int descriptor, const struct iovec *parts, int count, off_t offset) { return gathered(descriptor, parts, count, offset, 1); }
ssize_t pwritev64(int descriptor, const struct iovec *parts, int count, off64_t offset) { return gathered(descriptor, parts, count, offset, 1); }

/* copies inside the kernel are refused, so that whoever wants one writes instead */
ssize_t sendfile(int out, int in, off_t *offset, size_t length) {
    char full[PATH_MAX];
    if (watched_descriptor(out, full)) { errno = EINVAL; return -1; }
    return REAL(sendfile)(out, in, offset, length);
}
ssize_t sendfile64(int out, int in, off64_t *offset, size_t length) { return sendfile(out, in, offset, length); }
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t length, unsigned flags) {
    char full[PATH_MAX];
    if (watched_descriptor(out, full)) { errno = EXDEV; return -1; }
    return syscall(SYS_copy_file_range, in, from, out, to, length, flags);
}
static void *mapping(void *address, size_t length, int protection, int flags, int descriptor, off_t offset) {
    char full[PATH_MAX];
    if (descriptor >= 0 && (flags & MAP_SHARED) && (protection & PROT_WRITE) && watched_descriptor(descriptor, full)) unseen++;
    return (void *)syscall(SYS_mmap, address, length, protection, flags, descriptor, offset);
}
void *mmap(void *a, size_t l, int p, int f, int d, off_t o) { return mapping(a, l, p, f, d, o); }
void *mmap64(void *a, size_t l, int p, int f, int d, off64_t o) { return mapping(a, l, p, f, d, o); }

/* ---- syncing and truncating ---- */

int fsync(int descriptor) {
    char full[PATH_MAX];
    if (!watched_descriptor(descriptor, full)) return (int)syscall(SYS_fsync, descriptor);
    DIES(-1);
    record(SYNC, full, 0, 0, 0, 0);  /* the harness reads through the page cache: no disk needed */
    return 0;
}
int fdatasync(int descriptor) { return fsync(descriptor); }
static int truncating(int descriptor, off_t length) {
    char full[PATH_MAX];
    int follows = watched_descriptor(descriptor, full);
    if (follows) DIES(-1);
    int done = (int)syscall(SYS_ftruncate, descriptor, length);
    if (follows && !done) record(TRUNCATE, full, 0, length, 0, 0);
    return done;
}
int ftruncate(int descriptor, off_t length) { return truncating(descriptor, length); }
int ftruncate64(int descriptor, off64_t length) { return truncating(descriptor, length); }

/* ---- names ---- */

int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    char one[PATH_MAX], two[PATH_MAX];
    int follows = watched(from, old, one);
    follows = watched(to, new, two) || follows;
    if (follows) DIES(-1);
    int done = (int)syscall(SYS_renameat2, from, old, to, new, flags);
    if (follows && !done) record(flags & RENAME_EXCHANGE ? EXCHANGE : RENAME, one, two, 0, 0, 0);
    return done;
}
int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int from, const char *old, int to, const char *new) { return renameat2(from, old, to, new, 0); }

int mkdirat(int folder, const char *path, mode_t rights) {
    char full[PATH_MAX];
    struct stat before;
    int follows = watched(folder, path, full) && syscall(SYS_newfstatat, folder, path, &before, AT_SYMLINK_NOFOLLOW);
    if (follows) DIES(-1);
    int done = (int)syscall(SYS_mkdirat, folder, path, rights);
    if (follows && !done) record(MKDIR, full, 0, 0, 0, 0);
    return done;
}
int mkdir(const char *path, mode_t rights) { return mkdirat(AT_FDCWD, path, rights); }

int unlinkat(int folder, const char *path, int flags) {
    char full[PATH_MAX];
    struct stat before;
    int follows = watched(folder, path, full) && !syscall(SYS_newfstatat, folder, path, &before, AT_SYMLINK_NOFOLLOW);
    if (follows) FREES(-1);
    int done = (int)syscall(SYS_unlinkat, folder, path, flags);
    if (follows && !done) record(flags & AT_REMOVEDIR ? RMDIR : UNLINK, full, 0, 0, 0, 0);
    return done;
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int linkat(int from, const char *old, int to, const char *new, int flags) {
    char one[PATH_MAX], two[PATH_MAX];
    int follows = watched(to, new, two) && absolute(from, old, one);
    if (follows) DIES(-1);
    int done = (int)syscall(SYS_linkat, from, old, to, new, flags);
    if (follows && !done) record(LINK, one, two, 0, 0, 0);
    return done;
}
int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }

/* ---- system calls made without the C library ---- */

static const int followed[] = {
    SYS_openat, SYS_write, SYS_pwrite64, SYS_writev, SYS_fsync, SYS_fdatasync, SYS_ftruncate,
    SYS_renameat, SYS_renameat2, SYS_mkdirat, SYS_unlinkat, SYS_linkat, SYS_copy_file_range,
#ifdef __x86_64__
    SYS_open, SYS_creat, SYS_rename, SYS_mkdir, SYS_unlink, SYS_rmdir, SYS_link,
#endif
};
enum { FOLLOWED = sizeof followed / sizeof *followed };

static long act(long number, const long *a) {
    switch (number) {
    case SYS_openat: return opening((int)a[0], (char *)a[1], (int)a[2], (mode_t)a[3]);
    case SYS_write: return write((int)a[0], (void *)a[1], (size_t)a[2]);
    case SYS_pwrite64: return pwrite((int)a[0], (void *)a[1], (size_t)a[2], a[3]);
    case SYS_writev: return writev((int)a[0], (void *)a[1], (int)a[2]);
    case SYS_fsync: case SYS_fdatasync: return fsync((int)a[0]);
    case SYS_ftruncate: return ftruncate((int)a[0], a[1]);
    case SYS_renameat: return renameat2((int)a[0], (char *)a[1], (int)a[2], (char *)a[3], 0);
    case SYS_renameat2: return renameat2((int)a[0], (char *)a[1], (int)a[2], (char *)a[3], (unsigned)a[4]);
    case SYS_mkdirat: return mkdirat((int)a[0], (char *)a[1], (mode_t)a[2]);
    case SYS_unlinkat: return unlinkat((int)a[0], (char *)a[1], (int)a[2]);
    case SYS_linkat: return linkat((int)a[0], (char *)a[1], (int)a[2], (char *)a[3], (int)a[4]);
    case SYS_copy_file_range: return copy_file_range((int)a[0], (off64_t *)a[1], (int)a[2], (off64_t *)a[3], (size_t)a[4], (unsigned)a[5]);
#ifdef __x86_64__
    case SYS_open: return opening(AT_FDCWD, (char *)a[0], (int)a[1], (mode_t)a[2]);
    case SYS_creat: return creat((char *)a[0], (mode_t)a[1]);
    case SYS_rename: return rename((char *)a[0], (char *)a[1]);
    case SYS_mkdir: return mkdir((char *)a[0], (mode_t)a[1]);
    case SYS_unlink: return unlink((char *)a[0]);
    case SYS_rmdir: return rmdir((char *)a[0]);
    case SYS_link: return link((char *)a[0], (char *)a[1]);
#endif
    }
    errno = ENOSYS;
    return -1;
}

static void trapped(int signal_number, siginfo_t *info, void *context) {
    (void)signal_number;
    int kept = errno;
#ifdef __x86_64__
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    long given[] = {r[REG_RDI], r[REG_RSI], r[REG_RDX], r[REG_R10], r[REG_R8], r[REG_R9]};
#else
    unsigned long long *r = ((ucontext_t *)context)->uc_mcontext.regs;
    long given[] = {(long)r[0], (long)r[1], (long)r[2], (long)r[3], (long)r[4], (long)r[5]};
#endif
    long result = act(info->si_syscall, given);
    if (result == -1) result = -errno;
#ifdef __x86_64__
    r[REG_RAX] = result;
#else
    r[0] = (unsigned long long)result;
#endif
    errno = kept;
}

/* Where the code lies that makes calls of its own: libraries written in Rust. A programme that is
 * started from here keeps the filter but not the handler; nothing of its own lies there. */
enum { RANGES = 16 };
static int raw_callers(uint64_t (*ranges)[2]) {
    char line[1024], rights[8];
    unsigned long from, to;
    int found = 0;
    FILE *maps = REAL(fopen)("/proc/self/maps", "r");
    while (maps && fgets(line, sizeof line, maps)) {
        if (sscanf(line, "%lx-%lx %7s", &from, &to, rights) != 3 || rights[2] != 'x') continue;
        if (!strstr(line, "safetensors") && !strstr(line, "tokenizers")) continue;
        if (from >> 32 != (to - 1) >> 32 || found == RANGES) return -1;
        ranges[found][0] = from, ranges[found++][1] = to;
    }
    if (maps) fclose(maps);
    return found;
}

#define LOAD(place) (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (uint32_t)(place))
#define JUMP(how, value, yes, no) (struct sock_filter)BPF_JUMP(BPF_JMP | how | BPF_K, (uint32_t)(value), yes, no)
#define RETURN(what) (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, what)
#define ADDRESS offsetof(struct seccomp_data, instruction_pointer)

/* 0, or what went wrong */
static int follow_raw_calls(void) {
    uint64_t ranges[RANGES][2];
    int count = raw_callers(ranges), n = 0;
    struct sigaction handler = {.sa_sigaction = trapped, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART};
    struct sock_filter filter[FOLLOWED + 6 * RANGES + 3];
    if (count < 0) return 1;
    sigaction(SIGSYS, &handler, 0);
    filter[n++] = LOAD(offsetof(struct seccomp_data, nr));
    for (int i = 0; i < FOLLOWED; i++) filter[n++] = JUMP(BPF_JEQ, followed[i], (uint8_t)(FOLLOWED - i), 0);
    filter[n++] = RETURN(SECCOMP_RET_ALLOW);
    for (int i = 0; i < count; i++) {
        filter[n++] = LOAD(ADDRESS + 4);
        filter[n++] = JUMP(BPF_JEQ, ranges[i][0] >> 32, 0, 4);
        filter[n++] = LOAD(ADDRESS);
        filter[n++] = JUMP(BPF_JGE, ranges[i][0], 0, 2);
        filter[n++] = JUMP(BPF_JGE, ranges[i][1], 1, 0);
        filter[n++] = RETURN(SECCOMP_RET_TRAP);
    }
    filter[n++] = RETURN(SECCOMP_RET_ALLOW);
    struct sock_fprog programme = {.len = (unsigned short)n, .filter = filter};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return 2;
    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &programme) ? 3 : 0;
}
