/* A server that does to its memory all that may end in bytes which the program did not write, and looks each time.

   memory SOCKET         serve HTTP: /health /digest /operate /scribble /churn /allocator /writable
   memory --once         do what /operate does and print it
   memory --once FILE    the same on memory that was replaced by private mappings of FILE with the same bytes

   The rule: memory that may be expected to read as zeros reads as zeros, or the call fails and the memory is as it was.
   A breach is reported as WRONG, and by HTTP with status 500. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#define MADV_GUARD_REMOVE 103
#endif
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_process_madvise
#define SYS_process_madvise 440
#endif

enum { PAGE = 4096, SMALL = 64 * PAGE, LARGE = 1024 * PAGE };
enum { GOLDEN = 1, WRITTEN = 2 }; /* what a region is filled with: at the dump, and before an operation */

/* --- the answer -------------------------------------------------------------------------------------------------- */

static char reply[1 << 16]; /* nothing here uses malloc unasked: /operate moves the end of the heap */
static size_t replied;
static bool wrong;

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...) {
    va_list list;
    va_start(list, format);
    replied += (size_t)vsnprintf(reply + replied, sizeof reply - replied, format, list);
    va_end(list);
    if (replied >= sizeof reply) abort();
}

static void breach(const char *what) {
    wrong = true;
    say(" WRONG: %s", what);
}

/* --- regions ------------------------------------------------------------------------------------------------------ */

struct region {
    char *at;
    size_t size;
    uint64_t seed;
};

static uint64_t word(uint64_t seed, uint64_t contents, size_t index) {
    uint64_t x = (seed * 1000003 + contents) * 0x9E3779B97F4A7C15u + index;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    return (x ^ x >> 27) | 1; /* never zero */
}

static void fill(struct region *r, uint64_t contents) {
    for (size_t i = 0; i < r->size / 8; i++) ((uint64_t *)r->at)[i] = word(r->seed, contents, i);
}

static bool holds(const struct region *r, uint64_t contents, size_t from, size_t to) {
    for (size_t i = from / 8; i < to / 8; i++)
        if (((volatile uint64_t *)r->at)[i] != word(r->seed, contents, i)) return false;
    return true;
}

static bool zeros(const void *at, size_t size) {
    for (size_t i = 0; i < size / 8; i++)
        if (((const volatile uint64_t *)at)[i]) return false;
    return true; /* all sizes here are multiples of 8 */
}

