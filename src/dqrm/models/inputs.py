"""Validation of a model's arguments; invalid ones are refused in one sentence, before anything is computed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dqrm.errors import UserError
from dqrm.quant.tables import INTEGERS
from dqrm.quant.uniform import no_tensor


class InputError(UserError, ValueError):
    """An argument that the model does not accept."""


def checked(
    dense: Any, ids: Any, bags: Any, model: Any, tables: Any
) -> tuple[Tensor, Tensor, Sequence[tuple[Tensor, Tensor]]]:
    """The validated arguments of a `ClickModel`; dense as float32, or as the dtype that the model's parameters have.

    Other floating types are converted. Integers are not: numeric columns of a log are prepared as floats, and integers
    are more often ids in the wrong place. Only types and shapes are checked: the lookup finds ids outside their table.

    Args:
        tables: the model's.

    Raises:
        InputError: not tensors, or a mismatch of dtype, shape, number of rows or device.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return dense, ids, bags
    num_dense = model.num_dense
    device = tables._buffers[
        "row_offsets"
    ].device  # bypasses nn.Module's attribute lookup, which takes longer than all checks together
    if type(bags) in (tuple, list) and not bags and _plain(dense, ids, num_dense, tables, device):
        return dense, ids, bags
    _check_matrix("ids", ids, tables.num_single, "one for each single-valued table", device)
    if tables.num_single:
        _check_integers("ids", ids)
    if num_dense or dense is not None:
        _check_matrix("dense", dense, num_dense, "one for each dense column", device)
        if len(dense) != len(ids):
            raise InputError(
                f"dense has {len(dense)} rows and ids has {len(ids)}, expected the same number: one per sample"
            )
    if num_dense and dense.dtype != torch.float32:
        dense = _floats(dense, model)
    _check_bags(bags, len(tables.table_rows) - tables.num_single, len(ids), device)
    return dense, ids, bags


def _plain(dense: Any, ids: Any, num_dense: int, tables: Any, device: torch.device) -> bool:
    """Whether nothing has to be checked or converted, as in most calls, at the cost of a microsecond or two."""
    return (
        isinstance(dense, Tensor)
        and isinstance(ids, Tensor)
        and dense.dtype is torch.float32
        and (ids.dtype is torch.int32 or ids.dtype is torch.int64)
        and dense.dim() == 2
        and ids.shape == (dense.shape[0], tables.num_single)
        and dense.shape[1] == num_dense
        and len(tables.table_rows) == tables.num_single
        and dense.device == device == ids.device
    )


def _check_matrix(name: str, given: Any, columns: int, what: str, device: torch.device) -> None:
    _check_tensor(name, given, device)
    if given.dim() != 2:
        raise InputError(
            f"{name} is {given.dim()}-dimensional {list(given.shape)}, expected [B, {columns}]: a row per sample"
            + (f"; for one sample {name}[None]" if list(given.shape) == [columns] else "")
        )
    if given.shape[1] != columns:
        raise InputError(f"{name} has {given.shape[1]} columns {list(given.shape)}, expected {columns}: {what}")


def _check_tensor(name: str, given: Any, device: torch.device) -> None:
    if not isinstance(given, Tensor):
        raise InputError(no_tensor(name, given))
    if given.device != device:
        raise InputError(f"{name} is on {given.device}, but the model is on {device}; use {name}.to('{device}')")


def _check_integers(name: str, given: Tensor) -> None:
    if given.dtype not in INTEGERS:
        raise InputError(f"{name} is {given.dtype}, expected integers: torch.int64 or torch.int32")


def _floats(dense: Tensor, model: Any) -> Tensor:
    if not dense.is_floating_point():
        raise InputError(
            f"dense is {dense.dtype}, expected torch.float32; use dense.float() if these are the intended values"
        )
    own = next((weight for stack in model.stacks().values() for weight in stack.parameters()), None)
    return dense.to(torch.float32 if own is None else own.dtype)


def _check_bags(bags: Any, multi: int, samples: int, device: torch.device) -> None:
    if not isinstance(bags, Sequence):
        raise InputError(f"bags is a {type(bags).__name__}, expected a pair (values, offsets) per multi-valued table")
    if len(bags) != multi:
        raise InputError(f"bags has {len(bags)} entries, expected {multi}: one for each multi-valued table")
    for number, bag in enumerate(bags):
        if not isinstance(bag, Sequence) or len(bag) != 2:
            raise InputError(f"bags[{number}] is a {type(bag).__name__}, expected a pair (values [L], offsets [B])")
        for name, given in zip(("values", "offsets"), bag):
            _check_tensor(f"{name} of bags[{number}]", given, device)
            if given.dim() != 1:
                raise InputError(f"{name} of bags[{number}] is {given.dim()}-dimensional, expected one dimension")
            if name == "offsets" or len(given):
                _check_integers(f"{name} of bags[{number}]", given)
        if len(bag[1]) != samples:
            raise InputError(f"bags[{number}] has {len(bag[1])} offsets, expected {samples}: one per sample")
