"""Every public function and method has types: of its parameters and of what it returns."""

import inspect

import pytest

import ms_diffusion as md


def functions(value):
    """The function, or the public methods that a class defines itself, with its constructor."""
    if inspect.isfunction(value):
        yield value
    elif inspect.isclass(value):
        for name, member in vars(value).items():
            member = getattr(member, "__func__", member)
            if inspect.isfunction(member) and (name == "__init__" or not name.startswith("_")):
                yield member


@pytest.mark.parametrize("name", md.__all__)
def test_public_functions_have_types(name):
    for function in functions(getattr(md, name)):
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
        missing = [p.name for p in parameters if p.annotation is p.empty]
        if "return" not in function.__annotations__ and function.__name__ != "__init__":
            missing.append("return")
        assert not missing, f"{function.__module__}.{function.__qualname__}: {', '.join(missing)}"
