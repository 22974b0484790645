"""One run on several processes, as torchrun or Slurm starts them: the first decides and writes, the others do their share.

A function whose work can be shared is marked by `collective`: where the first process calls it, all call it, each on what it has
opened itself. Inside it `map_shards`, `stack_shards`, `on_all_ranks`, `on_rank_zero` and `sum_over_ranks` share the work and bring
together what was found. Outside of it, inside of each other, and without torchrun, they do all the work here; so whoever knows
nothing of this module is right too.

What is found does not depend on how many processes there are: text is cut into `SHARES` shares, a forward never reaches from one
into the next, a candidate's rows are in no other's forward, and sums of shares are added in one order, float32 ones in a tree.
Without torchrun nothing is cut: results are those of earlier versions, and differ from these by rounding.
"""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

from evopress.errors import EvoPressError, first_line

if TYPE_CHECKING:
    from torch import Tensor

SHARES = 8
"""Of text, whatever the number of processes, which divides it."""
_COLLECTIVE, _WAITING = timedelta(minutes=30), timedelta(days=30)
"""How long one waits for the others in shared work, and for the first to ask. A process that has ended is noticed at once."""

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Known(Protocol):
    """What every process has its own of."""

    @property
    def known_as(self) -> Any:
        """By what others find theirs: a tuple that begins with a word; None where this process alone has it."""


S = TypeVar("S", bound=Known)


class LostError(EvoPressError):
    """Another process of the run has ended."""


@dataclass
class _World:
    rank: int
    size: int
    waiting: Any = None
    """Group of processes for what the first one asks."""
    depth: int = 0
    """Shared functions that are being called, one inside the other."""
    alone: bool = False
    """Doing its own part, which is not shared further."""
    broken: bool = False
    """A process is lost, or left what others are still in."""
    agreed: bool = False
    """An error is on its way that was raised on all."""


_world: _World | None = None


def asked_for() -> bool:
    """Tell whether the command itself is run by several processes: torchrun's, or the tasks of one srun."""
    return _of_torchrun() or ("SUBMITIT_EXECUTOR" not in os.environ and is_task_of_several())


def is_first() -> bool:
    """Tell, before they have begun, whether this is the first of a launcher's processes, or the only one."""
    return not asked_for() or os.environ.get("RANK" if _of_torchrun() else "SLURM_PROCID", "0") == "0"


def is_task_of_several() -> bool:
    """Tell whether Slurm has started this process as one of several tasks of a step."""
    told = os.environ
    return "SLURM_STEP_ID" in told and _num_tasks(told) > 1 and not _has_terminal(told)


def adopt_slurm_task() -> None:
    """Write into the environment of a Slurm task what torchrun would tell it, which `begin` reads; leave any other process's."""
    if _of_torchrun() or not is_task_of_several():
        return
    told = os.environ
    port = told.get("MASTER_PORT") or str(20000 + (31 * int(told["SLURM_JOB_ID"]) + int(told["SLURM_STEP_ID"])) % 20000)
    address = told.get("MASTER_ADDR") or _first_node(told)
    os.environ |= {"RANK": told["SLURM_PROCID"], "LOCAL_RANK": told["SLURM_LOCALID"], "WORLD_SIZE": str(_num_tasks(told))}
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": port}


def _of_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _num_tasks(told: Mapping[str, str]) -> int:
    """Return how many tasks a Slurm step has."""
    return int(told.get("SLURM_STEP_NUM_TASKS") or told.get("SLURM_NTASKS", "1"))  # the latter may be the job's, of another step


def _has_terminal(told: Mapping[str, str]) -> bool:
    """Tell whether a person types at this task, the first of `srun --pty`; what that starts inherits its variables alone."""
    return "SLURM_PTY_PORT" in told and "SUBMITIT_EXECUTOR" not in told and sys.stdin is not None and sys.stdin.isatty()


