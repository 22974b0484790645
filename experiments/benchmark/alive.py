"""Count the bytes of tensors that are alive: of real ones, and of a model whose weights are shapes alone, on torch's meta device.

What a model of shapes alone computes is nothing, but it takes the memory, operation by operation, that the model would.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

HOST, DEVICE, BOTH = "host", "device", "both"


class Alive(TorchDispatchMode):
    """Follows the bytes of the tensors that were made inside and are alive, by where they lie.

    Meta tensors stand for a device beside the host. Those that are made on the host, or of the host's alone, lie there.
    """

    def __init__(self, *, shapes: bool = False) -> None:
        """Begin at nothing.

        Args: shapes: the model's weights are shapes alone.
        """
        super().__init__()
        self.now = {HOST: 0, DEVICE: 0}
        self.peak = {HOST: 0, DEVICE: 0, BOTH: 0}
        self.of_meta = DEVICE
        """Where a tensor lies that is made on the meta device or moved there: on the host if that is where the blocks stay."""
        self._places: dict[int, str] = {}
        self._calls: AbstractContextManager[Any] = _Calls(self) if shapes else nullcontext()

    def __enter__(self) -> Alive:
        self._calls.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._calls.__exit__(*raised)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_key(tensor): self.place(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        if function is torch.ops.aten.index.Tensor:  # wherever the indices are
            given = {_key(args[0]): self.place(args[0])}
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and _key(tensor) not in given and _key(tensor) not in self._places:
                on_host = not tensor.is_meta or (given and all(place == HOST for place in given.values()))
                self.put(tensor, HOST if on_host else self.of_meta)
        return made

    def place(self, tensor: Tensor) -> str:
        """Return where a tensor lies."""
        return self._places.get(_key(tensor), DEVICE if tensor.is_meta else HOST)

    def begin(self) -> None:
        """Forget the peak so far."""
        self.peak = {**self.now, BOTH: sum(self.now.values())}

    def put(self, tensor: Tensor, place: str) -> Tensor:
        """Count a tensor that was made in a place until its memory is given back."""
        storage = tensor.untyped_storage()
        self._places[_key(tensor)] = place
        self.now[place] += storage.nbytes()
        self.peak[place] = max(self.peak[place], self.now[place])
        self.peak[BOTH] = max(self.peak[BOTH], sum(self.now.values()))
        weakref.finalize(storage, self._gone, _key(tensor), place, storage.nbytes())
        return tensor

    def _gone(self, key: int, place: str, size: int) -> None:
        self._places.pop(key, None)
        self.now[place] -= size


class _Calls(TorchFunctionMode):
    """What meta tensors cannot do: move to the host and back, tell a value, and choose the fused attention."""

    def __init__(self, alive: Alive) -> None:
        super().__init__()
        self.alive = alive

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if function in (torch.empty, torch.zeros) and str(kwargs.get("device") or "cpu") == "cpu":
            return self._made(args[0] if len(args) == 1 else args, kwargs.get("dtype") or torch.get_default_dtype(), HOST)
        if name == "new_empty" and kwargs.get("device") is not None:
            return self._made(args[1], args[0].dtype, HOST if str(kwargs["device"]) == "cpu" else DEVICE)
        if name == "index_add_" and args[0].is_meta:
            return args[0]  # the index is on the host
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if name == "__getitem__":
                return args[0][tree_map_only(Tensor, _all_of, args[1])]
            if name in _VALUES:
                return _VALUES[name](args[0])
            if name in ("cpu", "to"):
                where = ["cpu"] if name == "cpu" else [str(each) for each in (*args[1:], *kwargs.values()) if _is_device(each)]
                tensor = args[0]
                if where and self.alive.place(tensor) != (place := HOST if where[0] == "cpu" else self.alive.of_meta):
                    tensor = self._made(tensor.shape, tensor.dtype, place)
                rest = [each for each in args[1:] if not _is_device(each)]
                kwargs = {key: each for key, each in kwargs.items() if not _is_device(each)}
                return tensor.to(*rest, **kwargs) if rest or "dtype" in kwargs else tensor
            if function is torch.nn.functional.scaled_dot_product_attention:
                return _Attention.apply(*args[:3])
        return function(*args, **kwargs)

    def _made(self, shape: Any, dtype: torch.dtype, place: str) -> Tensor:
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            made = torch.empty(shape, dtype=dtype, device="meta")
        return self.alive.put(made, place)


class _Attention(torch.autograd.Function):
    """The fused one: of the squares nothing is kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, attended)
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors[:3])


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value in ("cpu", "meta"))


def _all_of(index: Tensor) -> Any:
    """Take a mask for one that marks everything, and so for a copy."""
    return torch.zeros(index.shape, dtype=torch.int64, device="meta") if index.is_meta and index.dtype == torch.bool else index


def _listed(tensor: Tensor) -> Any:
    return [_listed(each) for each in tensor.unbind()] if tensor.dim() > 1 else [1.0] * tensor.numel() if tensor.dim() else 1.0


_VALUES: dict[str, Callable[[Tensor], Any]] = {
    "__bool__": lambda tensor: True,
    "__int__": lambda tensor: 0,
    "__float__": lambda tensor: 1.0,
    "item": lambda tensor: 1.0,
    "tolist": _listed,
}
"""What a number is taken for: flags say that all is well."""


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
