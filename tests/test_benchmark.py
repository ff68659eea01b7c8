import json

import pytest
from conftest import write_folder

from ifp_mlx.benchmark import Timings, main, ratios, table


def test_ratios_are_taken_turn_by_turn():
    times = {
        "dense": Timings(prefill=[4.0, 8.0], decode=[6.0, 6.0]),
        "compact": Timings([1.0], [1.0], [2.0, 2.0], [3.0, 2.0]),
        "stock": Timings(prefill=[2.0, 1.0], decode=[3.0, 4.0]),
    }
    compared = ratios(times)
    assert compared["prefill speed, compact / dense"] == [2.0, 4.0]
    assert compared["decode speed, compact / stock"] == [1.0, 2.0]
    assert "| compact | 1.000 | 1.000 | 2.000 | 2.500 | 4.0 |" in table(times, 11)


def test_the_command_times_three_models_in_turns(tmp_path, capsys):
    folder = write_folder(tmp_path / "tiny")
    arguments = ["--model", str(folder), "--target-size", "16", "--turns", "2"]
    main([*arguments, "--prompt-tokens", "9", "--max-tokens", "3", "--json"])
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1])
    assert report["target_size"] == 16 and report["prompt_tokens"] == 9
    assert all(len(values) == 2 for values in report["ratios"].values())
    assert [len(v) for v in report["seconds"]["compact"].values()] == [2] * 4
    assert [len(v) for v in report["seconds"]["dense"].values()] == [0, 0, 2, 2]


def test_mistakes_are_one_line_and_exit_status_2(tmp_path, capsys):
    folder = str(write_folder(tmp_path / "tiny"))
    for mistake, sentence in (
        (["--max-tokens", "1"], "--max-tokens 1 at least 2"),
        (["--allocation", "first-layer"], "benchmark with --allocation uniform"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["--model", folder, *mistake])
        assert stop.value.code == 2 and sentence in capsys.readouterr().err