def _first_node(told: Mapping[str, str]) -> str:
    """Return where the first task of a Slurm step runs, which need not be where the step was launched."""
    if told.get("SLURM_STEP_NUM_NODES") == "1":
        return "127.0.0.1"
    if nodes := told.get("SLURM_STEP_NODELIST"):
        with suppress(OSError, subprocess.SubprocessError, IndexError):
            asked = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=30, check=True)
            return asked.stdout.split()[0]
    return told.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")


def launched() -> bool:
    """Tell whether this is a run under torchrun, or of several tasks of Slurm, also on one process."""
    return _world is not None


def leads() -> bool:
    """Tell whether this process decides and writes."""
    return _world is None or _world.rank == 0


def size() -> int:
    """Return how many processes share the work at hand: 1 outside of shared functions, and in what each does for itself."""
    return _world.size if _world is not None and _world.depth and not _world.alone else 1


def processes() -> int:
    """Return how many processes the run has."""
    return 1 if _world is None else _world.size


def local_rank() -> int:
    """Return this process's number on its machine, by which it takes a GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def begin() -> None:
    """Join the other processes of the run, whom the environment names as torchrun writes it, or `adopt_slurm_task`.

    Raises: EvoPressError if there are not 1, 2, 4 or 8, they do not find each other, or were given different commands.
    """
    global _world
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if SHARES % count:
        raise EvoPressError(
            f"this run has {count} processes, expected 1, 2, 4 or {SHARES}: give torchrun --nproc-per-node=N, srun -n N or "
            "hydra.launcher.tasks_per_node=N; for separate runs start each with srun -n 1"
        )
    import torch.distributed as dist

    if not dist.is_available():
        raise EvoPressError("this torch has no torch.distributed, which torchrun needs: start with python -m evopress")
    _world = _World(rank, count)
    with _losses_told():
        # Objects and tensors on the host go by gloo, also where there are GPUs; NCCL waits for the first tensor on one.
        dist.init_process_group("cpu:gloo,cuda:nccl" if _has_nccl() else "gloo", timeout=_COLLECTIVE)
        _world.waiting = dist.new_group(backend="gloo", timeout=_WAITING)
        commands: list[Any] = [None] * count
        dist.all_gather_object(commands, sys.argv[1:])
    if any(command != commands[0] for command in commands):
        _world.broken = True
        raise EvoPressError(
            f"the {count} processes of this run have different commands, expected the same one: for separate runs start each with "
            "srun -n 1"
        )


def end() -> None:
    """Let the others end, and leave them; from the first process, or from one that was let go."""
    global _world
    world, _world = _world, None
    if world is None:
        return
    import torch.distributed as dist

    if world.rank == 0 and world.size > 1 and not world.broken:
        try:
            dist.broadcast_object_list([None], src=0, group=world.waiting)
        except RuntimeError:  # they have ended already
            return
    if not world.broken:
        dist.destroy_process_group()


def collective(function: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Mark a function of a module, or a method, whose work is shared: the first process's call becomes a call on every process.

    Its first argument is `Known`; the others are sent. What it returns is only looked at on the first process.
    """

    @functools.wraps(function)
    def shared(subject: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        world = _world
        if world is None or (world.depth == 0 and (world.rank or subject.known_as is None)):
            return function(subject, *args, **kwargs)
        if world.depth == 0 and world.size > 1:
            import torch.distributed as dist

            with _losses_told():
                name = f"{function.__module__}:{function.__qualname__}"
                dist.broadcast_object_list([(name, subject.known_as, args, kwargs)], src=0, group=world.waiting)
        return _called(world, function, subject, *args, **kwargs)

    return shared


def follow(find: Callable[[Any], Any]) -> None:
    """Do this process's share of whatever the first one asks, until that ends.

    Args: find: returns what this process has of something that is `Known`.

    Raises: LostError if the first process, or another, ends before.
    """
    import torch.distributed as dist

    world = _world
    assert world is not None and world.rank, "the first process follows nobody"
    while True:
        asked: list[Any] = [None]
        with _losses_told():
            dist.broadcast_object_list(asked, src=0, group=world.waiting)
        if asked[0] is None:
            return
        name, key, args, kwargs = asked[0]
        module, _, path = name.partition(":")
        function = functools.reduce(getattr, path.split("."), importlib.import_module(module)).__wrapped__
        try:
            _called(world, _found_and_called, find, key, function, args, kwargs)
        except _AgreedError:
            pass  # it was raised on all, and the first process tells it


def batch_within_share(count: int, most: int) -> int:
    """Return how many of `count` sequences go together: as many as there is room for, but none of two shares.

    Args: most: for which there is room.
    """
    return min(most, -(-count // SHARES)) if launched() else most


def shares(count: int) -> list[range]:
    """Return this process's shares of `count` sequences, some of them empty; without torchrun all is one."""
    if not launched():
        return [range(count)]
    width = -(-count // SHARES)
    return [range(min(number * width, count), min((number + 1) * width, count)) for number in shard(SHARES)]


class InPairs(Generic[T]):
    """What a process's shares add up to, in pairs, pairs of these, and so on: the same bits, however many processes have them."""

    def __init__(self, join: Callable[[T, T], T]) -> None:
        """Begin with none.

        Args: join: adds the second to the first, which it may change, and returns the sum.
        """
        self._join, self._partial, self._count = join, list[T](), 0

    def add(self, share: T) -> None:
        """Take one more share: the first two are added up, then the next two, and these to those."""
        self._partial.append(share)
        self._count += 1
        pairs = self._count
        while pairs % 2 == 0:
            last = self._partial.pop()
            self._partial[-1] = self._join(self._partial[-1], last)
            pairs //= 2

    @property
    def total(self) -> T:
        """What all shares add up to, once they are there: one, two, four or eight of them."""
        return self._partial[-1]


def sums_held() -> int:
    """Return how many sums `InPairs` holds at once, at most, where it adds up what `shares` gives a process."""
    return (SHARES // processes() if launched() else 1).bit_length()


def largest_shard(count: int, most: int | None = None) -> int:
    """Return how many of `count` things the process has that has most of them, where the run's processes share them.

    Args: most: that go together as `batch_within_share` has it, where `map_shards` shares what goes together; None: sequences that
        `shares` cuts.
    """
    if most is None:
        return min(count, -(-count // SHARES) * (SHARES // processes()))
    batch = batch_within_share(count, most)
    return min(count, -(-count // (batch * processes())) * batch)


def on_all_ranks(work: Callable[[], T], *, to_first: bool = False) -> list[T]:
    """Do something on every process, and return what all found, in their order; an error of one is raised on all.

    Args: to_first: what is found is large, and for the first process alone; others get no more than their own.
    """
    world = _world
    if world is None or size() == 1:
        return [work()]
    import torch.distributed as dist

    mine, error = _tried(work)
    found: list[Any] = [None] * world.size
    with _losses_told():
        dist.all_gather_object(found, (None, *mine[1:]) if to_first else mine)
    results = _agreed(found, error)
    if not to_first:
        return results
    with _losses_told():
        dist.gather_object(mine[0], found if world.rank == 0 else None, dst=0)
    return found if world.rank == 0 else [mine[0]]


def on_rank_zero(work: Callable[[], T]) -> T:
    """Do something on the first process alone, while the others wait, and return what it found; its error is raised on all."""
    world = _world
    if world is None or size() == 1:
        return work()
    import torch.distributed as dist

    mine, error = _tried(work) if world.rank == 0 else (None, None)
    found: list[Any] = [mine]
    with _losses_told():
        dist.broadcast_object_list(found, src=0)
    return _agreed(found, error)[0]


def shard(count: int, *, of: int | None = None, number: int | None = None) -> range:
    """Return which of `count` things are this process's: consecutive ones.

    Args:
        of: how many share them; None: all processes.
        number: of the process among these; None: this one's.
    """
    of = size() if of is None else of
    number = (_world.rank if _world is not None and of > 1 else 0) if number is None else number
    return range(count * number // of, count * (number + 1) // of)


def map_shards(things: Sequence[T], work: Callable[[Sequence[T]], R]) -> list[R]:
    """Let every process work on its share of things, and return what was found in their order; who has none does nothing."""
    mine = shard(len(things))
    idle = not mine and size() > 1
    found = on_all_ranks(lambda: [] if idle else [work(things[mine.start : mine.stop])])
    return [result for results in found for result in results]


def stack_shards(things: Sequence[T], work: Callable[[Sequence[T]], Tensor]) -> Tensor:
    """As `map_shards`, where rows of a tensor on the host are found, many of them: returns all, in the order of the things."""
    mine, rows = shard(len(things)), []
    idle = not mine and size() > 1

    def shape() -> Any:
        if idle:
            return None
        rows.append(work(things[mine.start : mine.stop]))
        return rows[0].shape, rows[0].dtype

    shapes = on_all_ranks(shape)
    world = _world
    if world is None or size() == 1:
        return rows[0]
    import torch
    import torch.distributed as dist

    tail, dtype = next((shape[1:], dtype) for shape, dtype in filter(None, shapes))
    counts = [0 if each is None else each[0][0] for each in shapes]
    total, start = torch.empty(sum(counts), *tail, dtype=dtype), 0
    for number, count in enumerate(counts):
        theirs = total[start : start + count]
        if number == world.rank and count:
            theirs.copy_(rows.pop())
        if count:
            with _losses_told():
                dist.broadcast(theirs.view(torch.uint8), src=number)
        start += count
    return total


def sum_over_ranks(total: Tensor) -> Tensor:
    """Add up the processes' tensors of one shape in a tree, to the same bits on each; changes `total`, and returns it."""
    world = _world
    if world is None or size() == 1:
        return total
    import torch
    import torch.distributed as dist

    at_hand = total.cpu() if total.is_cuda and not _has_nccl() else total
    step = 1
    with _losses_told():
        while step < world.size:
            if world.rank % (2 * step) == step:
                dist.send(at_hand, world.rank - step)
            elif world.rank % (2 * step) == 0:
                other = torch.empty_like(at_hand)
                dist.recv(other, world.rank + step)
                at_hand += other
            step *= 2
        dist.broadcast(at_hand, src=0)
    return total if at_hand is total else total.copy_(at_hand)


def _has_nccl() -> bool:
    import torch

    return torch.cuda.is_available() and torch.distributed.is_nccl_available()


class _AgreedError(Exception):
    """Raised on followers where an error is raised on all."""


def _called(world: _World, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
    world.depth += 1
    try:
        return function(*args, **kwargs)
    except BaseException:
        world.broken = world.broken or not world.agreed  # else the others are still in it
        raise
    finally:
        world.depth -= 1
        world.agreed = world.agreed and world.depth > 0


def _found_and_called(find: Callable[[Any], Any], key: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    function(find(key), *args, **kwargs)


def _tried(work: Callable[[], T]) -> tuple[Any, Exception | None]:
    """Do something; return what can be sent, (result, what went wrong, whether a user's error), and the error."""
    assert _world is not None
    _world.alone = True
    try:
        return (work(), None, False), None
    except Exception as error:
        told = isinstance(error, EvoPressError)
        return (None, str(error) if told else f"{type(error).__name__}: {error}", told), error
    finally:
        _world.alone = False


def _agreed(found: Sequence[tuple[T, str | None, bool]], mine: Exception | None) -> list[T]:
    """Return results; raise the first error, if there is one, in this process's own words where it is its own."""
    for number, (_, text, told) in enumerate(found):
        if text is None:
            continue
        if not leads():
            error: Exception = _AgreedError(text)
        elif number == 0 and mine is not None:
            error = mine
        else:
            error = EvoPressError(text) if told else RuntimeError(f"process {number}: {text}")
        assert _world is not None
        _world.agreed = True
        raise error
    return [result for result, _, _ in found]


@contextmanager
def _losses_told() -> Iterator[None]:
    """Turn what torch says of a process that is not there any more into a sentence."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if _world is not None:
            _world.broken = True
        raise LostError(
            f"another process of this run has ended or does not answer ({first_line(error)[:160]}): see its output, then resume "
            "with resume=, on any number of processes"
        ) from error
