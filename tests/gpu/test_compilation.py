"""Triton compiles the kernels for GPUs that are not here: what the interpreter accepts and a GPU does not."""

import os
import subprocess
import sys

_COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from workers.kernels.triton import append, attend, merge, tiling

def check(kernel, types, constants, **options):
    types = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(place,): [["tt.divisibility", 16]]
               for place, type_name in enumerate(types.values()) if type_name.startswith("*")}
    source = ASTSource(kernel, types, constants, aligned)
    compiled = compile(source, target=GPUTarget("cuda", ARCHITECTURE, 32), options=options)
    assert compiled.metadata.shared <= SHARED_BYTES, (kernel.__name__, constants, compiled.metadata.shared)
    assert "tf32" not in compiled.asm["ptx"], (kernel.__name__, constants)
    assert compiled.asm["cubin"]

INTEGERS = ("key_stride", "value_stride", "window", "kv_heads", "slots_end")
TYPES = dict.fromkeys(("partial_out", "partial_lse", "out", "lse"), "*fp32")
TYPES |= dict.fromkeys(("items", "tables", "rows"), "*i32") | dict.fromkeys(INTEGERS, "i32")
TYPES |= {"scale": "fp32", "slots": "*i64"}
for name, element_bytes, head_size in (("fp32", 4, 256), ("bf16", 2, 80)):
    types = TYPES | dict.fromkeys(("query", "key", "value", "cache_key", "cache_value"), "*" + name)
    shape = {"GROUP": 4, "HEAD_SIZE": head_size, "HEAD_PADDED": tiling.padded(head_size)}
    for rows, block_tokens in ((tiling.ROWS_FEW, 32), (tiling.ROWS_MANY, 0)):
        constants = {"KV_HEADS": 2, "BLOCK_TOKENS": block_tokens, "ROWS": rows, "WIDEN": False}
        constants |= {"PRECISE": name == "fp32", "SLOTS": tiling.slots_of(head_size, element_bytes)}
        options = {"num_warps": tiling.warps_of(rows), "num_stages": tiling.stages_of(rows)}
        check(attend._attend_tiles, types, shape | constants, enable_fp_fusion=True, **options)
    check(append._append_row, types, {"ROW_ELEMENTS": 480, "ELEMENTS": 1024}, enable_fp_fusion=True)
check(merge._merge_row, TYPES, shape | {"PARTS": 16}, enable_fp_fusion=True)
"""


def test_kernels_compile_for_ampere_and_hopper() -> None:
    """Every kernel becomes machine code within the shared memory of a block, without TF32."""
    without_interpreter = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    for architecture, shared_bytes in ((80, 163 * 1024), (90, 227 * 1024)):
        code = f"ARCHITECTURE, SHARED_BYTES = {architecture}, {shared_bytes}\n{_COMPILE}"
        subprocess.run([sys.executable, "-W", "error", "-c", code], env=without_interpreter, check=True)
