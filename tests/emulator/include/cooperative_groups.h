// Clusters of blocks.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  unsigned block_rank() const { return emulator::view->rank; }
  unsigned num_blocks() const { return emulator::view->blocks_of_cluster; }

  template <typename T>
  T* map_shared_rank(T* pointer, unsigned rank) const {
    return static_cast<T*>(emulator::shared_of(pointer, rank));
  }

  void sync(emulator::Site site = emulator::Site::here()) const {
    emulator::arrive_at_cluster(false, site);
    emulator::wait_for_cluster(site);
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
