// Inside the emulator: threads, warps, blocks and the cluster that runs.
#pragma once

#include <vector>

#include "emulator.h"

namespace emulator {

constexpr unsigned kMostThreads = 1024, kMostWarps = kMostThreads / 32, kMostBlocks = 16;  // of a block, of a cluster

// Time passes at synchronisations. What happened before the moment of one is ordered with what its threads do after it.
using Time = uint32_t;
extern Time now;

struct Warp;
struct Block;

struct Copy {
  void* to;
  const void* from;
  unsigned char data[16];  // of the source when the copy was asked for
  size_t bytes;
  unsigned group;
  Site site;
};

enum class State { ready, at_warp, at_block, at_cluster, done };

struct Thread : View {
  Warp* warp;
  Block* in;
  void* stack;  // pointer, while it does not run
  unsigned number;
  State state;
  Site site;         // where it waits, and what for
  const char* what;
  std::vector<Copy> copies;
  unsigned committed;  // groups of copies
  bool arrived;        // at the cluster's barrier
  unsigned phase;      // of that arrival
  bool has_waited;     // for the previous kernel
};

// Lanes on their way to a collective; there may be several of disjoint masks.
struct Meeting {
  unsigned mask, waiting;
  const char* what;
  Site site;
  Act act;
};

struct Warp {
  unsigned number, live, ready;  // masks of lanes
  Meeting meetings[32];          // by the lowest lane of their mask
  void* slots[32];
  Time synced;
};

struct Block {
  unsigned rank, ready;  // ready: mask of warps
  uint3 index;
  bool started, done;
  unsigned live, waiting;  // threads
  Time synced;
  Warp warps[kMostWarps];
  Thread* threads;
};

struct Cluster {
  unsigned size, live, arrived, phase;  // blocks, threads, threads, barriers passed
  bool relaxed;                         // some of this phase's arrivals order nothing
  Time synced, started;
  Block blocks[kMostBlocks];
};

extern Cluster cluster;
extern Thread* current;
extern bool unwritten_allowed;  // to read shared memory that nobody has written, which is NaN
extern Block* active;  // whose static shared memory is in place

std::string name_of(const Thread& thread);
std::string name_of(Site site);

// Memory: what scheduler and host ask of it.
constexpr size_t kMostShared = 227 << 10;
char* dynamic_shared(unsigned rank);
void poison_shared();                       // of all blocks of the cluster
void swap_static_shared(Block* from, Block* to);  // from may be null
void set_own(const char* from, const char* to);  // the threads' stacks

struct Buffer {
  const char* data;
  size_t size;
  bool writable;
  std::string name;
};
extern std::vector<Buffer> buffers;  // global memory that kernels may touch
void find_module();  // where our library has its statics, and the __shared__ ones for this thread of the host

}  // namespace emulator
