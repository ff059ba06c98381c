"""How the compiled kernels are called: what each operation takes, and the prototypes."""

from ctypes import c_float, c_int, c_int64, c_uint32, c_void_p
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from dqrm.kernels.build import library
from dqrm.kernels.layout import Tiers, Weight

_PLAIN = (Tensor, nn.Parameter)
_F32, _I64, _U8 = (torch.float32,), (torch.int64,), (torch.uint8,)
_FLOATS, _IDS = (torch.float32, torch.bfloat16), (torch.int64, torch.int32)
_ROWS = (*_FLOATS, torch.int8, torch.uint8)
_STORED = (torch.int8, torch.bfloat16, torch.float32)
# Valid tensors of each operation, in the order in which `kernels` passes them to `takes`.
_DTYPES: dict[str, Any] = {
    "lookup": (_IDS, _ROWS, _F32),
    "lookup_packed": (_IDS, _U8, _F32, (torch.int32,)),
    "add_rows": (_F32, _I64, _F32, _F32),
    "add_rows_stochastic": ((torch.bfloat16, torch.int8), _I64, _F32, _F32),
    "encode_int8_rows": (_F32, (torch.int8,)),
    "update_tiers": (_U8, _I64, _F32, _F32),
    "encode_tiers": (_F32, _U8),
    "sum_duplicates": (_I64, _F32),
    "raise_scales": (_I64, _ROWS, _F32, _I64),
    "blocks_max": (_ROWS, _U8, _F32),
    "idle_adam": (_F32, _F32, _F32, (torch.int32,), _I64, _F32, _F32, _F32),
    "adam_moments": (_F32, _F32, _I64, _F32),
    "quantize_weights": repeat(_F32),
    "finish_linear": ((torch.bfloat16,), _F32, _F32),
    "start_linear": (_FLOATS, _FLOATS, _F32),
    "interact": (_FLOATS, _F32),
    "block_scales": (_F32, _F32, _I64),
    "quantize_blocks": (_F32, _F32, _I64, _F32, (torch.int8,)),
    "cast_blocks": (_F32, _F32, _I64, _FLOATS),
    "decode_blocks": (_F32, _STORED, _I64, _F32),
    "pack_nibbles": ((torch.int8,),),
    "unpack_nibbles": (_U8,),
    "encode_rows": (_I64, _F32, _F32, _I64),
    "decode_rows": (_U8, _I64),
    "pack_rows": (_F32,),
    "unpack_rows": (_U8,),
}


def takes(operation: str, *tensors: Weight | None) -> bool:
    """Whether these are on the CPU, contiguous and of the operation's dtypes, and the library is available."""
    for given, dtypes in zip(tensors, _DTYPES[operation]):
        tensor = given.cold if isinstance(given, Tiers) else given
        if tensor is not None and not (
            type(tensor) in _PLAIN and tensor.is_cpu and tensor.dtype in dtypes and tensor.is_contiguous()
        ):
            return False
    return library() is not None


# Each kernel's arguments, then what it returns: pointer, int, 64-bit int, float, 32-bit unsigned, nothing.
_TYPES: dict[str, Any] = {"p": c_void_p, "i": c_int, "l": c_int64, "f": c_float, "u": c_uint32, "-": None}
_PROTOTYPES = {
    "lookup": "pillppppilpiippppipplpii l",
    "lookup_packed": "pillpppilpppipi l",
    "outside": "plli l",
    "add_rows": "plpplfplpippii -",
    "add_rows_stochastic": "plpplfuplpippii -",
    "add_rows_int8": "plpplfuplpippii i",
    "encode_int8": "pllpi -",
    "update_tiers": "ppppllpplfupplpippii i",
    "encode_tiers": "pllppi -",
    "sum_duplicates": "ppllpppi l",
    "raise_scales": "plplppilpippii -",
    "blocks_max": "ppilllppi u",
    "idle_adam": "pppplplllpplpplfffffffpi l",
    "adam_moments": "pplplpffffffi -",
    "quantize_weights": "pplppi -",
    "finish_linear": "pllplpii -",
    "start_linear": "ppillplpppi -",
    "interact": "piplllipli i",
    "interact_backward": "ppiplllilppi i",
    "block_scales": "pplpppipi -",
    "quantize_blocks": "pplpppppiiiupi -",
    "cast_blocks": "pplppppiiupi -",
    "decode_blocks": "piplppppii -",
    "pack_nibbles": "plpi -",
    "unpack_nibbles": "plpi -",
    "encode_rows": "ppllppliiipiuppi i",
    "decode_rows": "pllppliiippi i",
    "pack_rows": "plliiiupi -",
    "unpack_rows": "plliipi -",
}
_functions: dict[str, Any] = {}


def call(name: str, *arguments: Any) -> Any:
    """One kernel; tensors are passed as pointers, None as a null pointer."""
    function = _functions.get(name)
    if function is None:
        function = getattr(library(), f"dqrm_{name}")
        arguments_of, result = _PROTOTYPES[name].split()
        function.argtypes, function.restype = [_TYPES[letter] for letter in arguments_of], _TYPES[result]
        _functions[name] = function  # last: another thread may take it at once
    return function(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments], torch.get_num_threads())
