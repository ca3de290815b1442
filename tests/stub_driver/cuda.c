/* libcuda.so.1 without a GPU: the driver's checkpoints of processes, as the CUDA Driver API 13 documents them, what
 * cuda-bindings needs to find them, and as much of a device's memory as a program needs that only holds some. */

#include "state.h"
#include <stdint.h>

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_CONTEXT = 201,
    OPERATING_SYSTEM = 304,
    ILLEGAL_STATE = 401,
    NOT_FOUND = 500,
    NOT_READY = 600,
    NOT_SUPPORTED = 801,
    UNKNOWN = 999
};

static const struct {
    int code;
    const char *name, *words;
} _results[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {OPERATING_SYSTEM, "CUDA_ERROR_OPERATING_SYSTEM", "OS call failed or operation not supported on this OS"},
    {ILLEGAL_STATE, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {UNKNOWN, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

typedef struct {
    unsigned char bytes[16];
} Uuid;

typedef struct {
    Uuid old, new;
} Pair;

typedef struct {
    unsigned int timeout, reserved0;
    uint64_t reserved1[7];
} LockArguments;

typedef struct {
    Pair *pairs;
    unsigned int count;
    char reserved[64 - sizeof(Pair *) - sizeof(unsigned int)];
} RestoreArguments;

_Static_assert(sizeof(LockArguments) == 64 && sizeof(RestoreArguments) == 64, "as cuda.h has them");

static int _ready;

int cuInit(unsigned int flags) {
    int code = flags ? INVALID_VALUE : number_in("refuse", "init", 0, SUCCESS);
    _ready = code == SUCCESS;
    return code;
}

int cuDriverGetVersion(int *version) {
    *version = 13000;
    return SUCCESS;
}

int cuGetErrorString(int code, const char **words) {
    for (size_t i = 0; i < sizeof _results / sizeof *_results; i++)
        if (_results[i].code == code) return *words = _results[i].words, SUCCESS;
    *words = NULL;
    return INVALID_VALUE;
}

int cuGetErrorName(int code, const char **name) {
    for (size_t i = 0; i < sizeof _results / sizeof *_results; i++)
        if (_results[i].code == code) return *name = _results[i].name, SUCCESS;
    *name = NULL;
    return INVALID_VALUE;
}

int cuGetProcAddress_v2(const char *symbol, void **found, int version, uint64_t flags, int *status) {
    static void *self;
    Dl_info info;
    if (!self && dladdr((void *)cuGetProcAddress_v2, &info)) self = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    *found = self ? dlsym(self, symbol) : NULL;
    /* The functions' address is asked for by their plain name. */
    if (!*found && !strcmp(symbol, "cuGetProcAddress")) *found = (void *)cuGetProcAddress_v2;
    if (status) *status = *found ? 0 : 1;
    return *found ? SUCCESS : NOT_FOUND;
}

static void note(const char *format, ...) {
    FILE *lock = locked(), *file = open_in_folder("a", "calls");
    va_list rest;
    va_start(rest, format);
    if (file) vfprintf(file, format, rest), fclose(file);
    va_end(rest);
    unlocked(lock);
}

static int all_zero(const void *bytes, size_t size) {
    for (size_t i = 0; i < size; i++)
        if (((const char *)bytes)[i]) return 0;
    return 1;
}

/* What everything asked about a process begins with: it may hang or be refused. */
static int asked(const char *step, int pid) {
    while (is_there("hang", step, pid)) usleep(2000);
    if (!_ready) return NOT_INITIALIZED;
    return number_in("refuse", step, pid, SUCCESS);
}

static int nobody(int pid) {
    return kill(pid, 0) ? INVALID_VALUE : NOT_INITIALIZED;
}

static int move(int pid, const char *wanted, const char *then) {
    FILE *lock = locked();
    Process process;
    int code = SUCCESS;
    if (!read_process(pid, &process))
        code = nobody(pid);
    else if (strcmp(process.state, wanted))
        code = ILLEGAL_STATE;
    else
        strcpy(process.state, then), write_process(pid, &process);
    unlocked(lock);
    return code;
}

int cuCheckpointProcessGetState(int pid, int *state) {
    static const char *names[] = {"running", "locked", "checkpointed", "failed"};
    int code = asked("state", pid);
    if (code) return code;
    FILE *lock = locked();
    Process process;
    code = read_process(pid, &process) ? UNKNOWN : nobody(pid);
    unlocked(lock);
    for (int i = 0; code == UNKNOWN && i < 4; i++)
        if (!strcmp(names[i], process.state)) *state = i, code = SUCCESS;
    return code;
}

int cuCheckpointProcessLock(int pid, LockArguments *given) {
    note("lock %d %d\n", pid, given ? (int)given->timeout : -1);
    if (given && (given->reserved0 || !all_zero(given->reserved1, sizeof given->reserved1))) return INVALID_VALUE;
    int code = asked("lock", pid);
    return code ? code : move(pid, "running", "locked");
}

int cuCheckpointProcessCheckpoint(int pid, void *given) {
    note("checkpoint %d\n", pid);
    if (given && !all_zero(given, 64)) return INVALID_VALUE;
    int code = asked("checkpoint", pid);
    return code ? code : move(pid, "locked", "checkpointed");
}

int cuCheckpointProcessUnlock(int pid, void *given) {
    note("unlock %d\n", pid);
    if (given && !all_zero(given, 64)) return INVALID_VALUE;
    int code = asked("unlock", pid);
    return code ? code : move(pid, "locked", "running");
}

static void written(const Uuid *uuid, char *text) {
    text += sprintf(text, "GPU-");
    for (int i = 0; i < 16; i++)
        text += sprintf(text, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", uuid->bytes[i]);
}

/* Each device of the machine must be named as an old one, and each new one but once; the types must be the same. */
static int mapped(Process *process, char old[][48], char new[][48], unsigned int count) {
    Device present[MOST];
    int known = devices(present);
    for (int i = 0; i < known; i++) {
        unsigned int as_old = 0, as_new = 0;
        for (unsigned int j = 0; j < count; j++)
            as_old += !strcmp(old[j], present[i].uuid), as_new += !strcmp(new[j], present[i].uuid);
        if (as_old != 1 || as_new > 1) return INVALID_VALUE;
    }
    for (int i = 0; i < process->count; i++) {
        const char *before = NULL, *after = NULL;
        unsigned int j = 0;
        while (j < count && strcmp(old[j], process->uuid[i])) j++;
        if (j == count) return INVALID_VALUE;
        for (int k = 0; k < known; k++) {
            if (!strcmp(present[k].uuid, old[j])) before = present[k].name;
            if (!strcmp(present[k].uuid, new[j])) after = present[k].name;
        }
        if (!after || (before && strcmp(before, after))) return INVALID_VALUE;
        strcpy(process->uuid[i], new[j]);
    }
    return SUCCESS;
}

static int lacking(const Process *process) {
    Device present[MOST];
    int known = devices(present);
    for (int i = 0; i < process->count; i++)
        for (int k = 0; k < known; k++)
            if (!strcmp(present[k].uuid, process->uuid[i]) && present[k].total >= 0 &&
                present[k].total - used(present[k].uuid) < process->bytes[i])
                return 1;
    return 0;
}

int cuCheckpointProcessRestore(int pid, RestoreArguments *given) {
    char old[MOST][48], new[MOST][48], line[MOST * 100] = "", *end = line;
    unsigned int count = given ? given->count : 0;
    if (count > MOST || (given && !all_zero(given->reserved, sizeof given->reserved))) return INVALID_VALUE;
    for (unsigned int i = 0; i < count; i++) {
        written(&given->pairs[i].old, old[i]), written(&given->pairs[i].new, new[i]);
        end += sprintf(end, " %s=%s", old[i], new[i]);
    }
    note("restore %d%s\n", pid, line);
    int code = asked("restore", pid);
    if (code) return code;
    FILE *lock = locked();
    Process process, moved;
    if (!read_process(pid, &process))
        code = nobody(pid);
    else if (strcmp(process.state, "checkpointed"))
        code = ILLEGAL_STATE;
    else if (process.broken)
        code = OPERATING_SYSTEM; /* as drivers of 2026 have it: one that ran out of memory once never comes back */
    else {
        moved = process;
        if (count) code = mapped(&moved, old, new, count);
        if (!code && lacking(&moved))
            process.broken = 1, write_process(pid, &process), code = OUT_OF_MEMORY;
        else if (!code)
            strcpy(moved.state, "locked"), write_process(pid, &moved);
    }
    unlocked(lock);
    return code;
}

/* A device's memory: pages of the process that asked for it. All of it is on the first device. */

static int _held_by; /* the process that is in the world by its own calls */

static int own(Process *process) {
    return read_process(getpid(), process) && !strcmp(process->state, "running");
}

/* Calls of a process that is locked or suspended wait. */
static void wait_until_running(void) {
    Process process;
    while (_held_by == getpid() && !own(&process)) usleep(500);
}

__attribute__((destructor)) static void leave(void) {
    char path[512];
    if (_held_by != getpid()) return;
    snprintf(path, sizeof path, "%s/processes/%d", folder_of_world(), _held_by);
    unlink(path);
}

int cuDeviceGetCount(int *count) {
    Device found[MOST];
    *count = devices(found);
    return _ready ? SUCCESS : NOT_INITIALIZED;
}

int cuDeviceGet(int *device, int ordinal) {
    Device found[MOST];
    if (!_ready) return NOT_INITIALIZED;
    *device = ordinal;
    return ordinal >= 0 && ordinal < devices(found) ? SUCCESS : NO_DEVICE;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    Device found[MOST];
    Process process = {.state = "running", .count = 1};
    if (!_ready) return NOT_INITIALIZED;
    if (device || !devices(found)) return NO_DEVICE;
    if (_held_by != getpid()) {
        FILE *lock = locked(), *pids = open_in_folder("a", "pids");
        if (pids) fprintf(pids, "%d\n", getpid()), fclose(pids);
        strcpy(process.uuid[0], found[0].uuid);
        process.bytes[0] = 64 << 20; /* what a context takes */
        write_process(_held_by = getpid(), &process);
        unlocked(lock);
    }
    *context = &_held_by;
    return SUCCESS;
}

int cuCtxSetCurrent(void *context) {
    return context == &_held_by ? SUCCESS : INVALID_CONTEXT;
}

int cuMemAlloc_v2(uint64_t *address, size_t size) {
    Process process;
    wait_until_running();
    FILE *lock = locked();
    void *made = own(&process) ? malloc(size) : NULL;
    if (made) process.bytes[0] += size, write_process(getpid(), &process);
    unlocked(lock);
    *address = (uint64_t)(uintptr_t)made;
    return made ? SUCCESS : OUT_OF_MEMORY;
}

int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t size) {
    wait_until_running();
    memcpy((void *)(uintptr_t)to, from, size);
    return SUCCESS;
}

int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t size) {
    wait_until_running();
    memcpy(to, (const void *)(uintptr_t)from, size);
    return SUCCESS;
}
