import pytest

from ifp_mlx.files.companions import licence_of


@pytest.mark.parametrize(
    "text", ["---\nlicense: mit\n---\n# x\n", "\ufeff---\r\nlicense: mit\r\n---\r\n"]
)
def test_the_licence_is_what_the_card_names(text, tmp_path):
    (tmp_path / "README.md").write_text(text, encoding="utf-8", newline="")
    assert licence_of(tmp_path) == "mit"


def test_a_name_counts_whatever_else_the_card_says(tmp_path):
    card = "---\nlicense: mit\nmodel-index:\n- name: x\n  results:\n  - task: {}\n---\n"
    (tmp_path / "README.md").write_text(card)
    assert licence_of(tmp_path) == "mit"


@pytest.mark.parametrize(
    "card",
    [
        b"",
        b"# hello\n",
        b"---\njust text\n---\n",
        b"---\nlicense:\n- mit\n- apache-2.0\n---\n",
        b"---\nlicense: 2.0\n---\n",
        b"---\nlicense: null\n---\n",
        b"---\nlicense: apache: 2.0\n---\n",
        b"---\nlicense:\tmit\n\ttags: x\n---\n",
        b"---\nlicense: mit\n---\ncaf\xe9\n",
    ],
)
def test_no_card_stands_in_the_way_of_what_it_comes_with(card, tmp_path):
    (tmp_path / "README.md").write_bytes(card)
    assert licence_of(tmp_path) is None


def test_a_folder_in_place_of_a_card_is_no_card(tmp_path):
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").mkdir()
    assert licence_of(tmp_path) is None
