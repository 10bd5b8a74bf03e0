/* A CUDA driver that says yes to everything Triton asks and runs nothing: libcuda.so.1 where there is no card.
   Attributes as of an H100 (CUDA driver API, CUdevice_attribute). */
#include <stddef.h>

#define YES(name) int name(void) { return 0; }

static long launches;

long stand_in_launches(void) { return launches; }

int cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) {
    launches++;
    return 0;
}
int cuLaunchKernel(void) {
    launches++;
    return 0;
}
int cuCtxGetCurrent(void **context) {
    *context = (void *)0x1000;
    return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = (void *)0x1000;
    return 0;
}
int cuDeviceGet(int *device, int ordinal) {
    *device = 0;
    return 0;
}
int cuDeviceGetCount(int *count) {
    *count = 1;
    return 0;
}
int cuDriverGetVersion(int *version) {
    *version = 13000;
    return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 8: *value = 49152; break;    /* shared memory of a block */
    case 97: *value = 232448; break;  /* the same, opted in to */
    case 81: *value = 233472; break;  /* shared memory of a multiprocessor */
    case 10: *value = 32; break;      /* lanes of a warp */
    case 12:                          /* registers of a block */
    case 82: *value = 65536; break;   /* registers of a multiprocessor */
    case 16: *value = 132; break;     /* multiprocessors */
    case 75: *value = 9; break;       /* compute capability */
    case 76: *value = 0; break;
    default: *value = 1;
    }
    return 0;
}
int cuFuncGetAttribute(int *value, int attribute, void *function) {
    *value = attribute == 0 ? 1024 : 0; /* threads of a block; no local memory */
    return 0;
}
int cuModuleLoadData(void **module, const void *image) {
    *module = (void *)0x2000;
    return 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = (void *)0x3000;
    return 0;
}
int cuOccupancyMaxActiveClusters(int *count, void *function, const void *config) {
    *count = 1;
    return 0;
}
int cuPointerGetAttribute(void *result, int attribute, unsigned long long pointer) {
    *(unsigned long long *)result = pointer;
    return 0;
}
int cuGetErrorString(int error, const char **text) {
    *text = "stand-in";
    return 0;
}
int cuCtxGetLimit(size_t *value, int limit) {
    *value = 1 << 20;
    return 0;
}
YES(cuInit)
YES(cuCtxSetCurrent)
YES(cuCtxSetLimit)
YES(cuCtxGetDevice)
YES(cuFuncSetAttribute)
YES(cuFuncSetCacheConfig)
YES(cuModuleUnload)
YES(cuStreamIsCapturing)
YES(cuTensorMapEncodeTiled)
YES(cuTensorMapEncodeIm2col)
