/* libnvidia-ml.so.1 without a GPU: what is asked of NVML about devices and who holds memory on them. */

#include "state.h"

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9 };

typedef struct {
    unsigned long long total, free, used;
} Memory;

typedef struct {
    unsigned int pid;
    unsigned long long used;
    unsigned int gpu_instance, compute_instance;
} Holder;

static int _ready;
static char _handles[MOST]; /* a handle is the address of one of them */

int nvmlInitWithFlags(unsigned int flags) {
    int code = number_in("refuse", "nvml", 0, SUCCESS);
    _ready = code == SUCCESS;
    return code;
}

int nvmlInit_v2(void) {
    return nvmlInitWithFlags(0);
}

int nvmlShutdown(void) {
    _ready = 0;
    return SUCCESS;
}

const char *nvmlErrorString(int code) {
    switch (code) {
    case SUCCESS: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    default: return "Unknown Error";
    }
}

int nvmlSystemGetDriverVersion(char *text, unsigned int size) {
    FILE *file = open_in_folder("r", "version");
    if (!_ready || !file) return UNINITIALIZED;
    text[fread(text, 1, size - 1, file)] = 0;
    fclose(file);
    return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned int *count) {
    Device found[MOST];
    *count = devices(found);
    return _ready ? SUCCESS : UNINITIALIZED;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **handle) {
    Device found[MOST];
    if ((int)index >= devices(found)) return INVALID_ARGUMENT;
    *handle = &_handles[index];
    return _ready ? SUCCESS : UNINITIALIZED;
}

static int device(void *handle, Device *one) {
    Device found[MOST];
    long index = (char *)handle - _handles;
    if (!_ready) return UNINITIALIZED;
    if (index < 0 || index >= devices(found)) return INVALID_ARGUMENT;
    *one = found[index];
    return SUCCESS;
}

static int told(const char *text, char *into, unsigned int size) {
    if (strlen(text) >= size) return INSUFFICIENT_SIZE;
    strcpy(into, text);
    return SUCCESS;
}

int nvmlDeviceGetUUID(void *handle, char *text, unsigned int size) {
    Device one;
    int code = device(handle, &one);
    return code ? code : told(one.uuid, text, size);
}

int nvmlDeviceGetName(void *handle, char *text, unsigned int size) {
    Device one;
    int code = device(handle, &one);
    return code ? code : told(one.name, text, size);
}

int nvmlDeviceGetMemoryInfo(void *handle, Memory *memory) {
    Device one;
    int code = device(handle, &one);
    if (code) return code;
    if (one.total < 0) return NOT_SUPPORTED;
    memory->total = one.total, memory->used = used(one.uuid), memory->free = memory->total - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetMigMode(void *handle, unsigned int *current, unsigned int *pending) {
    Device one;
    int code = device(handle, &one);
    if (code) return code;
    if (one.mig < 0) return NOT_SUPPORTED;
    *current = *pending = one.mig;
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned int *count, Holder *into) {
    int pids[256], most = into ? (int)*count : 0;
    long long bytes[256];
    Device one;
    int code = device(handle, &one);
    if (!code) code = number_in("refuse", "processes", 0, SUCCESS);
    if (code) return code;
    int unknown = is_there("refuse", "used", 0), found = holding(one.uuid, pids, bytes, 256);
    *count = found;
    if (found > most) return INSUFFICIENT_SIZE;
    for (int i = 0; i < found; i++)
        into[i] = (Holder){pids[i], unknown ? ~0ULL : (unsigned long long)bytes[i], ~0U, ~0U};
    return SUCCESS;
}
