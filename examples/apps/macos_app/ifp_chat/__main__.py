"""Run the app: ``python -m ifp_chat [MODEL]``."""

import sys

from .app import ChatApp

if __name__ == "__main__":
    ChatApp(model=sys.argv[1] if len(sys.argv) > 1 else "").main_loop()
