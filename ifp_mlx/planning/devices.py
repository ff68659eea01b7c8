"""Named devices: how fast their memory, their storage and their arithmetic are.

No figure here was measured by us. Each one says where it comes from:

- ``vendor``: the maker's own, a peak;
- ``third-party``: somebody measured, or keeps a data base;
- ``derived``: by the arithmetic that the source gives from one of the two;
- ``assumed``: nobody said; taken from the nearest relative that the source names.

How much of the peaks a program gets is a matter of the program, and so a
:class:`Runtime` of its own, with one constant for each phase.
"""

import difflib
from dataclasses import dataclass
from typing import Literal

Kind = Literal["vendor", "third-party", "derived", "assumed", "measured"]


@dataclass(frozen=True)
class Figure:
    """A number and where it comes from."""

    value: float
    kind: Kind
    source: str


@dataclass(frozen=True)
class Runtime:
    """What a program makes of a device's peaks.

    Attributes:
        prefill: share of the peak arithmetic that the prompt gets.
        decode: share of the peak memory bandwidth that decoding gets.
        load: share of the peak memory bandwidth that copying channels gets, which
            are read and written.
        layer_seconds: what a layer of a forward pass takes however small it is:
            kernels are started one by one.
        source: of these four.
    """

    prefill: float
    decode: float
    load: float
    layer_seconds: float
    source: str


# Prefill from Apple's M4 and M5 (Apple Machine Learning Research, "Exploring LLMs with
# MLX and the Neural Accelerators in the M5 GPU", as applemust.com and particle.news
# report it): 4096 tokens through Qwen3-14B at 4 bits in about 36 s and 8 to 10 s are
# 0.85 and 0.65 to 0.8 of the peaks below. Decoding: locara.dev finds 0.70 to 0.85 of
# the memory's peak usual. That the prompt had 4096 tokens has not been checked. The
# other two are guesses: --device here measures them.
MLX = Runtime(
    prefill=0.75,
    decode=0.75,
    load=0.5,
    layer_seconds=5e-5,
    source="prefill from Apple's M4 and M5 figures, decode from locara.dev; "
    "load and layer are assumed",
)
# The paper's script, PyTorch with one kernel after the other. Fitted once, to all rows
# of Table 3 together (examples/guides/plan.md shows what is left over).
PYTORCH = Runtime(
    prefill=0.58,
    decode=1.0,
    load=0.25,
    layer_seconds=9e-4,
    source="fitted to the paper's Table 3 as a whole",
)


@dataclass(frozen=True)
class Device:
    """A profile.

    Attributes:
        name: what ``--device`` takes.
        about: in words.
        memory: bytes per second to and from memory.
        storage: bytes per second from storage, read in sequence; ``None``: weights
            are not loaded from there.
        compute: half-precision operations per second (a multiplication and an
            addition are two).
        runtime: what a program gets of these.
    """

    name: str
    about: str
    memory: Figure
    storage: Figure | None
    compute: Figure
    runtime: Runtime = MLX


APPLE = "Apple's figure for this chip, as the press reports it"
M1_M1 = "Apple, M1 Max has 'nearly six times' the M1's: LPDDR4X-4266 on 128 bits"
CORES = "GPU cores x 128 units x 2 operations x clock, hmc-tech.com"
THREAD = "the chip table at macrumors.com, thread 2471322"
ACCELERATORS = (
    "T. Zakharko, Investigating the GPU Neural Accelerators on Apple A19/M5: 1024 "
    "operations per core and cycle, 40 cores 70 TFLOPS"
)
MINI = "Blackmagic on a Mac mini with 256 GB, applech2.com, 10 Nov 2024"
BLACKMAGIC = "Blackmagic on a MacBook Pro, Macworld and Tom's Guide by webinfobuzz.com"


def _apple(
    name: str,
    about: str,
    memory: tuple[float, Kind, str],
    storage: tuple[float, Kind, str],
    compute: tuple[float, Kind, str],
) -> Device:
    """Return a profile from GB/s, GB/s and TFLOPS."""
    (gbs, kind, why), (disk_gbs, disk_kind, disk_why) = memory, storage
    tflops, compute_kind, compute_why = compute
    return Device(
        name,
        about,
        Figure(gbs * 1e9, kind, why),
        Figure(disk_gbs * 1e9, disk_kind, disk_why),
        Figure(tflops * 1e12, compute_kind, compute_why),
    )


