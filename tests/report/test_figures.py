import json
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest

from tether.errors import ConfigError, ShapeError
from tether.report.bound_figure import _cells, bound_points
from tether.report.figures import base_drift, drift_against_bound, learning_curves, nll_change, overview_png
from tether.report.results import check_arrays, check_results, fusions, moved, texts_of
from tether.report.svg import WARN


def draw_all(results, arrays, across):
    return {
        "change": nll_change(results, across=across),
        "drift": base_drift(results, across=across),
        "curves": learning_curves(results, across=across),
        "bound": drift_against_bound(results, arrays, across=across),
    }


@pytest.fixture(scope="module")
def drawn(run):
    return draw_all(*run, 3)


def words(svg):
    found = (element for element in ET.fromstring(svg).iter() if element.tag.endswith("text"))
    return [" ".join(element.itertext()).strip() for element in found]


def test_figures_are_xml_of_their_own_with_units_and_no_link(drawn):
    for name, svg in drawn.items():
        root = ET.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.get("aria-label")
        assert any("nats" in text for text in words(svg)), name
        links = [value for element in root.iter() for key, value in element.items() if key.endswith("href")]
        assert all(link.startswith("#") for link in links)
        assert "metadata" not in svg


def test_figures_show_the_numbers_and_titles(drawn):
    assert {"−0.300", "+0.500", "law delta", "Law text"} <= set(words(drawn["change"]))
    assert {"0.046", "<1e-6", "0.15", "budget 0.05"} <= set(words(drawn["drift"]))
    assert {"step", "law delta"} <= set(words(drawn["curves"]))
    # Titles are text, not formulas.
    assert any("$x$" in text for text in words(drawn["bound"]))


def test_a_page_can_hold_all_figures(drawn):
    roots = [ET.fromstring(svg) for svg in drawn.values()]
    own = [{element.get("id") for element in root.iter() if element.get("id")} for root in roots]
    assert sum(map(len, own)) == len(set.union(*own))
    for root, ids in zip(roots, own, strict=True):
        used = {
            value[1:] for element in root.iter() for key, value in element.items() if key.endswith("href")
        }
        used |= {element.get("clip-path")[5:-1] for element in root.iter() if element.get("clip-path")}
        assert used <= ids


def test_the_users_settings_neither_matter_nor_change(drawn, run):
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        assert base_drift(run[0]) == drawn["drift"]
        assert dict(matplotlib.rcParams) == before


def test_overview_is_the_same_png_twice(run):
    first, second = overview_png(run[0]), overview_png(run[0])
    assert first == second
    assert first.startswith(b"\x89PNG\r\n\x1a\n")


def test_contexts_that_did_not_move_are_counted_apart(run, drawn):
    bound, drift, still = bound_points(*run, "gated")
    assert (len(bound), len(drift), still) == (120, 120, 120)
    assert (drift <= bound).all()
    shown = " ".join(words(drawn["bound"]))
    assert "120 contexts moved" in shown
    assert "120 did not" in shown


def test_only_a_violation_is_drawn_in_red(results, arrays, drawn):
    at = {key: values[3] for key, values in arrays["news"].items()}
    assert WARN not in drawn["bound"]
    # Rounding of float32 is no violation.
    at["latent_drift"][0], at["bound"][0] = np.nextafter(np.float32(0.02), np.float32(1)), 0.02
    assert WARN not in drift_against_bound(results, arrays, across=1)
    # A drift above a bound of 0 must not get lost on the logarithmic axis.
    at["latent_drift"][0], at["bound"][0] = 0.02, 0
    assert WARN in drift_against_bound(results, arrays, across=1)


def test_a_drift_with_a_bound_of_zero_is_kept(results, arrays):
    arrays["news"]["latent_drift"][3, 0], arrays["news"]["bound"][3, 0] = 0.02, 0
    bound, drift, still = bound_points(results, arrays, "linear")
    assert (len(drift), still) == (240, 0)
    assert (drift > bound).sum() == 1


def test_extremes_are_drawn(results, arrays):
    for text in arrays.values():
        text["latent_drift"][:] = 0
    for drifts in results["base_text"].values():
        drifts.update(softmax_kl=0.0, latent_drift=0.0)
    results["budget"]["value"] = None
    for delta in results["deltas"].values():
        delta.update(budget=None, curve=[{"step": 1, "nll": 2.0, "drift": 0.0}])
    results["texts"]["code"]["kind"] = "base"
    check_results(results)
    for svg in draw_all(results, arrays, 3).values():
        ET.fromstring(svg)


def test_the_run_is_complete_and_survives_json(results, arrays):
    check_results(results)
    check_results(json.loads(json.dumps(results)))
    check_arrays(results, arrays)
    assert moved(results) == ["law", "code", "gated", "linear"]
    assert fusions(results) == ["gated", "linear"]
    assert texts_of(results, "base") == ["news", "wiki"]


def test_missing_keys_are_all_named(results):
    del results["cells"]["news"]["gated"]["softmax_kl"]["mean"]
    del results["deltas"]["code"]["drift_base"]
    del results["samples"][0]["prompt"]
    named = r"lack cells\.news\.gated\.softmax_kl\.mean, deltas\.code\.drift_base, samples\.0\.prompt:"
    with pytest.raises(ConfigError, match=named):
        check_results(results)
    del results["usage"], results["title"]
    with pytest.raises(ConfigError, match="lack title, usage:"):
        check_results(results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["cells"]["law"]["linear"].update(nll=float("nan")), r"cells\.law\.linear\.nll=nan"),
        (lambda r: r["texts"]["law"].update(kind="other"), r"texts\.law\.kind='other'"),
        (lambda r: [text.update(kind="domain") for text in r["texts"].values()], "no text of kind 'base'"),
        (lambda r: r["deltas"]["law"].update(curve=[]), "no curve for delta 'law'"),
        (lambda r: r.update(columns=["base", "law", "code"]), "no column of a fusion"),
        (lambda r: r.update(columns=["base", "law", "gated"]), "no column 'code'"),
    ],
)
def test_what_cannot_be_reported_is_refused(results, change, message):
    change(results)
    with pytest.raises(ConfigError, match=message):
        check_results(results)


def test_arrays_must_belong_to_the_results(results, arrays):
    arrays["wiki"]["bound"][0, 0] = np.nan
    with pytest.raises(ConfigError, match=r"not finite in wiki\.bound:"):
        check_arrays(results, arrays)
    arrays["wiki"]["bound"] = arrays["wiki"]["bound"][1:]
    with pytest.raises(ShapeError, match=r"arrays of wiki: .*expected \(4, tokens\)"):
        check_arrays(results, arrays)
    del arrays["news"], arrays["law"]["bound"]
    with pytest.raises(ConfigError, match=r"lack law\.bound, news\.latent_drift, news\.bound:"):
        check_arrays(results, arrays)


@pytest.mark.parametrize("count", [3, 45, 53, 601])
def test_the_fullest_cell_has_the_full_shade_however_it_rounds(count):
    # For 45 and 53 points 5 log(1 + n) / log(1 + n) is more than 5.
    bound = np.repeat(10.0 ** np.arange(16), count)
    assert [shade for shade, _ in _cells(bound, bound / 10)] == [1.0]
