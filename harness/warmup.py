"""The warm-up proof: everything a training step can change is saved, put back, and a digest shows that it is what it was."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.errors import UserError


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and every buffer, non-persistent ones too."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _rng_states() -> dict[str, Any]:
    """State of every random generator a trainer may draw from."""
    states: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _restore_rng(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])


def _feed(digest: Any, value: Any) -> None:
    """Hash a value whatever it is: tensors by their bytes, containers in order, the rest by repr."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().view(-1)
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    elif isinstance(value, np.ndarray):
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        for part in value:
            _feed(digest, part)
    else:
        digest.update(repr(value).encode())


def state_digest(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> str:
    """sha256 over parameters, buffers, optimizer states and random generators."""
    digest = hashlib.sha256()
    _feed(digest, dict(_tensors(model)))
    _feed(digest, [optimizer.state_dict() for optimizer in optimizers])
    _feed(digest, _rng_states())
    return digest.hexdigest()


class Snapshot:
    """A copy of everything training changes, taken when made."""

    def __init__(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._model, self._optimizers = model, optimizers
        self._tensors = {name: tensor.detach().clone() for name, tensor in _tensors(model)}
        self._states = [{parameter: copy.deepcopy(state) for parameter, state in optimizer.state.items()} for optimizer in optimizers]
        self._groups = [
            [{key: copy.deepcopy(group[key]) for key in group if key != "params"} for group in optimizer.param_groups]
            for optimizer in optimizers
        ]
        self._identities = [id(parameter) for parameter in model.parameters()]
        self._modes = {module: module.training for module in model.modules()}
        self._rng = _rng_states()
        self.digest = state_digest(model, optimizers)

    @torch.no_grad()
    def restore(self) -> str:
        """Put everything back, in place.

        Returns:
            The digest of the live state afterwards; equal to `digest` if the warm-up left no trace.

        Raises:
            UserError: a parameter, buffer or parameter group is not the one that was saved, so nothing can be put back into it.
        """
        self._refuse_replaced()
        for name, tensor in _tensors(self._model):
            if name in self._tensors:
                tensor.copy_(self._tensors[name])
        for parameter in self._model.parameters():
            parameter.grad = None
        for optimizer, states, groups in zip(self._optimizers, self._states, self._groups, strict=True):
            optimizer.state.clear()  # in place: load_state_dict would replace the groups that a trainer's schedule holds on to
            optimizer.state.update({parameter: copy.deepcopy(state) for parameter, state in states.items()})
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                group.update(copy.deepcopy(values))
        for module, training in self._modes.items():
            module.training = training
        _restore_rng(self._rng)
        return state_digest(self._model, self._optimizers)

    def _refuse_replaced(self) -> None:
        live = dict(_tensors(self._model))
        same_shapes = all(name in live and live[name].shape == tensor.shape for name, tensor in self._tensors.items())
        same_parameters = self._identities == [id(parameter) for parameter in self._model.parameters()]
        same_groups = [len(groups) for groups in self._groups] == [len(optimizer.param_groups) for optimizer in self._optimizers]
        for kept, what in ((same_parameters, "a parameter"), (same_shapes, "a buffer"), (same_groups, "an optimizer's parameter groups")):
            if not kept:
                raise UserError(
                    f"the warm-up left a trace: it replaced {what}",
                    where="referee.warm_up",
                    fix="Let warm-up steps change values only",
                )


def state_bytes(optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Bytes of all tensors that the optimizers keep between steps, on this rank."""
    return sum(
        value.numel() * value.element_size()
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
