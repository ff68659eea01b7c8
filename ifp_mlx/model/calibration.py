"""The package's calibration text, in a model's tokens."""

from ..selection import calibration
from .checkpoint import IFPModel

TEXTS, TOKENS = 6, 96


def calibration_texts(model: IFPModel) -> list[list[int]]:
    """Return the token ids of a few calibration chats, cut to one length."""
    chats = calibration.calibration_chats()
    texts = []
    for chat in chats[:: len(chats) // TEXTS][:TEXTS]:
        # Some chat templates know no system message.
        turns = [message for message in chat if message["role"] != "system"]
        texts.append(model.tokens_of(turns))
    shortest = min(TOKENS, *map(len, texts))
    return [text[:shortest] for text in texts]
