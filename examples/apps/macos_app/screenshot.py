"""Run the app by itself, ask it something, and save a picture of its window.

    TOGA_BACKEND=toga_qt QT_QPA_PLATFORM=offscreen \\
        python examples/apps/macos_app/screenshot.py --model models/smollm2 --output OUT.png

It prints what it saw as JSON: the answers, and what the widgets showed.
"""

import argparse
import asyncio
import json
from typing import Any

from ifp_chat.app import ChatApp

ASK = {
    "Facts": "What is the capital of France?",
    "Code": "Write a Python function that adds two numbers.",
}


class Demonstration(ChatApp):
    """The app, pressing its own buttons.

    Args:
        output: where to write the PNG.
        max_tokens: of each answer.
    """

    def __init__(self, model: str, output: str, max_tokens: int) -> None:
        self.output, self.max_tokens = output, max_tokens
        self.seen: dict[str, Any] = {}
        super().__init__(model)

    async def on_running(self) -> None:
        """Open, select, ask, save, leave."""
        try:
            await super().on_running()
            for name, question in ASK.items():
                self.controller.choose(name)
                await self.controller.say(question, max_tokens=self.max_tokens)
            await asyncio.sleep(0.5)  # the last frame
            self.main_window.as_image().save(self.output)
            task = self.controller.assignment.task
            assert task is not None
            self.seen = {
                "status": self.status.text,
                "figures": self.figures.text,
                "transcript": self.transcript.value,
                "rows": [[r.task, r.kept, r.mb, r.where] for r in self.table.data],
                "shares": self.controller.shares(),
                "widths": task.widths,
                "channels": task.channels,
            }
        finally:
            self.request_exit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--max-tokens", type=int, default=120)
    args = parser.parse_args()
    app = Demonstration(args.model, args.output, args.max_tokens)
    app.main_loop()
    print(json.dumps(app.seen))


if __name__ == "__main__":
    main()
