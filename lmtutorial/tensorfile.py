"""Nested data with tensors in one safetensors file: written whole or not at all, read without unpickling."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEY = "lmtutorial"
"""Where in the file's metadata the JSON lies."""


def write_tree(path: str | Path, tree: dict[str, Any]) -> Path:
    """Write any nesting of dictionaries with string keys, lists, tuples, tensors and JSON values to a file.

    The tensors are named by their place ("model.head.bias"); the rest is JSON in the file's header. The file
    is written beside its place, flushed to the disk, and renamed over the old one: a program killed at any
    moment leaves the old file or the new one, whole. Folders on the way are made.

    Raises TypeError for anything else in the tree, ValueError for a number that is not finite.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     read_tree(write_tree(f"{folder}/x.safetensors", {"a": [1, (torch.ones(2), None)]}))
    {'a': [1, (tensor([1., 1.]), None)]}
    """
    from safetensors.torch import save  # not save_file, whose own temporary files outlive a kill

    tensors: dict[str, Tensor] = {}
    metadata = {KEY: json.dumps(_pack(tree, "", tensors), allow_nan=False)}
    return write_whole(path, save(tensors, metadata))


def write_whole(path: str | Path, content: bytes) -> Path:
    """Write a file whole or not at all, as `write_tree` does."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    try:
        beside.write_bytes(content)
        _flush(beside)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        _flush(path.parent)  # the rename itself
    return path


def read_tree(path: str | Path) -> dict[str, Any]:
    """What `write_tree` wrote; its tensors on the CPU.

    Raises FileNotFoundError, or ValueError for a file that is damaged or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
    if KEY not in metadata:
        raise ValueError(
            f"{path} is a safetensors file, but not one of lmtutorial's: its metadata lack {KEY!r}"
        )
    tree: dict[str, Any] = _unpack(json.loads(metadata[KEY]), tensors)
    return tree


def _pack(tree: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """`tree` as JSON, with each tensor moved to `tensors` and replaced by the name of its place."""
    if isinstance(tree, Tensor):
        while place in tensors:  # the places ["a"]["b"] and ["a.b"] are spelled alike
            place += "'"
        # a copy, because safetensors refuses tensors that share memory
        tensors[place] = tree.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"__tensor__": place}
    if isinstance(tree, dict):
        for key in tree:
            if not isinstance(key, str) or key in ("__tensor__", "__tuple__"):
                raise TypeError(
                    f"{place or 'the tree'} has the key {key!r}; keys are strings, and two are taken"
                )
        return {key: _pack(value, f"{place}.{key}".lstrip("."), tensors) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        items = [_pack(value, f"{place}.{number}", tensors) for number, value in enumerate(tree)]
        return {"__tuple__": items} if isinstance(tree, tuple) else items
    if tree is None or isinstance(tree, (str, bool, int, float)):
        return tree
    raise TypeError(f"{place} is of type {type(tree).__name__}; only tensors and JSON values can be saved")


def _unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_pack`."""
    if isinstance(tree, list):
        return [_unpack(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if tree.keys() == {"__tensor__"}:
        return tensors[tree["__tensor__"]]
    if tree.keys() == {"__tuple__"}:
        return tuple(_unpack(tree["__tuple__"], tensors))
    return {key: _unpack(value, tensors) for key, value in tree.items()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
