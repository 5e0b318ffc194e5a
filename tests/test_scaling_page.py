"""docs/scaling.md against the script that makes its tables, and some of their cells by hand."""

import json
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "scaling.md"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def cell(block: str, line: str, column: str) -> str:
    """Of a table on the page, by the first cell of the line and the name of the column."""
    text = PAGE.read_text(encoding="utf-8")
    header, _, *lines = re.search(rf"<!-- {block} -->\n(.*?)\n<!-- end -->", text, re.DOTALL)[1].splitlines()
    names, *found = [[part.strip() for part in row.strip("|").split("|")] for row in (header, *lines)]
    (match,) = [row for row in found if row[0] == line]
    return match[names.index(column)]


def test_the_page_is_that_of_the_script():
    from scaling_tables import render

    text = PAGE.read_text(encoding="utf-8")
    assert text == render(text), "run python benchmarks/scaling_tables.py"


def test_a_page_without_a_place_for_a_table_is_refused():
    from scaling_tables import render

    with pytest.raises(ValueError, match="no place for the table 'domo'"):
        render(PAGE.read_text(encoding="utf-8").replace("<!-- domo -->", ""))


def test_weights_of_8x7b_by_hand():
    expert, attention, router, norms = 3 * 4096 * 14336, 2 * 4096 * (4096 + 1024), 8 * 4096, 2 * 4096
    weights = 32 * (8 * expert + attention + router + norms) + 2 * 32000 * 4096 + 4096
    active = weights - 32 * 6 * expert
    assert weights == 46_702_792_704
    assert cell("models", "8x7B", "N, 10⁹") == f"{weights / 1e9:.1f}"
    assert cell("models", "8x7B", "active, 10⁹") == f"{active / 1e9:.1f}"
    assert 400 <= float(cell("models", "400-GB MoE", "bf16, GB")) <= 402


def test_codes_of_a_bucket_among_1024_ranks_by_hand():
    # 3,200 blocks of 2,048: one bit each and two float32 levels a block; shards have 3 or 4 blocks, and all come back
    # as long as the longest.
    block, blocks = 2048 // 8 + 2 * 4, 6_553_600 // 2048
    up, down = blocks * block * 1023 / 1024, 1023 * 4 * block
    assert cell("codecs", "1,024", "the same in 25-MiB buckets") == f"{(up + down) / 6_553_600:.3f}" == "0.294"
    assert cell("codecs", "1,024", "messages a bucket") == "2,046"
    assert cell("codecs", "1,024", "bytes of one") == "1,060"  # 4 blocks are 1,056


def test_rounds_batches_and_epochs_by_hand():
    assert cell("domo", "64", "a round, GB") == f"{2 * 63 / 64 * 4:.2f}"  # 10⁹ weights
    assert cell("domo", "64", "1 Gbit/s, s") == f"{2 * 63 / 64 * 4 / 0.125 / 100:.2f}"
    assert cell("pipeline", "`1f1b`, 8 batches an update", "32") == f"{(8 + 31) / 8 * 3:.1f}"
    assert cell("federated", "U-Net, 1.6 million", "10,000") == f"{2 * 10_000 * 4 * 1_624_844 / 1e9:.0f}"
    header = 4 + 4 + 16 + 1 + 2 * 8 + 4 * 4
    assert cell("vertical", "64", "an update, kB") == f"{63 * (8 * 1024 + 2 * header) / 1e3:.0f}"
    assert cell("vertical", "64", "an epoch of all, MB") == "3,230"  # 64 · 63 · 8 · 100,000 bytes are 3,225.6 MB
    assert cell("optimizers", "RSGDm", "8x7B, GB") == f"{16 * 46.702792704:.0f}"


def test_the_plan_is_that_of_the_benchmark_and_bytes_are_those_on_the_wire():
    from scaling_checks import all_checks

    found = [check for check in all_checks() if check[1] != "memory, over that of the fewest sites"]
    depth = json.loads((ROOT / "benchmarks" / "results" / "pruning_scale.json").read_text())["rows"]
    (planned,) = [row["planned_peak_bytes"] for row in depth if row["kind"] == "depth" and row["layers"] == 32]
    assert found[0][1:3] == ("memory on a CPU, GB", planned / 1e9)
    sent = [formula / measured for _, what, formula, measured, _ in found if "bytes" in what or "wire" in what]
    assert len(sent) == 6 and all(0.9 < ratio < 1.01 for ratio in sent)


def test_sites_that_the_selector_of_fedsm_can_have():
    from hf_mlopt.errors import ConfigurationError
    from hf_mlopt.federated.selector_model import selector_model

    text = PAGE.read_text(encoding="utf-8")
    assert text.count("2,917") == 2
    selector_model(3, 2917)
    with pytest.raises(ConfigurationError):
        selector_model(3, 2918)
