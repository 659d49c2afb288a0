/* A stand-in for the driver's management library, which says what environment variables say at the time of each call.

   STAND_IN_GPUS: devices separated by ';', each "name|uuid|cores|major|minor|mig|memory MiB|power W|virtualization mode".
   STAND_IN_FAILS: "function=code" separated by ','; that function then answers with the code. A build with
   -DWITHOUT_CORES has no nvmlDeviceGetNumGpuCores, as drivers before 495. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { char name[96], uuid[96]; unsigned cores; int major, minor; unsigned mig, mib, watts; int mode; } Gpu;
typedef struct { unsigned long long total, free, used; } Memory;
static Gpu gpus[16];

static int failure(const char *function) {
    const char *at = getenv("STAND_IN_FAILS");
    size_t length = strlen(function);
    while (at && *at) {
        if (!strncmp(at, function, length) && at[length] == '=') return atoi(at + length + 1);
        at = strchr(at, ',');
        if (at) at++;
    }
    return 0;
}
#define ANSWER int code = failure(__func__); if (code) return code
#define GPU ((Gpu *)device)

static unsigned read_gpus(void) {
    const char *at = getenv("STAND_IN_GPUS");
    unsigned count = 0;
    while (at && *at && count < 16) {
        Gpu *gpu = &gpus[count];
        memset(gpu, 0, sizeof *gpu);
        sscanf(at, "%95[^|]|%95[^|]|%u|%d|%d|%u|%u|%u|%d", gpu->name, gpu->uuid, &gpu->cores, &gpu->major, &gpu->minor,
               &gpu->mig, &gpu->mib, &gpu->watts, &gpu->mode);
        count++;
        at = strchr(at, ';');
        if (at) at++;
    }
    return count;
}

int nvmlInit_v2(void) { ANSWER; return 0; }
int nvmlShutdown(void) { ANSWER; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { ANSWER; *count = read_gpus(); return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    ANSWER;
    if (index >= read_gpus()) return 2;
    *device = &gpus[index];
    return 0;
}
int nvmlDeviceGetUUID(void *device, char *text, unsigned size) { ANSWER; snprintf(text, size, "%s", GPU->uuid); return 0; }
int nvmlDeviceGetName(void *device, char *text, unsigned size) { ANSWER; snprintf(text, size, "%s", GPU->name); return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { ANSWER; snprintf(text, size, "580.159.04"); return 0; }
#ifndef WITHOUT_CORES
int nvmlDeviceGetNumGpuCores(void *device, unsigned *cores) { ANSWER; *cores = GPU->cores; return 0; }
#endif
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
    ANSWER;
    *major = GPU->major;
    *minor = GPU->minor;
    return 0;
}
int nvmlDeviceGetMemoryInfo(void *device, Memory *memory) {
    ANSWER;
    memory->total = (unsigned long long)GPU->mib << 20;
    return 0;
}
int nvmlDeviceGetEnforcedPowerLimit(void *device, unsigned *milliwatts) { ANSWER; *milliwatts = 1000 * GPU->watts; return 0; }
int nvmlDeviceGetMigMode(void *device, unsigned *current, unsigned *pending) {
    ANSWER;
    *current = *pending = GPU->mig;
    return 0;
}
int nvmlDeviceGetVirtualizationMode(void *device, int *mode) { ANSWER; *mode = GPU->mode; return 0; }
const char *nvmlErrorString(int code) { return code == 3 ? "Not Supported" : code == 15 ? "GPU is lost" : "Unknown Error"; }
