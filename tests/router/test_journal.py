import csv
import json
import struct

import pytest
import torch

import tiny_moe
from tether.errors import ConfigError
from tether.router import RouteJournal, RoutingShaper
from tether.router.journal import routing_png


@pytest.fixture
def report(moe):
    with RoutingShaper(moe, form="none") as shaper, torch.no_grad():
        moe(input_ids=tiny_moe.tokens())
        return shaper.report(torch.tensor([0, 0, 1, 1]))


def test_rows_of_csv_and_lines_of_json_hold_the_report(report, tmp_path):
    for suffix in ("csv", "jsonl"):
        for step in (5, 10):
            # Opened again, as a resumed run does.
            RouteJournal(tmp_path / f"log.{suffix}").append(step, report)
    with (tmp_path / "log.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], row["layer"]) for row in rows] == [
        (str(line["step"]), line["layer"]) for line in lines
    ]
    assert len(rows) == 6
    for row, line in zip(rows, lines, strict=True):
        assert float(row["nrmi"]) == pytest.approx(line["nrmi"])
    assert len(lines[0]["gates"]) == 2


def test_another_file_is_not_appended_to(tmp_path):
    with pytest.raises(ConfigError, match=r"\.csv or \.jsonl"):
        RouteJournal(tmp_path / "log.txt")
    (tmp_path / "log.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="columns 'a,b'"):
        RouteJournal(tmp_path / "log.csv")


def test_the_figure_has_a_row_a_layer(report):
    png = routing_png(report, ["law", "code"])
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    wide, high = struct.unpack(">II", png[16:24])
    one = routing_png(report | {"layers": dict(list(report["layers"].items())[:1])})
    assert (wide, high) > struct.unpack(">II", one[16:24])
    with pytest.raises(ConfigError, match="1 names for 2 tasks"):
        routing_png(report, ["law"])
