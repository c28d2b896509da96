# Huawei ModelArts has this module, and nobody else.
from typing import Any

def __getattr__(name: str) -> Any: ...
