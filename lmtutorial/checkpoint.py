"""Checkpoints: a model, its optimizer and the state of a run in one file, whole or not there.

A checkpoint is a safetensors file with JSON in its header (`lmtutorial.tensorfile`). Nothing is ever
unpickled, so a checkpoint from a stranger cannot run code.
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lmtutorial.distributed import Processes
from lmtutorial.models.cache import LanguageModel
from lmtutorial.sharding import gathered, spread
from lmtutorial.tensorfile import read_tree, write_tree

VERSION = 1
"""Of what a checkpoint holds; a newer one is refused."""

KINDS = {
    "lstm": ("lmtutorial.models.lstm", "LSTM", "LSTMConfig"),
    "transformer": ("lmtutorial.models.transformer", "Transformer", "TransformerConfig"),
}
"""Kinds of model that can be built from a checkpoint alone: (module, class, class of its `config`)."""


def save_checkpoint(
    path: str | Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    state: dict[str, Any] | None = None,
) -> Path:
    """Write the model, and if given the optimizer and a `state`, to one file; returns its path.

    `state` is any nesting of dictionaries with string keys, lists, tuples, tensors and JSON values. A file
    already there is replaced in one step, or on an error stays as it is. In a `process_group` all processes
    call it, and process 0 writes; tensors that are spread over them are whole in the file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_checkpoint(f"{folder}/last.safetensors", model=nn.Linear(3, 2), state={"step": 7})
    ...     load_checkpoint(path, model=nn.Linear(3, 2))
    {'step': 7}
    """
    config = getattr(model, "config", None)
    known = _own_class(model)
    tree = {
        "version": VERSION,
        "kind": next((kind for kind, names in KINDS.items() if names[:2] == known), known[1]),
        "config": dataclasses.asdict(cast(Any, config)) if dataclasses.is_dataclass(config) else None,
        "model": _tensors(model),
        "optimizer": None if optimizer is None else _moments(model, optimizer),
        "state": state or {},
    }
    process = Processes.current().rank
    tree = gathered(tree, keep=process == 0)
    return write_tree(path, tree) if process == 0 else Path(path)


def load_checkpoint(
    path: str | Path, *, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Copy a checkpoint into a model, and if given an optimizer; returns the `state` saved with them.

    The tensors of the state come back on the CPU. The optimizer keeps its own settings (learning rate, ...).
    Everything is checked before anything is changed.

    Raises FileNotFoundError, or ValueError for a file that is damaged or does not fit, naming the tensor and
    both shapes.
    """
    tree = _read(path)
    own, saved = _tensors(model), tree["model"]
    faults = _misfits(own, saved)
    if optimizer is not None:
        faults += _optimizer_misfits(model, optimizer, tree["optimizer"])
    if faults:
        raise ValueError(f"{path} does not fit: " + "; ".join(faults))
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(spread(saved[name], like=tensor))
    if optimizer is not None:
        moments = [
            {key: spread(moment, like=p) for key, moment in tree["optimizer"][name].items()}
            for name, p in _trained(model, optimizer).items()
        ]
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": dict(enumerate(moments)), "param_groups": groups})
    return cast(dict[str, Any], tree["state"])


def load_model(path: str | Path, device: torch.device | str = "cpu") -> LanguageModel:
    """The model of a checkpoint, built from the file alone, on `device` and in evaluation mode.

    Raises FileNotFoundError, or ValueError for a damaged file or a kind of model that is not in `KINDS`.

    >>> import tempfile
    >>> from lmtutorial.models.lstm import LSTM, LSTMConfig
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model = LSTM(LSTMConfig(vocab_size=50, width=8))
    ...     path = save_checkpoint(f"{folder}/best.safetensors", model=model)
    ...     load_model(path).config
    LSTMConfig(vocab_size=50, width=8, layers=1, dropout=0.0, tied=True)
    """
    tree = _read(path)
    if tree["kind"] not in KINDS:
        raise ValueError(
            f"{path} holds a model of kind {tree['kind']!r}; {', '.join(KINDS)} can be built from a file"
        )
    module_name, class_name, config_name = KINDS[tree["kind"]]
    module = importlib.import_module(module_name)
    model = getattr(module, class_name)(getattr(module, config_name)(**tree["config"]))
    load_checkpoint(path, model=model)
    return cast(LanguageModel, model.to(device).eval())


def find_checkpoint(path: str | Path, *names: str) -> Path:
    """The file to read for `path`: itself, or if it is a folder, the first of `names` that is in it.

    `find_checkpoint("runs/demo", "best", "last")` is the best weights of a run, or else its last.
    Raises FileNotFoundError.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    files = [path / f"{name}.safetensors" for name in names]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"the folder {path} holds no {' or '.join(file.name for file in files)}")
    return found


def _read(path: str | Path) -> dict[str, Any]:
    tree = read_tree(path)
    if "model" not in tree:
        raise ValueError(f"{path} is no checkpoint: it holds no model")
    if tree["version"] > VERSION:
        raise ValueError(f"{path} is a checkpoint of version {tree['version']}; this package reads {VERSION}")
    return tree


def _own_class(model: nn.Module) -> tuple[str, str]:
    """Module and name of a model's class; spreading a model puts a class of torch's before its own."""
    classes = [(kind.__module__, kind.__name__) for kind in type(model).__mro__]
    return next(names for names in classes if not names[0].startswith("torch.distributed."))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, one name each: a tied head and its embedding are one tensor."""
    seen: dict[int, str] = {}
    named = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in named.items() if seen.setdefault(id(tensor), name) == name}


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's parameters in its own order, by their names in the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """What the optimizer remembers of each parameter: by name, because its own order may change."""
    return {name: optimizer.state[parameter] for name, parameter in _trained(model, optimizer).items()}


def _misfits(own: dict[str, Tensor], saved: dict[str, Tensor]) -> list[str]:
    """Every tensor that is missing, unknown or of another shape."""
    faults = []
    for name in sorted(own.keys() | saved.keys()):
        if name not in saved:
            faults.append(f"{name} {tuple(own[name].shape)} is in the model but not in the file")
        elif name not in own:
            faults.append(f"{name} {tuple(saved[name].shape)} is in the file but not in the model")
        elif own[name].shape != saved[name].shape:
            here, there = tuple(own[name].shape), tuple(saved[name].shape)
            faults.append(f"{name} has shape {there} in the file and {here} in the model")
    return faults


def _optimizer_misfits(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, dict[str, Tensor]] | None
) -> list[str]:
    if saved is None:
        return ["the file holds no optimizer, so training cannot go on from it"]
    faults = []
    for name, parameter in _trained(model, optimizer).items():
        if name not in saved:
            faults.append(f"the file holds nothing of the optimizer for {name}")
        for moment, tensor in saved.get(name, {}).items():
            if tensor.dim() and tensor.shape != parameter.shape:
                here, there = tuple(parameter.shape), tuple(tensor.shape)
                faults.append(f"the optimizer's {moment} of {name} has shape {there}, the parameter {here}")
    return faults
