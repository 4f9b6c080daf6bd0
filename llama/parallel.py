"""The processes of one run: their group, fairscale's model-parallel groups, each one's device and dtype."""

import atexit
import contextlib
import functools
import gc
import io
import os
import re
import socket
import sys
import traceback
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import fairscale.nn.model_parallel.initialize as fairscale_groups
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore  # by these names they have types
from torch.distributed import distributed_c10d

from llama.errors import DeviceError, ParameterError, PeerError

Given = ParamSpec("Given")
Result = TypeVar("Result")
_before_leaving: list[weakref.WeakMethod[Callable[[], None]]] = []
_process: list[int] = []  # the one in which a model was built
GLOO_FILE = re.compile(r"\[[^\]]*gloo/[^\]]*\] ")  # how each error of gloo's begins, which has no class of its own


class SoloGroup(dist.ProcessGroup):
    """The process group of a process that runs alone: it has nobody to talk to, so it opens no port."""

    def getBackendName(self) -> str:
        return "solo"


def rank() -> int:
    """This process's number among all of the run; 0 where no group was made (and torchrun started none)."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """This process's number among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """How many processes torchrun started; 1 for a plain python run."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def model_parallel_rank() -> int:
    return int(fairscale_groups.get_model_parallel_rank())


def model_parallel_size() -> int:
    return int(fairscale_groups.get_model_parallel_world_size())


def with_peers(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Make a function in which processes meet raise PeerError where the others cannot be reached."""

    @functools.wraps(function)
    def meet(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if not (isinstance(error, dist.DistError) or GLOO_FILE.match(str(error))):
                raise
            reason = _first_sentence(error)
        raise PeerError(  # outside of `except`, so that its traceback is ours alone
            f"another process of this run has ended, or cannot be reached ({reason}): start all of them again"
        )

    return meet


def _first_sentence(error: RuntimeError) -> str:
    """What an error of PyTorch's says first: without a place in its source, and without advice."""
    return GLOO_FILE.sub("", str(error)).partition("\n")[0].partition(". This is ")[0].rstrip(".")


@with_peers
def initialize(device: torch.device, size: int | None) -> None:
    """Join the process group and split it into model-parallel groups of `size` processes (None: all of them).

    Groups made before are used again. Raises DeviceError as `check_process`, and ParameterError where
    `size` does not divide the number of processes, or differs from the size in use in this process.
    """
    check_process()
    _process[:] = [os.getpid()]
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where kernels and collectives of this process go
    if not dist.is_initialized():
        _join_process_group(device)
    world = dist.get_world_size()
    size = world if size is None else size
    if not isinstance(size, int) or size < 1:
        raise ParameterError(f"model_parallel_size={size} is out of range: expected an integer, 1 or more, or None")
    if world % size:
        processes = "1 process is" if world == 1 else f"{world} processes are"
        raise ParameterError(
            f"model_parallel_size={size}, but {processes} running: start torchrun with --nproc_per_node {size}"
            " (or a multiple of it), or leave model_parallel_size out"
        )
    if not fairscale_groups.model_parallel_is_initialized():
        with contextlib.redirect_stdout(io.StringIO()):  # fairscale announces its groups on stdout
            fairscale_groups.initialize_model_parallel(size)
    elif model_parallel_size() != size:
        raise ParameterError(
            f"model_parallel_size={size}, but this process already runs a model split over {model_parallel_size()}:"
            " use one size a process"
        )


def check_process() -> None:
    """Raise DeviceError in a process forked from one that had built a model.

    It would wait for ever, for threads that were not forked with the rest.
    """
    if _process not in ([], [os.getpid()]):
        raise DeviceError(
            f"this process was forked from process {_process[0]} after that had built a model, and without the threads"
            ' that compute: fork before anything is built, or start processes by multiprocessing\'s "spawn" method'
        )


def _join_process_group(device: torch.device) -> None:
    if world_size() > 1:
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
        return
    if not hasattr(dist.Backend, "SOLO"):
        dist.Backend.register_backend(
            "solo",
            lambda store, rank, size, timeout: SoloGroup(rank, size),  # type: ignore[call-arg]  # torch's stub lacks it
            devices=["cpu", "cuda", "mps"],
        )
    dist.init_process_group("solo", store=HashStore(), rank=0, world_size=1)


@with_peers
def broadcast(value: Any, device: torch.device, group: dist.ProcessGroup | None = None) -> Any:
    """The value that the first rank of `group` (None: of all) has, on every rank of it."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=dist.get_global_rank(group, 0) if group else 0, group=group, device=device)
    return values[0]


@with_peers
def patient_group() -> dist.ProcessGroup | None:
    """A group of all ranks, over their CPUs, in which one may keep the others waiting while a person thinks.

    In other groups the waiting ones give up after 10 to 30 minutes. None where there is one process.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(days=365)) if world_size() > 1 else None


def is_first_to_fail() -> bool:
    """Whether no other process of this run has claimed to report its error yet; each call is a claim."""
    if world_size() == 1:
        return True
    try:
        store = _common_store()
        return store is None or store.add(f"llama/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (OSError, dist.DistError):  # the process that held it has ended
        return True


def _common_store() -> Store | None:
    """What all processes of this run can write to; None where there is nothing: better said twice than not at all."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's own: there before the group is
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection(address, timeout=5).close()  # or PyTorch would try for minutes, and say so at length
        return TCPStore(*address, is_master=False)
    if not dist.is_initialized():
        return None
    store = inner = distributed_c10d._get_default_store()
    while isinstance(inner, PrefixStore):
        inner = inner.underlying_store
    if isinstance(inner, TCPStore):
        _check_alive(inner.host, inner.port)
    return store


def _check_alive(host: str, port: int) -> None:
    """Raise OSError where the process that listens there has ended, or just ends: PyTorch would print its C++ stack."""
    with socket.create_connection((host, port), timeout=5) as connection, contextlib.suppress(TimeoutError):
        connection.settimeout(0.5)  # one that was killed may take a moment to let go of its port
        if not connection.recv(1):
            raise ConnectionResetError


def before_leaving(method: Callable[[], None]) -> None:
    """Have this method called by `leave`, if its object is still there then."""
    _before_leaving.append(weakref.WeakMethod(method))


def leave() -> None:
    """Take leave of the other processes at the end of a run that went well; one that runs alone has nobody to leave."""
    if dist.is_initialized() and dist.get_backend() == "solo":
        return
    for method in _before_leaving:
        if still_there := method():
            still_there()
    if dist.is_initialized():
        dist.destroy_process_group()
    fairscale_groups.destroy_model_parallel()  # it holds groups, and the threads of a group end with the last reference


def _leave_at_exit() -> None:
    """Take leave when Python ends, however it ends, and whoever made the groups or has destroyed them already.

    Gloo's threads let go of a collective's tensors some time after it, and need Python for that: one that comes to it
    while Python ends aborts the process. Gloo waits for nobody here; NCCL might, for a process that has failed, so it
    is left to its own end.
    """
    if dist.is_initialized() and "nccl" in dist.get_backend_config():
        return
    if dist.is_initialized() or fairscale_groups.model_parallel_is_initialized():
        _forget_locals(getattr(sys, "last_value", None))
        leave()
        gc.collect()  # a cycle may hold a group too


def _forget_locals(error: BaseException | None) -> None:
    """Clear the local variables, some of which may be groups, of the functions that an uncaught error came through."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


atexit.register(_leave_at_exit)  # now, so that what a script registers later is done before, and may use the model
