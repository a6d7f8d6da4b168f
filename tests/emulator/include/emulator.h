// What the emulator's headers ask of its runtime: threads of a block are fibers, of which one runs at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "xla/ffi/api/ffi.h"

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

// A place in the kernels' source: as a default argument, that of the call.
struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// What a kernel sees of itself.
struct View {
  uint3 thread, block;
  unsigned lane, rank, blocks_of_cluster;
  char* shared;  // dynamic
};

struct Launch {
  dim3 grid, block;
  unsigned cluster = 1;
  size_t shared = 0;
  bool early = false;
  const void* kernel = nullptr;
  void (*invoke)(const Launch&) = nullptr;
  const void* arguments = nullptr;
  size_t arguments_size = 0;
};

extern const View* view;  // of the thread that runs, or null
extern Launch launched;   // the kernel that runs

// Run a kernel, unless a launch before it has failed.
void run(const Launch& launch);

// Call an FFI handler with its buffers known and its results poisoned.
XLA_FFI_Error* call(XLA_FFI_Handler* handler, XLA_FFI_CallFrame* frame);

// Stop the kernel: the launch fails with this message, the thread's place and the name of the kernel. `pc` is an address
// in the code to name the line of.
[[noreturn]] void fail(const std::string& what, const void* pc = nullptr);

// Wait for the other lanes of `mask`. The last to come calls act(slots, lanes) with what each of `lanes` has brought.
using Act = void (*)(void* const* slots, unsigned lanes);
void meet(unsigned mask, const char* what, Site site, void* slot, Act act);

// As `meet`, and what these lanes did to memory is ordered.
void sync_warp(unsigned mask, Site site);
void sync_block(Site site);
void arrive_at_cluster(bool relaxed, Site site);
void wait_for_cluster(Site site);

// Where `pointer` into this block's shared memory is in another block of the cluster.
void* shared_of(const void* pointer, unsigned rank);

// Asynchronous copies of up to 16 bytes: they happen when somebody waits for them, as late as can be.
void copy_async(void* to, const void* from, size_t bytes, Site site);
void commit_copies();
void wait_for_copies(unsigned but);

// Programmatic dependent launch.
void wait_for_previous();
void rely_on_previous_wait();
void launch_next();

enum class Access { read, write, atomic };

// Look at an access to memory of the thread that runs.
void access(const void* pointer, size_t size, Access access, const void* pc);

}  // namespace emulator
