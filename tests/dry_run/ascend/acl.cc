// The functions of AscendCL and HCCL whose answers matter to MindSpore. All others answer 0, success (build.py).
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <map>

#include "../calls.h"

static thread_local int device = 0;
static thread_local void *context = nullptr;
static void *first_context = nullptr;

extern "C" {

// Device, context, streams, events

int aclrtGetDeviceCount(uint32_t *n) { *n = 8; return 0; }
int aclrtSetDevice(int d) {
  device = d;
  if (!first_context) first_context = handle();
  context = first_context;
  return 0;
}
int aclrtGetDevice(int *d) { *d = device; return 0; }
const char *aclrtGetSocName() {
  const char *name = getenv("DRY_RUN_SOC");
  return name ? name : "Ascend910B2";
}
int aclrtCreateContext(void **c, int) { *c = context = handle(); return 0; }
int aclrtSetCurrentContext(void *c) { context = c; return 0; }
int aclrtGetCurrentContext(void **c) {
  if (!context) context = first_context ? first_context : (first_context = handle());
  *c = context;
  return 0;
}
int aclrtGetRunMode(int *mode) { *mode = 1; return 0; }  // ACL_HOST
int aclrtCreateStream(void **s) { *s = handle(); return 0; }
int aclrtCreateStreamWithConfig(void **s, uint32_t, uint32_t) { *s = handle(); return 0; }
int aclrtStreamQuery(void *, int *status) { *status = 0; return 0; }  // complete
int aclrtDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 7; *greatest = 0; return 0; }
int aclrtCreateEvent(void **e) { *e = handle(); return 0; }
int aclrtCreateEventWithFlag(void **e, uint32_t) { *e = handle(); return 0; }
int aclrtCreateEventExWithFlag(void **e, uint32_t) { *e = handle(); return 0; }
int aclrtQueryEventStatus(void *, int *status) { *status = 1; return 0; }  // complete
int aclrtEventElapsedTime(float *ms, void *, void *) { *ms = 0; return 0; }
int aclrtEventGetTimestamp(void *, uint64_t *t) { *t = 0; return 0; }
int aclrtProcessReport(int) { usleep(50000); return 0; }  // MindSpore calls it in a loop
int aclGetCannVersion() { return 0; }
const char *aclGetRecentErrMsg() { return ""; }

// Memory

int aclrtMalloc(void **p, size_t n, int) { return (*p = device_memory(n)) ? 0 : 207001; }
int aclrtMallocAlign32(void **p, size_t n, int) { return (*p = device_memory(n)) ? 0 : 207001; }
int aclrtReserveMemAddress(void **p, size_t n, size_t, void *, uint64_t) { return (*p = device_memory(n)) ? 0 : 207001; }
int aclrtMallocPhysical(void **h, size_t, void *, uint64_t) { *h = handle(); return 0; }
int aclrtMallocHost(void **p, size_t n) { *p = aligned_alloc(64, (n + 127) / 64 * 64); return 0; }
int aclrtFreeHost(void *p) { free(p); return 0; }
int aclrtGetMemInfo(int, size_t *available, size_t *total) {
  *available = size_t(60) << 30;
  *total = size_t(64) << 30;
  return 0;
}
void *aclrtAllocatorCreateDesc() { return handle(); }
int aclrtMemcpy(void *to, size_t, const void *from, size_t n, int kind) { copy(to, from, n, kind); return 0; }
int aclrtMemcpyAsync(void *to, size_t, const void *from, size_t n, int kind, void *) { copy(to, from, n, kind); return 0; }
int aclrtMemset(void *p, size_t, int value, size_t n) { note("memset"); if (p) memset(p, value, n); return 0; }
int aclrtMemsetAsync(void *p, size_t, int value, size_t n, void *) { note("memset"); if (p) memset(p, value, n); return 0; }

// Descriptions of arguments. The many per launch are small, or their cost would show in the host's time

void *aclCreateTensor() { return handle(); }
void *aclCreateTensorList() { return handle(); }
void *aclCreateScalar() { return handle(); }
void *aclCreateScalarList() { return handle(); }
void *aclCreateIntArray() { return handle(); }
void *aclCreateFloatArray() { return handle(); }
void *aclCreateBoolArray() { return handle(); }
void *aclCreateDataBuffer(void *, size_t) { return handle(); }
int aclDestroyDataBuffer(void *p) { free(p); return 0; }
void *aclCreateTensorDesc() { return handle(); }
int aclDestroyTensorDesc(void *p) { free(p); return 0; }
void *aclopCreateAttr() { return handle(); }
size_t aclDataTypeSize(int) { return 4; }
void *aclmdlCreateDesc() { return handle(4096); }
void *aclmdlCreateDataset() { return handle(4096); }
void *acltdtCreateChannel() { return handle(4096); }

// aclnnX takes two calls: aclnnXGetWorkspaceSize(arguments..., uint64_t *size, aclOpExecutor **executor), and aclnnX itself,
// the launch. How many arguments come before the last two depends on X: `get_workspace_size` (build.py) passes the registers
// and the stack, and the two are neighbours that point into the caller's frame, at zeros. MindSpore wants an executor.

__attribute__((visibility("hidden"))) long find_executor(void **registers, void **stack) {
  char here;
  const uintptr_t low = reinterpret_cast<uintptr_t>(&here), high = low + (1 << 20);
  auto on_stack = [&](void *p) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p);
    return at > low && at < high && at % 8 == 0;
  };
  auto argument = [&](int k) { return k < 6 ? registers[k] : stack[k - 6]; };
  for (int k = 0; k + 1 < 40; k++) {
    void *size = argument(k), *executor = argument(k + 1);
    if (size != executor && on_stack(size) && on_stack(executor) && !*static_cast<uint64_t *>(size) &&
        !*static_cast<void **>(executor)) {
      *static_cast<void **>(executor) = handle();
      return 0;
    }
  }
  note("no executor found");
  return 0;
}

// The older way to launch: an operator by its name, which CANN compiles when it meets a new shape

int aclopCompileAndExecute(const char *type, int, const void *const *, const void *const *, int, const void *const *,
                           void *const *, const void *, int, int, const char *, void *) {
  note(std::string("aclop ") + type);
  return 0;
}
int aclopCompileAndExecuteV2(const char *type, int, void **, void **, int, void **, void **, void *, int, int, const char *,
                             void *) {
  note(std::string("aclop ") + type);
  return 0;
}

// Communication of one rank

int HcclGetRootInfo(void *info) { memset(info, 1, 4096); return 0; }
int HcclCommInitRootInfo(uint32_t, const void *, uint32_t, void **c) { *c = handle(); return 0; }
int HcclCommInitRootInfoConfig(uint32_t, const void *, uint32_t, const void *, void **c) { *c = handle(); return 0; }
int HcclCommInitClusterInfoConfig(const char *, uint32_t, const void *, void **c) { *c = handle(); return 0; }
int HcclGetCommName(void *, char *name) { strcpy(name, "dry run"); return 0; }
int HcclGetRankId(void *, uint32_t *rank) { *rank = 0; return 0; }
int HcclGetRankSize(void *, uint32_t *size) { *size = 1; return 0; }
}

namespace ge {
// GE's table of error texts, in which MindSpore's own code registers some: a map at the front of the object
class StatusFactory {
 public:
  static StatusFactory *Instance();
};
StatusFactory *StatusFactory::Instance() {
  static char *object = [] {
    char *memory = static_cast<char *>(handle(8192));
    new (memory) std::map<uint32_t, std::string>();
    return memory;
  }();
  return reinterpret_cast<StatusFactory *>(object);
}
}  // namespace ge
