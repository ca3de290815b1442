/* What the stand-ins for NVIDIA's driver share: a folder named by GPUCKPT_STUB_DRIVER, or by the file `world` beside the
 * library, described in __init__.py. Every change is made under a lock on it, so that all processes see the same. */

#define _GNU_SOURCE /* before any header */
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#define MOST 16

typedef struct {
    char uuid[48], name[96];
    long long total; /* -1: not told */
    int mig;         /* -1: the type has none */
} Device;

typedef struct {
    char state[16];
    int count, broken; /* broken: a restore has failed for lack of memory */
    char uuid[MOST][48];
    long long bytes[MOST];
} Process;

static const char *folder_of_world(void) {
    static char found[384];
    const char *named = getenv("GPUCKPT_STUB_DRIVER");
    char beside[512];
    Dl_info info;
    if (named || *found) return named ? named : found;
    if (!dladdr((void *)folder_of_world, &info)) return ".";
    const char *end = strrchr(info.dli_fname, '/');
    snprintf(beside, sizeof beside, "%.*s/world", end ? (int)(end - info.dli_fname) : 1, end ? info.dli_fname : ".");
    FILE *file = fopen(beside, "r");
    if (!file || fscanf(file, "%383s", found) != 1) strcpy(found, ".");
    if (file) fclose(file);
    return found;
}

static FILE *open_in_folder(const char *mode, const char *format, ...) {
    char name[128], path[512];
    va_list rest;
    va_start(rest, format);
    vsnprintf(name, sizeof name, format, rest);
    va_end(rest);
    snprintf(path, sizeof path, "%s/%s", folder_of_world(), name);
    return fopen(path, mode);
}

static FILE *locked(void) {
    FILE *file = open_in_folder("a", "lock");
    if (file) flock(fileno(file), LOCK_EX);
    return file;
}

static void unlocked(FILE *file) {
    if (file) fclose(file);
}

static int devices(Device *found) {
    FILE *file = open_in_folder("r", "devices");
    char total[32], mig[8];
    int count = 0;
    while (file && count < MOST &&
           fscanf(file, "%47s %31s %7s %95[^\n]", found[count].uuid, total, mig, found[count].name) == 4) {
        found[count].total = *total == '-' ? -1 : atoll(total);
        found[count++].mig = *mig == '-' ? -1 : atoi(mig);
    }
    if (file) fclose(file);
    return count;
}

static int read_process(int pid, Process *found) {
    FILE *file = open_in_folder("r", "processes/%d", pid);
    if (!file) return 0;
    memset(found, 0, sizeof *found);
    int ok = fscanf(file, "%15s %d", found->state, &found->broken) == 2;
    while (ok && found->count < MOST &&
           fscanf(file, "%47s %lld", found->uuid[found->count], &found->bytes[found->count]) == 2)
        found->count++;
    fclose(file);
    return ok;
}

static void write_process(int pid, const Process *given) {
    FILE *file = open_in_folder("w", "processes/%d", pid);
    if (!file) return;
    fprintf(file, "%s %d\n", given->state, given->broken);
    for (int i = 0; i < given->count; i++) fprintf(file, "%s %lld\n", given->uuid[i], given->bytes[i]);
    fclose(file);
}

static int on_device(const Process *process) {
    return !strcmp(process->state, "running") || !strcmp(process->state, "locked");
}

/* Whoever holds something on a device: process ids, at most `most` of them, and how many bytes; returns how many. */
static int holding(const char *uuid, int *pids, long long *bytes, int most) {
    FILE *file = open_in_folder("r", "pids");
    int count = 0, pid;
    Process process;
    while (file && fscanf(file, "%d", &pid) == 1) {
        if (!read_process(pid, &process) || !on_device(&process)) continue;
        for (int i = 0; i < process.count; i++) {
            if (strcmp(process.uuid[i], uuid)) continue;
            if (count < most) pids[count] = pid, bytes[count] = process.bytes[i];
            count++;
        }
    }
    if (file) fclose(file);
    return count;
}

static long long used(const char *uuid) {
    int pids[256];
    long long bytes[256], sum = 0;
    int count = holding(uuid, pids, bytes, 256);
    for (int i = 0; i < count && i < 256; i++) sum += bytes[i];
    return sum;
}

/* A number from a file; `otherwise` if there is none. */
static int number_in(const char *folder, const char *step, int pid, int otherwise) {
    FILE *file = open_in_folder("r", "%s/%s-%d", folder, step, pid);
    int found = otherwise;
    if (file) {
        if (fscanf(file, "%d", &found) != 1) found = otherwise;
        fclose(file);
    }
    return found;
}

static int is_there(const char *folder, const char *step, int pid) {
    FILE *file = open_in_folder("r", "%s/%s-%d", folder, step, pid);
    if (file) fclose(file);
    return file != NULL;
}
