"""The calibration text is as long as memory is reckoned for."""

from ifp_mlx.selection.calibration import CHATS, calibration_chats


def test_there_are_as_many_dialogues_as_are_reckoned_with():
    chats = calibration_chats()
    assert len(chats) == CHATS
    assert all(chat[-1]["content"].strip() for chat in chats)
