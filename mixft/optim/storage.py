"""How an optimizer keeps its state, and how that goes into a state dictionary and comes out of one.

``optimizer.state[param]`` holds ``step``; every state tensor of the rule by its name, FP32, BF16 or 8-bit codes with
their scales beside them as ``<name>_scale``; and for a 16-bit parameter ``master``: its FP32 weights, or int16, the
remainder by which these exceed the parameter. A state dictionary holds FP32 only, under the same names without the
scales, so that it fits every other storage, and torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixft.ops.optimizer_state import GROUP_SIZE, dequantize_state, join_master, quantize_state, split_master

MASTER_WEIGHTS = ("auto", "fp32", "split", "none")
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
SCALE = "_scale"


@dataclass(frozen=True)
class Storage:
    """The storage of one optimizer's state.

    Attributes:
        master_weights: one of ``MASTER_WEIGHTS``.
        state_dtype: one of ``STATE_DTYPES``; int8 stands for 8-bit codes with scales.
        signed: of every state tensor that the rule may have, whether it can be negative.
    """

    master_weights: str
    state_dtype: torch.dtype
    signed: dict[str, bool]

    def master_dtype(self, param: Tensor) -> torch.dtype | None:
        """That of the master of ``param``, ``torch.int16`` for a remainder; None where it has none."""
        if param.dtype == torch.float32 or self.master_weights == "none":
            return None
        return torch.int16 if self.master_weights == "split" else torch.float32

    def complete(self, param: Tensor, state: dict[str, Any], names: Iterable[str]) -> bool:
        """Make what ``state`` lacks of ``names`` and of the master; whether a state tensor was made.

        What is there as a state dictionary has it is narrowed first: ``ZeroRedundancyOptimizer.load_state_dict`` puts
        it into the optimizer's state itself, with step counts on the CPU.

        Raises:
            ValueError: state has another shape than ``param``, which was given a tensor of another shape.
        """
        kept = self.master_dtype(param)
        for name in (*names, *(["master"] if kept else [])):
            if name in state and state[name].shape != param.shape:
                raise ValueError(
                    f"{name} has shape {tuple(state[name].shape)} and its parameter {tuple(param.shape)} by now; "
                    "delete the parameter's entry in the optimizer's state to start anew, or make a new optimizer"
                )
        self._narrow_loaded(param, state)
        is_new = False
        for name in names:
            if name not in state:
                state |= self._zeros(name, param)
                is_new = True
            elif self.state_dtype == torch.int8 and state[name].stride() != torch.empty_like(param).stride():
                # The parameter's layout has changed: a scale belongs to neighbours in storage.
                values = dequantize_state(state[name], state[name + SCALE])
                state |= self._narrow(name, torch.empty_like(param, dtype=torch.float32).copy_(values))
        if "master" in state and state["master"].dtype != kept:
            # Left from when the parameter had another dtype: kept, it would come back out of date.
            del state["master"]
        if kept is not None and "master" not in state:
            split = kept == torch.int16
            state["master"] = torch.zeros_like(param, dtype=kept) if split else param.detach().float()
        return is_new

    def widen(self, param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """``state`` as a state dictionary has it; tensors that are FP32 already are not copied."""
        wide = {}
        for name, value in state.items():
            if name == "master":
                wide[name] = value if value.is_floating_point() else join_master(param.detach(), value)
            elif name + SCALE in state:
                wide[name] = dequantize_state(value, state[name + SCALE])
            elif name in self.signed:
                wide[name] = value.float()
            elif name.removesuffix(SCALE) not in self.signed:
                wide[name] = value
        return wide

    def narrow(self, param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """What ``widen`` gave as this storage keeps it for ``param``.

        A remainder belongs to one value of the parameter only, so splitting a master sets the parameter to it.
        """
        narrow = {}
        for name, value in state.items():
            if name in self.signed:
                like_param = torch.empty_like(param, dtype=torch.float32)
                fits = value.stride() == like_param.stride()
                narrow |= self._narrow(name, value if fits else like_param.copy_(value))
            elif name != "master":
                narrow[name] = value
        kept = self.master_dtype(param)
        if kept == torch.float32:
            narrow["master"] = state.get("master", param.detach().float())
        elif kept == torch.int16 and "master" in state:
            upper, narrow["master"] = split_master(state["master"], param.dtype)
            param.copy_(upper)
        return narrow

    def _narrow_loaded(self, param: Tensor, state: dict[str, Any]) -> None:
        wide = {
            name: state[name].float()
            for name in self.signed
            if name in state and state[name].is_floating_point() and state[name].dtype != self.state_dtype
        }
        has_wide_master = "master" in state and state["master"].dtype == torch.float32
        if has_wide_master and (wide or self.master_dtype(param) == torch.int16):
            wide["master"] = state["master"]
        if wide:
            state |= self.narrow(param, wide)
        if "step" in state or any(name in state for name in self.signed):
            # Momentum of an optimizer that counts no steps: one has been taken.
            state["step"] = torch.as_tensor(state.get("step", 1.0), dtype=torch.float32, device=param.device)

    def _zeros(self, name: str, param: Tensor) -> dict[str, Tensor]:
        if self.state_dtype != torch.int8:
            return {name: torch.zeros_like(param, dtype=self.state_dtype)}
        # A zero has code 0 and scale 0. Quantizing zeros instead would take several times the parameter's memory.
        codes = torch.zeros_like(param, dtype=torch.int8 if self.signed[name] else torch.uint8)
        return {name: codes, name + SCALE: codes.new_zeros(-(-param.numel() // GROUP_SIZE), dtype=torch.uint8)}

    def _narrow(self, name: str, values: Tensor) -> dict[str, Tensor]:
        if self.state_dtype != torch.int8:
            return {name: values.to(self.state_dtype)}
        codes, scales = quantize_state(values, signed=self.signed[name])
        return {name: codes, name + SCALE: scales}
