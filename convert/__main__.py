"""python -m convert --source=HF_DIR|HUB_ID --target=DIR"""

from __future__ import annotations

import sys

from absl import app, flags

from convert.converter import convert
from ernie_jax.errors import UserError

_SOURCE = flags.DEFINE_string("source", None, "Hugging Face directory (local or gs://) or hub id.", required=True)
_TARGET = flags.DEFINE_string("target", None, "Directory to write (local or gs://).", required=True)
_REVISION = flags.DEFINE_string("revision", None, "Branch, tag or commit of a hub id.")
_DTYPE = flags.DEFINE_string(
    "dtype", None, "bfloat16, float32 or float16 for everything but the router; default: as in the source."
)
_HOST_MEMORY_GB = flags.DEFINE_float("host_memory_gb", 4.0, "Host memory to use at most, in GB.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace a checkpoint at the target.")
_KEEP_DOWNLOAD = flags.DEFINE_bool("keep_download", False, "Leave a hub id's shards in Hugging Face's cache.")


def main(argv: list[str]) -> None:
    if argv[1:]:
        sys.exit(f"unexpected argument {argv[1]}: every option is a flag, --name=value")
    try:
        convert(
            _SOURCE.value,
            _TARGET.value,
            revision=_REVISION.value,
            dtype=_DTYPE.value,
            host_memory_gb=_HOST_MEMORY_GB.value,
            overwrite=_OVERWRITE.value,
            keep_download=_KEEP_DOWNLOAD.value,
        )
    except UserError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where it was")


if __name__ == "__main__":
    app.run(main)
