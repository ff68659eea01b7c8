"""An engine's progress as named bars on standard error."""

from tqdm import tqdm

from ..engine import Event, Progress
from ..files.progress import CALIBRATION, CARD, announce

NAMES = {
    "download": "downloading",
    "load": "opening",
    "card": CARD,
    "calibrate": CALIBRATION,
    "select": "selecting",
    "channels": "loading",
    "prefill": "reading",
}
SOON = {
    "prefill": 0.3
}  # seconds; a stage that every answer has is shown only if it takes longer


class Bars:
    """Shows one bar at a time on a terminal; elsewhere it names the work that the user
    did not ask for.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._stage = ""

    def __call__(self, event: Event) -> None:
        """Show how far a stage is; any other event ends it."""
        stage = event.stage if isinstance(event, Progress) else ""
        if stage != self._stage:
            self.close()
        if not isinstance(event, Progress) or stage not in NAMES:
            return
        total = event.total or None
        if self._bar is None:
            if NAMES[stage] in (CALIBRATION, CARD):
                announce(NAMES[stage])
            size = {"unit": "B", "unit_scale": True} if stage == "download" else {}
            how = {"disable": None, "leave": False, "delay": SOON.get(stage, 0)} | size
            self._bar, self._stage = tqdm(desc=NAMES[stage], total=total, **how), stage
        self._bar.total = total
        self._bar.update(event.done - self._bar.n)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._stage = None, ""
