"""One process of a team, for test_team.py: worker.py INDEX COUNT PORT WHAT runs a function of this file."""

import os
import signal
import sys
import time

import numpy as np

from ernie_jax import distributed, team
from ernie_jax.errors import UserError

index, count, port = map(int, sys.argv[1:4])
what = sys.argv[4]


def start(devices: bool = False, **facts) -> None:
    distributed.start(distributed.Place(index, count, f"127.0.0.1:{port}"), facts, devices)


def values():
    start()
    time.sleep(0.3 * (index == 0))  # the others' values come early
    print(distributed.gather({"from": index}), distributed.broadcast(f"of {index}"))
    print(len(distributed.broadcast("x" * 10_000_000)))
    distributed.barrier("here")
    print(distributed.process_index(), distributed.process_count(), distributed.is_primary())


def facts():
    start(**{"--alike": 1, "--other": [2] if index == 2 else None})


def impatient():
    team.ROLL_CALL_SECONDS = 2
    start()


def error():
    start()
    distributed.barrier("all are here")
    if index == 1:
        raise UserError("file.txt: no such file")
    distributed.barrier("never")


def bug():
    start()
    distributed.barrier("all are here")
    if index == 1:
        raise ZeroDivisionError("a bug")
    distributed.barrier("never")


def interrupted():
    start()
    distributed.barrier("all are here")
    if index == 0:
        raise KeyboardInterrupt
    distributed.barrier("never")


def early():
    start()
    if index == 0:
        time.sleep(1)
    print("done")


def channel():
    start()
    end = distributed.open_channel()
    if index == 0:
        for number in range(3):
            end.send("count", {"number": number}, [np.arange(number)])
    else:
        for word, fact, (array,) in [end.receive() for _ in range(3)]:
            print(word, fact, array.tolist())


def last_wishes():
    start()
    if index == 0:
        distributed.before_fall(lambda: print("in order", flush=True))
    distributed.barrier("all are here")
    if index == 1:
        raise UserError("file.txt: no such file")
    distributed.barrier("never")


def silent():
    team.SILENCE_SECONDS = 3
    start()
    distributed.barrier("all are here")
    if index == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    distributed.barrier("never")


def collective():
    """Hang in a collective for which process 1 never comes."""
    start(devices=True)
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((jax.device_count(),), ("all",))
    sharding = NamedSharding(mesh, PartitionSpec("all"))
    x = jax.make_array_from_callback((jax.device_count(),), sharding, lambda place: np.ones(1))
    add = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    print("sum", float(add(x)), flush=True)
    if sys.argv[5:] == [str(index)]:
        time.sleep(1000)
    elif sys.argv[5:]:
        float(add(x))


def main():
    try:
        globals()[what]()
        distributed.finish()
    except UserError as problem:
        distributed.stop(f"error: {problem}", 1)
    except KeyboardInterrupt:
        distributed.stop("interrupted", 130)
    except Exception as problem:
        distributed.crash(problem)


main()
