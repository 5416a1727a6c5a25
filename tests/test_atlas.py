"""The atlas: every kernel is in it, as its recipe says; KERNELS.md is what the command prints."""

import subprocess
import sys
from pathlib import Path

import pytest

from jaxattn import atlas, kernels
from jaxattn.fields import SITES
from jaxattn.recipe import Recipe
from sweeps.peers.peer import peers

ROOT = Path(__file__).resolve().parent.parent


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "jaxattn", "kernels", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


def test_kernels_md_is_generated():
    done = command("--markdown")
    assert done.returncode == 0, done.stderr
    same = done.stdout == (ROOT / "KERNELS.md").read_text(encoding="utf-8")
    assert same, "KERNELS.md is not what the recipes say: jaxattn kernels --markdown > KERNELS.md"


def test_every_kernel_has_a_row_in_text_and_in_markdown():
    text, markdown = atlas.text(kernels.families()), atlas.markdown().splitlines()
    for name in kernels.names():
        assert sum(line.split("  ")[0] == name for line in text) == 1
        assert sum(line.startswith(f"| [{name}](#{name}) |") for line in markdown) == 1
        assert sum(line == f"### {name}" for line in markdown) == 1
    rows = [line for line in markdown if line.startswith("|")]
    assert len({line.count(" | ") for line in rows}) == 1  # as many cells in each


def test_cells_are_formats_and_float32_is_empty():
    recipe = Recipe(probs="float16", value="float8_e4m3fn:sat", running_sum="float16:rz")
    codes = {site: atlas.code(recipe, site) for site in SITES}
    codes = {site: code for site, code in codes.items() if code}
    assert codes == {"value": "e4m3:sat", "probs": "f16", "running_sum": "f16:rz"}
    assert atlas.sites_of([recipe]) == ["value", "probs", "running_sum"]


def test_evidence_is_a_run_a_paper_or_the_source():
    """And what is called a run is in the fidelity study; those on a GPU await one."""
    ran = {peer.recipe for peer in peers().values() if peer.family != "gpu"}
    for name in kernels.names():
        kind = atlas.evidence(kernels.get(name)).partition(":")[0]
        assert kind in ("real kernel", "paper", "source")
        assert (kind == "real kernel") == (name in ran), name


def test_a_card_has_every_field_that_is_not_an_ideal_kernels():
    card = "\n".join(atlas.card(kernels.get("sage-1")))
    for said in ("query_group  128", "pv_accum     float16", "evidence  real kernel", "int8"):
        assert said in card
    assert "log2e_at" in card  # its scores are in base 2
    assert "log2e_at" not in "\n".join(atlas.card(kernels.get("torch-cpu-flash-bf16")))


@pytest.mark.parametrize("arguments", [("--markdown", "--json"), ("metal", "--markdown")])
def test_markdown_is_of_all_kernels(arguments):
    done = command(*arguments)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
