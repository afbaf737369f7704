/* The HIP runtime of an MI300X that is not there: what Triton asks of libamdhip64, with HIP's limits; nothing runs.
 *
 * As fake_libcuda.c. Limits: AMD CDNA3 ISA guide; HIP runtime API, hipModuleLaunchKernel.
 */
#define __HIP_PLATFORM_AMD__
#define _GNU_SOURCE
#include <dlfcn.h>
#include <hip/hip_runtime_api.h>
#include <stdint.h>
#include <string.h>

enum { MAX_THREADS = 1024, MAX_SHARED = 64 << 10 };

/* Launches until now; grid (x, y, z), threads a program and bytes of shared memory of the last. */
uint64_t launched[6];

hipError_t hipModuleLaunchKernel(hipFunction_t f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by,
                                 unsigned bz, unsigned shared, hipStream_t stream, void **arguments, void **extra)
{
    uint64_t threads = (uint64_t)bx * by * bz;
    if (!x || !y || !z || !threads || threads > MAX_THREADS || shared > MAX_SHARED)
        return hipErrorInvalidValue;
    if ((uint64_t)x * bx > UINT32_MAX || (uint64_t)y * by > UINT32_MAX || (uint64_t)z * bz > UINT32_MAX)
        return hipErrorInvalidValue;
    uint64_t last[] = {launched[0] + 1, x, y, z, threads, shared};
    memcpy(launched, last, sizeof last);
    return hipSuccess;
}

hipError_t hipGetDeviceProperties(hipDeviceProp_t *properties, int device)
{
    *properties = (hipDeviceProp_t){.sharedMemPerBlock = MAX_SHARED, .multiProcessorCount = 304, .warpSize = 64};
    strcpy(properties->gcnArchName, "gfx942:sramecc+:xnack-");
    return hipSuccess;
}

/* The header's name of the function above has a version in it. */
#undef hipGetDeviceProperties
hipError_t hipGetDeviceProperties(hipDeviceProp_t *, int) __attribute__((alias("hipGetDevicePropertiesR0600")));

hipError_t hipPointerGetAttribute(void *value, hipPointer_attribute attribute, hipDeviceptr_t pointer)
{
    *(hipDeviceptr_t *)value = pointer;
    return attribute == HIP_POINTER_ATTRIBUTE_DEVICE_POINTER ? hipSuccess : hipErrorInvalidValue;
}

hipError_t hipFuncGetAttribute(int *value, hipFunction_attribute attribute, hipFunction_t function)
{
    *value = attribute == HIP_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? MAX_THREADS : 0;
    return hipSuccess;
}

hipError_t hipModuleLoadDataEx(hipModule_t *module, const void *image, unsigned count, hipJitOption *options,
                               void **values)
{
    *module = (hipModule_t)launched;
    return hipSuccess;
}

hipError_t hipModuleGetFunction(hipFunction_t *function, hipModule_t module, const char *name)
{
    *function = (hipFunction_t)launched;
    return hipSuccess;
}

hipError_t hipDriverGetVersion(int *version)
{
    *version = HIP_VERSION;
    return hipSuccess;
}

const char *hipGetErrorString(hipError_t error)
{
    return error == hipErrorInvalidValue ? "invalid argument" : "not supported";
}

/* Called for nothing that mixft launches, but asked for by name. */
hipError_t unsupported(void)
{
    return hipErrorNotSupported;
}

/* The last argument's type has a name in some headers only. */
hipError_t address(const char *, void **, int, uint64_t, void *) __asm__("hipGetProcAddress");
hipError_t address(const char *name, void **function, int version, uint64_t flags, void *status)
{
    *function = dlsym(RTLD_DEFAULT, name);
    if (!*function)
        *function = (void *)unsupported;
    return hipSuccess;
}
