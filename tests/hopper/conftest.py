"""H100s that are not here, and our kernels for them."""

import jax
import pytest
from jax.experimental import topologies

from ernie_jax import kernels
from ernie_jax.errors import UserError

# What XLA wants to know of a GPU to compile for it: an H100 as its driver describes it.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def h100s(count: int) -> list[jax.Device]:
    """Return stand-ins for H100s of one host, to compile for."""
    return topologies.get_topology_desc(platform="cuda", topology=f"1x1x{count}", target_config=H100).devices


@pytest.fixture(scope="session", autouse=True)
def built():
    """Compile our kernels, which XLA wants to find when it compiles a step."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="JAX's CUDA plugin, of the test extra, is for Linux only")
    try:
        kernels.build("90")
    except UserError as error:
        pytest.skip(str(error))
