// What the host's side asks of the scheduler.
#pragma once

#include <string>
#include <vector>

#include "runtime.h"

namespace emulator {

// Of threads between synchronisations, and of blocks: forward and backward run warps to completion one after another.
enum class Order { shuffled, forward, backward };

struct Failure {
  std::string what;  // empty: none
  const void* pc;
  Thread thread;
};

void set_order(Order order, uint64_t seed);
std::string describe_order();

void begin_launch();

// Start a kernel's random numbers anew; in which order to run its `count` clusters.
std::vector<unsigned> order_of(unsigned count);

// Run the cluster whose first block is block `first` of the grid.
Failure run_cluster(unsigned first);

std::string describe_deadlock();

}  // namespace emulator
