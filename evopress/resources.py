"""What there is to work in, on disk and in memory, and the one comparison of that with what work takes."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil
import torch

from evopress.compress.compressor import free_now
from evopress.errors import EvoPressError
from evopress.files import make_folder
from evopress.progress import in_bytes
from evopress.ranks import Known, collective, on_all_ranks

_SPARE = 1.02
"""Of the disk: headers of files and the like."""


@dataclass
class Needs:
    """What one stage of a run takes; where processes share it, the one with the most to do."""

    stage: str
    what: str
    tokens: int = 0
    """Tokens that enter a model, those of every candidate counted."""
    block_tokens: float = 0.0
    """Tokens times the blocks that compute them, prefixes that candidates share counted once."""
    disk: dict[Path, int] = field(default_factory=dict)
    """Bytes by folder, of all processes together."""
    memory: int = 0
    """Of the host, beside the model."""
    device: int = 0
    """Of the compute device, beside the model; 0 where that is the host."""
    seconds: float | None = None
    """None: it was not measured what such a stage takes."""
    alone: bool = False
    """Whether the first process does it by itself."""
    name: str = ""
    """What it is in a sentence; nothing: "the stage search"."""
    less_memory: str = (
        "lower fitness.max_tokens_in_flight, fitness.chunk_tokens, level_db.cache_bytes, data.search_tokens or search.tokens"
    )
    """What to do where there is too little."""
    less_disk: str = "leave stages out (stages), or use another hydra.run.dir or level_db.root"

    def __post_init__(self) -> None:
        self.name = self.name or f"the stage {self.stage}"


@dataclass(frozen=True)
class Room:
    """The memory that one process of a run finds free, in bytes."""

    machine: str
    """Whose memory it shares with the run's other processes there."""
    memory: int
    device: int | None = None
    """Of its GPU; None: it has none."""
    where: str = ""
    """The GPU's name."""
    to_load: int = 0
    """Bytes of the model that will come into the host's memory."""
    to_load_there: int = 0
    """And into the GPU's."""


class Placed(Known, Protocol):
    """What every process has on a device."""

    @property
    def device(self) -> torch.device:
        """Where it is computed."""


@collective
def rooms(of: Placed) -> list[Room]:
    """Return what each process of the run finds."""
    return on_all_ranks(lambda: room_on(of.device))


def room_on(device: torch.device) -> Room:
    """Return what this process finds where it computes on a device."""
    there = free_now(device) if device.type == "cuda" else None
    return Room(socket.gethostname(), psutil.virtual_memory().available, there, str(device))


def check_model(size: int, device: torch.device, *, offload: bool) -> None:
    """Raise EvoPressError if a model of so many bytes is larger than what the host has free, or the GPU where it lies there.

    Args: offload: its blocks stay in the host's memory.
    """
    room = room_on(device)
    if size > room.memory:
        raise EvoPressError(
            f"the model takes {in_bytes(size)} of the host's memory, of which {in_bytes(room.memory)} are free: use a machine with "
            "more, or a smaller model, or model.dtype=bfloat16 where it is float32"
        )
    if room.device is not None and size > room.device and not offload:
        raise EvoPressError(
            f"the model takes {in_bytes(size)} on {room.where}, of which {in_bytes(room.device)} are free: set model.offload=true, "
            "which keeps its blocks in the host's memory"
        )


def disks(folders: Iterable[Path]) -> list[tuple[list[Path], int]]:
    """Group folders by the file system that they are on, with the bytes that are free there."""
    groups: dict[int, list[Path]] = {}
    for folder in folders:
        groups.setdefault(_existing(folder).stat().st_dev, []).append(folder)
    return [(group, shutil.disk_usage(_existing(group[0])).free) for group in groups.values()]


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def check_room(stages: Sequence[Needs], rooms: Sequence[Room], *, offload: bool = False) -> None:
    """Raise EvoPressError if stages, one after the other, need more than there is; what they write stays.

    Args:
        rooms: of each process, the first one's first; those on one machine share its memory.
        offload: the model's blocks lie in the host's memory already.
    """
    for folder in dict.fromkeys(folder for needs in stages for folder, size in needs.disk.items() if size):
        make_folder(_existing(folder))  # what is shared with others may be there to be read alone
    for folders, free in disks(dict.fromkeys(folder for needs in stages for folder in needs.disk)):
        writing = [(needs, size) for needs in stages if (size := sum(needs.disk.get(folder, 0) for folder in folders))]
        total = sum(size for _, size in writing)
        if total * _SPARE > free:
            parts = ", ".join(f"{needs.stage} {in_bytes(size)}" for needs, size in writing)
            one, *others = (needs for needs, _ in sorted(writing, key=lambda each: -each[1]))
            raise EvoPressError(
                f"{'this run' if others else one.name} needs {in_bytes(total)} of disk{f' ({parts})' if others else ''} but "
                f"{' and '.join(map(str, folders))} has {in_bytes(free)} free: free some space, "
                f"{one.less_disk}{', or leave stages out (stages)' if others and one.less_disk != Needs.less_disk else ''}"
            )
    for needs in stages:
        work = [needs if number == 0 or not needs.alone else Needs(needs.stage, "") for number in range(len(rooms))]
        for words, those in by_machine(rooms).items():
            needed = sum(work[number].memory + rooms[number].to_load for number in those)
            fewer = ", or start fewer processes" if len(those) > 1 else ""
            free, loading = min(rooms[number].memory for number in those), any(rooms[number].to_load for number in those)
            _compare(needs, needed, free, words, loading, fewer)
        for own, room in zip(work, rooms, strict=True):
            if room.device is not None:
                otherwise = "" if offload else ", or set model.offload=true"
                loading = bool(room.to_load_there)
                _compare(needs, own.device + room.to_load_there, room.device, f"on {room.where}", loading, otherwise)


def _compare(needs: Needs, needed: int, free: int, where: str, loading: bool, otherwise: str) -> None:
    if needed > free:
        raise EvoPressError(
            f"{needs.name} needs about {in_bytes(needed)} {where}{', the model included,' if loading else ''} but {in_bytes(free)} "
            f"are free: {needs.less_memory}{otherwise}"
        )


def by_machine(rooms: Sequence[Room]) -> dict[str, list[int]]:
    """Return the numbers of the processes that share a memory, by what it is in a sentence."""
    found: dict[str, list[int]] = {}
    for number, room in enumerate(rooms):
        found.setdefault(room.machine, []).append(number)
    if len(rooms) == 1:
        return {"of memory": [0]}
    return {f"of memory for {len(those)} process{'es' * (len(those) > 1)} on {name}": those for name, those in found.items()}
