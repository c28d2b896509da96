"""A stand-in for ModelArts' moxing: the functions of moxing.file that the package uses, on folders of this machine."""

from . import file  # noqa: F401
