# MindSpore has no type stubs, and what pyright infers from its source is wrong in places: everything in it is Any.
from typing import Any

def __getattr__(name: str) -> Any: ...
