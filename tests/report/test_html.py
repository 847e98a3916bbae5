import re
from html.parser import HTMLParser

import pytest

from tether.errors import ConfigError
from tether.report.html import markdown_table, render, write_report
from tether.report.table import change_text, main_table, nats_text
from tether.report.verdict import budget_lines, checks, sentence

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Collects text and attributes, and sees that every element is closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.tags, self.attributes, self.pre = [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "pre":
            self.pre.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "pre" in self.open:
            self.pre[-1] += data
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def html(run):
    return render(*run)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_every_section_is_there_in_order(page):
    order = [
        "Two domains & a <leash>",
        "Results",
        "Budget",
        "Figures",
        "Certificate",
        "What it does not claim",
    ]
    order += ["Generated text", "Cost", "What is not claimed", "Versions"]
    places = [page.words.index(title) for title in order]
    assert places == sorted(places)
    assert page.tags.count("svg") == 8


def test_every_figure_of_the_main_table_is_there(page, run):
    for group in main_table(run[0]):
        assert group.title in page.words
        for row in group.rows:
            for cell in row.cells:
                assert cell.value in page.words
                assert cell.note in page.words
    for text in ("2.740", "2.440 −0.300", "2.710 ▲ +0.500", "<1e-6", "0.046", "0.0489", "97.8%"):
        assert text in page.words
    for text in ("48.2", "1,000.0", "1,048.2", "2.10 GB", "950 MB", "needs 59 documents", "at most 0.012"):
        assert text in page.words


def test_samples_are_escaped_and_keep_their_whitespace(page, html):
    assert "<script" not in html
    assert "script" not in page.tags
    # A parser of HTML drops one line break right after <pre>.
    assert [text.removeprefix("\n") for text in page.pre] == [
        "tether verify certificate.json", "<script>alert(1)</script>", "\n  two\n", "b </pre>"
    ]  # fmt: skip


def test_nothing_is_loaded_from_elsewhere(page, html):
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    links = [
        value for key, value in page.attributes if key in {"src", "href", "xlink:href", "action", "data"}
    ]
    assert all(value.startswith("#") for value in links)
    named = re.sub(r'xmlns(:xlink)?="http://www\.w3\.org/[a-z0-9/]+"', "", html)
    assert "http" not in named
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    ids = [value for key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))


def test_the_file_is_the_page_and_the_same_twice(tmp_path, run, html):
    path = write_report(tmp_path / "made" / "report.html", *run)
    assert path == tmp_path / "made" / "report.html"
    assert path.read_bytes() == html.encode()
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_nothing_is_written_when_keys_are_missing(tmp_path, results, arrays):
    del results["bounds"], results["verify"]
    with pytest.raises(ConfigError, match="lack bounds, verify:"):
        write_report(tmp_path / "report.html", results, arrays)
    with pytest.raises(ConfigError, match="lack bounds, verify:"):
        markdown_table(results)
    assert list(tmp_path.iterdir()) == []


def test_the_sentence_says_what_holds(run, page):
    said = sentence(run[0])
    assert said == (
        "Gated fusion predicts all 2 domain texts better than tiny-lm (Law text −0.290, Code text −0.190 "
        "nats per token, held-out documents); on base text (16 documents, 120 tokens) its output distribution moves by "
        "<1e-6 nats per token, where the budget of each delta is 0.05."
    )
    assert said in page.words
    assert [check.holds for check in checks(run[0])] == [True] * 4
    assert page.words.count("✓ holds") == 4


def test_the_sentence_turns_when_a_delta_or_the_fusion_is_no_better(results):
    # Worse, and better but not surely so.
    results["cells"]["code"]["code"]["nll_change"] = {"mean": 0.03, "low": 0.015, "high": 0.045}
    results["cells"]["law"]["gated"]["nll_change"] = {"mean": -0.01, "low": -0.03, "high": 0.01}
    said = sentence(results)
    assert said.startswith("Gated fusion predicts 1 of 2 domain texts better than tiny-lm (Code text −0.190")
    assert ", but not Law text (−0.010, interval −0.030 to +0.010);" in said
    assert said.endswith(
        "; not better than the base even alone: code | delta on Code text "
        "(+0.030, interval +0.015 to +0.045)."
    )
    own, fused, *rest = checks(results)
    assert (own.holds, fused.holds, [check.holds for check in rest]) == (False, False, [True, True])
    assert own.detail == "not shown for Code text (+0.030, interval +0.015 to +0.045)"
    results["cells"]["code"]["gated"]["nll_change"]["high"] = 0.0
    assert sentence(results).startswith(
        "Gated fusion predicts none of the 2 domain texts better than tiny-lm: Law text (−0.010, interval "
        "−0.030 to +0.010) and Code text (−0.190, interval −0.205 to 0.000) nats per token, held-out documents;"
    )


