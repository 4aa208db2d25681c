"""Published traces by name: the file itself where somebody has it, else the fit that is shipped."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER_VARIABLE = "ANABRANCH_TRACES"
"""Environment variable that names a folder of published traces."""

_FILES = {
    "azure-conv": "AzureLLMInferenceTrace_conv.csv",
    "azure-code": "AzureLLMInferenceTrace_code.csv",
    "kimi-conv": "mooncake_conversation_trace.jsonl",
}


def file_of(name: str) -> Path | None:
    """The file of a named workload, as its owner calls it; None where it is not there."""
    folder, file = os.environ.get(FOLDER_VARIABLE), _FILES.get(name)
    path = Path(folder) / file if folder and file else None
    return path if path is not None and path.is_file() else None
