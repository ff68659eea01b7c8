"""A model for apps: one thread owns MLX, callers on any thread get plain events."""

from ..selection.request import Request
from .calling import Calling
from .chat import Chat
from .dialect import Call, Dialect
from .engine import Engine
from .errors import (
    Busy,
    Cancelled,
    CheckFailed,
    ContextTooLong,
    EngineClosed,
    IFPError,
    IncompatibleModel,
    InvalidRequest,
    ModelNotFound,
    OutOfMemory,
    UnknownTask,
)
from .events import CancelToken, Done, Event, Progress, Task, Token
from .sampling import Sampling

__all__ = [
    "Busy",
    "Call",
    "Calling",
    "CancelToken",
    "Cancelled",
    "Chat",
    "CheckFailed",
    "ContextTooLong",
    "Dialect",
    "Done",
    "Engine",
    "EngineClosed",
    "Event",
    "IFPError",
    "IncompatibleModel",
    "InvalidRequest",
    "ModelNotFound",
    "OutOfMemory",
    "Progress",
    "Request",
    "Sampling",
    "Task",
    "Token",
    "UnknownTask",
]
