/* NVIDIA's cuda-checkpoint on top of libcuda.so.1, as theirs is: its options (those of version 580), what it prints, and
 * its status, which is the driver's code in the eight bits that a status has. */

#include <getopt.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int cuInit(unsigned int);
int cuGetErrorString(int, const char **);
int cuCheckpointProcessGetState(int, int *);
int cuCheckpointProcessLock(int, void *);
int cuCheckpointProcessCheckpoint(int, void *);
int cuCheckpointProcessRestore(int, void *);
int cuCheckpointProcessUnlock(int, void *);

static const char *words(int code) {
    const char *found = NULL;
    cuGetErrorString(code, &found);
    return found ? found : "unrecognized error code";
}

static int parsed(const char *text, unsigned char *bytes) {
    int count = 0;
    if (strncmp(text, "GPU-", 4)) return 0;
    for (text += 4; *text; text += *text == '-' ? 1 : 2)
        if (*text != '-' && (count == 16 || sscanf(text, "%2hhx", &bytes[count++]) != 1)) return 0;
    return count == 16;
}

static int restored(int pid, char *map) {
    unsigned char pairs[16][2][16];
    struct {
        void *pairs;
        unsigned int count;
        char reserved[52];
    } given = {pairs, 0, {0}};
    for (char *pair = map ? strtok(map, ",") : NULL; pair && given.count < 16; pair = strtok(NULL, ",")) {
        char *new = strchr(pair, '=');
        if (new) *new++ = 0;
        if (!new || !parsed(pair, pairs[given.count][0]) || !parsed(new, pairs[given.count][1])) return 1;
        given.count++;
    }
    return cuCheckpointProcessRestore(pid, map ? &given : NULL);
}

int main(int argc, char **argv) {
    static const struct option options[] = {{"get-state", 0, 0, 's'},  {"action", 1, 0, 'a'}, {"pid", 1, 0, 'p'},
                                            {"timeout", 1, 0, 't'}, {"device-map", 1, 0, 'd'}, {0, 0, 0, 0}};
    static const char *names[] = {"running", "locked", "checkpointed", "failed"};
    int option, pid = 0, asked = 0, state = 0, code;
    char *action = NULL, *map = NULL;
    struct {
        unsigned int timeout, reserved[15];
    } given = {0, {0}};
    while ((option = getopt_long(argc, argv, "p:t:d:", options, NULL)) != -1) {
        if (option == 's') asked = 1;
        else if (option == 'a') action = optarg;
        else if (option == 'p') pid = atoi(optarg);
        else if (option == 't') given.timeout = atoi(optarg);
        else if (option == 'd') map = optarg;
        else return 1;
    }
    if (!pid || asked == (action != NULL) || optind < argc) return fprintf(stderr, "Invalid arguments\n"), 1;
    if ((code = cuInit(0))) return fprintf(stderr, "Error initializing CUDA: \"%s\"\n", words(code)), code & 255;
    if (asked) {
        if ((code = cuCheckpointProcessGetState(pid, &state)))
            return fprintf(stderr, "Error getting process state for process ID %d: \"%s\"\n", pid, words(code)), code & 255;
        return puts(names[state]), 0;
    }
    if (!strcmp(action, "lock")) code = cuCheckpointProcessLock(pid, &given);
    else if (!strcmp(action, "checkpoint")) code = cuCheckpointProcessCheckpoint(pid, NULL);
    else if (!strcmp(action, "restore")) code = restored(pid, map);
    else if (!strcmp(action, "unlock")) code = cuCheckpointProcessUnlock(pid, NULL);
    else return fprintf(stderr, "Invalid action\n"), 1;
    if (code) fprintf(stderr, "Could not %s on process ID %d: \"%s\"\n", action, pid, words(code));
    return code & 255;
}
