/* The CUDA driver of an H100 that is not there: what Triton asks of libcuda, with CUDA's limits, and nothing runs.
 *
 * A launch that CUDA would refuse is refused; of any other, `launched` has what it was launched with. Memory is the
 * host's: every address is one of the device. Limits: CUDA C++ programming guide, "technical specifications per compute
 * capability" 9.0; CUDA driver API, cuLaunchKernel and cuTensorMapEncodeTiled.
 */
#include <cuda.h>
#include <stdint.h>

enum { MAX_THREADS = 1024, MAX_GRID_YZ = 65535, MAX_SHARED = 227 << 10 };

/* Launches until now; grid (x, y, z), threads a program and bytes of shared memory of the last. */
uint64_t launched[6];

static CUresult launch(uint64_t x, uint64_t y, uint64_t z, uint64_t threads, uint64_t shared)
{
    if (!x || !y || !z || !threads || x > INT32_MAX || y > MAX_GRID_YZ || z > MAX_GRID_YZ)
        return CUDA_ERROR_INVALID_VALUE;
    if (threads > MAX_THREADS || shared > MAX_SHARED)
        return CUDA_ERROR_INVALID_VALUE;
    uint64_t last[] = {launched[0] + 1, x, y, z, threads, shared};
    for (int i = 0; i < 6; i++)
        launched[i] = last[i];
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **arguments, void **extra)
{
    return launch(c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX * c->blockDimY * c->blockDimZ, c->sharedMemBytes);
}

CUresult cuLaunchKernel(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void **arguments, void **extra)
{
    return launch(x, y, z, (uint64_t)bx * by * bz, shared);
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *size, const cuuint64_t *stride, const cuuint32_t *box,
                                const cuuint32_t *step, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill)
{
    if (rank < 1 || rank > 5 || (uintptr_t)address % 16)
        return CUDA_ERROR_INVALID_VALUE;
    for (cuuint32_t i = 0; i < rank; i++)
        if (!size[i] || size[i] > 1ull << 32 || !box[i] || box[i] > 256 || step[i] != 1)
            return CUDA_ERROR_INVALID_VALUE;
    for (cuuint32_t i = 0; i + 1 < rank; i++)
        if (stride[i] % 16 || stride[i] >= 1ull << 40)
            return CUDA_ERROR_INVALID_VALUE;
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer)
{
    *(CUdeviceptr *)value = pointer;
    return attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute *attributes, void **values, CUdeviceptr pointer)
{
    return CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device)
{
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = MAX_SHARED; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = MAX_SHARED + 1024; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 0;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function)
{
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? MAX_THREADS : 0;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text)
{
    *text = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : "not supported";
    return CUDA_SUCCESS;
}

#define HANDLE(value) (*(value) = (void *)launched, CUDA_SUCCESS)
CUresult cuCtxGetCurrent(CUcontext *context) { return HANDLE(context); }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return HANDLE(context); }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return HANDLE(module); }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) { return HANDLE(function); }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_ERROR_NOT_SUPPORTED; }
