"""The window: widgets, and what each of them asks the controller to do."""

import asyncio
from typing import Any

import toga
from toga.constants import COLUMN, ROW

from .controller import Controller

# The colours of the picture in the README: shared, this task's own, left out.
SHARED, OWN, LEFT_OUT = "#264653", "#e76f51", "#dfe3e6"
LEGEND = (
    "Kept channels, layer by layer. Dark: by every task; orange: not by every task."
)
KEEP_FROM, KEEP_AT, KEEP_TO, KEEP_STEP = 25, 75, 100, 5  # %, once it is moved


class ChatApp(toga.App):
    """A window on a :class:`Controller`.

    Args:
        model: a folder or hub id to open at the start.
        controller: default: a new one; a test gives its own.
    """

    def __init__(self, model: str = "", controller: Controller | None = None) -> None:
        self.controller = controller or Controller()
        self._model = model
        self._background: list[asyncio.Task[None]] = []
        self._drawn: dict[str, Any] = {}
        super().__init__("IFP Chat", "org.example.ifp_chat", app_name="ifp_chat")

    def startup(self) -> None:
        """Build the window."""
        self.controller.redraw = self.draw
        self.main_window = toga.MainWindow(title="IFP Chat", size=(1080, 620))
        columns = toga.Box(
            children=[self._left(), self._right()], direction=ROW, gap=16, flex=1
        )
        self.main_window.content = toga.Box(
            children=[self._top(), columns, self._bottom()],
            direction=COLUMN,
            gap=12,
            margin=14,
        )
        self.draw()
        self.main_window.show()

    def _top(self) -> toga.Box:
        self.model = toga.TextInput(
            value=self._model,
            placeholder="A model folder, or a Hugging Face Hub id",
            on_confirm=self.open,
            flex=1,
        )
        self.folder_button = toga.Button("Folder ...", on_press=self.choose_folder)
        self.open_button = toga.Button("Open", on_press=self.open)
        row = [toga.Label("Model"), self.model, self.folder_button, self.open_button]
        return toga.Box(children=row, direction=ROW, gap=8, align_items="center")

    def _left(self) -> toga.Box:
        self.table = toga.Table(
            columns=["Task", "Kept", "MB", "Where"],
            on_select=self.choose,
            flex=1,
        )
        self.name = toga.TextInput(placeholder="Name of the task")
        self.instruction = toga.MultilineTextInput(
            placeholder="The instruction: it selects the channels", height=64
        )
        self.keep = toga.Slider(
            min=KEEP_FROM,
            max=KEEP_TO,
            value=KEEP_AT,
            tick_count=(KEEP_TO - KEEP_FROM) // KEEP_STEP + 1,
            on_change=self.change_keep,
            flex=1,
        )
        self.keep_label = toga.Label("Keep auto", width=76)
        self.select_button = toga.Button("Select channels", on_press=self.select)
        self.tell = toga.Switch(
            "Tell the model the instruction, too", on_change=self.change_tell
        )
        keeping = [self.keep_label, self.keep, self.select_button]
        self.canvas = toga.Canvas(
            height=150, on_resize=lambda *_, **__: self._draw_bars()
        )
        children = [
            self.table,
            self.name,
            self.instruction,
            self.tell,
            toga.Box(children=keeping, direction=ROW, gap=8, align_items="center"),
            self.canvas,
            toga.Label(LEGEND, font_size=8),
        ]
        return toga.Box(children=children, direction=COLUMN, gap=8, width=430)

    def _right(self) -> toga.Box:
        self.transcript = toga.MultilineTextInput(readonly=True, flex=1)
        self.prompt = toga.TextInput(
            placeholder="Ask something", on_confirm=self.send, flex=1
        )
        self.send_button = toga.Button("Send", on_press=self.send)
        self.stop_button = toga.Button("Stop", on_press=self.stop)
        self.restart_button = toga.Button("New chat", on_press=self.restart)
        row = [self.prompt, self.send_button, self.stop_button, self.restart_button]
        asking = toga.Box(children=row, direction=ROW, gap=8, align_items="center")
        return toga.Box(
            children=[self.transcript, asking], direction=COLUMN, gap=8, flex=1
        )

    def _bottom(self) -> toga.Box:
        self.progress = toga.ProgressBar(max=1.0, width=160)
        self.status = toga.Label("", flex=1)
        self.figures = toga.Label("")
        self.unload_button = toga.Button("Unload", on_press=self.unload)
        row = [self.progress, self.status, self.figures, self.unload_button]
        return toga.Box(children=row, direction=ROW, gap=10, align_items="center")

    async def on_running(self) -> None:
        """Keep the window up to date from now on."""
        work = [self.controller.frames(), self.controller.watch_memory()]
        self._background = [asyncio.create_task(each) for each in work]
        if self._model:
            await self.controller.open(self._model)

    async def on_exit(self) -> bool:
        """End the engine before the app ends."""
        for task in self._background:
            task.cancel()
        await self.controller.close()
        return True

    async def choose_folder(self, widget: toga.Widget) -> None:
        """Ask for a model folder and open it."""
        dialog = toga.SelectFolderDialog("A model folder")
        folder = await self.main_window.dialog(dialog)
        if folder is not None:
            self.model.value = str(folder)
            await self.controller.open(str(folder))

    async def open(self, widget: toga.Widget) -> None:
        """Open what the field names."""
        if self.model.value.strip():
            await self.controller.open(self.model.value.strip())

    def choose(self, widget: toga.Widget) -> None:
        """Talk to the task of the selected row."""
        if widget.selection is not None:
            self.controller.choose(widget.selection.task)

    def change_keep(self, widget: toga.Widget) -> None:
        """Keep another share from the next selection on."""
        self.controller.keep = round(widget.value) / 100
        self.keep_label.text = f"Keep {widget.value:.0f} %"

    def change_tell(self, widget: toga.Widget) -> None:
        """Tell the model the instruction, or not, from the next conversation on."""
        self.controller.tell = widget.value

    async def select(self, widget: toga.Widget) -> None:
        """Select channels by the instruction in the field."""
        await self.controller.select(self.name.value, self.instruction.value)

    async def send(self, widget: toga.Widget) -> None:
        """Send the text in the field; it stays there if it cannot be sent now."""
        if self.controller.ready:
            text, self.prompt.value = self.prompt.value, ""
            await self.controller.say(text)

    def stop(self, widget: toga.Widget) -> None:
        """Stop the work in progress."""
        self.controller.stop()

    def restart(self, widget: toga.Widget) -> None:
        """Begin the conversation anew."""
        self.controller.restart()

    async def unload(self, widget: toga.Widget) -> None:
        """Give the memory back."""
        await self.controller.unload()

    def draw(self) -> None:
        """Show the controller's state; only widgets that differ are touched."""
        state = self.controller
        self._set(self.status, "text", state.status)
        self._set(self.figures, "text", figures(state))
        for button in (self.open_button, self.folder_button):
            self._set(button, "enabled", not state.busy)
        for button in (self.select_button, self.send_button, self.restart_button):
            self._set(button, "enabled", state.ready)
        self._set(self.unload_button, "enabled", state.ready)
        self._set(self.stop_button, "enabled", state.can_stop)
        self._draw_progress()
        self._draw_tasks()
        if self._set(self.transcript, "value", transcript(state)):
            self.transcript.scroll_to_bottom()
        self._draw_bars()

    def _set(self, widget: toga.Widget, name: str, value: Any) -> bool:
        key = f"{widget.id}.{name}"
        if self._drawn.get(key) == value:
            return False
        self._drawn[key] = value
        setattr(widget, name, value)
        return True

    def _draw_progress(self) -> None:
        fraction = self.controller.fraction
        self._set(self.progress, "max", None if fraction is None else 1.0)
        if fraction is not None:
            self._set(self.progress, "value", fraction)
        busy = self.controller.busy
        if self._drawn.get("busy") != busy:
            self._drawn["busy"] = busy
            self.progress.style.visibility = "visible" if busy else "hidden"
            self.progress.start() if busy else self.progress.stop()

    def _draw_tasks(self) -> None:
        rows = task_rows(self.controller)
        if self._drawn.get("rows") != rows:
            self._drawn["rows"] = rows
            for number, row in enumerate(rows):
                if number < len(self.table.data):
                    shown = self.table.data[number]
                    for name, value in row.items():
                        if getattr(shown, name) != value:
                            setattr(shown, name, value)
                else:
                    self.table.data.append(row)
        assignment = self.controller.assignment
        if self._drawn.get("assignment") != assignment.name:
            self._drawn["assignment"] = assignment.name
            self.name.value = assignment.name
            self.instruction.value = assignment.instruction

    def _draw_bars(self) -> None:
        shares = self.controller.shares()
        width, height = self._canvas_size()
        if self._drawn.get("bars") == (shares, width, height):
            return
        self._drawn["bars"] = (shares, width, height)
        canvas = self.canvas
        canvas.root_state.drawing_actions.clear()
        for number, (kept, common) in enumerate(shares):
            step = width / len(shares)
            for share, colour in ((1.0, LEFT_OUT), (kept, OWN), (common, SHARED)):
                canvas.begin_path()
                canvas.rect(
                    number * step, height * (1 - share), step * 0.8, height * share
                )
                canvas.fill(fill_style=colour)
        canvas.redraw()

    def _canvas_size(self) -> tuple[int, int]:
        layout = self.canvas.layout
        return layout.content_width, layout.content_height


def transcript(state: Controller) -> str:
    """Return the current conversation as text."""
    parts = [
        f"{line.speaker}\n{line.text}" + (f"\n({line.figures})" if line.figures else "")
        for line in state.assignment.lines
    ]
    return "\n\n".join(parts)


def figures(state: Controller) -> str:
    """Return speed and memory in a line."""
    parts = [f"{state.speed:.1f} tokens/s"] if state.speed else []
    if state.memory:
        parts.append(f"{state.memory['active'] / 1e6:.0f} MB in use")
    return "   ".join(parts)


def task_rows(state: Controller) -> list[dict[str, str]]:
    """Return the table's rows: what each task keeps, and where it is."""
    rows = []
    for assignment in state.assignments.values():
        task = assignment.task
        kept = mb = where = ""
        if task is not None:
            kept = f"{task.kept_channels / task.total_channels:.0%}"
            mb = f"{task.bytes / 1e6:.0f}"
            where = "memory" if task.resident else "disk"
        rows.append({"task": assignment.name, "kept": kept, "mb": mb, "where": where})
    return rows
