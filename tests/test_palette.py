"""Pictures: six colours at most, and a policy looks the same in all of them."""
import shutil
from pathlib import Path

import matplotlib.colors
import matplotlib.figure
import pytest

import pykvc
from evals import palette, panels, report, study

ROOT = Path(__file__).parent.parent


def test_every_policy_has_a_look_of_its_own():
    looks = {policy["name"]: palette.look(policy["name"]) for policy in pykvc.policies()}
    assert len({tuple(map(str, look.values())) for look in looks.values()}) == len(looks)
    colours = {look["color"] for look in looks.values()} - {palette.FULL}
    assert colours == set(palette.COLOURS) and len(colours) == 6 and palette.OTHER not in colours
    assert palette.look("snapkv:window=8 0.5") == looks["snapkv"]
    assert palette.look("my_own")["color"] == palette.OTHER  # a policy in Python


def test_nth_repeats_colours_with_another_line():
    looks = [palette.nth(i) for i in range(20)]
    assert len({look["color"] for look in looks}) == 6 and len({(look["color"], str(look["linestyle"])) for look in looks}) == 20


@pytest.mark.parametrize("name", ["3-many-shot", "7-pareto"])
def test_pictures_of_the_archived_answers(name, tmp_path, monkeypatch):
    shutil.copytree(ROOT/"docs/results"/name, tmp_path/name)
    drawn: list[tuple[str, str]] = []

    def look_at(figure, path, **_):
        for axes in figure.axes:
            drawn.extend((line.get_label(), matplotlib.colors.to_hex(line.get_color()).upper()) for line in axes.get_lines())
            drawn.extend((container.get_label(), matplotlib.colors.to_hex(container[0].get_color()).upper()) for container in axes.containers)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", look_at)
    rows = report.scored(tmp_path/name)
    lines = report.table(rows)
    assert panels.draw(tmp_path, study.read(name).blocks["picture"], lines) and panels.draw_report(tmp_path, rows, lines)
    known = {policy["name"] for policy in pykvc.policies()}
    named = {(label, colour) for label, colour in drawn if label.partition(" ")[0].partition(":")[0] in known}
    assert len(named) > 4 and {(label, palette.look(label)["color"]) for label, _ in named} == named
    assert {colour for _, colour in drawn} <= {*palette.COLOURS, palette.FULL, palette.OTHER, palette.QUIET}
