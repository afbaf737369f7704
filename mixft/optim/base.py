"""What every mixft optimizer shares: master weights, the check of the gradients, clipping, and state dictionaries."""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from mixft.ops.optimizer_step import step_unchecked_
from mixft.ops.validation import is_dtensor

from .dtensor import gradient_pieces, piece_of, shards_of
from .hyperparameters import check_precision, loaded_group
from .learning_rate import LearningRates
from .members import Arrangement, Gradients, Members, Stepped, arrange, check_gradients, check_parameters
from .memory import MemoryReport, measure
from .scalars import at, step_scalars
from .sharding import Shards
from .state import adopt_loaded_state, check_loaded_state, shield_loaded_state, wide_state, without_placeholders
from .storage import Storage

# Options by which torch's optimizers choose between implementations of the same values; there is one here.
TORCH_IMPLEMENTATION_OPTIONS = ("foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay")
# Options of an optimizer as a whole.
OPTIMIZER_OPTIONS = (
    "max_grad_norm", "master_weights", "state_dtype", "stochastic_rounding", "skip_nonfinite", "sharded_over"
)  # fmt: skip


class MixedPrecisionOptimizer(Optimizer):
    """Base of the optimizers; a subclass names its op, its state and its hyperparameters.

    Attributes:
        max_grad_norm: the norm that gradients are clipped to, over all groups; None for no clipping.
        storage: how state is kept.
        stochastic_rounding: whether 16-bit parameters without masters are rounded up or down at random.
        skip_nonfinite: whether a step reads the gradients for NaN and Inf first.
        last_grad_norm: 0-d FP32 tensor, the norm of the unscaled gradients before clipping at the last step, those of
            the other processes of ``sharded_over`` included; None before the first step and where ``max_grad_norm`` is
            None.
        last_found_inf: 0-d FP32 tensor, 1 where the last step was skipped, on every process of ``sharded_over``; None
            before the first step, and where nothing looked.
        last_nonfinite: what the last step found where it looked: pairs of parameters and int64 [parameters], the number
            of NaN and Inf elements in the gradient of each; of this process alone.
        releases_gradients: whether parameters are stepped inside backward, by :func:`mixft.optim.release_gradients`.
        main_grads: FP32 gradients by parameter, without a loss scale, to step with in place of ``.grad``; set around a
            step by ``mixft.amp.GradAccumulator``.
    """

    # Tells torch.amp.GradScaler to hand over its scale and its finding (the attributes grad_scale and found_inf).
    _step_supports_amp_scaling = True

    op: ClassVar[Callable]
    # Every state tensor that the rule may have, in the op's order, and whether it can be negative.
    signed_state: ClassVar[dict[str, bool]]
    # Whether the rule cannot go on without knowing the number of steps taken.
    needs_step: ClassVar[bool] = False
    # Whether weight decay leaves the gradients alone, where there is a rule of the same state with which it does not.
    decoupled: ClassVar[bool | None] = None
    # Whether a state tensor made late makes the next step the parameter's first.
    restarts_with_new_state: ClassVar[bool] = False

    releases_gradients: bool = False
    main_grads: dict[Tensor, Tensor] | None = None
    _shards: Shards | None = None
    _has_dtensors: bool = False

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        max_grad_norm: float | None,
        master_weights: str,
        state_dtype: torch.dtype,
        stochastic_rounding: bool,
        skip_nonfinite: bool,
        sharded_over: "torch.distributed.ProcessGroup | None",
    ) -> None:
        if isinstance(params, torch.nn.Module):
            raise TypeError(f"params is a {type(params).__name__}; give its parameters() or named_parameters()")
        check_precision(max_grad_norm, master_weights, state_dtype, stochastic_rounding, skip_nonfinite)
        self.max_grad_norm = max_grad_norm
        self.storage = Storage(master_weights, state_dtype, self.signed_state)
        self.stochastic_rounding = stochastic_rounding
        self.skip_nonfinite = skip_nonfinite
        self.sharded_over = sharded_over
        self._forget_last_step()
        self.check_hyperparameters(defaults)
        super().__init__(params, defaults)

    def _forget_last_step(self) -> None:
        self.last_grad_norm: Tensor | None = None
        self.last_found_inf: Tensor | None = None
        self.last_nonfinite: list[tuple[list[Tensor], Tensor]] = []
        self._arrangement: Arrangement | None = None
        self._rates = LearningRates()
        self._found_in_backward: Tensor | None = None

    @property
    def finds_overflows(self) -> bool:
        """Whether every step looks at the gradients, so that a loss scaler need not: where it clips."""
        return self.max_grad_norm is not None

    @property
    def _gradient_of(self) -> Callable[[Tensor], Tensor | None]:
        return attrgetter("grad") if self.main_grads is None else self.main_grads.get

    @property
    def master_weights(self) -> str:
        """Which masters are kept: "auto", "fp32", "split" or "none"."""
        return self.storage.master_weights

    @property
    def state_dtype(self) -> torch.dtype:
        """What state tensors are kept in; ``torch.int8`` stands for 8-bit codes with scales."""
        return self.storage.state_dtype

    @property
    def sharded_over(self) -> "torch.distributed.ProcessGroup | None":
        """The group whose processes clip by one norm and skip together; to be set anew after unpickling."""
        return None if self._shards is None else self._shards.groups[0]

    @sharded_over.setter
    def sharded_over(self, group: "torch.distributed.ProcessGroup | None") -> None:
        shards = None if group is None else Shards(group)
        if shards is not None and self._has_dtensors:
            raise ValueError(
                "sharded_over is given and parameters are DTensors, which know who shares them; leave it out"
            )
        self._shards = shards
        self._arrangement = None

    @staticmethod
    @abstractmethod
    def check_hyperparameters(group: dict[str, Any]) -> None:
        """Raise ValueError for a hyperparameter out of range."""

    @classmethod
    @abstractmethod
    def state_names(cls, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the state tensors, of a parameter's shape, that the rule keeps under the options of ``group``."""

    @classmethod
    @abstractmethod
    def rule(cls, group: dict[str, Any]) -> tuple:
        """The op's hyperparameters after its scalar tensors and before ``stochastic_rounding``, in order."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as ``torch.optim.Optimizer.add_param_group`` does.

        Raises:
            TypeError: a parameter is not a real floating-point tensor of 16 or 32 bits, or a DTensor that is a sum.
            ValueError: a hyperparameter is out of range, a parameter is given twice or overlaps itself, an option
                is named that a group cannot have, or there are DTensors beside ``sharded_over``.
        """
        kind = type(self).__name__
        for name in (*OPTIMIZER_OPTIONS, *TORCH_IMPLEMENTATION_OPTIONS):
            if name in param_group:
                # ZeroRedundancyOptimizer puts all that it is given into its groups.
                own = f"give it to the optimizer, or to a ZeroRedundancyOptimizer in functools.partial({kind}, {name}=)"
                remedy = own if name in OPTIMIZER_OPTIONS else "leave it out"
                raise ValueError(f"{name} is not an option of a parameter group of {kind}; {remedy}")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self.check_hyperparameters(group)
            check_parameters([each["params"] for each in self.param_groups], kind)
            has_dtensors = any(map(is_dtensor, group["params"]))
            if has_dtensors and self._shards is not None:
                raise ValueError(
                    f"sharded_over is given and parameters of group {len(self.param_groups) - 1} are DTensors, which "
                    f"know the processes that share them; leave it out"
                )
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._has_dtensors = self._has_dtensors or has_dtensors

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, or none at all where a gradient holds a NaN or Inf.

        Nothing here waits for the device: whether the step was taken is in ``last_found_inf``.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            TypeError: a gradient is sparse, of a dtype that is not served, or a DTensor where its parameter is plain.
            ValueError: a gradient has another shape than its parameter or is a view of negated numbers, or a group's
                ``lr`` is a tensor of several elements.
            RuntimeError: gradients were released inside backward with a GradScaler's scale still in them; or a CUDA
                graph is being captured and state would have to be made, which every replay would do again.
        """
        if self.releases_gradients and getattr(self, "found_inf", None) is not None:
            raise RuntimeError(
                "gradients are released inside backward and a GradScaler hands over their scale only now; the "
                "parameters were stepped with scaled gradients, use one or the other"
            )
        loss = None
        try:
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self._step()
        except BaseException:
            # A GradScaler takes back what it has handed over after a step that succeeds only.
            self._forget_scaler()
            raise
        return loss

    def _forget_scaler(self) -> None:
        for name in ("grad_scale", "found_inf"):
            vars(self).pop(name, None)

    # One op does all the work, so that there is nothing for a compiler to fuse.
    @torch._disable_dynamo
    def _step(self) -> None:
        params = [param for group in self.param_groups for param in group["params"]]
        grads = list(map(self._gradient_of, params))
        pieces = params
        if self._has_dtensors:
            pieces, grads = list(map(piece_of, params)), gradient_pieces(params, grads)
        members, shards = self._arranged(params, pieces, grads)
        # The other processes wait for what this one has found, be it nothing.
        if members or shards:
            self._update(members, params, grads, shards)
        found, self._found_in_backward = self._found_in_backward, None
        if found is not None:
            self.last_found_inf = torch.maximum(found, at(self.last_found_inf, found.device)) if members else found

    def step_in_backward(self, group: dict[str, Any], param: Tensor) -> None:
        """Step ``param`` of ``group`` alone; for :func:`mixft.optim.release_gradients`.

        Raises:
            TypeError: as ``step``.
            ValueError: ``max_grad_norm`` was set since.
        """
        if self.max_grad_norm is not None:
            raise ValueError(
                f"max_grad_norm is {self.max_grad_norm} by now, and gradients are released inside backward, before the "
                f"norm of all is known; set it to None, or remove() the release"
            )
        params, grads = [param], [self._gradient_of(param)]
        check_gradients(params, grads, type(self).__name__)
        names = self.state_names(group)
        step = Stepped([group], [names], params, params, grads, self.state)
        work = arrange(group, [0], step, self.storage, names, self.restarts_with_new_state, [None])
        self._update(work, params, grads, [])
        found = self.last_found_inf
        if found is not None and self._found_in_backward is not None:
            found = torch.maximum(found, at(self._found_in_backward, found.device))
        self._found_in_backward = found

    def _arranged(
        self, params: list[Tensor], pieces: list[Tensor], grads: Gradients
    ) -> tuple[list[Members], list[Shards]]:
        """The parameters that have a gradient, arranged anew where anything has changed since the last step, and the
        processes that have other pieces of any."""
        names = list(map(self.state_names, self.param_groups))
        step = Stepped(self.param_groups, names, params, pieces, grads, self.state)
        if self._arrangement is None or not self._arrangement.holds(step):
            check_gradients(pieces, grads, type(self).__name__)
            shards = list(map(shards_of, params)) if self._has_dtensors else [self._shards] * len(params)
            self._arrangement = Arrangement(step, self.storage, self.restarts_with_new_state, shards)
        return self._arrangement.members, self._arrangement.shards if self._shards is None else [self._shards]

    def _update(self, work: list[Members], params: list[Tensor], of_all: Gradients, shards: list[Shards]) -> None:
        """Change those of ``params`` and their state that are in ``work``, or nothing where a gradient of any, also in
        the other processes of ``shards``, is not finite."""
        grads: dict[tuple[torch.device, Shards | None], list[Tensor]] = {}
        checked: dict[tuple[torch.device, Shards | None], list[Tensor]] = defaultdict(list)
        rates = [self._rates.of(members.group, members.device) for members in work]
        listed = [members.gradients(of_all) for members in work]
        for members, own in zip(work, listed, strict=True):
            where = members.device, members.shards
            before = grads.get(where)
            grads[where] = own if before is None else before + own
            checked[where] += map(params.__getitem__, members.positions)
        scalars = step_scalars(
            grads,
            # Set by torch.amp.GradScaler around the step.
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            max_norm=self.max_grad_norm,
            skip_nonfinite=self.skip_nonfinite,
            shards=shards,
            home=None if work else shards[0].device(self._first_device()),
        )
        self.last_grad_norm = scalars.norm
        self.last_found_inf = scalars.found_inf
        self.last_nonfinite = list(zip(checked.values(), scalars.nonfinite, strict=True)) if scalars.nonfinite else []
        if not work:
            return
        home, *others = dict.fromkeys(device for device, _ in grads)
        local = {home: scalars} | {device: scalars.on(device) for device in others}
        for members, own, lr in zip(work, listed, rates, strict=True):
            rounding = self.stochastic_rounding and not members.tensors["masters"]
            here = local[members.device]
            values = (lr, here.inv_scale, here.clip_coef, here.found_inf, *self.rule(members.group), rounding)
            step_unchecked_(self.op, members.tensors | {"grads": own}, values)

    def _first_device(self) -> torch.device | None:
        return next((param.device for group in self.param_groups for param in group["params"]), None)

    def __repr__(self) -> str:
        """torch's, with the options of the optimizer as a whole."""
        options = "".join(f"    {name}: {getattr(self, name)}\n" for name in OPTIMIZER_OPTIONS)
        return f"{super().__repr__().removesuffix(')')}All Parameter Groups\n{options})"

    def memory_report(self) -> MemoryReport:
        """Bytes of the parameters, of each kind of state and of the gradients as they are now."""
        params = [param for group in self.param_groups for param in group["params"]]
        return measure(params, self.state, self.storage)

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """State by torch's names and in FP32, whatever it is kept in; masters, split ones too, as ``master``.

        ``torch.optim``'s optimizer of the same name loads it and ignores the masters. State of DTensors is DTensors.
        """
        params = [param for group in self.param_groups for param in group["params"]]

        # Registered first, so that the user's own hooks see the dictionary as it is saved.
        def widen(_, saved: dict[str, Any]) -> dict[str, Any]:
            state = {
                key: wide_state(params[key], values, self.storage) if key in range(len(params)) else values
                for key, values in saved["state"].items()
            }
            # torch's name for it.
            mark = {} if self.decoupled is None else {"decoupled_weight_decay": self.decoupled}
            groups = [{**group, **mark} for group in saved["param_groups"]]
            return {**saved, "state": state, "param_groups": groups}

        handle = self.register_state_dict_post_hook(widen, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dictionary of this optimizer or of its namesake in ``torch.optim``.

        It is copied, and kept as this optimizer keeps its state. A master that the dictionary lacks is made from the
        parameter as it is now, so load the model first. With ``master_weights="split"`` a loaded master also sets the
        parameter, to the value that is stored with the remainder.

        Raises:
            TypeError: a hyperparameter that has to be a number is a tensor; nothing is changed then.
            ValueError: groups or state do not fit this optimizer's parameters, or are of an Adam whose weight decay is
                decoupled where this one's is not, or the reverse; nothing is changed then.
        """

        # Registered last, so that the user's own hooks see the dictionary as it is.
        def prepare(_, loaded: dict[str, Any]) -> dict[str, Any]:
            kind = type(self).__name__
            groups = [loaded_group(group, self.defaults, self.decoupled, kind) for group in loaded["param_groups"]]
            loaded = without_placeholders({**loaded, "param_groups": groups})
            restarts = self.restarts_with_new_state
            check_loaded_state(loaded, self.param_groups, self.state_names, self.storage, self.needs_step, restarts)
            return shield_loaded_state(loaded)

        handle = self.register_load_state_dict_pre_hook(prepare)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        own = ("max_grad_norm", "storage", "stochastic_rounding", "skip_nonfinite", "_shards", "_has_dtensors")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        live_groups = self.__dict__.get("param_groups")
        super().__setstate__(state)
        self._forget_last_step()
        for group in self.param_groups:
            for name in TORCH_IMPLEMENTATION_OPTIONS:
                group.pop(name, None)
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            adopt_loaded_state(group["params"], self.state, self.storage)
        if live_groups is not None:
            # Whoever holds these groups, as the schedulers of an optimizer that was swapped, sees what was loaded.
            for live, loaded in zip(live_groups, self.param_groups, strict=True):
                live.clear()
                live.update(loaded)
            self.param_groups = live_groups
