"""What can go wrong in the engine, as types that an app can tell apart.

    IFPError
    ├── ModelNotFound (FileNotFoundError)   no such folder, hub id or mask file
    ├── IncompatibleModel (ValueError)      damaged, unsafe or unsupported files
    ├── InvalidRequest (ValueError)         a choice that cannot be had
    │   ├── UnknownTask                     no task of that name is prepared
    │   └── ContextTooLong                  prompt and answer do not fit the context
    ├── OutOfMemory (MemoryError)           would exceed the engine's memory limit
    ├── CheckFailed (OSError)               the whole model could not be read to check
    ├── Busy                                too many requests are waiting
    ├── Cancelled                           stopped by its CancelToken
    └── EngineClosed (RuntimeError)         closed, or its worker has died

Apps import them from :mod:`ifp_mlx.engine`. Every message is a sentence for the user:
the fact, the value, the remedy. An error with a builtin beside it is also that builtin,
so code that calls the package's plain functions can catch the same errors.
"""


class IFPError(Exception):
    """The base of every error that an :class:`~ifp_mlx.engine.Engine` raises."""


class ModelNotFound(IFPError, FileNotFoundError):
    """There is no such model folder, hub id or mask file."""


class IncompatibleModel(IFPError, ValueError):
    """The files are damaged, unsafe, of another model or of an unsupported type."""


class InvalidRequest(IFPError, ValueError):
    """A request asks for what cannot be had."""


class UnknownTask(InvalidRequest):
    """No task of that name has been prepared."""


class ContextTooLong(InvalidRequest):
    """The prompt and the answer together are longer than the model's context."""


class OutOfMemory(IFPError, MemoryError):
    """What was asked for would exceed the engine's memory limit."""


class CheckFailed(IFPError, OSError):
    """The whole model could not be read in the midst of an answer that it checks."""


class Busy(IFPError):
    """Too many requests are waiting already."""


class Cancelled(IFPError):
    """The work was stopped by its :class:`~ifp_mlx.engine.CancelToken`."""


class EngineClosed(IFPError, RuntimeError):
    """The engine was closed, or its worker has died."""