def test_the_sentence_turns_when_a_budget_or_the_bound_is_broken(results, arrays, monkeypatch):
    monkeypatch.setattr("tether.report.html._figures", lambda results, arrays: [])
    results["base_text"]["law"]["softmax_kl"] = 0.0674
    results["base_text"]["gated"]["softmax_kl"] = 0.06
    results["bounds"]["violations"] = 3
    said = sentence(results)
    assert "moves by 0.060 nats per token, more than the budget of 0.05 of each delta;" in said
    assert said.endswith(
        "; the budget is exceeded by law delta (0.0674 where 0.05 is allowed); "
        "the bound is violated in 3 of 480 contexts."
    )
    assert [check.holds for check in checks(results)] == [True, True, False, False]
    words = Page(render(results, arrays)).words
    assert "✗ exceeded" in words
    assert "This was found not to hold" in words
    assert words.count("✗ does not hold") == 2


def test_a_budget_is_held_against_its_own_metric(results):
    results["deltas"]["law"].update(metric="latent", budget=0.2)
    results["deltas"]["code"].update(metric="fisher", drift_base=0.051)
    law, code = budget_lines(results)
    assert law.measured == pytest.approx(0.0456 * 7)
    assert law.exceeded
    assert code.measured is None
    assert code.exceeded
    results["base_text"]["law"]["latent_drift"] = 0.20001
    assert checks(results)[2].detail.startswith("law delta (0.20001 where 0.2 is allowed)")
    results["deltas"]["law"].update(budget=None)
    assert not budget_lines(results)[0].exceeded


def test_checks_say_when_there_is_nothing_to_check(results):
    for delta in results["deltas"].values():
        delta["budget"] = None
    results["bounds"]["contexts"] = 0
    results["deltas"] = {"other": results["deltas"]["law"]}
    results["columns"] = ["base", "other", "gated"]
    results["column_titles"]["other"] = "other delta"
    results["base_text"]["other"] = results["base_text"]["law"]
    assert [check.holds for check in checks(results)] == [None, True, None, None]


def test_best_is_the_lowest_and_ties_share_it(run):
    nll, kl, drift = main_table(run[0])
    best = {row.title: [cell.best for cell in row.cells] for row in nll.rows}
    assert best["Law text"] == [False, True, False, False, False]
    assert best["News text"] == [True, False, False, True, False]
    assert [cell.worse for cell in nll.rows[1].cells] == [False, True, False, False, True]
    # On its own domain a delta is meant to move.
    assert not any(cell.best for group in (kl, drift) for row in group.rows[:2] for cell in row.cells)
    assert [cell.best for cell in kl.rows[-1].cells] == [False, False, False, True, False]


def test_markdown_is_a_table_that_is_aligned(results):
    lines = markdown_table(results).splitlines()
    assert len(lines) == 2 + 4 + 2
    assert len({len(line) for line in lines}) == 1
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 7 for line in lines)
    assert "code \\| delta" in lines[0]
    assert re.fullmatch(r"\| -+ \|( -+: \|){5}", lines[1])
    assert "| **2.440** |" in lines[2]
    assert lines[-2].startswith("| softmax KL, base text")
    assert "**<1e-6**" in lines[-2]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (9.9e-7, "<1e-6"), (1e-6, "1.0e-6"), (8.21e-5, "8.2e-5"), (9.96e-5, "0.00010")),
        *((0.000821, "0.00082"), (0.0497, "0.050"), (0.0996, "0.10"), (0.996, "1.0"), (3.14, "3.1")),
        *((9.96, "10"), (642.0, "640"), (12345, "12,000")),
    ],
)
def test_drifts_have_two_digits(value, text):
    assert nats_text(value) == text


def test_changes_have_a_sign():
    assert [change_text(value) for value in (-0.3124, 0.01, -0.0004, 0)] == [
        "−0.312",
        "+0.010",
        "0.000",
        "0.000",
    ]
