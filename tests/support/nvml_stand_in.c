/* A library with NVML's names and no hardware behind it; each call reads its result from the environment:
 *   NVML_STAND_IN_DEVICES  how many GPUs there are (2)
 *   NVML_STAND_IN_DRIVER   the driver's version (580.65.06)
 *   NVML_STAND_IN_CUDA     the CUDA version of that driver, 1000 * major + 10 * minor (13000; 0: unknown)
 *   NVML_STAND_IN_INIT     what initialising returns (0; 9: driver not loaded)
 *   NVML_STAND_IN_MIG      1: GPU 0 is in MIG mode, with instances at places 0 and 2 of 7
 *   NVML_STAND_IN_LOST     the index of a GPU that fell off the bus (-1: none)
 *   NVML_STAND_IN_MEMORY   0: no GPU has memory of its own, as on a system on a chip
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, INVALID = 2, LOST = 15 };
enum { MAX_GPUS = 64, MIG_PLACES = 7, MIG_STEP = 2, N_MIG = 2 };

typedef struct { int is_mig; unsigned number; } Device;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } MemoryV2;
typedef struct { unsigned gpu, memory; } Utilization;

static const unsigned long long TOTAL = 16ULL << 30, FREE = 15ULL << 30;
static Device gpus[MAX_GPUS], migs[N_MIG];

static int number(const char *name, int otherwise) {
    const char *value = getenv(name);
    return value && *value ? atoi(value) : otherwise;
}

static int copy(char *to, unsigned length, const char *text) {
    snprintf(to, length, "%s", text);
    return SUCCESS;
}

static void uuid_of(const Device *device, char *to, unsigned length) {
    snprintf(to, length, "%s-00000000-0000-0000-0000-%012u", device->is_mig ? "MIG" : "GPU", device->number);
}

static unsigned n_gpus(void) { return (unsigned)number("NVML_STAND_IN_DEVICES", 2); }

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    for (unsigned i = 0; i < MAX_GPUS; i++) gpus[i] = (Device){0, i};
    for (unsigned i = 0; i < N_MIG; i++) migs[i] = (Device){1, i};
    return number("NVML_STAND_IN_INIT", SUCCESS);
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int code) {
    static char text[64];
    snprintf(text, sizeof text, "stand-in error %d", code);
    return text;
}

int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    const char *value = getenv("NVML_STAND_IN_DRIVER");
    return copy(version, length, value ? value : "580.65.06");
}
int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    *version = number("NVML_STAND_IN_CUDA", 13000);
    return *version ? SUCCESS : NOT_SUPPORTED;
}
int nvmlSystemGetCudaDriverVersion(int *version) { return nvmlSystemGetCudaDriverVersion_v2(version); }

int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = n_gpus();
    return SUCCESS;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **device) {
    if (index >= n_gpus()) return INVALID;
    if ((int)index == number("NVML_STAND_IN_LOST", -1)) return LOST;
    *device = &gpus[index];
    return SUCCESS;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, Device **device) {
    char mine[96];
    unsigned n = n_gpus() + (number("NVML_STAND_IN_MIG", 0) ? N_MIG : 0);
    for (unsigned i = 0; i < n; i++) {
        Device *candidate = i < n_gpus() ? &gpus[i] : &migs[i - n_gpus()];
        uuid_of(candidate, mine, sizeof mine);
        if (strcasecmp(mine, uuid) == 0) {
            *device = candidate;
            return SUCCESS;
        }
    }
    return NOT_FOUND;
}
int nvmlDeviceGetIndex(Device *device, unsigned *index) {
    *index = device->is_mig ? device->number * MIG_STEP : device->number;
    return SUCCESS;
}
int nvmlDeviceGetUUID(Device *device, char *uuid, unsigned length) {
    uuid_of(device, uuid, length);
    return SUCCESS;
}
int nvmlDeviceGetName(Device *device, char *name, unsigned length) {
    return copy(name, length, device->is_mig ? "Stand-in GPU MIG 1g.2gb" : "Stand-in GPU");
}

int nvmlDeviceGetMemoryInfo(Device *device, Memory *memory) {
    unsigned part = device->is_mig ? 8 : 1;
    *memory = (Memory){TOTAL / part, FREE / part, (TOTAL - FREE) / part};
    return number("NVML_STAND_IN_MEMORY", 1) ? SUCCESS : NOT_SUPPORTED;
}
int nvmlDeviceGetMemoryInfo_v2(Device *device, MemoryV2 *memory) {
    Memory plain;
    int code = nvmlDeviceGetMemoryInfo(device, &plain);
    *memory = (MemoryV2){memory->version, plain.total, 0, plain.free, plain.used};
    return code;
}
int nvmlDeviceGetUtilizationRates(Device *device, Utilization *rates) {
    (void)device;
    *rates = (Utilization){0, 0};
    return SUCCESS;
}
int nvmlDeviceGetCpuAffinity(Device *device, unsigned length, unsigned long *cores) {
    (void)device;
    memset(cores, 0xff, length * sizeof *cores);
    return SUCCESS;
}
static int no_processes(unsigned *count) {
    *count = 0;
    return SUCCESS;
}
int nvmlDeviceGetComputeRunningProcesses_v2(Device *device, unsigned *count, void *infos) {
    (void)device, (void)infos;
    return no_processes(count);
}
int nvmlDeviceGetComputeRunningProcesses_v3(Device *device, unsigned *count, void *infos) {
    (void)device, (void)infos;
    return no_processes(count);
}

int nvmlDeviceGetMigMode(Device *device, unsigned *current, unsigned *pending) {
    if (!number("NVML_STAND_IN_MIG", 0)) return NOT_SUPPORTED;
    *current = *pending = device->number == 0;
    return SUCCESS;
}
int nvmlDeviceIsMigDeviceHandle(Device *device, unsigned *is_mig) {
    *is_mig = (unsigned)device->is_mig;
    return SUCCESS;
}
int nvmlDeviceGetMaxMigDeviceCount(Device *device, unsigned *count) {
    (void)device;
    *count = MIG_PLACES;
    return SUCCESS;
}
int nvmlDeviceGetMigDeviceHandleByIndex(Device *device, unsigned place, Device **mig) {
    (void)device;
    if (place % MIG_STEP || place / MIG_STEP >= N_MIG) return NOT_FOUND;
    *mig = &migs[place / MIG_STEP];
    return SUCCESS;
}
int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(Device *mig, Device **device) {
    (void)mig;
    *device = &gpus[0];
    return SUCCESS;
}