_PROFILES = (
    _apple(
        "m1",
        "Apple M1, 8 GPU cores, 256 GB SSD",
        (68.3, "derived", M1_M1),
        (2.75, "third-party", MINI),
        (2.6, "third-party", THREAD),
    ),
    _apple(
        "m1-pro",
        "Apple M1 Pro, 16 GPU cores, 1 TB SSD",
        (200, "vendor", APPLE),
        (5.80, "third-party", BLACKMAGIC),
        (5.3, "derived", CORES),
    ),
    _apple(
        "m1-max",
        "Apple M1 Max, 32 GPU cores",
        (400, "vendor", APPLE),
        (5.80, "assumed", "as m1-pro"),
        (10.6, "derived", CORES),
    ),
    _apple(
        "m1-ultra",
        "Apple M1 Ultra, 64 GPU cores",
        (800, "vendor", APPLE),
        (5.80, "assumed", "as m1-pro"),
        (21.2, "derived", CORES),
    ),
    _apple(
        "m2",
        "Apple M2, 10 GPU cores, 256 GB SSD",
        (100, "vendor", APPLE),
        (1.46, "third-party", MINI),
        (3.55, "third-party", THREAD),
    ),
    _apple(
        "m2-pro",
        "Apple M2 Pro, 19 GPU cores, 2 TB SSD",
        (200, "vendor", APPLE),
        (5.37, "third-party", BLACKMAGIC),
        (6.75, "derived", "m2, by GPU cores"),
    ),
    _apple(
        "m2-max",
        "Apple M2 Max, 38 GPU cores",
        (400, "vendor", APPLE),
        (5.37, "assumed", "as m2-pro"),
        (13.5, "derived", "m2, by GPU cores"),
    ),
    _apple(
        "m2-ultra",
        "Apple M2 Ultra, 76 GPU cores",
        (800, "vendor", APPLE),
        (5.37, "assumed", "as m2-pro"),
        (27.0, "derived", "m2, by GPU cores"),
    ),
    _apple(
        "m3",
        "Apple M3, 10 GPU cores, 256 GB SSD",
        (100, "vendor", APPLE),
        (2.88, "third-party", "Blackmagic on a MacBook Air, Max Tech by imore.com"),
        (3.58, "third-party", CORES),
    ),
    _apple(
        "m3-pro",
        "Apple M3 Pro, 18 GPU cores",
        (150, "vendor", APPLE),
        (5.37, "assumed", "as m2-pro"),
        (6.44, "third-party", CORES),
    ),
    _apple(
        "m3-max",
        "Apple M3 Max, 40 GPU cores",
        (400, "vendor", APPLE),
        # The 17.5 GB/s that flash-moe reports is more than any Mac's SSD: the cache.
        (5.37, "assumed", "as m2-pro"),
        (14.3, "third-party", CORES),
    ),
    _apple(
        "m3-ultra",
        "Apple M3 Ultra, 80 GPU cores",
        (819, "vendor", APPLE),
        (5.37, "assumed", "as m2-pro"),
        (28.6, "derived", "two m3-max"),
    ),
    _apple(
        "m4",
        "Apple M4, 10 GPU cores, 256 GB SSD",
        (120, "vendor", APPLE),
        (2.79, "third-party", MINI),
        (3.76, "third-party", CORES),
    ),
    _apple(
        "m4-pro",
        "Apple M4 Pro, 20 GPU cores",
        (273, "vendor", APPLE),
        (5.37, "assumed", "as m2-pro"),
        (7.53, "derived", f"16 cores at 6.02: {CORES}"),
    ),
    _apple(
        "m4-max",
        "Apple M4 Max, 40 GPU cores, 4 TB SSD",
        (546, "vendor", APPLE),
        (7.3, "derived", "The Verge: the M5 Max reads 13.6 GB/s, 86 % faster"),
        (17.2, "derived", f"32 cores at 13.74: {CORES}"),
    ),
    _apple(
        "m5",
        "Apple M5, 10 GPU cores with neural accelerators",
        (153, "vendor", APPLE),
        (6.32, "third-party", "Blackmagic on a MacBook Pro, Max Tech by worldnl.com"),
        (17.5, "derived", ACCELERATORS),
    ),
    _apple(
        "m5-pro",
        "Apple M5 Pro, 20 GPU cores with neural accelerators",
        (307, "vendor", APPLE),
        (14.5, "vendor", "Apple's announcement of 3 March 2026, 'up to'"),
        (35.0, "derived", ACCELERATORS),
    ),
    _apple(
        "m5-max",
        "Apple M5 Max, 40 GPU cores with neural accelerators, 4 TB SSD",
        (614, "vendor", APPLE),
        (13.6, "third-party", "The Verge, 16-inch MacBook Pro"),
        (70.0, "third-party", ACCELERATORS),
    ),
    _apple(
        "iphone-17-pro",
        "iPhone 17 Pro, A19 Pro, 6 GPU cores with neural accelerators, 256 GB",
        (75.8, "third-party", "a chip table at partofstyle.com; 9600 MT/s on 64 bits"),
        (1.6, "third-party", "AnTuTu results that leaked; 3.2 with 512 GB or more"),
        (9.0, "derived", "5 cores of the A19 measured at 7.5: T. Zakharko"),
    ),
    _apple(
        "ipad-m4",
        "iPad Pro, M4, 10 GPU cores",
        (120, "vendor", APPLE),
        (1.6, "assumed", "as iphone-17-pro"),
        (3.76, "third-party", CORES),
    ),
    Device(
        "rtx-a6000",
        "NVIDIA RTX A6000, the paper's; all weights stay in its memory",
        Figure(768e9, "vendor", "NVIDIA's data sheet, by servethehome.com"),
        None,
        Figure(154.8e12, "derived", "NVIDIA's 309.7 are with sparsity: half of that"),
        PYTORCH,
    ),
)
DEVICES = {device.name: device for device in _PROFILES}


def find(name: str) -> Device:
    """Return a profile by its name.

    Raises:
        ValueError: if there is none, with the names that are near or all of them.
    """
    key = name.lower().replace(" ", "-").replace("_", "-")
    if key in DEVICES:
        return DEVICES[key]
    near = difflib.get_close_matches(key, DEVICES, 3)
    raise ValueError(
        f"There is no device profile {name!r}; use {', '.join(near or DEVICES)}, or "
        "here, which measures this machine."
    )
