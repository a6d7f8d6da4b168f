// The handler's side: buffers, launches, the part of CUDA's runtime that our sources use, and settings for Python.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

#include "cuda_runtime.h"
#include "scheduler.h"

namespace emulator {
namespace {

std::mutex mutex;  // one handler at a time
std::string error, last_error;
std::map<const void*, size_t> granted;  // dynamic shared memory of kernels
int processors = 8;

// Ask addr2line for an address in our library: its function, or its file and line.
std::string look_up(const void* pc, bool function) {
  Dl_info info;
  if (!dladdr(pc, &info)) return "";
  char command[4096];
  std::snprintf(command, sizeof command, "addr2line -Cfi -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
                size_t(static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase)));
  FILE* pipe = popen(command, "r");
  if (!pipe) return "";
  // Two lines a function, from that which is inlined to that which is not: its name and a place, which may end in
  // "(discriminator 2)".
  std::string text, place;
  for (char line[4096]; std::fgets(line, sizeof line, pipe);) {
    if (text.empty()) text = line;
    if (!std::fgets(line, sizeof line, pipe)) break;
    place.assign(line, std::strcspn(line, " \n"));
    if (place.find("/emulator/include/") == std::string::npos) break;  // the kernel's, not ours
  }
  pclose(pipe);
  if (!function) return place.substr(place.rfind('/') + 1);
  for (const char* part : {"(anonymous namespace)::", "ernie::", "void "})
    for (size_t at; (at = text.find(part)) != std::string::npos;) text.erase(at, std::strlen(part));
  return text.substr(0, text.find_first_of("(\n"));
}

std::string describe(const Failure& failure, const Launch& launch) {
  std::string text = look_up(launch.kernel, true) + ", " + name_of(failure.thread) + ": " + failure.what;
  // The return address is behind the call.
  if (failure.pc) text += " (" + look_up(static_cast<const char*>(failure.pc) - 1, false) + ")";
  return text + " [" + describe_order() + "]";
}

std::string problem(const Launch& launch) {
  const auto threads = launch.block.x, blocks = launch.grid.x * launch.grid.y * launch.grid.z;
  if (launch.block.y != 1 || launch.block.z != 1) return "the emulator knows blocks of one dimension only";
  if (threads == 0 || threads > kMostThreads || blocks == 0) return "a launch of no threads, or too many";
  if (launch.grid.y > 65535 || launch.grid.z > 65535) return "a grid too large in y or z";
  if (launch.cluster > kMostBlocks || launch.grid.x % launch.cluster) return "a grid that is not of whole clusters";
  const size_t most = granted.count(launch.kernel) ? granted[launch.kernel] : 48 << 10;
  if (launch.shared > most) return std::to_string(launch.shared) + " bytes of dynamic shared memory without asking";
  return "";
}

}  // namespace

void run(const Launch& launch) {
  if (!error.empty()) return;
  if (error = problem(launch); !error.empty()) return;
  launched = launch;
  begin_launch();
  const unsigned blocks = launch.grid.x * launch.grid.y * launch.grid.z;
  for (const unsigned at : order_of(blocks / launch.cluster)) {
    const Failure failure = run_cluster(at * launch.cluster);
    if (failure.what.empty()) continue;
    error = describe(failure, launch);
    return;
  }
}

XLA_FFI_Error* call(XLA_FFI_Handler* handler, XLA_FFI_CallFrame* frame) {
  if (frame->stage != XLA_FFI_ExecutionStage_EXECUTE || frame->extension_start) return handler(frame);
  const std::lock_guard lock(mutex);
  find_module();
  error.clear(), buffers.clear();
  const auto add = [](void* buffer, bool result, int64_t index) {
    const auto* raw = static_cast<const XLA_FFI_Buffer*>(buffer);
    const xla::ffi::AnyBuffer view(raw);
    buffers.push_back({static_cast<const char*>(raw->data), view.size_bytes(), result,
                       (result ? "result " : "argument ") + std::to_string(index)});
  };
  for (int64_t i = 0; i < frame->rets.size; ++i) add(frame->rets.rets[i], true, i);
  for (int64_t i = 0; i < frame->args.size; ++i) add(frame->args.args[i], false, i);
  for (const Buffer& result : buffers) {
    if (!result.writable) break;
    bool aliased = false;
    for (const Buffer& other : buffers) aliased |= !other.writable && other.data == result.data && other.size;
    if (!aliased && result.size) std::memset(const_cast<char*>(result.data), 0xff, result.size);
  }
  return handler(frame);
}

}  // namespace emulator

cudaError_t cudaGetLastError() {
  std::swap(emulator::last_error, emulator::error);
  emulator::error.clear();
  return emulator::last_error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : emulator::last_error.c_str();
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = emulator::processors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emulator::kMostShared; break;
  }
  return cudaSuccess;
}

namespace emulator {

cudaError_t grant(const void* kernel, int bytes) {
  if (bytes < 0 || size_t(bytes) > kMostShared) {
    error = std::to_string(bytes) + " bytes of dynamic shared memory are more than there are";
    return cudaErrorInvalidValue;
  }
  granted[kernel] = bytes;
  return cudaSuccess;
}

}  // namespace emulator

extern "C" __attribute__((visibility("default"))) void emulator_configure(int order, uint64_t seed, int processors,
                                                                        int unwritten_allowed) {
  const std::lock_guard lock(emulator::mutex);
  emulator::set_order(static_cast<emulator::Order>(order), seed);
  emulator::processors = processors;
  emulator::unwritten_allowed = unwritten_allowed;
}