/* Between two pages without access, so that the kernel joins no region with its neighbour. */
static char *map(size_t size, int flags) {
    char *at = mmap(NULL, size + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    if (at == MAP_FAILED || mprotect(at + PAGE, size, PROT_READ | PROT_WRITE)) abort();
    return at + PAGE;
}

/* --- operations: each gets a region that holds `contents`, and may do with it what it likes ----------------------- */

static const char *refusal(void) { return errno == EINVAL ? " refused EINVAL" : errno == ENOSYS ? " refused ENOSYS"
                                     : errno == ENOMEM ? " refused ENOMEM" : errno == EFAULT ? " refused EFAULT"
                                     : errno == EPERM ? " refused EPERM" : " refused"; }

static void dropped(struct region *r, uint64_t contents, bool done) {
    if (!done) {
        say("%s", refusal());
        if (!holds(r, contents, 0, r->size)) breach("refused, yet the memory changed");
    } else if (zeros(r->at, r->size)) {
        say(" zeros");
    } else {
        breach("dropped memory reads as something else than zeros");
    }
}

static void dontneed(struct region *r, uint64_t contents) {
    dropped(r, contents, madvise(r->at, r->size, MADV_DONTNEED) == 0);
}

static void dontneed_locked(struct region *r, uint64_t contents) {
    dropped(r, contents, madvise(r->at, r->size, MADV_DONTNEED_LOCKED) == 0);
}

static void guard(struct region *r, uint64_t contents) {
    bool done = madvise(r->at, r->size, MADV_GUARD_INSTALL) == 0;
    if (done && madvise(r->at, r->size, MADV_GUARD_REMOVE)) abort();
    dropped(r, contents, done);
}

static void process_dontneed(struct region *r, uint64_t contents) {
    struct { void *at; size_t size; } vector = {r->at, r->size};
    int self = (int)syscall(SYS_pidfd_open, getpid(), 0);
    bool done = syscall(SYS_process_madvise, self, &vector, 1, MADV_DONTNEED, 0) == (long)r->size;
    int error = errno;
    close(self);
    errno = error;
    dropped(r, contents, done);
}

/* Freed memory may be dropped at any time until it is written: each page is zeros or what was written last. */
static void lazy_free(struct region *r, uint64_t contents) {
    if (madvise(r->at, r->size, MADV_FREE)) {
        dropped(r, contents, false);
        return;
    }
    say(" done");
    for (size_t at = 0; at < r->size; at += PAGE)
        if (!zeros(r->at + at, PAGE) && !holds(r, contents, at, at + PAGE)) {
            breach("freed memory holds neither zeros nor what was written last");
            return;
        }
}

static void pageout(struct region *r, uint64_t contents) {
    say(madvise(r->at, r->size, MADV_PAGEOUT) ? " refused" : " done");
    if (!holds(r, contents, 0, r->size)) breach("memory was paged out and came back changed");
}

static void wipe_on_fork(struct region *r, uint64_t contents) {
    if (madvise(r->at, r->size, MADV_WIPEONFORK)) {
        dropped(r, contents, false);
        return;
    }
    int status;
    pid_t child = fork();
    if (child == 0) _exit(!zeros(r->at, r->size));
    waitpid(child, &status, 0);
    say(" done");
    if (status) breach("the child does not read zeros");
    if (!holds(r, contents, 0, r->size)) breach("the parent's memory changed");
    madvise(r->at, r->size, MADV_KEEPONFORK);
}

static void unmap(struct region *r, uint64_t contents) {
    size_t half = r->size / 2;
    munmap(r->at + half, half);
    char *again = mmap(r->at + half, half, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (again != r->at + half) abort();
    say(" done");
    if (!zeros(again, half)) breach("new memory is not zeros");
    if (!holds(r, contents, 0, half)) breach("the other half changed");
}

static void map_over(struct region *r, uint64_t contents) {
    size_t quarter = r->size / 4;
    char *middle = r->at + quarter;
    mmap(middle, 2 * quarter, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    say(" done");
    if (!zeros(middle, 2 * quarter)) breach("new memory is not zeros");
    if (!holds(r, contents, 0, quarter)) breach("what was before it changed");
}

static void grow(struct region *r, uint64_t contents) {
    char *moved = mremap(r->at, r->size, 2 * r->size, MREMAP_MAYMOVE);
    if (moved == MAP_FAILED) {
        dropped(r, contents, false);
        return;
    }
    struct region now = {moved, r->size, r->seed};
    say(" done");
    if (!holds(&now, contents, 0, r->size)) breach("the memory changed");
    if (!zeros(moved + r->size, r->size)) breach("what was added is not zeros");
    munmap(moved, 2 * r->size);
    r->at = map(r->size, 0);
}

static void shrink_and_grow(struct region *r, uint64_t contents) {
    size_t half = r->size / 2;
    if (mremap(r->at, r->size, half, 0) == MAP_FAILED) {
        dropped(r, contents, false);
        return;
    }
    say(" shrunk");
    if (mremap(r->at, half, r->size, 0) == MAP_FAILED) {
        say("%s", refusal());
        r->at = map(r->size, 0);
        return;
    }
    if (!holds(r, contents, 0, half)) breach("the memory changed");
    if (!zeros(r->at + half, half)) breach("what was added is not zeros");
}

static void move_away(struct region *r, uint64_t contents) {
    char *moved = mremap(r->at, r->size, r->size, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
    if (moved == MAP_FAILED) {
        dropped(r, contents, false);
        return;
    }
    struct region now = {moved, r->size, r->seed};
    if (!holds(&now, contents, 0, r->size)) breach("the moved memory changed");
    dropped(r, contents, true);
    munmap(moved, r->size);
}

static void fork_and_write(struct region *r, uint64_t contents) {
    int status;
    pid_t child = fork();
    if (child == 0) {
        bool right = holds(r, contents, 0, r->size);
        fill(r, 77);
        if (madvise(r->at, r->size, MADV_DONTNEED) == 0) right = right && zeros(r->at, r->size);
        else right = right && holds(r, 77, 0, r->size);
        _exit(!right);
    }
    waitpid(child, &status, 0);
    say(" done");
    if (status) breach("the child's memory is wrong");
    if (!holds(r, contents, 0, r->size)) breach("the child's writes are seen by the parent");
}

static void protect(struct region *r, uint64_t contents) {
    for (int access = PROT_NONE; access <= PROT_READ; access++)
        if (mprotect(r->at, r->size, access) || mprotect(r->at, r->size, PROT_READ | PROT_WRITE)) abort();
    say(" done");
    if (!holds(r, contents, 0, r->size)) breach("the memory changed");
}

static const struct {
    const char *name;
    void (*perform)(struct region *, uint64_t contents);
} operations[] = {
    {"dontneed", dontneed}, {"dontneed-locked", dontneed_locked}, {"guard", guard},
    {"process-dontneed", process_dontneed}, {"free", lazy_free}, {"pageout", pageout},
    {"wipe-on-fork", wipe_on_fork}, {"unmap", unmap}, {"map-over", map_over}, {"grow", grow},
    {"shrink-and-grow", shrink_and_grow}, {"move-away", move_away}, {"fork", fork_and_write}, {"protect", protect},
};
enum { OPERATIONS = sizeof operations / sizeof *operations, KINDS = 4 };

/* For each operation a region of each size that is only read before it, and one that is written. */
static struct region regions[OPERATIONS][KINDS];
static struct region sparse, wiped, plain; /* with holes; under MADV_WIPEONFORK; for nothing but to be digested */
static char *heap_end;

static bool in_sparse(size_t page) { return page % 256 < 64 ? page % 16 < 12 : page % 256 == 200; }

static void fill_sparse(uint64_t contents) {
    for (size_t page = 0; page < sparse.size / PAGE; page++)
        if (in_sparse(page))
            for (size_t i = page * PAGE / 8; i < (page + 1) * PAGE / 8; i++)
                ((uint64_t *)sparse.at)[i] = word(sparse.seed, contents, i);
}

static sigjmp_buf escape;
static void fault(int signal) { siglongjmp(escape, signal); }

static void prepare(void) {
    uint64_t seed = 10;
    for (int o = 0; o < OPERATIONS; o++)
        for (int kind = 0; kind < KINDS; kind++) {
            size_t size = kind < 2 ? SMALL : LARGE;
            regions[o][kind] = (struct region){map(size, 0), size, seed++};
            fill(&regions[o][kind], GOLDEN);
        }
    sparse = (struct region){map(16 * LARGE, MAP_NORESERVE), 16 * LARGE, seed++};
    fill_sparse(GOLDEN);
    wiped = (struct region){map(SMALL, 0), SMALL, seed++};
    fill(&wiped, GOLDEN);
    if (madvise(wiped.at, wiped.size, MADV_WIPEONFORK)) abort();
    plain = (struct region){map(LARGE, 0), LARGE, seed++};
    fill(&plain, GOLDEN);
    signal(SIGBUS, fault);
    signal(SIGSEGV, fault);
}

static void replace_one(struct region *r, int file, off_t *end) {
    if (pwrite(file, r->at, r->size, *end) != (ssize_t)r->size) abort();
    int flags = MAP_PRIVATE | MAP_FIXED;
    if (mmap(r->at, r->size, PROT_READ | PROT_WRITE, flags, file, *end) == MAP_FAILED) abort();
    *end += (off_t)r->size;
}

/* What a restore of a mapped golden does. */
static void replace_by_file(const char *path) {
    int file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    off_t end = 0;
    if (file < 0) abort();
    for (int o = 0; o < OPERATIONS; o++)
        for (int kind = 0; kind < KINDS; kind++) replace_one(&regions[o][kind], file, &end);
    close(file);
}

static void heap(void) {
    size_t size = LARGE;
    say("heap shrink:");
    if (sbrk(0) != heap_end) {
        say(" not at its end\n");
    } else {
        struct region half = {heap_end - size / 2, size / 2, 0};
        if (sbrk(-(intptr_t)half.size) == (void *)-1 || sbrk((intptr_t)half.size) == (void *)-1) abort();
        say(" done");
        if (!zeros(half.at, half.size)) breach("new heap is not zeros");
        say("\n");
    }
    struct region block = {sbrk((intptr_t)size), size, 0};
    say("heap grow: done");
    if (!zeros(block.at, block.size)) breach("new heap is not zeros");
    say("\n");
    fill(&block, GOLDEN);
    heap_end = sbrk(0);
}

static void standing(void) {
    int status;
    say("standing:");
    for (size_t page = 0; page < sparse.size / PAGE; page++) {
        size_t at = page * PAGE;
        if (in_sparse(page) ? !holds(&sparse, GOLDEN, at, at + PAGE) : !zeros(sparse.at + at, PAGE)) {
            breach(in_sparse(page) ? "a page changed" : "a hole is not zeros");
            break;
        }
    }
    pid_t child = fork();
    if (child == 0) _exit(!zeros(wiped.at, wiped.size));
    waitpid(child, &status, 0);
    if (status) breach("what is wiped on fork is not zeros in a child");
    if (!holds(&wiped, GOLDEN, 0, wiped.size)) breach("what is wiped on fork changed in the parent");
    say(" done\n");
}

static void operate(void) {
    standing();
    heap();
    for (int o = 0; o < OPERATIONS; o++)
        for (int kind = 0; kind < KINDS; kind++) {
            struct region *r = &regions[o][kind];
            bool write = kind % 2;
            say("%s %s %s:", operations[o].name, kind < 2 ? "small" : "large", write ? "written" : "read");
            int caught = sigsetjmp(escape, 1);
            if (caught) {
                breach(caught == SIGBUS ? "SIGBUS" : "SIGSEGV");
                r->at = map(r->size, 0);
            } else if (!holds(r, GOLDEN, 0, r->size)) {
                breach("is not as it was");
            } else {
                if (write) fill(r, WRITTEN);
                operations[o].perform(r, write ? WRITTEN : GOLDEN);
            }
            say("\n");
            fill(r, GOLDEN);
        }
}

static void digest(void) {
    uint64_t sum = 0;
    for (size_t i = 0; i < plain.size / 8; i++) sum = sum * 31 + ((uint64_t *)plain.at)[i];
    for (size_t i = 0; i < sparse.size / 8; i++) sum = sum * 31 + ((uint64_t *)sparse.at)[i];
    for (int o = 0; o < OPERATIONS; o++)
        for (int kind = 0; kind < KINDS; kind++)
            for (size_t i = 0; i < regions[o][kind].size / 8; i++) sum = sum * 31 + ((uint64_t *)regions[o][kind].at)[i];
    say("%016llx", (unsigned long long)sum);
}

static void scribble(void) {
    for (int o = 0; o < OPERATIONS; o++)
        for (int kind = 0; kind < KINDS; kind++) fill(&regions[o][kind], 99);
    fill(&plain, 99);
    memset(sparse.at, 0x5A, sparse.size);
    if (sbrk(0) == heap_end) memset(heap_end - LARGE, 0x5A, LARGE);
    say("written");
}

/* Whether a file that is mapped here could be written through its path: never, if it is a golden's. */
static void writable(void) {
    static char line[4096];
    int files = 0;
    FILE *maps = fopen("/proc/self/maps", "r");
    while (fgets(line, sizeof line, maps)) {
        char *path = strstr(line, "/run/gpuckpt-memory/");
        if (!path) continue;
        path[strcspn(path, "\n")] = 0;
        files++;
        int file = open(path, O_RDWR);
        if (file >= 0) breach(path);
        close(file);
    }
    fclose(maps);
    say("%d", files);
}

/* --- the allocator ------------------------------------------------------------------------------------------------ */

/* Whoever gives advice comes by here; how often memory was to be dropped, and how often that was refused. */
static atomic_int drops, refused;

int madvise(void *at, size_t size, int advice) {
    int answer = (int)syscall(SYS_madvise, at, size, advice);
    if (advice == MADV_DONTNEED || advice == MADV_FREE) {
        atomic_fetch_add(&drops, 1);
        if (answer) atomic_fetch_add(&refused, 1);
    }
    return answer;
}

static void purge(void) {
    int (*jemalloc)(const char *, void *, size_t *, void *, size_t) = dlsym(RTLD_DEFAULT, "mallctl");
    void (*mimalloc)(bool) = dlsym(RTLD_DEFAULT, "mi_collect");
    void (*tcmalloc)(void) = dlsym(RTLD_DEFAULT, "MallocExtension_ReleaseFreeMemory");
    if (jemalloc) jemalloc("arena.4096.purge", NULL, NULL, NULL, 0); /* 4096: all of them */
    else if (mimalloc) mimalloc(true);
    else if (tcmalloc) tcmalloc();
    else malloc_trim(0);
}

enum { THREADS = 4, SLOTS = 300 };

static struct churner {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int steps; /* still to do; the thread waits at 0 */
    uint64_t random, seed, zeroed, checked;
    struct region slots[SLOTS];
    const char *trouble;
} churners[THREADS];

static uint64_t next(struct churner *c) {
    c->random ^= c->random << 13, c->random ^= c->random >> 7, c->random ^= c->random << 17;
    return c->random;
}

static size_t some_size(struct churner *c) {
    uint64_t x = next(c), limit = x % 32 == 0 ? 2 << 20 : x % 4 == 0 ? 64 << 10 : 2 << 10;
    return (next(c) % limit + 8) & ~(size_t)7;
}

static void verify(struct churner *c, struct region *slot, size_t size) {
    c->checked += size;
    if (!holds(slot, GOLDEN, 0, size)) c->trouble = "an allocation changed by itself";
}

static void allocate(struct churner *c, struct region *slot, bool clear) {
    size_t size = some_size(c);
    *slot = (struct region){clear ? calloc(1, size) : malloc(size), size, c->seed++};
    if (!slot->at) abort();
    if (clear) {
        c->zeroed += size;
        if (!zeros(slot->at, size)) c->trouble = "calloc gave memory that is not zeros";
    }
    fill(slot, GOLDEN);
}

static void release(struct churner *c, struct region *slot) {
    if (slot->at) verify(c, slot, slot->size);
    free(slot->at);
    slot->at = NULL;
}

static void resize(struct churner *c, struct region *slot) {
    size_t size = some_size(c);
    char *moved = realloc(slot->at, size);
    if (!moved) abort();
    slot->at = moved;
    verify(c, slot, size < slot->size ? size : slot->size);
    slot->size = size;
    fill(slot, GOLDEN);
}

static void step(struct churner *c) {
    struct region *slot = &c->slots[next(c) % SLOTS];
    if (!slot->at) allocate(c, slot, next(c) % 2);
    else if (next(c) % 3 == 0) resize(c, slot);
    else release(c, slot);
    if (c->steps % 500 == 0) {
        for (int i = 0; i < SLOTS; i++) release(c, &c->slots[i]);
        purge();
        for (int i = 0; i < SLOTS; i++) allocate(c, &c->slots[i], true);
    } else if (c->steps % 125 == 0) {
        purge();
    }
}

static void work(struct churner *c) {
    for (int i = 0; i < SLOTS; i++)
        if (c->slots[i].at) verify(c, &c->slots[i], c->slots[i].size); /* what was there at the dump */
    for (; c->steps > 0; c->steps--) step(c);
}

static void *loop(void *argument) {
    struct churner *c = argument;
    pthread_mutex_lock(&c->lock);
    for (;;) {
        while (c->steps == 0) pthread_cond_wait(&c->changed, &c->lock);
        work(c);
        pthread_cond_broadcast(&c->changed);
    }
    return NULL;
}

/* The first churns in the main thread, whose heap is that of brk. */
static void start_churners(void) {
    for (int i = 0; i < THREADS; i++) {
        struct churner *c = &churners[i];
        pthread_t thread;
        pthread_mutex_init(&c->lock, NULL);
        pthread_cond_init(&c->changed, NULL);
        c->random = 88172645463325252u + (uint64_t)i, c->seed = (uint64_t)i << 32;
        if (i && pthread_create(&thread, NULL, loop, c)) abort();
    }
}

static void churn(void) {
    enum { STEPS = 1000 };
    for (int i = 1; i < THREADS; i++) {
        pthread_mutex_lock(&churners[i].lock);
        churners[i].steps = STEPS;
        pthread_cond_broadcast(&churners[i].changed);
        pthread_mutex_unlock(&churners[i].lock);
    }
    churners[0].steps = STEPS;
    work(&churners[0]);
    uint64_t zeroed = 0, checked = 0;
    for (int i = 0; i < THREADS; i++) {
        struct churner *c = &churners[i];
        pthread_mutex_lock(&c->lock);
        while (c->steps) pthread_cond_wait(&c->changed, &c->lock);
        zeroed += c->zeroed, checked += c->checked;
        if (c->trouble) breach(c->trouble);
        pthread_mutex_unlock(&c->lock);
    }
    say("zeroed %llu checked %llu", (unsigned long long)zeroed, (unsigned long long)checked);
}

static void allocator(void) {
    static const char *const known[][2] = {
        {"mallctl", "jemalloc"}, {"mi_collect", "mimalloc"}, {"MallocExtension_ReleaseFreeMemory", "tcmalloc"}};
    const char *name = "glibc";
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (dlsym(RTLD_DEFAULT, known[i][0])) name = known[i][1];
    say("%s drops %d refused %d", name, drops, refused);
}

/* --- HTTP --------------------------------------------------------------------------------------------------------- */

static void serve(const char *path) {
    static const struct {
        const char *path;
        void (*answer)(void);
    } pages[] = {{"/digest", digest}, {"/operate", operate}, {"/scribble", scribble},
                 {"/churn", churn}, {"/allocator", allocator}, {"/writable", writable}};
    static char request[4096], head[128];
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 8)) abort();
    for (;;) {
        int peer = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        size_t got = 0;
        ssize_t more;
        memset(request, 0, sizeof request);
        while (!strstr(request, "\r\n\r\n") && (more = read(peer, request + got, sizeof request - 1 - got)) > 0)
            got += (size_t)more;
        replied = 0, wrong = false;
        int status = strncmp(request, "GET /health ", 12) == 0 ? 200 : 404;
        for (size_t i = 0; i < sizeof pages / sizeof *pages; i++) {
            size_t length = strlen(pages[i].path);
            if (strncmp(request + 4, pages[i].path, length) || request[4 + length] != ' ') continue;
            pages[i].answer();
            status = wrong ? 500 : 200;
        }
        int size = snprintf(head, sizeof head, "HTTP/1.1 %d .\r\nContent-Length: %zu\r\nConnection: close\r\n\r\n",
                            status, replied);
        if (write(peer, head, (size_t)size) < 0 || write(peer, reply, replied) < 0) perror("answer");
        close(peer);
    }
}

int main(int count, char **words) {
    signal(SIGPIPE, SIG_IGN);
    prepare();
    if (count >= 2 && strcmp(words[1], "--once") == 0) {
        heap_end = (char *)sbrk(LARGE) + LARGE;
        if (count == 3) replace_by_file(words[2]);
        operate();
        fputs(reply, stdout);
        return wrong;
    }
    start_churners();
    serve(words[1]);
}
