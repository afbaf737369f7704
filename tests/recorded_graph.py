"""A CUDA graph without a GPU: what a step asks of the device, recorded once and replayed without its Python code.

``Graph`` sees torch's operators through a dispatch mode, and mixft's kernels where Triton's interpreter launches them.
As in a CUDA graph, a capture changes nothing yet, and what is kept is which operation, on which memory, with which
numbers. So a replay shows whatever a step left to the host: a value that was read, a number that should have been a
tensor, a branch. Memory of before the capture is known by a weak reference only, as a graph knows it by an address;
what is allocated inside is the graph's own, and holds NaN until an operation fills it.
"""

import contextlib
from unittest import mock

import torch
from optimizer_cases import RefuseSync
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import GridExecutor

from mixft.kernels import device_cache, multi_tensor
from mixft.ops.accumulate import accumulate_gradients_
from mixft.ops.adamw import adamw_step_
from mixft.ops.grad import unscale_gradients_
from mixft.ops.grad_scalars import gradient_scalars
from mixft.ops.lion import lion_step_
from mixft.ops.sgd import sgd_step_
from mixft.optim import learning_rate, members

STEP_OPS = (accumulate_gradients_, adamw_step_, gradient_scalars, lion_step_, sgd_step_, unscale_gradients_)
LAUNCHERS = {op._opoverload: op.without_dispatch["cuda"] for op in STEP_OPS}
LEFT_UNFILLED = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Address:
    """Where a tensor is, without keeping it alive."""

    def __init__(self, tensor):
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.dtype, self.place = tensor.dtype, (tensor.storage_offset(), tensor.shape, tensor.stride())

    def tensor(self):
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, f"{self.dtype} {tuple(self.place[1])} was freed after the capture and is replayed"
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.place)


class Graph(RefuseSync):
    """Operations within ``capture()`` are recorded, and those that change something are not done.

    Attributes:
        kernels: the names of the kernels in it, in order.
    """

    def __init__(self):
        super().__init__()
        self.kernels = []
        self._operations = []
        self._own = {}
        self._made = []

    @contextlib.contextmanager
    def capture(self):
        with contextlib.ExitStack() as stack:
            for module in (device_cache, multi_tensor, members, learning_rate):
                stack.enter_context(mock.patch.object(module, "capturing", return_value=True))
            stack.enter_context(mock.patch.object(GridExecutor, "__call__", self._launcher()))
            stack.enter_context(self)
            yield self
        for tensor in self._made:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 1)

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, made in self._operations:
                args, kwargs = tree_map(
                    lambda leaf: leaf.tensor() if isinstance(leaf, Address) else leaf, (args, kwargs)
                )
                found = function(*args, **kwargs)
                for kept, again in zip(made, _tensors(found) if made else [], strict=True):
                    kept.copy_(again)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in LAUNCHERS:
            with self:
                return LAUNCHERS[function](*args, **kwargs)
        if function.namespace != "aten":
            return function(*args, **kwargs)
        schema = function._schema
        written = [
            argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write
        ]
        if written:
            self._record(function, args, kwargs, [])
            given = dict(zip([argument.name for argument in schema.arguments], args, strict=False)) | kwargs
            return given[written[0]] if schema.returns else None
        found = super().__torch_dispatch__(function, types, args, kwargs)
        name = schema.name.removeprefix("aten::")
        made = [tensor for tensor in _tensors(found) if self._is_new(tensor, (args, kwargs)) or name == "lift_fresh"]
        for tensor in made:
            storage = tensor.untyped_storage()
            self._own[storage._cdata] = storage
        # What the host writes into a new tensor is there before any replay.
        if made and name != "lift_fresh":
            self._made += made
            if name not in LEFT_UNFILLED:
                self._record(function, args, kwargs, made)
        return found

    def _is_new(self, tensor, inputs):
        storage = tensor.untyped_storage()._cdata
        return storage not in self._own and all(storage != given.untyped_storage()._cdata for given in _tensors(inputs))

    def _launcher(self):
        launch = GridExecutor.__call__

        def record(executor, *args, **kwargs):
            self.kernels.append(executor.fn.__name__)
            self._record(lambda *args, **kwargs: launch(executor, *args, **kwargs), args, kwargs, [])

        return record

    def _record(self, function, args, kwargs, made):
        def kept(leaf):
            if not isinstance(leaf, torch.Tensor) or leaf.untyped_storage()._cdata in self._own:
                return leaf
            return Address(leaf)

        self._operations.append((function, *tree_map(kept, (args, kwargs)), made))


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
