// A libcuda.so.1 that runs a kernel on the CPU: enough of the driver to launch by, whatever module it is given.
#include "cuda_on_cpu.cpp"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

namespace {
void* const kContext = reinterpret_cast<void*>(0x10);
void* const kModule = reinterpret_cast<void*>(0x20);
void* const kFunction = reinterpret_cast<void*>(0x30);
void* current;
int shared_bytes_allowed;

int missing() {
  std::fprintf(stderr, "a function of the driver that is not here\n");
  std::abort();
}
}  // namespace

extern "C" {
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuDeviceGet(int* device, int index) { return *device = index, 0; }
int cuCtxGetCurrent(void** context) { return *context = current, 0; }
int cuCtxSetCurrent(void* context) { return current = context, 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = kContext, 0; }
int cuModuleLoadData(void** module, const void* image) {
  *module = kModule;
  return current != kContext || std::memcmp(image, "\x7f" "ELF", 4);
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = kFunction;
  return module != kModule || std::strcmp(name, "gradient_descent");
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  shared_bytes_allowed = value;
  return function != kFunction || attribute != 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
}
int cuLaunchKernel(
    void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
    unsigned block_z, unsigned shared_bytes, void* stream, void** parameters, void** extra) {
  const bool good = function == kFunction && grid_y * grid_z * block_y * block_z == 1 &&
                    shared_bytes == SHARED_FLOATS * 4 && shared_bytes <= unsigned(shared_bytes_allowed) &&
                    stream == reinterpret_cast<void*>(0x40) && !extra;
  return good ? run(parameters, grid_x, block_x, 0) : 1;
}
int cuGetErrorName(int, const char** name) { return *name = "error", 0; }
int cuGetProcAddress_v2(const char* name, void** function, int, unsigned long long, int* status) {
  static void* self = [] {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(cuInit), &info);
    return dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  }();
  *function = dlsym(self, name);
  if (!*function) *function = reinterpret_cast<void*>(missing);
  if (status) *status = 0;
  return 0;
}
int cuGetProcAddress(const char* name, void** function, int version, unsigned long long flags) {
  return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}
}
